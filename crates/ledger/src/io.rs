//! What the ledger is told, what it wants done, and what it tells.

use std::sync::Arc;

use chorus_protocol::capability::Capability;
use chorus_protocol::entry::{Body, Entry, Equivocation};
use chorus_protocol::message::LedgerGossip;
use chorus_protocol::policy::PolicyId;
use chorus_protocol::sync::SyncMessage;
use chorus_protocol::{Hash, NodeId, Verified};

use crate::delta::{EntryKey, MarkUpdate};
use crate::refusal::{Acceptance, AppendError, Misconduct};

/// What can happen to the ledger.
#[derive(Clone, Debug)]
pub enum LedgerInput {
    /// A frame on the ledger's topic. Answered by exactly one [`LedgerEffect::Judged`], before the call returns.
    Gossip {
        /// The neighbour that passed it on.
        from: NodeId,
        /// The frame.
        frame: LedgerGossip,
    },
    /// A message of a reconciliation.
    Sync {
        /// The neighbour that sent it.
        from: NodeId,
        /// The message.
        message: SyncMessage,
    },
    /// A neighbour can be reached.
    PeerUp(NodeId),
    /// A neighbour can be reached no more.
    PeerDown(NodeId),
    /// This node has something to say.
    Append {
        /// The caller's number for this append.
        request: u64,
        /// What it says.
        body: Body,
    },
    /// A batch is on disk.
    Persisted {
        /// The batch.
        batch: u64,
    },
    /// A batch did not reach the disk.
    PersistFailed {
        /// The batch.
        batch: u64,
        /// What the store said.
        reason: String,
    },
}

/// One atomic write. No key appears in it twice.
#[derive(Clone, Debug, Default)]
pub struct PersistBatch {
    /// The ledger's number for this batch, which comes back when it is written.
    pub batch: u64,
    /// Entries to write, each under its author and number.
    pub puts: Vec<Verified<Entry>>,
    /// Entries to delete, by author and number.
    pub deletes: Vec<EntryKey>,
    /// What to remember of authors beyond their entries, as opaque bytes; `None` forgets it.
    pub marks: Vec<MarkUpdate>,
    /// Proofs to write, each under the author it convicts.
    pub proofs: Vec<(NodeId, Equivocation)>,
    /// Authors whose proofs are to be deleted.
    pub pardons: Vec<NodeId>,
    /// Whether the answer must wait until the disk itself has it: so for own entries and for proofs. What else came from the
    /// network can be had from there again.
    pub durable: bool,
}

/// What the ledger wants done.
#[derive(Clone, Debug)]
pub enum LedgerEffect {
    /// Gossip a frame.
    Publish(LedgerGossip),
    /// Send a message to a neighbour.
    Send {
        /// The neighbour.
        to: NodeId,
        /// The message.
        message: SyncMessage,
    },
    /// Write to disk, all or nothing. Answered by [`LedgerInput::Persisted`] or [`LedgerInput::PersistFailed`].
    Persist(PersistBatch),
    /// The judgement on a gossiped frame.
    Judged(Acceptance),
    /// A neighbour did what no honest node does.
    Penalise {
        /// The neighbour.
        peer: NodeId,
        /// What it did.
        reason: Misconduct,
    },
    /// An own entry is on disk.
    Appended {
        /// The caller's number.
        request: u64,
        /// The entry's hash.
        hash: Hash,
        /// Its number in the chain.
        seq: u64,
    },
    /// An own entry was not written.
    AppendFailed {
        /// The caller's number.
        request: u64,
        /// Why.
        error: AppendError,
    },
    /// Something that others in this node act on.
    Event(LedgerEvent),
}

/// What others in this node act on.
#[derive(Clone, Debug)]
pub enum LedgerEvent {
    /// What a node offers has changed.
    Capability {
        /// The node.
        node: NodeId,
        /// What it offers now; `None` when it left, let it expire, or is a fraud.
        capability: Option<Arc<Capability>>,
    },
    /// A receipt entered the set. [`crate::receipt_work`] opens its inner half.
    Receipt {
        /// The entry.
        entry: Verified<Entry>,
    },
    /// What an owner says of a policy that it trains has changed.
    Policy {
        /// The policy.
        policy: PolicyId,
        /// The entry that stands now; `None` when the owner let it expire, trains too many others since, or is a fraud.
        stands: Option<Verified<Entry>>,
    },
    /// An accusation entered the set. It is its author's word, and no more.
    Misbehaviour {
        /// The entry.
        entry: Verified<Entry>,
    },
    /// A node is a proven fraud; nothing of it counts.
    Quarantined {
        /// The node.
        node: NodeId,
    },
    /// A reconciliation that this node began has ended.
    Synced {
        /// With whom.
        peer: NodeId,
        /// Entries and proofs that were new here.
        received: usize,
        /// Entries and proofs that were handed over.
        sent: usize,
    },
    /// The network holds an entry under this node's key that this node did not write: another node runs with the same key, or
    /// this node has lost its disk. Stop one of the two, or make a new key.
    DuplicateKey {
        /// The entry.
        entry: Verified<Entry>,
        /// Whether it was written while this node ran, which proves a second node; otherwise it may be one's own, from before
        /// the disk was lost.
        while_running: bool,
    },
}

/// Figures for metrics. Counters count since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Entries in the set.
    pub entries: usize,
    /// Their bytes, as encoded.
    pub bytes: usize,
    /// Authors with something in the set or remembered.
    pub authors: usize,
    /// Capabilities that stand.
    pub capabilities: usize,
    /// Policies that stand.
    pub policies: usize,
    /// Accusations in the set.
    pub accusations: usize,
    /// Convicted authors.
    pub quarantined: usize,
    /// Bytes of superseded entries that are kept as evidence.
    pub superseded_bytes: usize,
    /// Own entries that wait for the disk.
    pub pending_appends: usize,
    /// Received entries that wait for verification.
    pub inbox: usize,
    /// Entries admitted.
    pub admitted: u64,
    /// Entries refused that nobody is to blame for: known, expired, superseded, over a quota.
    pub passed_over: u64,
    /// Of these, entries dated ahead of this node's clock; many of them mean that the clock is wrong.
    pub future_dated: u64,
    /// Entries and proofs refused that no honest node passes on.
    pub refused: u64,
    /// Contradictions of which only a hash was left, so that they could not be proven.
    pub unproven: u64,
    /// Batches that did not reach the disk.
    pub persist_failures: u64,
    /// Reconciliations begun.
    pub syncs_opened: u64,
    /// Reconciliations that found equal sets.
    pub syncs_equal: u64,
    /// Reconciliations that timed out or were aborted.
    pub syncs_broken: u64,
}
