//! Leases out: granting, watching, losing.

use std::collections::VecDeque;
use std::time::Duration;

use chorus_machine::{Ctx, Outbox, Time};
use chorus_protocol::beacon::Lease;
use chorus_protocol::job::{Failure, Pool};
use chorus_protocol::message::Direct;
use chorus_protocol::{JobId, NodeId, Verified};

use super::state::{Held, Job, MAX_STRIKES};
use super::{Requester, RequesterEffect, event, release};
use crate::job::{JobError, JobEventKind};
use crate::select::{Candidate, reward};

/// Leases taken back that are remembered, and for how long.
const MAX_REVOKED: usize = 1_024;
const KEEP_REVOKED: Duration = Duration::from_secs(120);
/// How a lease's end weighs when a node will surely fail again.
const FOR_GOOD: u32 = MAX_STRIKES;

/// Why a lease ended without a result.
#[derive(Clone, Debug)]
pub(super) enum Lost {
    /// The connection to the executor is gone.
    PeerDown,
    /// The grant could not be sent.
    Unreachable,
    /// The grant was not accepted in time.
    NotAccepted,
    /// No sign of life.
    Silent,
    /// The executor equivocated.
    Quarantined,
    /// The executor refused the lease.
    Refused(Failure),
    /// The executor reported a failure.
    Failed(Failure),
    /// The executor's result contradicts its own receipt.
    Invalid,
}

impl Lost {
    fn reason(&self) -> String {
        match self {
            Self::PeerDown => "the connection broke".to_owned(),
            Self::Unreachable => "it cannot be reached".to_owned(),
            Self::NotAccepted => "it did not answer the lease".to_owned(),
            Self::Silent => "it gave no sign of life".to_owned(),
            Self::Quarantined => "it is quarantined for equivocation".to_owned(),
            Self::Refused(failure) => format!("it refused: {failure}"),
            Self::Failed(failure) => failure.to_string(),
            Self::Invalid => "its result contradicts its receipt".to_owned(),
        }
    }

    fn failure(&self) -> Option<&Failure> {
        match self {
            Self::Refused(failure) | Self::Failed(failure) => Some(failure),
            _ => None,
        }
    }

    /// Whether the executor's track record pays for it.
    fn is_executors_fault(&self) -> bool {
        match self {
            Self::PeerDown | Self::NotAccepted | Self::Silent | Self::Quarantined | Self::Invalid => true,
            Self::Unreachable => false,
            Self::Refused(failure) | Self::Failed(failure) => failure.is_executors_fault(),
        }
    }

    /// Whether the executor is known to have stopped, so that it need not be told.
    fn has_stopped(&self) -> bool {
        matches!(self, Self::Refused(_) | Self::Failed(_) | Self::Invalid)
    }

    /// How strongly it speaks against another lease of the same job to the same node.
    fn strikes(&self, reserved: bool) -> u32 {
        match self.failure() {
            // Whoever was asked without a reservation may well be busy.
            Some(Failure::Busy) if !reserved => 0,
            Some(Failure::NoSuchModel | Failure::ContextExceeded { .. } | Failure::Leaving) => FOR_GOOD,
            _ if matches!(self, Self::Invalid | Self::Quarantined) => FOR_GOOD,
            _ => 1,
        }
    }
}

/// What a `Progress` says.
#[derive(Debug)]
pub(super) struct ProgressMessage {
    pub(super) index: u32,
    pub(super) tokens: u32,
    pub(super) text: String,
}

/// Leases taken back, oldest first: a late result under one of them still gets a receipt that says so.
#[derive(Debug, Default)]
pub(super) struct Revoked(VecDeque<(Time, JobId, Held)>);

impl Revoked {
    pub(super) fn push(&mut self, lease: JobId, held: Held, now: Time) {
        if self.0.len() >= MAX_REVOKED {
            self.0.pop_front();
        }
        self.0.push_back((now + KEEP_REVOKED, lease, held));
    }

