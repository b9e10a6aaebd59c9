//! The election of an executor: beacon, bid, lease, receipt.

use bincode::{Decode, Encode};
use serde::Serialize;

use crate::id::{BeaconId, Hash, JobId};
use crate::job::{Failure, JobKind, Requirement, Risk};
use crate::key::NodeId;
use crate::limits::{MAX_BEACON_BYTES, MAX_SMALL_BYTES};
use crate::signed::{Received, Signable};
use crate::wall::WallTime;

/// A node's place among those that could answer a beacon: the better match first, equals in an order that is drawn anew for each
/// beacon and that everybody can compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Encode, Decode, Serialize)]
pub struct Rank {
    /// The match score in thousandths.
    pub score_milli: u16,
    /// Drawn by [`Rank::of`].
    pub draw: u32,
}

impl Rank {
    /// Returns the rank of a node with that match score.
    #[must_use]
    pub fn of(beacon: BeaconId, node: NodeId, score_milli: u16) -> Self {
        let hash = Hash::derive("chorus beacon draw v1", &[beacon.as_bytes(), node.as_bytes()]);
        let [a, b, c, d, ..] = *hash.as_bytes();
        Self { score_milli, draw: u32::from_le_bytes([a, b, c, d]) }
    }
}

/// The announcement of a job, gossiped by its requester. It says what is needed, never what is asked.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct Beacon {
    /// This announcement; a job that is announced again gets a new one.
    pub id: BeaconId,
    /// The job.
    pub job: JobId,
    /// What kind of work it is.
    pub kind: JobKind,
    /// What it needs.
    pub requirement: Requirement,
    /// How much harm a wrong answer does.
    pub risk: Risk,
    /// When it was announced.
    pub made: WallTime,
    /// When the job must be done.
    pub deadline: WallTime,
    /// How long bids are taken, in milliseconds from `made`.
    pub window_ms: u32,
    /// Executors the requester is looking for.
    pub executors: u16,
    /// The lowest rank that is invited to answer; the default invites everybody who can.
    pub invited: Rank,
}

impl Beacon {
    /// Returns whether a node with that match score is invited to answer.
    #[must_use]
    pub fn invites(&self, node: NodeId, score_milli: u16) -> bool {
        self.invited == Rank::default() || Rank::of(self.id, node, score_milli) >= self.invited
    }
}

impl Signable for Beacon {
    const KIND: &'static str = "beacon";
    const VERSION: u16 = 1;
    const MAX_BYTES: usize = MAX_BEACON_BYTES;
}

/// An offer to do a job, sent to the requester alone. A slot stays reserved for `hold_ms`.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct Bid {
    /// The announcement it answers.
    pub beacon: BeaconId,
    /// The requester it is meant for.
    pub requester: NodeId,
    /// The bidder's own match score in thousandths. Informative: the requester recomputes it from the ledger.
    pub score_milli: u16,
    /// Slots in use, this reservation not counted.
    pub active: u16,
    /// Slots in all.
    pub slots: u16,
    /// When the bidder expects to be done, in milliseconds from the lease.
    pub expected_ms: u32,
    /// How long the slot stays reserved, in milliseconds from the bid.
    pub hold_ms: u32,
}

impl Signable for Bid {
    const KIND: &'static str = "bid";
    const VERSION: u16 = 1;
    const MAX_BYTES: usize = MAX_SMALL_BYTES;
}

/// The exclusive right to do a job. Of two leases on one job only the one with the higher fence holds.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct Lease {
    /// The job.
    pub job: JobId,
    /// The announcement whose bid won.
    pub beacon: BeaconId,
    /// Who may do it.
    pub executor: NodeId,
    /// The fencing token: grows with every lease on this job.
    pub fence: u64,
    /// What kind of work it is.
    pub kind: JobKind,
    /// Digest of the requirement, for the receipt.
    pub requirement: Hash,
    /// When the job must be done.
    pub deadline: WallTime,
}

impl Signable for Lease {
    const KIND: &'static str = "lease";
    const VERSION: u16 = 1;
    const MAX_BYTES: usize = MAX_SMALL_BYTES;
}

/// The executor's half of a receipt: what it says it did.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct Work {
    /// The job.
    pub job: JobId,
    /// Who asked for it.
    pub requester: NodeId,
    /// Under which lease.
    pub fence: u64,
    /// What kind of work it was.
    pub kind: JobKind,
    /// Digest of the requirement.
    pub requirement: Hash,
    /// Salted digest of the output; [`Hash::ZERO`] for a failure.
    pub output: Hash,
    /// BLAKE3 of the weights that did it.
    pub model: Hash,
    /// Tokens read.
    pub prompt_tokens: u32,
    /// Tokens written.
    pub completion_tokens: u32,
    /// From lease to result, in milliseconds, as the executor measured it.
    pub elapsed_ms: u32,
    /// Why it failed, if it did.
    pub failure: Option<Failure>,
}

impl Signable for Work {
    const KIND: &'static str = "work";
    const VERSION: u16 = 1;
    const MAX_BYTES: usize = MAX_SMALL_BYTES;
}

/// What the requester makes of the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The result was used.
    Accepted,
    /// The executor reported a failure.
    Failed,
    /// The result came under a lease that no longer held, or lost to a hedge.
    Superseded,
    /// The result did not fit its own digest, or broke the grammar it was bound to.
    Invalid,
}

/// The countersigned outcome of a job: the executor's signature inside, the requester's around it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Receipt {
    /// The executor's signed half.
    pub work: Received<Work>,
    /// What the requester makes of it.
    pub verdict: Verdict,
    /// From lease to result, in milliseconds, as the requester measured it.
    pub observed_ms: u32,
}

impl Serialize for Receipt {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct;
        let work = self.work.unverified().ok();
        let mut out = serializer.serialize_struct("Receipt", 5)?;
        out.serialize_field("executor", &self.work.claimed_author())?;
        out.serialize_field("kind", &work.as_ref().map(|work| work.kind))?;
        out.serialize_field("tokens", &work.as_ref().map(|work| work.completion_tokens))?;
        out.serialize_field("verdict", &self.verdict)?;
        out.serialize_field("observed_ms", &self.observed_ms)?;
        out.end()
    }
}
