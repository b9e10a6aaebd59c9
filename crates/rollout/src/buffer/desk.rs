//! Who samples what: sessions, opening of groups, assignments, and members that go to another.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use chorus_machine::{Outbox, Time};
use chorus_protocol::rollout::{Assignment, Bulk, Credit, GroupId, Hello, RolloutFrame, Want};
use chorus_protocol::{List, NodeId};

use super::group::{Group, Member};
use super::sequences::Sequences;
use super::{Buffer, BufferEffect, Mode};
use crate::pacing::{Rate, floor};

/// Work that a sampler has ahead of it, at its measured rate.
const LOOKAHEAD: Duration = Duration::from_secs(2);
/// A slow sampler has this many times what its queue takes at its measured rate.
const PATIENCE: f64 = 4.0;
/// Members taken back in a row, after which a sampler gets one at a time until it delivers.
const MISSES: u32 = 3;
/// Members of a sampler whose fate is remembered.
const FATES: u32 = 4_096;
/// Assignments in one message.
const MAX_WORK: usize = 256;

/// A sampler that is connected, or was a moment ago.
#[derive(Debug, Default)]
pub(super) struct Session {
    pub(super) slots: u16,
    /// The step of the weights that it serves.
    pub(super) serving: Option<u64>,
    /// Members assigned since its hello.
    pub(super) until: u64,
    /// Members that it has not delivered.
    pub(super) out: BTreeSet<(GroupId, u16)>,
    pub(super) rate: Rate,
    pub(super) gone: Option<Time>,
    /// Its process: another one knows nothing of what this one was asked.
    pub(super) boot: u64,
    /// Times in a row that a member was taken back from it.
    pub(super) misses: u32,
    /// It holds a lease.
    pub(super) hired: bool,
    /// Members that it delivered and that counted, and members that came to nothing. Older ones fade.
    fate: (u32, u32),
}

impl Session {
    /// How many members it may have before it: what it does at a time, and what it does in [`LOOKAHEAD`]. Whoever is slow, or not
    /// known, gets nothing to keep waiting: others may be done with it sooner.
    fn room(&self) -> usize {
        let slots = usize::from(self.slots);
        let ahead = self.rate.per_second().map_or(0.0, |rate| rate * LOOKAHEAD.as_secs_f64());
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and 65,536")]
        let ahead = ahead.ceil().clamp(0.0, 65_536.0) as usize;
        // Who let members lie is tried with one at a time.
        let most = match self.misses {
            _ if !self.samples() => 0,
            0..MISSES => slots + ahead,
            _ => 1,
        };
        most.saturating_sub(self.out.len())
    }

    /// Whether it is there to be given work.
    pub(super) fn samples(&self) -> bool {
        self.slots > 0 && self.gone.is_none() && self.hired
    }

    /// Notes what became of members that it was given.
    fn note(&mut self, counted: u32, lost: u32) {
        let (good, bad) = self.fate;
        self.fate = (good.saturating_add(counted), bad.saturating_add(lost));
        if self.fate.0.saturating_add(self.fate.1) > FATES {
            self.fate = (self.fate.0 / 2, self.fate.1 / 2);
        }
    }

    /// The share of what it was given that came and counted. Whoever was given nothing yet is believed in.
    pub(super) fn reliability(&self) -> f64 {
        let (good, bad) = (f64::from(self.fate.0) + 1.0, f64::from(self.fate.1));
        good / (good + bad)
    }

    /// When it would be done with one member more, in seconds, as far as that is known.
    fn wait(&self) -> f64 {
        #[allow(clippy::cast_precision_loss, reason = "small numbers")]
        let queue = (self.out.len() + 1) as f64;
        let rate = self.rate.per_second().unwrap_or_else(|| f64::from(self.slots)).max(1e-3);
        queue / rate * f64::from(1u32 << self.misses.min(16))
    }
}

impl Buffer {
    pub(super) fn hello(&mut self, from: NodeId, hello: &Hello, out: &mut Outbox<BufferEffect>) {
        if hello.policy != self.cfg.policy {
            return;
        }
        if let Some(settled) = self.settled.get_mut(&from) {
            settled.skip_to(hello.first_unacknowledged);
        } else if self.settled.len() < super::MAX_SAMPLERS {
            self.settled.entry(from).or_default().skip_to(hello.first_unacknowledged);
        }
        let session = self.sessions.entry(from).or_default();
        let lost = if session.boot == hello.boot { BTreeSet::new() } else { session.out.clone() };
        (session.slots, session.gone, session.boot) = (hello.slots, None, hello.boot);
        session.hired = self.hired.contains(&from);
        session.serving = hello.serving.map(|(_, step)| step);
        // What the same process was given before is still its own: it goes on after a reconnection.
        session.until = 0;
        for (group, member) in lost {
            self.tally.reissued += u64::from(self.release(from, group, member));
        }
        let reply = Hello {
            policy: self.cfg.policy.clone(),
            serving: self.published.map(|(version, step, _)| (version, step)),
            slots: 0,
            // Numbers go on from here, should the sampler have lost its count: above all that is settled, not in a gap.
            first_unacknowledged: self.settled.get(&from).map_or(1, Sequences::next),
            boot: 0,
        };
        out.push(BufferEffect::Send { to: from, message: Bulk::Hello(reply) });
        self.tell(from, Vec::new(), out);
    }

