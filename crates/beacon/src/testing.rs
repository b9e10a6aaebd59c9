//! What the tests of several modules need: small capabilities, payloads and keys.

use std::sync::Arc;
use std::time::Duration;

use chorus_machine::Time;
use chorus_protocol::bounded::{List, Text};
use chorus_protocol::capability::{Capability, ModelOffer, Rate, Skill};
use chorus_protocol::job::{Finish, JobKind, Output, Payload, Requirement, Risk, Role, Turn};
use chorus_protocol::{Embedding, Hash, JobId, NetworkId, NodeId, SecretKey, TaskId};

use crate::job::JobSpec;

pub(crate) fn network() -> NetworkId {
    "test".parse().unwrap()
}

pub(crate) fn key(n: u8) -> SecretKey {
    SecretKey::from_bytes(&[n; 32])
}

pub(crate) fn id(n: u8) -> NodeId {
    key(n).node_id()
}

/// A node with `slots` slots and one model: 500 tokens/s read, 50 written.
pub(crate) fn capability(slots: u16, context: u32) -> Capability {
    let model = ModelOffer {
        name: Text::truncated("tiny"),
        fingerprint: Hash::from_bytes([7; 32]),
        architecture: Text::truncated("llama"),
        quantisation: Text::truncated("Q8_0"),
        context,
        prefill: Rate::from_tokens_per_s(500.0),
        decode: Rate::from_tokens_per_s(50.0),
    };
    Capability {
        name: Text::default(),
        software: Text::default(),
        models: List::truncated([model]),
        devices: List::default(),
        slots,
        skills: List::default(),
        tools: List::default(),
        sampling: None,
    }
}

pub(crate) fn shared(slots: u16) -> Arc<Capability> {
    Arc::new(capability(slots, 4096))
}

pub(crate) fn skill(tags: &[&str], embedding: Option<Embedding>) -> Skill {
    Skill { text: Text::default(), tags: List::truncated(tags.iter().map(|t| Text::truncated(t))), embedding }
}

pub(crate) fn payload(stream: bool) -> Payload {
    Payload {
        salt: [3; 16],
        turns: List::truncated([Turn { role: Role::User, content: Text::truncated("2 + 2?") }]),
        json_schema: None,
        max_tokens: 16,
        temperature_milli: 0,
        top_p_milli: 1000,
        seed: 1,
        stop: List::default(),
        stream,
        policy: None,
    }
}

pub(crate) fn output(text: &str) -> Output {
    Output {
        text: Text::truncated(text),
        prompt_tokens: 4,
        completion_tokens: 2,
        finish: Finish::Stop,
        model: Hash::from_bytes([7; 32]),
    }
}

pub(crate) fn spec(n: u8, now: Time, deadline: Duration) -> JobSpec {
    JobSpec {
        job: JobId::from_bytes([n; 16]),
        task: TaskId::from_bytes([9; 16]),
        kind: JobKind::Answer,
        requirement: Requirement::default(),
        payload: payload(true),
        deadline: now + deadline,
        risk: Risk::Low,
        max_leases: 4,
        avoid: Vec::new(),
        only: Default::default(),
    }
}
