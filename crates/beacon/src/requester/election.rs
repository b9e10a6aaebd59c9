//! From a job to a ranked list of bidders.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use chorus_machine::{Ctx, Outbox, Time, earliest};
use chorus_protocol::beacon::{Beacon, Bid, Rank};
use chorus_protocol::job::Pool;
use chorus_protocol::{BeaconId, JobId, NodeId, Received, Verified};

use super::state::{Call, Election, Job, MAX_STRIKES};
use super::{Requester, RequesterEffect, event, release};
use crate::job::{JobError, JobEventKind};
use crate::lease::Fault;
use crate::phi::{claimed_time, milli, phi, why_nobody};
use crate::select::Candidate;

/// Bidders that are remembered beside the winner.
const MAX_BENCH: usize = 16;
/// Nodes that a job's first beacon invites for each bid at which its window closes: some are busy, and some are far away.
const INVITED_PER_BID: usize = 3;
/// Each further beacon of a job invites more by this power of two.
const INVITED_GROWTH_LOG2: u32 = 2;

impl Requester {
    /// Gives a job what it needs next: a lease, a rival, a beacon, an end, or nothing.
    pub(super) fn advance(&mut self, cx: &mut Ctx<'_>, id: JobId, out: &mut Outbox<RequesterEffect>) {
        while let Some(job) = self.jobs.get(&id) {
            let held = self.held(job);
            let overdue = |at| at <= cx.now;
            let enough = match held[..] {
                [] => false,
                [only] => !only.hedge_at(&self.config, job.spec.deadline).is_some_and(overdue),
                _ => true,
            };
            let idle = held.is_empty();
            if enough {
                break;
            }
            if job.leases >= job.spec.max_leases.max(1) {
                if idle {
                    self.exhaust(cx, id, out);
                }
                break;
            }
            if let Some(candidate) = self.next_of_bench(id) {
                self.grant(cx, id, candidate, false, out);
                continue;
            }
            let Some(job) = self.jobs.get(&id) else { return };
            if job.election.is_none() && job.resume_at.is_none() {
                self.announce(cx, id, idle, out);
            }
            break;
        }
        self.reschedule(id);
    }

    fn exhaust(&mut self, cx: &mut Ctx<'_>, id: JobId, out: &mut Outbox<RequesterEffect>) {
        let Some(job) = self.jobs.get(&id) else { return };
        let error = match job.last_failure.clone() {
            Some(last) => JobError::Exhausted { leases: job.leases, last },
            None => JobError::NobodyCan { reason: self.why_not(job) },
        };
        self.finish(cx, id, Err(error), out);
    }

    fn why_not(&self, job: &Job) -> String {
        let capable = self.capabilities.values().filter(|c| phi(c, &job.spec.requirement).is_some()).count();
        match capable {
            0 => why_nobody(self.capabilities.values().map(Arc::as_ref), &job.spec.requirement),
            _ => format!("{capable} nodes can, but none took it after {} announcements", job.beacons.len()),
        }
    }

    fn next_of_bench(&mut self, id: JobId) -> Option<Candidate> {
        loop {
            let job = self.jobs.get_mut(&id)?;
            if job.bench.is_empty() {
                return None;
            }
            let next = job.bench.remove(0);
            let job = self.jobs.get(&id)?;
            if self.eligible(job, next.node).is_some() {
                return Some(next);
            }
        }
    }

    /// Returns φ of a node that may get a lease of this job, or `None`: not in the ledger, not capable, not among those that its
    /// customer would have, quarantined, failed before, or already at it.
    pub(super) fn eligible(&self, job: &Job, node: NodeId) -> Option<f64> {
        let ruled_out = self.quarantined.contains(&node)
            || !job.spec.admits(node)
            || job.is_struck(node)
            || self.held(job).iter().any(|held| held.executor() == node);
        if ruled_out {
            return None;
        }
        phi(self.capabilities.get(&node)?, &job.spec.requirement)
    }

    /// Whom a beacon may reach: nodes that can do the job and are not ruled out, and how well they match.
    fn reach(&self, job: &Job) -> Vec<(NodeId, u16)> {
        let score = |node: &NodeId| self.eligible(job, *node).map(|score| (*node, milli(score)));
        self.capabilities.keys().filter_map(score).collect()
    }

