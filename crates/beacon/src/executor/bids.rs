//! Beacons in, bids out: who gets a slot reserved, and for how long.

use std::time::Duration;

use chorus_machine::{Ctx, Outbox, Time, earliest};
use chorus_protocol::beacon::{Beacon, Bid};
use chorus_protocol::job::Pool;
use chorus_protocol::limits::{MAX_BEACON_AGE_MS, MAX_CLOCK_SKEW_MS};
use chorus_protocol::message::Direct;
use chorus_protocol::{BeaconId, JobId, NodeId, Verified, WallTime};

use super::{Executor, ExecutorEffect, ExecutorEvent};
use crate::phi::{milli, phi, time_for};

/// Share of a beacon queue that one requester may fill: one in this many.
const QUEUE_SHARE: usize = 4;

/// A slot that is kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reservation {
    pub(super) job: JobId,
    pub(super) pool: Pool,
    pub(super) until: Time,
}

/// An open beacon that found no free slot.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) beacon: Verified<Beacon>,
    pub(super) closes: Time,
}

impl Executor {
    pub(super) fn on_beacon(&mut self, cx: &mut Ctx<'_>, beacon: Verified<Beacon>, out: &mut Outbox<ExecutorEffect>) {
        let requester = beacon.author();
        let Some(score) = self.offer.as_ref().and_then(|offer| phi(offer, &beacon.requirement)) else { return };
        if self.draining || !is_current(&beacon, cx.wall) || self.memory.is_muted(requester, cx.now) {
            return;
        }
        let window = Duration::from_millis(u64::from(beacon.window_ms).min(MAX_BEACON_AGE_MS));
        let closes = cx.now + window;
        // As long as a copy passes for current, and as long as a lease may refer to it.
        let life = beacon.deadline.since(beacon.made).min(super::runs::MAX_JOB_LIFE);
        let forget = cx.now + life.max(super::memory::KEEP_HEARD);
        if !self.memory.hear(beacon.id, requester, beacon.made, cx.now, forget) {
            return;
        }
        if requester != self.me && !beacon.invites(self.me, milli(score)) {
            // Enough better ones are asked; should they not be enough, a new beacon invites more.
            return;
        }
        let pool = beacon.kind.pool();
        if self.free_of(pool) > 0 {
            self.bid(cx, &beacon, out);
            return;
        }
        // Its requester need not wait for this node.
        let free_in_ms =
            self.free_in(pool, cx.now).map_or(u32::MAX, |time| u32::try_from(time.as_millis()).unwrap_or(u32::MAX));
        let message = Direct::Busy { beacon: beacon.id, free_in_ms };
        out.push(ExecutorEffect::Send { to: requester, message });
        let again = |waiting: &&mut Waiting| waiting.beacon.author() == requester && waiting.beacon.job == beacon.job;
        if let Some(waiting) = self.waiting.iter_mut().find(again) {
            // The job was announced again: its place in the queue stays.
            *waiting = Waiting { beacon, closes };
        } else if self.may_wait(requester) {
            out.push(ExecutorEffect::Event(ExecutorEvent::Waiting { requester, job: beacon.job }));
            self.waiting.push(Waiting { beacon, closes });
        }
    }

    /// How long until a slot is likely to come free: the soonest of reservations that lapse and of runs that take as long as runs
    /// took lately. `None` when nothing is known of either.
    fn free_in(&self, pool: Pool, now: Time) -> Option<Duration> {
        let runs = self.runs.values().filter(|run| run.kind.pool() == pool);
        let ending = self.usual_of(pool).and_then(|usual| runs.map(|run| run.started + usual).min());
        let reservations = self.reservations.values().filter(|reservation| reservation.pool == pool);
        let lapsing = reservations.map(|reservation| reservation.until).min();
        earliest(ending, lapsing).map(|at| at.since(now))
    }

    /// What runs of a pool took lately.
    fn usual_of(&self, pool: Pool) -> Option<Duration> {
        self.usual.get(&pool).and_then(|seconds| Duration::try_from_secs_f64(*seconds).ok())
    }

