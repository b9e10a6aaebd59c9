//! The messages of the bulk plane. Each travels alone on an ordered stream between two nodes that know each other's keys.

use std::sync::Arc;

use bincode::{Decode, Encode};
use serde::Serialize;

use super::frame::RolloutFrame;
use super::parts::GroupId;
use crate::bounded::{List, Text};
use crate::codec::{self, DecodeError};
use crate::id::Hash;
use crate::limits::{MAX_BULK_BYTES, MAX_CHUNK_BYTES, MAX_CHUNKS, MAX_EVIDENCE_PIECE_BYTES};
use crate::policy::{Manifest, PolicyId, Version};
use crate::signed::Received;

/// Bytes of a bitmap with one bit for each chunk; bit `i` is bit `i mod 8` of byte `i / 8`.
pub const MAX_BITMAP_BYTES: usize = MAX_CHUNKS / 8;

/// What a node says first on a connection.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Hello {
    /// The policy that the connection is about.
    pub policy: PolicyId,
    /// The version that this node serves, and its step; none while it has none.
    pub serving: Option<(Version, u64)>,
    /// Rollouts that it can sample at a time; 0 for a node that only passes weights on.
    pub slots: u16,
    /// The number of its oldest frame that is not acknowledged, or of its next one.
    pub first_unacknowledged: u64,
    /// Drawn once when its process began. With another one, what it was asked for before is lost but for its frames.
    pub boot: u64,
}

/// With which weights a piece of work may be begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
pub enum Want {
    /// Those of this step or a later one: the asynchronous mode.
    AtLeast {
        /// The oldest step that still serves.
        step: u64,
    },
    /// Exactly these; whoever serves others refreshes first: the sequential mode.
    Exactly {
        /// The version.
        version: Version,
        /// Its step.
        step: u64,
    },
}

/// Members of one group that a sampler shall sample.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct Assignment {
    /// The group.
    pub group: GroupId,
    /// The environment that makes the task.
    pub environment: Text<96>,
    /// The seed it makes it from.
    pub seed: u64,
    /// The first member that is meant.
    pub first: u16,
    /// How many members are meant.
    pub members: u16,
    /// With which weights.
    pub want: Want,
    /// When the trainer gives the members to somebody else, in milliseconds from now.
    pub deadline_ms: u32,
}

/// How far a sampler may go, and where the trainer stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct Credit {
    /// Rollouts that it may have begun since its `Hello`. Never falls on one connection.
    pub until: u64,
    /// The version that the trainer published last.
    pub version: Version,
    /// Its step.
    pub step: u64,
    /// The greatest staleness that the trainer accepts, in steps.
    pub staleness: u32,
}

/// Why a rollout, or a whole frame, does not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Encode, Decode, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// The oldest version in it is further behind than the trainer accepts.
    Stale,
    /// It names a version that the trainer does not know.
    UnknownVersion,
    /// That member, or that frame, was there before.
    Duplicate,
    /// The group was trained on or given up.
    ClosedGroup,
    /// The group's environment or seed is another one.
    WrongTask,
    /// That member was not asked of this sampler.
    NotAssigned,
    /// It has more tokens than the trainer takes.
    TooLong,
    /// The frame is for a policy that is not trained here.
    WrongPolicy,
    /// The frame's number lies too far ahead of those that are missing.
    TooFarAhead,
    /// The trainer has no room now; send the frame again later.
    Full,
    /// The trainer's disk does not take it now; send the frame again later.
    Disk,
    /// It was sampled, but its sampler had no room to keep it.
    SpoolFull,
    /// The sampler could not sample it.
    Failed,
    /// The trainer's deadline passed before it was done.
    Deadline,
}

impl Refusal {
    /// Returns whether the same frame may be taken later.
    #[must_use]
    pub fn is_retryable(self) -> bool {
        matches!(self, Self::Full | Self::Disk | Self::TooFarAhead)
    }
}

/// What a sampler will not deliver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct WorkReport {
    /// The group.
    pub group: GroupId,
    /// The member.
    pub member: u16,
    /// Why.
    pub reason: Refusal,
}

/// The number of [`Bulk::Frame`] among the messages.
const FRAME: u32 = 2;

