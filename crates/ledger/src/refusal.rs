//! Why an entry, an append or a neighbour is turned away.

use chorus_protocol::entry::NoProof;
use chorus_protocol::{DecodeError, NodeId, VerifyError, WallTime};

/// What the gossip layer is told about a frame: pass it on, drop it, or hold it against the sender.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Acceptance {
    /// New and good: pass it on.
    Accept,
    /// Nothing new, or nobody's fault: drop it.
    Ignore,
    /// No honest node passes such a thing on.
    Reject {
        /// What is wrong with it.
        reason: Refusal,
    },
}

impl From<Refusal> for Acceptance {
    fn from(reason: Refusal) -> Self {
        if reason.is_senders_fault() { Self::Reject { reason } } else { Self::Ignore }
    }
}

/// Why an entry does not reach the state.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The envelope does not hold.
    #[error(transparent)]
    Invalid(#[from] VerifyError),
    /// The pair convicts nobody.
    #[error(transparent)]
    NoProof(#[from] NoProof),
    /// Number 0 belongs to nobody; chains count from 1.
    #[error("an entry has number 0; chains count from 1")]
    SeqZero,
    /// Written later than now, by more than clocks may differ.
    #[error("an entry is dated {ahead_ms} ms ahead; check the clocks of both machines")]
    FutureDated {
        /// By how much it lies ahead of this node's clock, in milliseconds.
        ahead_ms: u64,
    },
    /// It counts no more.
    #[error("an entry expired at {0:?}")]
    Expired(WallTime),
    /// It asks to live longer than entries may, or ends before it begins.
    #[error("an entry asks to live {life_ms} ms, which is not between 1 ms and 30 days")]
    Life {
        /// From its writing to its expiry, in milliseconds; 0 when it ends before it begins.
        life_ms: u64,
    },
    /// The executor's half of a receipt does not hold.
    #[error("the executor's half of a receipt does not hold: {0}")]
    Work(VerifyError),
    /// Only who asked for a job may countersign it.
    #[error("a receipt by {author:?} is for a job that {requester:?} asked for")]
    NotRequester {
        /// Who wrote the receipt.
        author: NodeId,
        /// Whom the executor names as the requester.
        requester: NodeId,
    },
    /// A failure that the requester calls accepted.
    #[error("a receipt accepts a result that its executor reports as failed")]
    AcceptedFailure,
    /// A policy is called by its name.
    #[error("a policy has no name; give it one")]
    Nameless,
    /// Nobody accuses himself.
    #[error("an author accuses itself")]
    AccusesItself,
    /// There is no evidence, or more than anybody would fetch.
    #[error("an accusation's evidence has {bytes} bytes, which is not between 1 byte and 64 MiB")]
    EvidenceSize {
        /// Its size.
        bytes: u64,
    },
    /// Already here.
    #[error("the entry is already known")]
    Known,
    /// A later entry of the same author stands in its place.
    #[error("a later entry of its author stands in its place")]
    Superseded,
    /// Its author is a proven fraud.
    #[error("{0:?} wrote two entries where one belongs, and is quarantined")]
    Quarantined(NodeId),
    /// It makes its author a proven fraud.
    #[error("{0:?} wrote two entries where one belongs; the pair is now known as the proof")]
    Equivocates(NodeId),
    /// It contradicts an entry of which only the hash is left, so that nothing can be proven.
    #[error("the entry contradicts one of {0:?} that was compacted away")]
    ContradictsTrace(NodeId),
    /// Older than every receipt, or accusation, that is kept of its author.
    #[error("the author has more entries of this kind than are kept, and this one is older than those")]
    AuthorQuota,
    /// The set is at its bound.
    #[error("the ledger is full; raise ledger.max_entries or ledger.max_bytes")]
    Full,
}

impl Refusal {
    /// Returns whether no honest node would have passed it on. Races, clocks and quotas are nobody's fault.
    #[must_use]
    pub const fn is_senders_fault(&self) -> bool {
        match self {
            Self::Invalid(_)
            | Self::NoProof(_)
            | Self::SeqZero
            | Self::Life { .. }
            | Self::Work(_)
            | Self::NotRequester { .. }
            | Self::AcceptedFailure
            | Self::Nameless
            | Self::AccusesItself
            | Self::EvidenceSize { .. } => true,
            // It may well be this node's clock that is wrong, and then every neighbour would look guilty.
            Self::FutureDated { .. }
            | Self::Expired(_)
            | Self::Known
            | Self::Superseded
            | Self::Quarantined(_)
            | Self::Equivocates(_)
            | Self::ContradictsTrace(_)
            | Self::AuthorQuota
            | Self::Full => false,
        }
    }
}

/// What a neighbour did that no honest node does. The shell lowers its score and may disconnect it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Misconduct {
    /// It handed over an entry that does not hold.
    #[error("it sent an entry that does not hold: {0}")]
    Entry(Refusal),
    /// It handed over a proof that convicts nobody.
    #[error("it sent a proof that convicts nobody: {0}")]
    Proof(NoProof),
    /// Its reconciliation frame is none.
    #[error("it sent a reconciliation frame that cannot be read: {0}")]
    Frame(String),
    /// It keeps a reconciliation going without end.
    #[error("it kept a reconciliation going past every bound")]
    Endless,
}

/// Why an own entry was not written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AppendError {
    /// Too many appends wait for the disk.
    #[error("{waiting} entries wait for the disk; try again when some are written")]
    Overloaded {
        /// Appends in flight.
        waiting: usize,
    },
    /// The entry is over the size limit of its kind.
    #[error("the entry cannot be signed: {0}; shorten it")]
    TooLarge(#[from] DecodeError),
    /// Other nodes would refuse it.
    #[error("other nodes would refuse the entry: {0}")]
    Refused(#[from] Refusal),
    /// The disk did not take it.
    #[error("the entry could not be stored: {reason}")]
    Disk {
        /// What the store said.
        reason: String,
    },
}

impl AppendError {
    /// Returns whether the same append may succeed later.
    #[must_use]
    pub const fn is_retryable(&self) -> bool {
        matches!(self, Self::Overloaded { .. } | Self::Disk { .. })
    }
}