    pub(super) fn take(&mut self, lease: JobId, fence: u64, executor: NodeId) -> Option<Held> {
        let same =
            |(_, id, held): &(Time, JobId, Held)| *id == lease && held.fence == fence && held.executor() == executor;
        let at = self.0.iter().position(same)?;
        self.0.remove(at).map(|(_, _, held)| held)
    }

    pub(super) fn purge(&mut self, now: Time) {
        while self.0.front().is_some_and(|(until, ..)| *until <= now) {
            self.0.pop_front();
        }
    }
}

impl Requester {
    /// How many valid leases on slots of a pool a node holds of this requester.
    pub(super) fn leased_to(&self, node: NodeId, pool: Pool) -> usize {
        self.leases.values().filter(|held| held.executor() == node && held.kind.pool() == pool).count()
    }

    /// Grants a lease: under the job's id, or under its hedge's when the job's is taken.
    pub(super) fn grant(
        &mut self,
        cx: &mut Ctx<'_>,
        id: JobId,
        candidate: Candidate,
        reserved: bool,
        out: &mut Outbox<RequesterEffect>,
    ) {
        self.dissolve(id, candidate.node, out);
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let hedge = self.leases.contains_key(&id);
        let lease_id = if hedge { job.hedge } else { id };
        let fence = self.fences.draw(cx.wall);
        let lease = Lease {
            job: lease_id,
            beacon: job.beacons.last().copied().unwrap_or_default(),
            executor: candidate.node,
            fence,
            kind: job.spec.kind,
            requirement: job.requirement,
            deadline: cx.wall.plus(job.spec.deadline.since(cx.now)),
        };
        let lease = Verified::sign(&self.key, &self.network, lease).expect("a lease has a fixed size below its limit");
        job.leases += 1;
        job.election_took.get_or_insert(cx.now.since(job.submitted));
        let node = candidate.node;
        let elected = JobEventKind::Elected { node, score: candidate.score, fence, bids: job.bids, hedge };
        event(job, elected, out);
        let payload = Box::new(job.spec.payload.clone());
        out.push(RequesterEffect::Send { to: node, message: Direct::Grant { lease: lease.to_wire(), payload } });
        let held = Held {
            job: id,
            hedge,
            candidate,
            fence,
            kind: job.spec.kind,
            requirement: job.requirement,
            lease: lease.to_wire(),
            reserved,
            granted: cx.now,
            confirmed: false,
            last_sign: cx.now,
            probed: false,
            doubted: None,
            next_index: 0,
        };
        self.leases.insert(lease_id, held);
        self.reschedule(id);
    }

    /// Ends an election that is still open when its job gets a lease otherwise, from the bench: what it would bring is no longer
    /// needed, and must not become a third lease.
    fn dissolve(&mut self, id: JobId, winner: NodeId, out: &mut Outbox<RequesterEffect>) {
        let Some(election) = self.jobs.get_mut(&id).and_then(Job::end_election) else { return };
        for bidder in election.bids.iter().filter(|bidder| bidder.node != winner) {
            release(bidder.node, election.call.beacon, out);
        }
    }

    /// Returns the valid lease under which a message came, or tells its sender that it has none.
    fn valid(
        &mut self,
        from: NodeId,
        lease: JobId,
        fence: u64,
        out: &mut Outbox<RequesterEffect>,
    ) -> Option<&mut Held> {
        let valid = self.leases.get(&lease).is_some_and(|held| held.fence == fence && held.executor() == from);
        if !valid {
            out.push(RequesterEffect::Send { to: from, message: Direct::Cancel { job: lease, fence } });
            return None;
        }
        self.leases.get_mut(&lease)
    }

    pub(super) fn on_accept(
        &mut self,
        cx: &mut Ctx<'_>,
        from: NodeId,
        lease: JobId,
        fence: u64,
        out: &mut Outbox<RequesterEffect>,
    ) {
        if let Some(held) = self.valid(from, lease, fence, out) {
            let (job, first) = (held.job, !held.confirmed);
            held.alive(cx.now);
            self.tell_started(job, from, first, out);
            self.reschedule(job);
        }
    }

