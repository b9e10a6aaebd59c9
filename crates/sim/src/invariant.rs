//! What must never happen, checked while it could.
//!
//! | invariant | how it is checked |
//! |---|---|
//! | one valid lease a job | every election an honest requester reports, every grant it sends and every lease it lists is compared with the one lease that stands under that id; a hedge has an id of its own (`chorus_beacon::lease`) |
//! | no result under a stale token | every `Accepted` receipt that an honest requester writes must name the executor and the token of the lease that stands, once a job |
//! | no run without a lease | every run an honest executor starts for an honest requester must be of a lease granted to it, and its token must be above every earlier one of that id |
//! | nothing acknowledged is lost | what an author publishes must be on its disk then, must be there after every crash, and must be in every ledger once they agree, unless superseded or expired |
//! | no honest author is convicted | every quarantine that an honest node reports |
//! | nothing forged is admitted | an honest node never holds an entry that its author did not write |
//! | bounded queues | jobs, waiting beacons, reserved slots, appends and writes in flight, effects of one turn |
//! | each task ends once, in time | every end is compared with the tasks under way |
//!
//! A monitor never looks at what adversaries claim; their half of a job binds nobody.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use chorus_beacon::hedge_id;
use chorus_core::{RunId, TaskEvent, TaskEventKind};
use chorus_ledger::{Ledger, Topic, topic};
use chorus_machine::Time;
use chorus_protocol::beacon::{Lease, Verdict, Work};
use chorus_protocol::entry::Entry;
use chorus_protocol::{Hash, JobId, NodeId, TaskId, Verified, WallTime};

use crate::queue::HostId;

/// A task may end this much after its deadline: the turn in which its clock runs out.
const GRACE: Duration = Duration::from_millis(20);

/// What is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Invariant {
    /// One valid lease a job.
    OneValidLease,
    /// No result under a stale token.
    NoStaleResult,
    /// No run without a lease.
    NoRunWithoutLease,
    /// Nothing acknowledged is lost.
    NothingAcknowledgedIsLost,
    /// No honest author is convicted.
    NoHonestConviction,
    /// Nothing forged is admitted.
    NothingForged,
    /// Bounded queues.
    BoundedQueues,
    /// Each task ends once, in time.
    TaskEndsOnce,
}

/// An invariant that did not hold.
#[derive(Clone, Debug)]
pub struct Violation {
    /// Which.
    pub invariant: Invariant,
    /// When, in the world's time.
    pub at: Time,
    /// On which node.
    pub host: HostId,
    /// What was seen.
    pub seen: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} broken at {} on node {}: {}", self.invariant, self.at, self.host, self.seen)
    }
}

/// The lease that stands, or stood last, under one id.
#[derive(Clone, Copy, Debug)]
struct Standing {
    fence: u64,
    executor: NodeId,
    /// It ended without a result.
    lost: bool,
}

/// A task under way or over.
#[derive(Clone, Copy, Debug)]
struct Task {
    host: HostId,
    due: Time,
    ended: bool,
}

/// An own entry that its author published.
#[derive(Clone, Debug)]
struct Published {
    hash: Hash,
    expires: WallTime,
    /// The next one on this topic supersedes it.
    topic: Option<Topic>,
}

