//! Samples what a trainer asked for: a task from its seed, an answer from the engine, its reward from the environment.
//!
//! What is drawn follows from the group, the member and this node's key alone, so a sampler that starts again after a crash draws the
//! same answer from the same weights, and two samplers that are given one member draw different ones.

use std::sync::Arc;
use std::time::Duration;

use chorus_engine::{Finish, SampleRequest, Sampling, VersionedEngine};
use chorus_protocol::job;
use chorus_protocol::rollout::{GroupId, Rollout, Segment};
use chorus_protocol::{Hash, NodeId, Text};
use chorus_trainer::env::{by_name, training_task_of};
use chorus_trainer::policy::Tokenizer;
use tokio_util::sync::CancellationToken;

/// The longest that one answer may take. The trainer has given it to somebody else long before.
const LIMIT: Duration = Duration::from_secs(600);

/// A member to sample.
#[derive(Clone, Debug)]
pub(super) struct Member {
    pub(super) group: GroupId,
    pub(super) member: u16,
    pub(super) environment: Text<96>,
    pub(super) seed: u64,
}

/// Samples it. The error is for the log; the trainer only hears that it failed.
pub(super) async fn sample(engine: Arc<VersionedEngine>, me: NodeId, member: Member) -> Result<Rollout, String> {
    let Member { group, member, environment, seed } = member;
    let Some(played) = by_name(environment.as_str()) else {
        return Err(format!("this node has no environment '{environment}'; update it, or sample for another trainer"));
    };
    let task = training_task_of(&*played, seed);
    let prompt = Tokenizer.encode(&task.prompt);
    let request = SampleRequest {
        prompt: prompt.clone(),
        max_tokens: u32::try_from(played.max_tokens()).unwrap_or(u32::MAX),
        sampling: Sampling::seeded(draw_seed(me, group, member), 1.0),
        exactly: None,
    };
    let sampled = tokio::time::timeout(LIMIT, engine.sample(request, CancellationToken::new()));
    let sampled = match sampled.await {
        Ok(sampled) => sampled.map_err(|error| error.to_string())?,
        Err(_) => return Err(format!("no answer within {LIMIT:?}")),
    };
    let finish = match sampled.finish {
        Finish::Stop => job::Finish::Stop,
        Finish::Length => job::Finish::Length,
        Finish::Cancelled => return Err("it was cancelled".to_owned()),
    };
    let reward = played.reward(&task, &Tokenizer.decode(&sampled.tokens));
    Ok(Rollout {
        group,
        member,
        environment,
        seed,
        prompt: prompt.into(),
        // Rounding can put a certain token's logarithm a hair above 0, which no frame may hold.
        log_probs: sampled.logprobs.iter().map(|logprob| logprob.min(0.0)).collect(),
        completion: sampled.tokens,
        reward,
        finish,
        segments: vec![Segment { version: sampled.version, from: 0 }],
    })
}

fn draw_seed(me: NodeId, group: GroupId, member: u16) -> u64 {
    let parts: [&[u8]; 3] = [me.as_bytes(), &group.0.to_le_bytes(), &member.to_le_bytes()];
    let hash = Hash::derive("chorus rollout draw v1", &parts);
    hash.as_bytes().iter().take(8).fold(0, |seed, byte| seed << 8 | u64::from(*byte))
}