    fn tell_started(&self, job: JobId, node: NodeId, first: bool, out: &mut Outbox<RequesterEffect>) {
        if let Some(job) = self.jobs.get(&job).filter(|_| first) {
            event(job, JobEventKind::Started { node }, out);
        }
    }

    pub(super) fn on_progress(
        &mut self,
        cx: &mut Ctx<'_>,
        from: NodeId,
        lease: JobId,
        fence: u64,
        progress: ProgressMessage,
        out: &mut Outbox<RequesterEffect>,
    ) {
        let Some(held) = self.valid(from, lease, fence, out) else { return };
        if progress.index < held.next_index {
            return;
        }
        held.next_index = progress.index.saturating_add(1);
        let (job, first) = (held.job, !held.confirmed);
        held.alive(cx.now);
        self.tell_started(job, from, first, out);
        if let Some(job) = self.jobs.get(&job) {
            let ProgressMessage { tokens, text, .. } = progress;
            event(job, JobEventKind::Progress { node: from, tokens, text }, out);
        }
        self.reschedule(job);
    }

    pub(super) fn on_refuse(
        &mut self,
        cx: &mut Ctx<'_>,
        from: NodeId,
        lease: JobId,
        fence: u64,
        failure: Failure,
        out: &mut Outbox<RequesterEffect>,
    ) {
        if fence == crate::executor::WITHDRAWN {
            self.withdraw(lease, from);
            return;
        }
        let valid = self.leases.get(&lease).is_some_and(|held| held.fence == fence && held.executor() == from);
        if valid {
            self.lose(cx, lease, Lost::Refused(failure), out);
        }
    }

    /// How many slots of a node's pool this requester ties up: valid leases, and bids in open elections.
    pub(super) fn tied(&self, node: NodeId, pool: Pool) -> usize {
        let bids = |job: &&Job| {
            job.spec.kind.pool() == pool
                && job.election.as_ref().is_some_and(|e| e.bids.iter().any(|bid| bid.node == node))
        };
        self.leased_to(node, pool) + self.jobs.values().filter(bids).count()
    }

    /// Forgets a bid that its bidder took back.
    fn withdraw(&mut self, job: JobId, node: NodeId) {
        let Some(job) = self.jobs.get_mut(&job) else { return };
        job.bench.retain(|candidate| candidate.node != node);
        if let Some(election) = &mut job.election {
            election.bids.retain(|candidate| candidate.node != node);
        }
        let id = job.spec.job;
        self.reschedule(id);
    }

    /// Acts on an executor's silence: asks at half of the time, gives up at the end of it.
    pub(super) fn check_silence(&mut self, cx: &mut Ctx<'_>, lease: JobId, out: &mut Outbox<RequesterEffect>) {
        let Some(held) = self.leases.get_mut(&lease) else { return };
        if held.silence_timer(&self.config) > cx.now {
            return;
        }
        if held.last_sign + held.silence(&self.config) <= cx.now {
            let lost = if held.confirmed { Lost::Silent } else { Lost::NotAccepted };
            self.lose(cx, lease, lost, out);
            return;
        }
        held.probed = true;
        let (to, signed) = (held.executor(), held.lease.clone());
        if let Some(job) = self.jobs.get(&held.job) {
            let payload = Box::new(job.spec.payload.clone());
            out.push(RequesterEffect::Send { to, message: Direct::Grant { lease: signed, payload } });
        }
    }