/// Watches one world.
#[derive(Debug, Default)]
pub struct Monitor {
    honest: BTreeMap<NodeId, HostId>,
    everybody: BTreeMap<NodeId, HostId>,
    /// By requester and the id on the lease.
    leases: BTreeMap<(HostId, JobId), Standing>,
    /// Every lease ever granted, and to whom.
    granted: BTreeMap<(HostId, JobId, u64), NodeId>,
    /// The job behind the id on a lease.
    job_of: BTreeMap<(HostId, JobId), JobId>,
    accepted: BTreeSet<(HostId, JobId)>,
    /// By executor, requester and id: the highest token that ran.
    ran: BTreeMap<(HostId, NodeId, JobId), u64>,
    tasks: BTreeMap<TaskId, Task>,
    due: BTreeSet<(Time, TaskId)>,
    published: BTreeMap<HostId, BTreeMap<u64, Published>>,
    /// Every entry that an honest author wrote, published or not.
    written: BTreeSet<Hash>,
    violation: Option<Violation>,
    /// Leases granted by honest requesters: to anybody, and to adversaries.
    pub leases_granted: u64,
    /// Of these, to adversaries.
    pub leases_to_adversaries: u64,
    /// Jobs announced by honest requesters.
    pub jobs: BTreeSet<JobId>,
    /// Hedging leases.
    pub hedges: u64,
    /// Bids compared in the elections of each honest requester, in order.
    pub bids: BTreeMap<HostId, Vec<usize>>,
    /// Leases that ended without a result.
    pub leases_lost: u64,
    /// Outcomes that reached an honest requester under a token that no longer stood.
    pub stale_refused: u64,
}

impl Monitor {
    /// Makes a monitor that knows who is who.
    #[must_use]
    pub fn new(nodes: impl Iterator<Item = (HostId, NodeId, bool)>) -> Self {
        let mut monitor = Self::default();
        for (host, id, honest) in nodes {
            monitor.everybody.insert(id, host);
            if honest {
                monitor.honest.insert(id, host);
            }
        }
        monitor
    }

    /// Returns what was broken first.
    #[must_use]
    pub fn violation(&self) -> Option<&Violation> {
        self.violation.as_ref()
    }

    /// Returns the place of a node.
    #[must_use]
    pub fn host(&self, id: &NodeId) -> Option<HostId> {
        self.everybody.get(id).copied()
    }

    /// Returns how many jobs of honest requesters ended with an accepted result.
    #[must_use]
    pub fn jobs_accepted(&self) -> u64 {
        self.accepted.len() as u64
    }

    /// Notes that an invariant does not hold. Only the first is kept: what follows may follow from it.
    pub fn broken(&mut self, invariant: Invariant, at: Time, host: HostId, seen: String) {
        self.violation.get_or_insert(Violation { invariant, at, host, seen });
    }

    /// An honest requester tells what happens to a task.
    pub fn on_task_event(&mut self, host: HostId, event: &TaskEvent, now: Time) {
        match &event.kind {
            TaskEventKind::Announced { place, .. } => {
                self.jobs.insert(place.job);
            }
            TaskEventKind::Elected { place, node, fence, bids, hedge, .. } => {
                self.bids.entry(host).or_default().push(*bids);
                self.on_elected(host, place.job, *node, *fence, *hedge, now);
            }
            TaskEventKind::Lost { place, node, .. } => {
                self.leases_lost += 1;
                for id in [place.job, hedge_id(place.job)] {
                    if let Some(lease) = self.leases.get_mut(&(host, id)).filter(|lease| lease.executor == *node) {
                        lease.lost = true;
                    }
                }
            }
            _ => {}
        }
    }

    fn on_elected(&mut self, host: HostId, job: JobId, executor: NodeId, fence: u64, hedge: bool, now: Time) {
        let id = if hedge { hedge_id(job) } else { job };
        self.job_of.insert((host, id), job);
        self.leases_granted += 1;
        self.hedges += u64::from(hedge);
        self.leases_to_adversaries += u64::from(!self.honest.contains_key(&executor));
        if let Some(old) = self.leases.get(&(host, id)) {
            let (old_fence, lost) = (old.fence, old.lost);
            if fence <= old_fence {
                let seen = format!("lease {id:?} was granted under {fence} after {old_fence}");
                self.broken(Invariant::OneValidLease, now, host, seen);
            }
            if !lost {
                let seen = format!("lease {id:?} was granted to {executor:?} while another stood");
                self.broken(Invariant::OneValidLease, now, host, seen);
            }
        }
        if self.accepted.contains(&(host, job)) {
            self.broken(Invariant::OneValidLease, now, host, format!("job {job:?} was leased after its result came"));
        }
        self.leases.insert((host, id), Standing { fence, executor, lost: false });
        self.granted.insert((host, id, fence), executor);
    }

