//! What a node can do, as it says so itself in its ledger chain.

use bincode::{Decode, Encode};
use serde::Serialize;

use crate::bounded::{List, Text};
use crate::embedding::Embedding;
use crate::id::Hash;
use crate::job::Pool;
use crate::policy::PolicyId;

/// A lower-case word that both a skill and a requirement may carry.
pub type Tag = Text<32>;
/// A model's name: a file's stem or a Hugging Face id.
pub type ModelName = Text<96>;
/// A tool's name, as MCP gives it.
pub type ToolName = Text<64>;

/// Tokens per second, in thousandths, so that no float is on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
pub struct Rate(u32);

impl Rate {
    /// Makes a rate from tokens per second; what is not finite or negative becomes zero.
    #[must_use]
    pub fn from_tokens_per_s(rate: f64) -> Self {
        if !rate.is_finite() {
            return Self(0);
        }
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a float cast saturates")]
        Self((rate * 1_000.0).round() as u32)
    }

    /// Returns tokens per second.
    #[must_use]
    pub fn tokens_per_s(self) -> f64 {
        f64::from(self.0) / 1_000.0
    }
}

impl Serialize for Rate {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.tokens_per_s())
    }
}

/// What kind of processor runs the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// A general-purpose processor.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
    /// An Apple GPU.
    Metal,
    /// A server that this node speaks to over HTTP.
    Remote,
}

/// One processor and its memory.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct Device {
    /// What kind it is.
    pub kind: DeviceKind,
    /// What it calls itself.
    pub name: Text<64>,
    /// Its memory in MiB, as measured at start.
    pub memory_mib: u32,
}

/// One model that a node runs, with what was measured of it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct ModelOffer {
    /// Its name.
    pub name: ModelName,
    /// BLAKE3 of its weights.
    pub fingerprint: Hash,
    /// Its architecture, as the weights say.
    pub architecture: Text<32>,
    /// Its quantisation, as the weights say.
    pub quantisation: Text<16>,
    /// The most tokens of prompt and answer together.
    pub context: u32,
    /// Prompt tokens per second, measured at start.
    pub prefill: Rate,
    /// Answer tokens per second, measured at start.
    pub decode: Rate,
}

/// Something a node is good at: a short text, what it means, and tags.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct Skill {
    /// What the node says it is good at.
    pub text: Text<256>,
    /// Words to match exactly.
    pub tags: List<Tag, 8>,
    /// The text's embedding; absent on a node without an embedder.
    #[serde(skip)]
    pub embedding: Option<Embedding>,
}

/// A tool that a node offers, as MCP describes it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct Tool {
    /// Its name.
    pub name: ToolName,
    /// What it does.
    pub description: Text<256>,
    /// The JSON Schema of its arguments.
    pub schema: Text<1024>,
}

/// The readiness to sample rollouts for a trainer.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct SamplingOffer {
    /// Rollouts that it samples at a time.
    pub slots: u16,
    /// What an hour costs, in thousandths of whatever unit a swarm reckons in; 0 asks for nothing.
    pub price_milli: u32,
    /// The one policy that it samples for; none for any.
    pub policy: Option<PolicyId>,
}

impl SamplingOffer {
    /// Returns whether it covers a policy.
    #[must_use]
    pub fn covers(&self, policy: &PolicyId) -> bool {
        self.slots > 0 && self.policy.as_ref().is_none_or(|only| only == policy)
    }
}

/// Everything a node offers. The latest one of an author wins.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct Capability {
    /// A name for people; it need not be unique.
    pub name: Text<64>,
    /// The software and its version.
    pub software: Text<32>,
    /// Models it runs; empty for a node that only asks.
    pub models: List<ModelOffer, 8>,
    /// Processors it runs them on.
    pub devices: List<Device, 16>,
    /// Jobs it runs at a time.
    pub slots: u16,
    /// What it is good at.
    pub skills: List<Skill, 8>,
    /// Tools it offers.
    pub tools: List<Tool, 8>,
    /// Whether it samples for trainers.
    pub sampling: Option<SamplingOffer>,
}

impl Capability {
    /// Returns how many jobs of a pool it runs at a time.
    #[must_use]
    pub fn slots_of(&self, pool: Pool) -> u16 {
        match pool {
            Pool::Answers => self.slots,
            Pool::Sampling => u16::from(self.sampling.as_ref().is_some_and(|offer| offer.slots > 0)),
        }
    }
}
