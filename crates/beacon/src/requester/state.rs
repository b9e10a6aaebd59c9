//! What a requester knows of one job, and of one lease.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use chorus_machine::{Time, earliest};
use chorus_protocol::beacon::Lease;
use chorus_protocol::job::{Failure, JobKind};
use chorus_protocol::{BeaconId, Hash, JobId, NodeId, Received};

use crate::config::{BeaconConfig, HedgePolicy};
use crate::job::JobSpec;
use crate::select::Candidate;

/// Strikes after which a node gets no further lease of this job, even if nobody else is left.
pub(super) const MAX_STRIKES: u32 = 2;

/// An announcement and who has not answered it.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) beacon: BeaconId,
    pub(super) opened: Time,
    pub(super) awaited: BTreeSet<NodeId>,
}

impl Call {
    /// Takes a node's answer. Returns how long it took if it is the node's first.
    pub(super) fn answered(&mut self, node: NodeId, now: Time) -> Option<Duration> {
        self.awaited.remove(&node).then(|| now.since(self.opened))
    }
}

/// An open announcement.
#[derive(Debug)]
pub(super) struct Election {
    pub(super) call: Call,
    /// How long bids are compared.
    pub(super) window: Duration,
    /// Whether more nodes could do it than were invited.
    pub(super) more: bool,
    /// How many nodes could do it when it was opened.
    pub(super) capable: usize,
    /// How many answered that they have no free slot, and when the first of them expects one.
    pub(super) busy: usize,
    pub(super) free_at: Option<Time>,
    pub(super) bids: Vec<Candidate>,
}

/// A job under way.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) spec: Box<JobSpec>,
    /// The id of its hedging lease.
    pub(super) hedge: JobId,
    pub(super) requirement: Hash,
    /// What learning rules call this kind of job.
    pub(super) bucket: u64,
    pub(super) submitted: Time,
    pub(super) election: Option<Election>,
    /// The last announcement that is no longer open: what its stragglers took is worth knowing.
    pub(super) decided: Option<Call>,
    /// Every beacon sent for it, the open one included.
    pub(super) beacons: Vec<BeaconId>,
    /// Beacons in a row that brought nothing.
    pub(super) barren: u32,
    /// Bidders that did not win, best first; their reservations are released.
    pub(super) bench: Vec<Candidate>,
    /// How many bid in the last election.
    pub(super) bids: usize,
    /// No new beacon before this.
    pub(super) resume_at: Option<Time>,
    /// Since when the ledger has known nobody who can do it.
    pub(super) nobody_since: Option<Time>,
    /// Nodes whose lease failed, and how often.
    pub(super) strikes: BTreeMap<NodeId, u32>,
    /// Nodes that failed once may be asked again, because nobody else is left.
    pub(super) lenient: bool,
    /// Executors that called the payload unusable.
    pub(super) unusable: u32,
    pub(super) leases: u32,
    pub(super) last_failure: Option<Failure>,
    /// From submission to the first lease.
    pub(super) election_took: Option<Duration>,
    /// When the requester looks after it next, as entered in its timers.
    pub(super) timer: Option<Time>,
}

impl Job {
    /// The ids under which it can be leased: its own, and its hedge's.
    pub(super) fn lease_ids(&self) -> [JobId; 2] {
        [self.spec.job, self.hedge]
    }

    /// Whether a node's earlier failures rule it out.
    pub(super) fn is_struck(&self, node: NodeId) -> bool {
        let limit = if self.lenient { MAX_STRIKES } else { 1 };
        self.strikes.get(&node).is_some_and(|&strikes| strikes >= limit)
    }

    pub(super) fn strike(&mut self, node: NodeId, strikes: u32) {
        let total = self.strikes.entry(node).or_insert(0);
        *total = total.saturating_add(strikes);
    }

    /// When the election has something to decide.
    pub(super) fn election_timer(&self, config: &BeaconConfig) -> Option<Time> {
        let election = self.election.as_ref()?;
        let wait = match (election.bids.is_empty(), election.more) {
            (false, _) => election.window,
            (true, false) => config.patience,
            // Nobody who was invited has a free slot: others have.
            (true, true) if election.call.awaited.is_empty() => Duration::ZERO,
            (true, true) => config.window_max,
        };
        Some(election.call.opened + wait)
    }