    /// Whom a beacon invites: everybody in a small swarm; in a large one as many of the best as the election needs, and more of
    /// them each time that those before did not bid. A thousand bids for one lease would reserve a thousand slots.
    fn invite(&self, beacon: BeaconId, reach: &[(NodeId, u16)], barren: u32) -> (Rank, BTreeSet<NodeId>) {
        let growth = 1usize.checked_shl(barren.saturating_mul(INVITED_GROWTH_LOG2)).unwrap_or(usize::MAX);
        let most = self.config.close_at.saturating_mul(INVITED_PER_BID).saturating_mul(growth);
        if reach.len() <= most {
            return (Rank::default(), reach.iter().map(|(node, _)| *node).collect());
        }
        let mut ranks: Vec<(Rank, NodeId)> =
            reach.iter().map(|&(node, score)| (Rank::of(beacon, node, score), node)).collect();
        ranks.sort_unstable();
        let lowest = ranks[ranks.len() - most].0;
        let invited = |&&(rank, node): &&(Rank, NodeId)| rank >= lowest || node == self.me;
        (lowest, ranks.iter().filter(invited).map(|(_, node)| *node).collect())
    }

    /// Publishes a beacon, or finds out that there is nobody to read it.
    fn announce(&mut self, cx: &mut Ctx<'_>, id: JobId, idle: bool, out: &mut Outbox<RequesterEffect>) {
        let Some(job) = self.jobs.get(&id) else { return };
        let reach = self.reach(job);
        let exhausted = job.beacons.len() >= usize::try_from(self.config.max_beacons).unwrap_or(usize::MAX);
        if !idle && (reach.is_empty() || exhausted) {
            // Nobody to rival with: look again later.
            let Some(job) = self.jobs.get_mut(&id) else { return };
            job.resume_at = Some(cx.now + self.config.back_off_max);
        } else if exhausted {
            self.exhaust(cx, id, out);
        } else if reach.is_empty() {
            self.nobody(cx, id, out);
        } else {
            self.publish(cx, id, &reach, out);
        }
    }

