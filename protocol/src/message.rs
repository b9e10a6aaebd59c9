//! What a frame may hold: two gossip topics, and one kind of direct message.
//!
//! A direct frame travels inside an encrypted stream whose far end is proven to own its key, so it is signed only where a third
//! party may have to judge it.

use bincode::{Decode, Encode};

use crate::beacon::{Beacon, Bid, Lease, Work};
use crate::bounded::Text;
use crate::codec::{self, DecodeError};
use crate::entry::{Entry, Equivocation};
use crate::id::{BeaconId, JobId};
use crate::job::{Failure, Output, Payload};
use crate::limits::{MAX_DIRECT_BYTES, MAX_GOSSIP_BYTES, MAX_PAYLOAD_BYTES};
use crate::signed::Received;
use crate::sync::SyncMessage;

/// A frame on the ledger's topic.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum LedgerGossip {
    /// A new entry.
    Entry(Received<Entry>),
    /// A proof that somebody equivocated.
    Equivocation(Equivocation),
}

/// A frame on the beacon's topic.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct BeaconGossip(pub Received<Beacon>);

/// A frame from one node to one other.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Direct {
    /// Executor to requester: "I can."
    Bid(Received<Bid>),
    /// Requester to a bidder that did not win: "your slot is free again."
    Release {
        /// The announcement that is decided.
        beacon: BeaconId,
    },
    /// Requester to the winner: the right, and the work.
    Grant {
        /// The signed right.
        lease: Received<Lease>,
        /// The private work.
        payload: Box<Payload>,
    },
    /// Executor: "I have begun."
    Accept {
        /// The job.
        job: JobId,
        /// The lease.
        fence: u64,
    },
    /// Executor: "I will not."
    Refuse {
        /// The job.
        job: JobId,
        /// The lease.
        fence: u64,
        /// Why.
        failure: Failure,
    },
    /// Executor: "still at it", with new text when the requester wants it. Also the executor's sign of life.
    Progress {
        /// The job.
        job: JobId,
        /// The lease.
        fence: u64,
        /// Counts from 0; a receiver drops what comes out of order.
        index: u32,
        /// Tokens made so far.
        tokens: u32,
        /// Text since the last one.
        text: Text<16_384>,
    },
    /// Executor: done, or failed, with its signed half of the receipt.
    Outcome {
        /// The job.
        job: JobId,
        /// The lease.
        fence: u64,
        /// What came of it.
        result: Result<Box<Output>, Failure>,
        /// The executor's half of the receipt.
        work: Received<Work>,
    },
    /// Requester: "stop."
    Cancel {
        /// The job.
        job: JobId,
        /// The lease.
        fence: u64,
    },
    /// Two ledgers comparing notes.
    Sync(SyncMessage),
    /// Executor to requester: "I could, but have no free slot; I will bid when one comes free while your window is open."
    Busy {
        /// The announcement it answers.
        beacon: BeaconId,
        /// When it expects a free slot, in milliseconds from now; `u32::MAX` when it cannot tell.
        free_in_ms: u32,
    },
}

impl Direct {
    /// Returns the name by which logs and metrics call this message.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Bid(_) => "bid",
            Self::Release { .. } => "release",
            Self::Grant { .. } => "grant",
            Self::Accept { .. } => "accept",
            Self::Refuse { .. } => "refuse",
            Self::Progress { .. } => "progress",
            Self::Outcome { .. } => "outcome",
            Self::Cancel { .. } => "cancel",
            Self::Sync(_) => "sync",
            Self::Busy { .. } => "busy",
        }
    }
}

/// A frame that knows its own limit.
pub trait Frame: Encode + Decode<()> {
    /// The frame's name in errors.
    const KIND: &'static str;
    /// The most bytes it may have.
    const MAX_BYTES: usize;

    /// Encodes the frame.
    ///
    /// # Errors
    /// [`DecodeError::TooLarge`] when no peer would accept it.
    fn to_bytes(&self) -> Result<Vec<u8>, DecodeError> {
        self.check()?;
        let bytes = codec::encode(self);
        if bytes.len() > Self::MAX_BYTES {
            return Err(DecodeError::TooLarge { kind: Self::KIND, len: bytes.len(), max: Self::MAX_BYTES });
        }
        Ok(bytes)
    }

    /// Decodes a frame from a remote.
    ///
    /// # Errors
    /// [`DecodeError`] when it is none.
    fn from_bytes(bytes: &[u8]) -> Result<Self, DecodeError> {
        let frame: Self = codec::decode(Self::KIND, bytes, Self::MAX_BYTES)?;
        frame.check()?;
        Ok(frame)
    }

    /// Checks limits of parts that their types do not hold.
    ///
    /// # Errors
    /// [`DecodeError::TooLarge`] when a part is over its own limit.
    fn check(&self) -> Result<(), DecodeError> {
        Ok(())
    }
}

impl Frame for LedgerGossip {
    const KIND: &'static str = "ledger gossip frame";
    const MAX_BYTES: usize = MAX_GOSSIP_BYTES;
}

impl Frame for BeaconGossip {
    const KIND: &'static str = "beacon gossip frame";
    const MAX_BYTES: usize = MAX_GOSSIP_BYTES;
}

impl Frame for Direct {
    const KIND: &'static str = "direct frame";
    const MAX_BYTES: usize = MAX_DIRECT_BYTES;

    fn check(&self) -> Result<(), DecodeError> {
        let Self::Grant { payload, .. } = self else { return Ok(()) };
        match codec::encoded_len(payload) {
            len if len > MAX_PAYLOAD_BYTES => {
                Err(DecodeError::TooLarge { kind: "payload", len, max: MAX_PAYLOAD_BYTES })
            }
            _ => Ok(()),
        }
    }
}