    pub(super) fn gone(&mut self, now: Time, from: NodeId) {
        if let Some(session) = self.sessions.get_mut(&from) {
            session.gone = Some(now);
        }
        self.note_reach(now);
    }

    /// Notes how far the slowest sampler is, of those that have work.
    fn note_reach(&mut self, now: Time) {
        let sampling = self.sessions.values().filter(|session| session.samples());
        // Who serves nothing yet is nowhere.
        if let Some(Some(step)) = sampling.map(|session| session.serving).min() {
            self.reach.served(now, step);
        }
    }

    pub(super) fn hired(&mut self, node: NodeId) {
        self.hired.insert(node);
        self.set_hired(node, true);
    }

    pub(super) fn dismissed(&mut self, node: NodeId) {
        self.hired.remove(&node);
        self.set_hired(node, false);
    }

    fn set_hired(&mut self, node: NodeId, hired: bool) {
        if let Some(session) = self.sessions.get_mut(&node) {
            session.hired = hired;
        }
    }

    pub(super) fn message(&mut self, now: Time, from: NodeId, message: Bulk) {
        match message {
            Bulk::GiveUp(reports) => {
                for report in reports {
                    if self.release(from, report.group, report.member) {
                        self.note_fate(from, 0, 1);
                        self.tally.reissued += 1;
                        self.count_refused(report.reason);
                    }
                }
            }
            Bulk::Serving { version, step } => {
                if let Some((published, _, at)) = self.published
                    && published == version
                {
                    self.pacing.spread.add(now.since(at).as_secs_f64());
                }
                if let Some(session) = self.sessions.get_mut(&from) {
                    session.serving = Some(step);
                }
                self.note_reach(now);
            }
            _ => {}
        }
    }

    fn note_fate(&mut self, node: NodeId, counted: u32, lost: u32) {
        if let Some(session) = self.sessions.get_mut(&node) {
            session.note(counted, lost);
        }
    }

    /// Measures what a sampler delivered, and how much of it counts.
    pub(super) fn delivered(&mut self, now: Time, from: NodeId, many: u32, frame: &RolloutFrame) {
        let Some(session) = self.sessions.get_mut(&from) else { return };
        session.note(many, u32::try_from(frame.len()).unwrap_or(u32::MAX).saturating_sub(many));
        session.rate.add(now, many);
        session.misses = 0;
        // What it delivered and what was refused is off its desk in any case.
        for view in frame.rollouts() {
            session.out.remove(&(view.group(), view.member()));
        }
    }

    /// Members whose time is up, or whose sampler stays away, go to others.
    pub(super) fn expire_members(&mut self, now: Time) {
        let away: Vec<NodeId> = self
            .sessions
            .iter()
            .filter(|(_, session)| session.gone.is_some_and(|at| at + self.cfg.grace <= now))
            .map(|(id, _)| *id)
            .collect();
        let mut lost = Vec::new();
        for (id, group) in &self.groups {
            for (member, number) in group.members.iter().zip(0u16..) {
                if let Member::Out { to, deadline, .. } = member
                    && (*deadline <= now || away.contains(to))
                {
                    lost.push((*to, *id, number));
                }
            }
        }
        for (sampler, group, member) in lost {
            if self.release(sampler, group, member) {
                self.tally.reissued += 1;
                if let Some(session) = self.sessions.get_mut(&sampler) {
                    session.misses = session.misses.saturating_add(1);
                    session.note(0, 1);
                }
            }
        }
        for sampler in away {
            self.sessions.remove(&sampler);
        }
    }

    /// Hands out members that nobody samples, the oldest group first, and opens groups while they can be used in time.
    pub(super) fn assign(&mut self, now: Time, out: &mut Outbox<BufferEffect>) {
        if self.is_quiet(now) {
            return;
        }
        let Some((version, published, _)) = self.published else { return };
        let mut work: BTreeMap<NodeId, Vec<Assignment>> = BTreeMap::new();
        let mut ahead = 0;
        let mut next = self.groups.keys().next().copied();
        loop {
            let id = match next {
                Some(id) => id,
                None => match self.open(ahead, published) {
                    Some(id) => id,
                    None => break,
                },
            };
            let floor = floor(self.next_step(), ahead, self.cfg.batch, self.cfg.staleness());
            let want = match self.cfg.mode {
                Mode::Sequential => Want::Exactly { version, step: published },
                Mode::Streaming { .. } => Want::AtLeast { step: floor },
            };
            if floor > published || !self.assign_group(now, id, (want, floor), &mut work) {
                break;
            }
            ahead += 1;
            next = self.groups.range(GroupId(id.0 + 1)..).next().map(|(id, _)| *id);
        }
        for (sampler, work) in work {
            self.tell(sampler, work, out);
        }
    }