    fn may_wait(&self, requester: NodeId) -> bool {
        let own = self.waiting.iter().filter(|waiting| waiting.beacon.author() == requester).count();
        self.waiting.len() < self.config.max_waiting && own < self.config.max_waiting.div_ceil(QUEUE_SHARE)
    }

    /// Answers waiting beacons, oldest first, while slots are free.
    pub(super) fn serve_waiting(&mut self, cx: &mut Ctx<'_>, out: &mut Outbox<ExecutorEffect>) {
        self.waiting.retain(|waiting| waiting.closes > cx.now);
        let served = |executor: &Self| {
            executor.waiting.iter().position(|waiting| executor.free_of(waiting.beacon.kind.pool()) > 0)
        };
        while let Some(first) = served(self) {
            let waiting = self.waiting.remove(first);
            self.bid(cx, &waiting.beacon, out);
        }
    }

    fn bid(&mut self, cx: &mut Ctx<'_>, beacon: &Verified<Beacon>, out: &mut Outbox<ExecutorEffect>) {
        let Some(score) = self.offer.as_ref().and_then(|offer| phi(offer, &beacon.requirement)) else { return };
        let (requester, pool) = (beacon.author(), beacon.kind.pool());
        let bid = Bid {
            beacon: beacon.id,
            requester,
            score_milli: milli(score),
            active: u16::try_from(self.taken_of(pool)).unwrap_or(u16::MAX),
            slots: u16::try_from(self.slots_of(pool)).unwrap_or(u16::MAX),
            expected_ms: u32::try_from(self.expected(beacon).as_millis()).unwrap_or(u32::MAX),
            hold_ms: u32::try_from(self.config.hold.as_millis()).unwrap_or(u32::MAX),
        };
        let bid = Verified::sign(&self.key, &self.network, bid).expect("a bid has a fixed size far below its limit");
        let reservation = Reservation { job: beacon.job, pool, until: cx.now + self.config.hold };
        self.reservations.insert((requester, beacon.id), reservation);
        out.push(ExecutorEffect::Event(ExecutorEvent::Bid { requester, job: beacon.job, score }));
        out.push(ExecutorEffect::Send { to: requester, message: Direct::Bid(bid.to_wire()) });
    }

    /// What runs took lately, or else the time to write a quarter of the context that is asked for after reading the rest.
    fn expected(&self, beacon: &Beacon) -> Duration {
        if let Some(usual) = self.usual_of(beacon.kind.pool()) {
            return usual;
        }
        let context = f64::from(beacon.requirement.min_context);
        let offer = self.offer.as_ref();
        offer
            .and_then(|offer| time_for(offer, &beacon.requirement, context * 0.75, context * 0.25))
            .unwrap_or(Duration::ZERO)
    }

    pub(super) fn on_release(
        &mut self,
        cx: &mut Ctx<'_>,
        from: NodeId,
        beacon: BeaconId,
        out: &mut Outbox<ExecutorEffect>,
    ) {
        self.waiting.retain(|waiting| waiting.beacon.author() != from || waiting.beacon.id != beacon);
        if self.reservations.remove(&(from, beacon)).is_some() {
            self.memory.answered(from);
            self.serve_waiting(cx, out);
        }
    }

    /// Frees the slots that nobody came for.
    pub(super) fn lapse(&mut self, now: Time, out: &mut Outbox<ExecutorEffect>) {
        let lapsed: Vec<_> = self.reservations.iter().filter(|(_, r)| r.until <= now).map(|(key, _)| *key).collect();
        for (requester, beacon) in lapsed {
            self.reservations.remove(&(requester, beacon));
            if requester != self.me {
                self.memory.lapsed(requester, self.config.hold, now);
            }
            out.push(ExecutorEffect::Event(ExecutorEvent::Lapsed { requester, beacon }));
        }
    }
}

/// Whether a beacon is neither too old, nor from the future, nor about a job that is over.
fn is_current(beacon: &Beacon, wall: WallTime) -> bool {
    let age = wall.since(beacon.made);
    let ahead = beacon.made.since(wall);
    age <= Duration::from_millis(MAX_BEACON_AGE_MS)
        && ahead <= Duration::from_millis(MAX_CLOCK_SKEW_MS)
        && beacon.deadline > beacon.made
}