    /// Ends the open election, whatever comes next.
    pub(super) fn end_election(&mut self) -> Option<Election> {
        let mut election = self.election.take()?;
        let Call { beacon, opened, ref mut awaited } = election.call;
        self.decided = Some(Call { beacon, opened, awaited: std::mem::take(awaited) });
        Some(election)
    }

    /// Pause before the next beacon, without its jitter.
    pub(super) fn back_off(&self, config: &BeaconConfig) -> Duration {
        let doublings = self.barren.saturating_sub(1).min(16);
        config.back_off.saturating_mul(1 << doublings).min(config.back_off_max)
    }
}

/// A valid lease.
#[derive(Debug)]
pub(super) struct Held {
    /// The job it serves.
    pub(super) job: JobId,
    pub(super) hedge: bool,
    pub(super) candidate: Candidate,
    pub(super) fence: u64,
    pub(super) kind: JobKind,
    pub(super) requirement: Hash,
    /// As it was sent, to be repeated.
    pub(super) lease: Received<Lease>,
    /// Whether the bidder keeps a slot for it.
    pub(super) reserved: bool,
    pub(super) granted: Time,
    pub(super) confirmed: bool,
    pub(super) last_sign: Time,
    /// Whether the grant was repeated since the last sign of life.
    pub(super) probed: bool,
    /// When it is repeated because a message could not be sent, if that is before the silence has lasted half of its time.
    pub(super) doubted: Option<Time>,
    pub(super) next_index: u32,
}

impl Held {
    pub(super) fn executor(&self) -> NodeId {
        self.candidate.node
    }

    /// How long silence is borne: less before the first sign of life.
    pub(super) fn silence(&self, config: &BeaconConfig) -> Duration {
        if self.confirmed { config.silence_timeout } else { config.accept_timeout }
    }

    /// When silence is acted on: a repeated grant at half, the loss of the lease at the end.
    pub(super) fn silence_timer(&self, config: &BeaconConfig) -> Time {
        let silence = self.silence(config);
        if self.probed {
            return self.last_sign + silence;
        }
        let due = self.last_sign + silence / 2;
        self.doubted.map_or(due, |doubted| doubted.min(due))
    }

    /// When a rival is due, by the policy.
    pub(super) fn hedge_at(&self, config: &BeaconConfig, deadline: Time) -> Option<Time> {
        let HedgePolicy::AtRisk { slowdown, spare, slack } = config.hedge else { return None };
        if self.candidate.latency.is_zero() {
            // Nothing is known of its speed: half of the time that is left is its share.
            return Some(self.granted + slack.max(deadline.since(self.granted) / 2));
        }
        let expected = self.candidate.latency.as_secs_f64();
        let times = |factor: f64| Duration::try_from_secs_f64(expected * factor).unwrap_or(Duration::MAX);
        let overdue = self.granted + slack.max(self.candidate.latency);
        let straggling = self.granted + slack.max(times(slowdown));
        let last_chance = Time::ZERO + deadline.since(Time::ZERO + times(spare));
        Some(straggling.min(overdue.max(last_chance)))
    }

    /// Takes a sign of life.
    pub(super) fn alive(&mut self, now: Time) {
        self.confirmed = true;
        self.last_sign = now;
        self.probed = false;
        self.doubted = None;
    }
}

/// The next moment at which a job needs attention.
pub(super) fn next_timer(job: &Job, leases: &[&Held], config: &BeaconConfig, may_hedge: bool) -> Time {
    let mut next = job.election_timer(config);
    next = earliest(next, job.resume_at);
    next = earliest(next, job.nobody_since.map(|since| since + config.grace));
    for lease in leases {
        next = earliest(next, Some(lease.silence_timer(config)));
    }
    if let ([lease], true) = (leases, may_hedge) {
        next = earliest(next, lease.hedge_at(config, job.spec.deadline));
    }
    earliest(next, Some(job.spec.deadline)).unwrap_or(job.spec.deadline)
}