    /// An honest requester sends a grant.
    pub fn on_grant(&mut self, host: HostId, lease: &Lease, now: Time) {
        let stands = self.leases.get(&(host, lease.job));
        if stands.is_none_or(|stands| stands.fence != lease.fence || stands.executor != lease.executor || stands.lost) {
            let seen = format!("a grant of {:?} under {} went out that does not stand", lease.job, lease.fence);
            self.broken(Invariant::OneValidLease, now, host, seen);
        }
    }

    /// Compares the leases that an honest requester lists with those that stand.
    pub fn on_leases(&mut self, host: HostId, listed: impl Iterator<Item = (JobId, u64, NodeId)>, now: Time) {
        let mut seen = BTreeSet::new();
        for (id, fence, executor) in listed {
            let stands = self.leases.get(&(host, id)).copied();
            let fits =
                stands.is_some_and(|stands| stands.fence == fence && stands.executor == executor && !stands.lost);
            if !seen.insert(id) || !fits {
                let seen = format!("lease {id:?} under {fence} is listed, and {stands:?} stands");
                self.broken(Invariant::OneValidLease, now, host, seen);
            }
        }
    }

    /// An honest executor starts a run.
    pub fn on_run(&mut self, host: HostId, me: NodeId, run: RunId, now: Time) {
        let Some(&requester) = self.honest.get(&run.requester) else { return };
        if self.granted.get(&(requester, run.job, run.fence)) != Some(&me) {
            let seen = format!("it runs {:?} under {}, which it was never granted", run.job, run.fence);
            self.broken(Invariant::NoRunWithoutLease, now, host, seen);
        }
        let last = self.ran.insert((host, run.requester, run.job), run.fence);
        if last.is_some_and(|last| last >= run.fence) {
            let seen = format!("it runs {:?} under {} after {last:?}", run.job, run.fence);
            self.broken(Invariant::NoRunWithoutLease, now, host, seen);
        }
    }

    /// An outcome reaches an honest requester. Returns whether it is stale; whether it is taken shows in the receipt.
    pub fn on_outcome(&mut self, host: HostId, job: JobId, fence: u64) -> bool {
        let stale = self.leases.get(&(host, job)).is_some_and(|stands| stands.fence != fence || stands.lost);
        self.stale_refused += u64::from(stale);
        stale
    }

    /// An honest requester writes a receipt.
    pub fn on_receipt(&mut self, host: HostId, verdict: Verdict, work: &Verified<Work>, now: Time) {
        if verdict != Verdict::Accepted {
            return;
        }
        let stands = self.leases.get(&(host, work.job)).copied();
        let fits = |stands: Standing| stands.fence == work.fence && stands.executor == work.author() && !stands.lost;
        if !stands.is_some_and(fits) {
            let seen = format!(
                "a result of {:?} for {:?} under {} was accepted while {stands:?} stood",
                work.author(),
                work.job,
                work.fence
            );
            self.broken(Invariant::NoStaleResult, now, host, seen);
        }
        let job = self.job_of.get(&(host, work.job)).copied().unwrap_or(work.job);
        if !self.accepted.insert((host, job)) {
            self.broken(Invariant::NoStaleResult, now, host, format!("job {job:?} was accepted twice"));
        }
    }

    /// An honest node publishes an entry of its own. `on_disk` says whether it would survive the process now.
    pub fn on_published(&mut self, host: HostId, entry: &Verified<Entry>, on_disk: bool, now: Time) {
        if !on_disk {
            let seen = format!("entry {} was published before it was on disk", entry.seq);
            self.broken(Invariant::NothingAcknowledgedIsLost, now, host, seen);
        }
        let topic = topic(&entry.body);
        let own = self.published.entry(host).or_default();
        if topic.is_some() {
            if own.iter().any(|(seq, old)| old.topic == topic && *seq > entry.seq) {
                return;
            }
            own.retain(|_, old| old.topic != topic);
        }
        own.insert(entry.seq, Published { hash: entry.hash(), expires: entry.expires, topic });
    }

