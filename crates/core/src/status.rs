//! What a node is doing, and what it waits for: nothing waits without a name.

use chorus_machine::Time;
use chorus_protocol::{Hash, JobId, TaskId};
use serde::Serialize;

use crate::node::Node;

/// A job under way, as its requester sees it.
#[derive(Clone, Debug, Serialize)]
pub struct JobStatus {
    /// The job.
    pub job: JobId,
    /// The task that it serves.
    pub task: TaskId,
    /// What it waits for.
    pub waiting_for: String,
}

/// The ledger in figures.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct LedgerStatus {
    /// Entries in the set.
    pub entries: usize,
    /// Their bytes, as encoded.
    pub bytes: usize,
    /// Nodes that offer something.
    pub capabilities: usize,
    /// Policies that their owners say they train.
    pub policies: usize,
    /// Accusations of misbehaviour.
    pub accusations: usize,
    /// Convicted authors.
    pub quarantined: usize,
    /// Whether this node is one of them.
    pub self_quarantined: bool,
    /// Digest of the set: equal digests, equal sets.
    pub digest: Hash,
}

/// Slots and what fills them.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct ExecutorStatus {
    /// Jobs that run now.
    pub running: usize,
    /// Slots that are kept for bids.
    pub reserved: usize,
    /// Slots in all.
    pub slots: usize,
}

/// A node in figures.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// The ledger.
    pub ledger: LedgerStatus,
    /// Work for others, and for itself.
    pub executor: ExecutorStatus,
    /// Jobs that this node asked for.
    pub jobs: Vec<JobStatus>,
    /// Tasks that this node runs.
    pub tasks: Vec<chorus_scheduler::TaskStatus>,
    /// Why nothing runs here, when nothing does.
    pub idle_because: String,
}

impl Node {
    /// Returns the node in figures.
    #[must_use]
    pub fn status(&self, now: Time) -> Status {
        let stats = self.ledger.stats();
        let executor = ExecutorStatus {
            running: self.executor.runs().count(),
            reserved: self.executor.reserved(),
            slots: self.executor.slots(),
        };
        let job =
            |view: chorus_beacon::JobView| JobStatus { job: view.job, task: view.task, waiting_for: view.waiting_for };
        Status {
            ledger: LedgerStatus {
                entries: stats.entries,
                bytes: stats.bytes,
                capabilities: stats.capabilities,
                policies: stats.policies,
                accusations: stats.accusations,
                quarantined: stats.quarantined,
                self_quarantined: self.ledger.is_quarantined(&self.me),
                digest: self.ledger.digest(),
            },
            idle_because: self.idle_because(&executor),
            executor,
            jobs: self.requester.jobs().map(job).collect(),
            tasks: self.scheduler.status(now).collect(),
        }
    }

    fn idle_because(&self, executor: &ExecutorStatus) -> String {
        if self.ledger.is_quarantined(&self.me) {
            return "this node is quarantined: its key signed two entries with one number".to_owned();
        }
        if executor.running > 0 {
            return format!("not idle: {} of {} slots work", executor.running, executor.slots);
        }
        if executor.slots == 0 {
            return "it offers no model, so nobody asks it (or the model still loads)".to_owned();
        }
        if executor.reserved > 0 {
            return format!("{} bids are out and wait for their requesters' choice", executor.reserved);
        }
        "nobody asks for what it offers".to_owned()
    }
}