    /// Ends a lease without a result, and finds the job another.
    pub(super) fn lose(&mut self, cx: &mut Ctx<'_>, lease: JobId, lost: Lost, out: &mut Outbox<RequesterEffect>) {
        let Some(held) = self.leases.remove(&lease) else { return };
        let (id, node) = (held.job, held.executor());
        if !lost.has_stopped() {
            out.push(RequesterEffect::Send { to: node, message: Direct::Cancel { job: lease, fence: held.fence } });
        }
        if lost.is_executors_fault() {
            self.reputation.failed(node, cx.now);
            self.selector.learn(&held.candidate, reward(false, held.candidate.latency_norm, 0.0));
        }
        if let Some(job) = self.jobs.get_mut(&id) {
            let strikes = lost.strikes(held.reserved);
            job.strike(node, strikes);
            if strikes == 0 {
                // Nothing was tried, so it does not count as a lease.
                job.leases = job.leases.saturating_sub(1);
            }
            job.last_failure = Some(lost.failure().cloned().unwrap_or_else(|| {
                Failure::Engine(chorus_protocol::Text::truncated(&format!("{node:?} was lost: {}", lost.reason())))
            }));
            event(job, JobEventKind::Lost { node, reason: lost.reason() }, out);
        }
        self.revoked.push(lease, held, cx.now);
        if let Some(Failure::InvalidPayload(_)) = lost.failure() {
            self.count_unusable(cx, id, node, &lost, out);
        }
        self.advance(cx, id, out);
    }

    /// Ends the job when a second executor, or the only one, calls its payload unusable.
    fn count_unusable(
        &mut self,
        cx: &mut Ctx<'_>,
        id: JobId,
        node: NodeId,
        lost: &Lost,
        out: &mut Outbox<RequesterEffect>,
    ) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.unusable += 1;
        job.strike(node, FOR_GOOD);
        let Some(job) = self.jobs.get(&id) else { return };
        let others = self.capabilities.keys().any(|other| self.eligible(job, *other).is_some());
        let alone = !others && self.held(job).is_empty();
        if let Some(failure) = lost.failure().filter(|_| job.unusable >= 2 || node == self.me || alone) {
            self.finish(cx, id, Err(JobError::Refused(failure.clone())), out);
        }
    }

    /// A message to a node could not be sent. What it was is unknown: a grant that did not arrive, or a release that nobody misses.
    ///
    /// A lease that was never confirmed is lost at once. Behind a confirmed one there is a run that may be well and whose next word
    /// may be on its way: its executor is asked after a moment, and if that question cannot be sent either, it is lost too.
    pub(super) fn send_failed(&mut self, cx: &mut Ctx<'_>, node: NodeId, out: &mut Outbox<RequesterEffect>) {
        let ask_at = cx.now + self.config.back_off;
        let (mut lost, mut doubted) = (Vec::new(), Vec::new());
        for (id, held) in self.leases.iter_mut().filter(|(_, held)| held.executor() == node) {
            if held.confirmed && !held.probed {
                held.doubted.get_or_insert(ask_at);
                doubted.push(held.job);
            } else {
                lost.push(*id);
            }
        }
        self.forget_bids(node);
        for job in doubted {
            self.reschedule(job);
        }
        for lease in lost {
            self.lose(cx, lease, Lost::Unreachable, out);
        }
        self.check_elections(cx, out);
    }

    /// A node is gone, or is not to be dealt with any more: its leases and bids are void.
    pub(super) fn node_gone(&mut self, cx: &mut Ctx<'_>, node: NodeId, lost: Lost, out: &mut Outbox<RequesterEffect>) {
        let void = |(id, held): (&JobId, &Held)| (held.executor() == node).then_some(*id);
        let leases: Vec<JobId> = self.leases.iter().filter_map(void).collect();
        self.forget_bids(node);
        for lease in leases {
            self.lose(cx, lease, lost.clone(), out);
        }
        self.check_elections(cx, out);
    }

    fn forget_bids(&mut self, node: NodeId) {
        for job in self.jobs.values_mut() {
            job.bench.retain(|candidate| candidate.node != node);
            if let Some(election) = &mut job.election {
                election.bids.retain(|candidate| candidate.node != node);
                election.call.awaited.remove(&node);
            }
        }
    }
}
