//! The counter at which every customer hands in a job: what to ask for, what comes back, and what happens in between.
//!
//! Strategies, replays, rollouts and tool calls all use these types and nothing else: none of them has a second way to find a
//! node, to retry, or to be paid attention to.

use std::collections::BTreeSet;
use std::time::Duration;

use chorus_machine::Time;
use chorus_protocol::job::{Failure, JobKind, Output, Payload, Requirement, Risk};
use chorus_protocol::{BeaconId, JobId, NodeId, TaskId};

/// A job as its customer hands it in.
#[derive(Clone, Debug)]
pub struct JobSpec {
    /// The job's id, drawn by the customer from its own randomness.
    pub job: JobId,
    /// The task it serves, for logs and events.
    pub task: TaskId,
    /// What kind of work it is.
    pub kind: JobKind,
    /// What its executor must have; public.
    pub requirement: Requirement,
    /// The work; private.
    pub payload: Payload,
    /// When it must be done.
    pub deadline: Time,
    /// How much harm a wrong answer does.
    pub risk: Risk,
    /// Leases that may be granted in all, hedges included.
    pub max_leases: u32,
    /// Nodes to pass over while others bid, for chains that should not share an executor.
    pub avoid: Vec<NodeId>,
    /// The only nodes that may get it, for a customer that weighs more than a match: a price, say. Empty for anybody.
    pub only: BTreeSet<NodeId>,
}

impl JobSpec {
    /// Returns whether its customer would have a node do it.
    #[must_use]
    pub fn admits(&self, node: NodeId) -> bool {
        self.only.is_empty() || self.only.contains(&node)
    }
}

/// How a job ended well.
#[derive(Clone, Debug)]
pub struct JobDone {
    /// What it brought.
    pub output: Output,
    /// Who did it.
    pub executor: NodeId,
    /// The executor's match score for this requirement, recomputed from the ledger, in [0, 1].
    pub score: f64,
    /// The executor's reputation when the result came: the mean of its success probability, in [0, 1].
    pub reputation: f64,
    /// Leases that were granted.
    pub leases: u32,
    /// From submission to the first lease.
    pub election: Duration,
    /// From submission to result.
    pub elapsed: Duration,
}

/// How a job ended badly.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum JobError {
    /// The ledger knows no node that meets the requirement, and none bid.
    #[error(
        "no node can serve this: {reason}; see who offers what with `chorus ledger ls`, or start a node that offers it"
    )]
    NobodyCan {
        /// What is missing.
        reason: String,
    },
    /// Every lease failed.
    #[error("{leases} leases failed, the last with: {last}")]
    Exhausted {
        /// Leases that were granted.
        leases: u32,
        /// How the last one failed.
        last: Failure,
    },
    /// The deadline passed.
    #[error("the deadline passed after {elapsed:?} while {waiting_for}; allow more time, or ask for fewer tokens")]
    Deadline {
        /// How long it was tried.
        elapsed: Duration,
        /// What was waited for.
        waiting_for: String,
    },
    /// The executor says that no executor can do it.
    #[error("{0}")]
    Refused(Failure),
    /// The customer took it back.
    #[error("the job was cancelled")]
    Cancelled,
    /// Too many jobs are under way on this node.
    #[error("this node already runs {limit} jobs; wait for one to end")]
    Overloaded {
        /// How many it takes at a time.
        limit: usize,
    },
}

impl JobError {
    /// Returns whether handing the same job in again later may help.
    #[must_use]
    pub const fn is_retryable(&self) -> bool {
        matches!(self, Self::NobodyCan { .. } | Self::Exhausted { .. } | Self::Overloaded { .. })
    }
}

/// Something that happened to a job on its way, told to whoever watches.
#[derive(Clone, Debug)]
pub struct JobEvent {
    /// The job.
    pub job: JobId,
    /// The task it serves.
    pub task: TaskId,
    /// What happened.
    pub kind: JobEventKind,
}

/// What happened to a job.
#[derive(Clone, Debug)]
pub enum JobEventKind {
    /// It was announced.
    Announced {
        /// The announcement.
        beacon: BeaconId,
        /// How many nodes the ledger says can do it.
        candidates: usize,
    },
    /// A bid came.
    Bid {
        /// Who bids.
        node: NodeId,
        /// The match score recomputed from the ledger.
        score: f64,
        /// What the bidder claimed.
        claimed: f64,
    },
    /// The window closed and a lease was granted.
    Elected {
        /// Who got it.
        node: NodeId,
        /// Its match score.
        score: f64,
        /// Its fencing token.
        fence: u64,
        /// How many bid.
        bids: usize,
        /// Whether this is a second, hedging lease.
        hedge: bool,
    },
    /// The executor has begun.
    Started {
        /// Who.
        node: NodeId,
    },
    /// The executor sent text, or a sign of life.
    Progress {
        /// Who.
        node: NodeId,
        /// Tokens so far.
        tokens: u32,
        /// New text; empty when it was not asked for.
        text: String,
    },
    /// A lease ended without a result; the job goes on.
    Lost {
        /// Who had it.
        node: NodeId,
        /// Why it ended.
        reason: String,
    },
    /// A result came.
    Finished {
        /// From whom.
        node: NodeId,
        /// Tokens written.
        tokens: u32,
        /// From submission to result.
        elapsed: Duration,
    },
}