    /// After a restart whoever was asked before still delivers: what comes within the grace need not be sampled again.
    fn is_quiet(&mut self, now: Time) -> bool {
        if self.alone && !self.sessions.is_empty() {
            (self.alone, self.quiet_until) = (false, Some(now + self.cfg.grace));
        }
        self.quiet_until = self.quiet_until.filter(|until| *until > now);
        self.quiet_until.is_some()
    }

    /// Opens one group more, if the bound, the room, the learner's need and the samplers allow it.
    fn open(&mut self, ahead: usize, published: u64) -> Option<GroupId> {
        let members = usize::from(self.cfg.members);
        let floor = floor(self.next_step(), ahead, self.cfg.batch, self.cfg.staleness());
        let wanted = match self.cfg.mode {
            Mode::Sequential => self.wanted && ahead < self.cfg.batch,
            Mode::Streaming { .. } => ahead < self.pacing.enough(self.cfg.batch),
        };
        let (open, _, held) = self.fill();
        let missing = (open + 1) * members - held;
        let fits = (open + 1) * members <= self.cfg.capacity
            && self.held_bytes.saturating_add(missing.saturating_mul(self.cfg.max_rollout_bytes))
                <= self.cfg.capacity_bytes;
        let someone = self.sessions.values().any(|session| session.room() > 0);
        if floor > published || !wanted || !fits || !someone {
            return None;
        }
        let id = GroupId(self.opened.0 + 1);
        self.opened = id;
        self.groups.insert(id, Group::new(self.cfg.plan.task(id), self.cfg.members, id <= self.adopt_until));
        Some(id)
    }

    /// Gives a group's idle members to whoever is done with them first. Returns whether all found a sampler.
    fn assign_group(
        &mut self,
        now: Time,
        id: GroupId,
        (want, floor): (Want, u64),
        work: &mut BTreeMap<NodeId, Vec<Assignment>>,
    ) -> bool {
        let Some(group) = self.groups.get_mut(&id) else { return true };
        let mut given = Vec::new();
        let mut all = true;
        for (slot, number) in group.members.iter_mut().zip(0u16..) {
            if !matches!(slot, Member::Idle) {
                continue;
            }
            let able = self
                .sessions
                .iter_mut()
                .filter(|(id, session)| session.room() > 0 && work.get(*id).is_none_or(|work| work.len() < MAX_WORK));
            let best = able.min_by(|(a_id, a), (b_id, b)| a.wait().total_cmp(&b.wait()).then(a_id.cmp(b_id)));
            let Some((to, session)) = best.map(|(to, session)| (*to, session)) else {
                all = false;
                break;
            };
            let allowed = self.cfg.patience.max(Duration::from_secs_f64((session.wait() * PATIENCE).min(86_400.0)));
            *slot = Member::Out { to, since: now, deadline: now + allowed, floor };
            if session.out.is_empty() {
                session.rate.begin(now);
            }
            session.out.insert((id, number));
            session.until += 1;
            given.push(to);
            let work = work.entry(to).or_default();
            match work.last_mut() {
                Some(last) if last.group == id && last.first + last.members == number => last.members += 1,
                _ => work.push(Assignment {
                    group: id,
                    environment: group.environment.clone(),
                    seed: group.seed,
                    first: number,
                    members: 1,
                    want,
                    deadline_ms: u32::try_from(allowed.as_millis()).unwrap_or(u32::MAX),
                }),
            }
        }
        given.dedup();
        given.into_iter().for_each(|to| group.give_to(to));
        all
    }

    /// Tells every sampler where the trainer stands.
    pub(super) fn tell_credit(&mut self, out: &mut Outbox<BufferEffect>) {
        let connected: Vec<NodeId> =
            self.sessions.iter().filter(|(_, session)| session.gone.is_none()).map(|(id, _)| *id).collect();
        for to in connected {
            self.tell(to, Vec::new(), out);
        }
    }

    fn tell(&self, to: NodeId, work: Vec<Assignment>, out: &mut Outbox<BufferEffect>) {
        let (Some((version, step, _)), Some(session)) = (self.published, self.sessions.get(&to)) else { return };
        let credit = Credit { until: session.until, version, step, staleness: self.cfg.staleness() };
        out.push(BufferEffect::Send { to, message: Bulk::Assign { credit, work: List::truncated(work) } });
    }
}