/// One message of the bulk plane.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub enum Bulk {
    /// Who speaks, and where it stands. The first message in both directions.
    Hello(Hello),
    /// To a sampler: what it shall sample, and how far it may go.
    Assign {
        /// How far it may go.
        credit: Credit,
        /// What it shall sample, the most urgent first.
        work: List<Assignment, 256>,
    },
    /// To the trainer: rollouts.
    Frame(Received<RolloutFrame>),
    /// To the sampler: the frame is on the trainer's disk, or counts for nothing and need not come again.
    Ack {
        /// The frame.
        sequence: u64,
        /// Rollouts that count.
        taken: u32,
        /// Rollouts that do not, by reason.
        refused: List<(Refusal, u32), 16>,
    },
    /// To the sampler: nothing of the frame was taken.
    Nack {
        /// The frame.
        sequence: u64,
        /// Why; [`Refusal::is_retryable`] says whether to send it again.
        reason: Refusal,
        /// When to send it again, in milliseconds.
        retry_ms: u32,
    },
    /// To the trainer: members that will not come.
    GiveUp(List<WorkReport, 256>),
    /// To the trainer: the version that answers from now on.
    Serving {
        /// The version.
        version: Version,
        /// Its step.
        step: u64,
    },
    /// A version, by its owner's signed manifest. Passed on to whoever did not announce it himself.
    Announce(Box<Received<Manifest>>),
    /// All the chunks of a version that the sender offers.
    Have {
        /// The version.
        version: Version,
        /// One bit for each chunk.
        chunks: List<u8, MAX_BITMAP_BYTES>,
    },
    /// One chunk more that the sender offers.
    HaveOne {
        /// The version.
        version: Version,
        /// The chunk.
        index: u32,
    },
    /// "Send me these", in this order.
    WantChunks {
        /// The version.
        version: Version,
        /// The chunks.
        indices: List<u32, 64>,
    },
    /// "I do not need these any more."
    Cancel {
        /// The version.
        version: Version,
        /// The chunks.
        indices: List<u32, 64>,
    },
    /// One chunk.
    Chunk {
        /// The version.
        version: Version,
        /// Its number.
        index: u32,
        /// Its bytes.
        bytes: List<u8, MAX_CHUNK_BYTES>,
    },
    /// "I do not send you that one."
    NoChunk {
        /// The version.
        version: Version,
        /// Its number.
        index: u32,
    },
    /// "Send me evidence from this byte on." Needs no hello; one at a time.
    WantEvidence {
        /// Its hash.
        evidence: Hash,
        /// The first byte that is wanted.
        from: u64,
    },
    /// A piece of evidence.
    Evidence {
        /// Its hash.
        evidence: Hash,
        /// Where in it the piece begins.
        from: u64,
        /// Bytes of all of it; 0 when the sender does not have it.
        total: u64,
        /// As many as fit, at least one if there are any left.
        bytes: List<u8, MAX_EVIDENCE_PIECE_BYTES>,
    },
}

impl Bulk {
    /// What it is called in errors.
    pub const KIND: &'static str = "bulk message";
    /// The most bytes that one may have.
    pub const MAX_BYTES: usize = MAX_BULK_BYTES;

    /// Encodes the message.
    ///
    /// # Errors
    /// [`DecodeError::TooLarge`] when it is over [`Bulk::MAX_BYTES`], which no message made of valid parts is.
    pub fn to_bytes(&self) -> Result<Vec<u8>, DecodeError> {
        let bytes = codec::encode(self);
        if bytes.len() > Self::MAX_BYTES {
            return Err(DecodeError::TooLarge { kind: Self::KIND, len: bytes.len(), max: Self::MAX_BYTES });
        }
        Ok(bytes)
    }

    /// Returns the encoding in two parts, one behind the other, of which the second may be empty: a frame's rollouts, which are shared and
    /// not copied.
    #[must_use]
    pub fn to_parts(&self) -> (Vec<u8>, Arc<[u8]>) {
        let Self::Frame(frame) = self else { return (codec::encode(self), Arc::default()) };
        let (envelope, rollouts) = frame.to_parts();
        ([codec::encode(&FRAME), envelope].concat(), rollouts)
    }

    /// Decodes a message.
    ///
    /// # Errors
    /// [`DecodeError`] when the bytes are none.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DecodeError> {
        codec::decode(Self::KIND, bytes, Self::MAX_BYTES)
    }
}
