//! Accusations: what an author says that another node did, and the evidence that it says it holds.
//!
//! An accusation is a statement of its author and nothing more. It proves nothing by itself: whoever wants to know fetches the
//! evidence by its hash, and computes again what is in dispute.

use bincode::{Decode, Encode};
use serde::Serialize;

use crate::bounded::List;
use crate::codec::{self, DecodeError};
use crate::id::Hash;
use crate::key::NodeId;
use crate::limits::{MAX_EVIDENCE_BYTES, MAX_EVIDENCE_FRAMES};
use crate::policy::{PolicyId, Version};
use crate::rollout::{GroupId, RolloutFrame};
use crate::signed::Received;

/// What a node is accused of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Charge {
    /// A reward that the environment does not give. Anybody can compute it.
    WrongReward,
    /// A prompt that is not the one of the group's task. Anybody can compute it.
    WrongPrompt,
    /// Log-probabilities of another version than the one that is claimed. Takes the weights of both.
    WrongVersion,
    /// Log-probabilities of no version, or tokens that were edited. Takes the weights of the version that is claimed.
    Edited,
    /// Answers that agree with those of others too often for chance.
    Copied,
}

/// "This node did that, and I hold the evidence."
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct Misbehaviour {
    /// Who is accused; not the author.
    pub accused: NodeId,
    /// The policy that it sampled for.
    pub policy: PolicyId,
    /// The version that it claims to have sampled with.
    pub version: Version,
    /// What it is accused of.
    pub charge: Charge,
    /// [`Evidence::hash`] of the evidence.
    pub evidence: Hash,
    /// Size of the evidence in bytes: 1 to [`MAX_EVIDENCE_BYTES`].
    pub evidence_bytes: u64,
}

/// A sampler's own signed words, and where in them the fault is.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Evidence {
    /// Who is accused.
    pub accused: NodeId,
    /// The group of the rollout that convicts; of copies, the last one.
    pub group: GroupId,
    /// Its number in the group.
    pub member: u16,
    /// The frame that holds it. Of copies: all frames of the accused without a gap, and among them those that it copied.
    pub frames: List<Received<RolloutFrame>, MAX_EVIDENCE_FRAMES>,
}

impl Evidence {
    /// What it is called in errors.
    pub const KIND: &'static str = "evidence";

    /// Encodes the evidence: the bytes that are hashed, kept and handed on.
    ///
    /// # Errors
    /// [`DecodeError::TooLarge`] when it is over [`MAX_EVIDENCE_BYTES`]; leave frames out.
    pub fn to_bytes(&self) -> Result<Vec<u8>, DecodeError> {
        let bytes = codec::encode(self);
        if bytes.len() > MAX_EVIDENCE_BYTES {
            return Err(DecodeError::TooLarge { kind: Self::KIND, len: bytes.len(), max: MAX_EVIDENCE_BYTES });
        }
        Ok(bytes)
    }

    /// Decodes evidence. The frames' signatures are still to be verified.
    ///
    /// # Errors
    /// [`DecodeError`] when the bytes are none.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DecodeError> {
        codec::decode(Self::KIND, bytes, MAX_EVIDENCE_BYTES)
    }

    /// Returns the name by which evidence of these bytes is accused with, looked for and handed on.
    #[must_use]
    pub fn hash(bytes: &[u8]) -> Hash {
        Hash::derive("chorus evidence v1", &[bytes])
    }
}