    /// Looks whether a ledger holds all that an author published.
    pub fn check_holds(&mut self, author: HostId, holder: HostId, ledger: &Ledger, wall: WallTime, now: Time) {
        let Some(own) = self.published.get(&author) else { return };
        let lost = own.iter().find(|(_, entry)| entry.expires > wall && ledger.get(&entry.hash).is_none());
        if let Some((seq, entry)) = lost {
            let seen = format!("entry {seq} ({:?}) of node {author} was published and is gone", entry.hash);
            self.broken(Invariant::NothingAcknowledgedIsLost, now, holder, seen);
        }
    }

    /// An honest author writes an entry of its own to its disk.
    pub fn on_written(&mut self, hash: Hash) {
        self.written.insert(hash);
    }

    /// Looks whether a ledger holds entries under an honest author's name that it did not write.
    pub fn check_forged(&mut self, holder: HostId, ledger: &Ledger, now: Time) {
        let is_forged = |entry: &&Verified<Entry>| {
            self.honest.contains_key(&entry.author()) && !self.written.contains(&entry.hash())
        };
        if let Some(entry) = ledger.entries().find(is_forged) {
            let seen = format!("it holds entry {} of {:?}, which that node never wrote", entry.seq, entry.author());
            self.broken(Invariant::NothingForged, now, holder, seen);
        }
    }

    /// An honest node reports that an author is a fraud.
    pub fn on_quarantined(&mut self, host: HostId, author: NodeId, now: Time) {
        if let Some(convicted) = self.honest.get(&author) {
            let seen = format!("it quarantined node {convicted}, which is honest");
            self.broken(Invariant::NoHonestConviction, now, host, seen);
        }
    }

    /// A user asks.
    pub fn on_asked(&mut self, host: HostId, task: TaskId, due: Time) {
        self.tasks.insert(task, Task { host, due, ended: false });
        self.due.insert((due, task));
    }

    /// A task ends.
    pub fn on_task_done(&mut self, host: HostId, task: TaskId, now: Time) {
        let Some(state) = self.tasks.get_mut(&task) else {
            self.broken(Invariant::TaskEndsOnce, now, host, format!("task {task:?} ended and was never asked there"));
            return;
        };
        let (due, again) = (state.due, state.ended || state.host != host);
        state.ended = true;
        self.due.remove(&(due, task));
        if again {
            self.broken(Invariant::TaskEndsOnce, now, host, format!("task {task:?} ended twice"));
        }
        if now > due + GRACE {
            let seen = format!("task {task:?} ended at {now}, after its deadline {due}");
            self.broken(Invariant::TaskEndsOnce, now, host, seen);
        }
    }

    /// A process died: its tasks die with it, its leases end, and it forgets which tokens it saw. Returns how many tasks died.
    pub fn on_crashed(&mut self, host: HostId) -> u64 {
        for (_, lease) in
            self.leases.range_mut((host, JobId::from_bytes([0; 16]))..=(host, JobId::from_bytes([0xff; 16])))
        {
            lease.lost = true;
        }
        self.ran.retain(|(executor, ..), _| *executor != host);
        let dies = |task: &TaskId| self.tasks.get(task).is_some_and(|state| state.host == host);
        let died: Vec<(Time, TaskId)> = self.due.iter().filter(|(_, task)| dies(task)).copied().collect();
        for (due, task) in &died {
            self.due.remove(&(*due, *task));
            self.tasks.remove(task);
        }
        died.len() as u64
    }

    /// Looks for tasks that should have ended.
    pub fn check_due(&mut self, now: Time) {
        let Some((due, task)) = self.due.first().copied().filter(|(due, _)| now > *due + GRACE) else { return };
        let host = self.tasks.get(&task).map_or(0, |state| state.host);
        self.broken(Invariant::TaskEndsOnce, now, host, format!("task {task:?} was due at {due} and goes on"));
    }
}
