//! A job: what is needed, the private payload, and what comes back.

use bincode::{Decode, Encode};
use serde::Serialize;

use crate::bounded::{List, Text};
use crate::capability::{ModelName, Tag, ToolName};
use crate::codec;
use crate::embedding::Embedding;
use crate::id::Hash;
use crate::policy::PolicyId;

/// Strings that may end an answer.
pub const MAX_STOPS: usize = 8;
/// Bytes of one of them.
pub const MAX_STOP_BYTES: usize = 64;
/// Bytes of a JSON Schema that an answer must satisfy.
pub const MAX_SCHEMA_BYTES: usize = 8_192;

/// What kind of work a job is. New kinds are appended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum JobKind {
    /// Decompose a task into subtasks.
    Plan,
    /// Answer a question or a subtask.
    Answer,
    /// Sample rollouts of a policy for its trainer, until the deadline. What is sampled travels over the bulk plane; the output tells how
    /// much it was.
    Sample,
}

/// What a job takes a slot of. A node has slots of each kind, and a job of one kind never waits for a slot of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Pool {
    /// Slots of the language model: one for each answer at a time.
    Answers,
    /// The one slot of the training room: a node samples for one trainer at a time.
    Sampling,
}

impl Pool {
    /// Both, in their order.
    pub const ALL: [Self; 2] = [Self::Answers, Self::Sampling];
}

impl JobKind {
    /// Returns what a job of this kind takes a slot of.
    #[must_use]
    pub const fn pool(self) -> Pool {
        match self {
            Self::Plan | Self::Answer => Pool::Answers,
            Self::Sample => Pool::Sampling,
        }
    }
}

/// How much harm a wrong answer does. High risk buys more chains.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Encode, Decode, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Risk {
    /// Nobody is harmed.
    #[default]
    Low,
    /// Somebody has to check.
    Medium,
    /// Somebody may be harmed.
    High,
}

/// What a job needs of its executor. Public, so it never holds the prompt: of the skill text only its embedding and tags travel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct Requirement {
    /// The meaning of the skill that is asked for.
    #[serde(skip)]
    pub embedding: Option<Embedding>,
    /// Words that the executor's skills should carry.
    pub tags: List<Tag, 8>,
    /// A model that must be there.
    pub model: Option<ModelName>,
    /// A tool that must be there.
    pub tool: Option<ToolName>,
    /// Tokens of prompt and answer that must fit.
    pub min_context: u32,
    /// The policy to sample for. With it nothing but the readiness to do so is asked for: no model, no skill.
    pub policy: Option<PolicyId>,
}

impl Requirement {
    /// Returns the digest by which receipts name this requirement.
    #[must_use]
    pub fn digest(&self) -> Hash {
        Hash::derive("chorus requirement v1", &[&codec::encode(self)])
    }
}

/// Who speaks in a chat turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions.
    System,
    /// The one who asks.
    User,
    /// The model.
    Assistant,
}

/// One turn of a chat.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct Turn {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: Text<131_072>,
}

/// The work itself. Only the holder of the lease sees it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct Payload {
    /// Random bytes known to the two sides alone, mixed into the output's digest, so that a public receipt does not give a short
    /// answer away.
    #[serde(skip)]
    pub salt: [u8; 16],
    /// The chat so far. The executor's own system prompt, if it has one, stands before it.
    pub turns: List<Turn, 64>,
    /// A JSON Schema that the answer must satisfy, token by token.
    pub json_schema: Option<Text<MAX_SCHEMA_BYTES>>,
    /// The most tokens to generate.
    pub max_tokens: u32,
    /// Sampling temperature in thousandths; 0 is greedy.
    pub temperature_milli: u32,
    /// Nucleus in thousandths; 1000 keeps everything.
    pub top_p_milli: u32,
    /// The sampler's seed: same seed, same weights, same tokens.
    pub seed: u64,
    /// Strings that end the answer; they are not part of it.
    pub stop: List<Text<MAX_STOP_BYTES>, MAX_STOPS>,
    /// Whether the requester wants the text while it is made.
    pub stream: bool,
    /// The policy to sample for, and nothing else, in a job of the kind [`JobKind::Sample`].
    pub policy: Option<PolicyId>,
}

impl Payload {
    /// Makes the payload of a job that samples for a policy.
    #[must_use]
    pub fn sampling(policy: PolicyId) -> Self {
        Self {
            salt: [0; 16],
            turns: List::default(),
            json_schema: None,
            max_tokens: 0,
            temperature_milli: 0,
            top_p_milli: 0,
            seed: 0,
            stop: List::default(),
            stream: false,
            policy: Some(policy),
        }
    }
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// The model ended it, or a stop string did.
    Stop,
    /// The token limit did.
    Length,
}

/// What a job brought.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct Output {
    /// The text.
    pub text: Text<131_072>,
    /// Tokens read.
    pub prompt_tokens: u32,
    /// Tokens written.
    pub completion_tokens: u32,
    /// Why it ended.
    pub finish: Finish,
    /// BLAKE3 of the weights that wrote it.
    pub model: Hash,
}

impl Output {
    /// Returns the salted digest that stands in the public receipt.
    #[must_use]
    pub fn digest(&self, salt: &[u8; 16]) -> Hash {
        Hash::derive("chorus output v1", &[salt, self.text.as_bytes()])
    }
}

/// Why an executor did not do a job, as it says so on the wire.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum Failure {
    /// Every slot is taken and no reservation is held.
    #[error("the executor has no free slot")]
    Busy,
    /// It does not run what was asked for.
    #[error("the executor does not run that model")]
    NoSuchModel,
    /// Prompt and answer do not fit.
    #[error(
        "the prompt has {prompt_tokens} tokens and the model holds {context}; shorten the prompt or ask for a larger context"
    )]
    ContextExceeded {
        /// Tokens of the prompt.
        prompt_tokens: u32,
        /// Tokens that fit.
        context: u32,
    },
    /// Its engine broke down; it restarts.
    #[error("the executor's engine failed: {0}")]
    Engine(Text<256>),
    /// The payload asks for something that no engine can do.
    #[error("the payload is not usable: {0}")]
    InvalidPayload(Text<256>),
    /// The lease is older than one already seen, or not for this node.
    #[error("the lease is stale")]
    StaleLease,
    /// It was told to stop.
    #[error("the job was cancelled")]
    Cancelled,
    /// Time ran out.
    #[error("the deadline passed before the answer was whole")]
    Deadline,
    /// The executor is shutting down.
    #[error("the executor is leaving")]
    Leaving,
}

impl Failure {
    /// Returns whether another executor may well succeed.
    #[must_use]
    pub const fn is_retryable_elsewhere(&self) -> bool {
        !matches!(self, Self::InvalidPayload(_) | Self::Cancelled | Self::Deadline)
    }

    /// Returns whether the executor itself is to blame, so that its reputation pays for it.
    #[must_use]
    pub const fn is_executors_fault(&self) -> bool {
        matches!(self, Self::Engine(_) | Self::NoSuchModel)
    }
}