    /// Nobody is left, or nobody was ever there.
    fn nobody(&mut self, cx: &mut Ctx<'_>, id: JobId, out: &mut Outbox<RequesterEffect>) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        if !job.lenient && job.strikes.values().any(|&strikes| strikes < MAX_STRIKES) {
            // Who failed once is all there is: give it a moment, then one more chance.
            job.lenient = true;
            job.resume_at = Some(cx.now + self.config.back_off);
        } else if job.leases > 0 {
            self.exhaust(cx, id, out);
        } else {
            let since = *job.nobody_since.get_or_insert(cx.now);
            if cx.now >= since + self.config.grace {
                self.exhaust(cx, id, out);
            }
        }
    }

    fn publish(&mut self, cx: &mut Ctx<'_>, id: JobId, reach: &[(NodeId, u16)], out: &mut Outbox<RequesterEffect>) {
        let Some(job) = self.jobs.get(&id) else { return };
        let beacon_id = BeaconId::from_bytes(cx.rng.bytes());
        let (lowest, invited) = self.invite(beacon_id, reach, job.barren);
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let beacon = Beacon {
            id: beacon_id,
            job: id,
            kind: job.spec.kind,
            requirement: job.spec.requirement.clone(),
            risk: job.spec.risk,
            made: cx.wall,
            deadline: cx.wall.plus(job.spec.deadline.since(cx.now)),
            window_ms: u32::try_from(self.config.patience.as_millis()).unwrap_or(u32::MAX),
            executors: 1,
            invited: lowest,
        };
        let beacon = Verified::sign(&self.key, &self.network, beacon)
            .expect("a requirement's lists are bounded so that a beacon stays below its limit");
        job.nobody_since = None;
        job.beacons.push(beacon.id);
        let capable = reach.len();
        job.election = Some(Election {
            more: invited.len() < capable,
            call: Call { beacon: beacon.id, opened: cx.now, awaited: invited },
            window: self.pace.window(&self.config),
            capable,
            busy: 0,
            free_at: None,
            bids: Vec::new(),
        });
        self.beacons.insert(beacon.id, id);
        event(job, JobEventKind::Announced { beacon: beacon.id, candidates: capable }, out);
        out.push(RequesterEffect::Publish(beacon));
    }

    pub(super) fn on_bid(
        &mut self,
        cx: &mut Ctx<'_>,
        from: NodeId,
        bid: Received<Bid>,
        out: &mut Outbox<RequesterEffect>,
    ) {
        // A signature costs more than everything else here, and most bids of a crowd come too late.
        if let Ok(Bid { beacon, .. }) = bid.unverified()
            && !self.is_of_use(from, beacon)
        {
            self.note_answer(cx.now, from, beacon);
            release(from, beacon, out);
            return;
        }
        let fault = match bid.verify(&self.network) {
            Err(_) => Fault::BadSignature("bid"),
            Ok(bid) if bid.author() != from || bid.requester != self.me => Fault::WrongParty("bid"),
            Ok(bid) => return self.on_honest_bid(cx, from, &bid, out),
        };
        out.push(RequesterEffect::Penalise { peer: from, reason: fault });
    }

    /// Whether a node's bid could still win: its election is open, or the bench of its job has room.
    fn is_of_use(&self, from: NodeId, beacon: BeaconId) -> bool {
        let Some(job) = self.beacons.get(&beacon).and_then(|id| self.jobs.get(id)) else { return false };
        let open = job.election.as_ref().is_some_and(|election| election.call.beacon == beacon);
        open || (job.bench.len() < MAX_BENCH && self.eligible(job, from).is_some())
    }

    fn on_honest_bid(&mut self, cx: &mut Ctx<'_>, from: NodeId, bid: &Bid, out: &mut Outbox<RequesterEffect>) {
        let Some((id, job)) = self.beacons.get(&bid.beacon).and_then(|id| self.jobs.get_key_value(id)) else {
            release(from, bid.beacon, out);
            return;
        };
        let (id, score) = (*id, self.eligible(job, from));
        let open = job.election.as_ref().filter(|election| election.call.beacon == bid.beacon);
        if open.is_some_and(|election| election.bids.iter().any(|other| other.node == from)) {
            return;
        }
        let is_open = open.is_some();
        let claimed = f64::from(bid.score_milli) / 1_000.0;
        event(job, JobEventKind::Bid { node: from, score: score.unwrap_or(0.0), claimed }, out);
        let candidate = score.map(|score| self.candidate(cx, id, from, score, bid));
        self.note_answer(cx.now, from, bid.beacon);
        let Some(job) = self.jobs.get_mut(&id) else { return };
        match (candidate, &mut job.election) {
            (Some(candidate), Some(election)) if is_open => {
                election.bids.push(candidate);
                self.check_elections(cx, out);
                self.reschedule(id);
            }
            (late, _) => {
                release(from, bid.beacon, out);
                let known = job.bench.iter().any(|other| other.node == from);
                job.bench.extend(late.filter(|_| !known));
            }
        }
    }

    /// A node that could do the job has no free slot: it is not waited for, and may bid later all the same. Only the first answer
    /// of a node that is waited for says anything new.
    pub(super) fn on_busy(
        &mut self,
        cx: &mut Ctx<'_>,
        from: NodeId,
        beacon: BeaconId,
        free_in: Duration,
        out: &mut Outbox<RequesterEffect>,
    ) {
        if !self.note_answer(cx.now, from, beacon) {
            return;
        }
        let Some(job) = self.beacons.get(&beacon).and_then(|id| self.jobs.get_mut(id)) else { return };
        let id = job.spec.job;
        if let Some(election) = job.election.as_mut().filter(|election| election.call.beacon == beacon) {
            election.busy += 1;
            election.free_at = earliest(election.free_at, Some(cx.now + free_in));
            self.check_election(cx, id, out);
            self.reschedule(id);
        }
    }

    /// Notes that a node answered an announcement, and how long that took. Returns whether it is the node's first answer to it.
    fn note_answer(&mut self, now: Time, from: NodeId, beacon: BeaconId) -> bool {
        let Some(job) = self.beacons.get(&beacon).and_then(|id| self.jobs.get_mut(id)) else { return false };
        let open = job.election.as_mut().map(|election| &mut election.call);
        let calls = open.into_iter().chain(job.decided.as_mut());
        let took = calls.filter(|call| call.beacon == beacon).find_map(|call| call.answered(from, now));
        if let Some(took) = took.filter(|_| from != self.me) {
            self.pace.take(took, &self.config);
        }
        took.is_some()
    }

    /// Sees a bidder as the selection rules do: with what the ledger and experience say, not with what it says itself. Its load and
    /// its own estimate of time count where this node knows nothing better.
    fn candidate(&mut self, cx: &Ctx<'_>, id: JobId, node: NodeId, score: f64, bid: &Bid) -> Candidate {
        let standing = self.standing(node, cx.now);
        let (job, capability) = (self.jobs.get(&id), self.capabilities.get(&node));
        let claimed = job.zip(capability).and_then(|(j, c)| claimed_time(c, &j.spec.requirement, &j.spec.payload));
        let claimed = claimed.unwrap_or(Duration::from_millis(u64::from(bid.expected_ms)));
        let latency = claimed.mul_f64(standing.slowdown);
        let told = share(usize::from(bid.active), usize::from(bid.slots));
        let pool = job.map_or(Pool::Answers, |job| job.spec.kind.pool());
        let seen = share(self.leased_to(node, pool), capability.map_or(0, |c| usize::from(c.slots_of(pool))));
        Candidate {
            node,
            score,
            load: told.max(seen),
            latency,
            latency_norm: (latency.as_secs_f64() / self.config.latency_scale.as_secs_f64()).min(1.0),
            reputation: standing.mean(),
            is_self: node == self.me,
            bucket: job.map_or(0, |job| job.bucket),
        }
    }

    /// Looks at all open elections: a bid in one may be the last that another could still hope for.
    pub(super) fn check_elections(&mut self, cx: &mut Ctx<'_>, out: &mut Outbox<RequesterEffect>) {
        let open: Vec<JobId> = self.jobs.values().filter(|job| job.election.is_some()).map(|j| j.spec.job).collect();
        for job in open {
            self.check_election(cx, job, out);
            self.reschedule(job);
        }
    }

    /// Whether a node may still bid of which this requester does not know that it has no slot left for it.
    fn may_hope(&self, election: &Election, pool: Pool) -> bool {
        let slots = |node: &NodeId| self.capabilities.get(node).map_or(0, |c| usize::from(c.slots_of(pool)));
        election.call.awaited.iter().any(|node| self.tied(*node, pool) < slots(node))
    }

    /// Closes the open election when it has what it waits for, or gives it up.
    pub(super) fn check_election(&mut self, cx: &mut Ctx<'_>, id: JobId, out: &mut Outbox<RequesterEffect>) {
        let Some(job) = self.jobs.get(&id) else { return };
        let timed_out = job.election_timer(&self.config).is_some_and(|at| at <= cx.now);
        let Some(election) = &job.election else { return };
        let bids = election.bids.len();
        let complete =
            bids > 0 && (timed_out || bids >= self.config.close_at || !self.may_hope(election, job.spec.kind.pool()));
        if bids == 0 && timed_out {
            let soonest = election.free_at.map(|at| at.since(cx.now));
            let Some(job) = self.jobs.get_mut(&id) else { return };
            let more = job.end_election().is_some_and(|election| election.more);
            job.barren = job.barren.saturating_add(1);
            if more {
                self.advance(cx, id, out);
                return;
            }
            // Whoever is busy may have a slot before the pause is over, but is not asked all the time.
            let pause = job.back_off(&self.config);
            let pause = soonest.map_or(pause, |soonest| pause.min(soonest.max(self.config.back_off)));
            job.resume_at = Some(cx.now + cx.rng.between(pause / 2, pause));
        } else if complete {
            self.close(cx, id, out);
        }
    }

    fn close(&mut self, cx: &mut Ctx<'_>, id: JobId, out: &mut Outbox<RequesterEffect>) {
        let Some(election) = self.jobs.get_mut(&id).and_then(Job::end_election) else { return };
        let mut order = self.selector.rank(&election.bids, cx.rng);
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.barren = 0;
        // Stable: the rule's order holds among those to avoid, and among the others.
        order.sort_by_key(|&i| job.spec.avoid.contains(&election.bids[i].node));
        let mut ranked: Vec<Candidate> = order.into_iter().map(|i| election.bids[i].clone()).collect();
        ranked.retain(|candidate| {
            let eligible = self.jobs.get(&id).and_then(|job| self.eligible(job, candidate.node)).is_some();
            if !eligible {
                release(candidate.node, election.call.beacon, out);
            }
            eligible
        });
        let winner = (!ranked.is_empty()).then(|| ranked.remove(0));
        for loser in &ranked {
            release(loser.node, election.call.beacon, out);
        }
        ranked.truncate(MAX_BENCH);
        if let Some(job) = self.jobs.get_mut(&id) {
            job.bench = ranked;
            job.bids = election.bids.len();
        }
        match winner {
            Some(winner) => self.grant(cx, id, winner, true, out),
            None => self.advance(cx, id, out),
        }
    }
}

fn share(part: usize, whole: usize) -> f64 {
    #[allow(clippy::cast_precision_loss, reason = "slots are few")]
    let share = part as f64 / whole.max(1) as f64;
    share.min(1.0)
}
