//! What becomes of a frame: which of its rollouts count, when it is acknowledged, and that it counts once.

use std::collections::BTreeMap;
use std::sync::Arc;

use chorus_machine::{Outbox, Time};
use chorus_protocol::rollout::{Bulk, GroupId, Refusal, RolloutFrame, RolloutView};
use chorus_protocol::{List, NodeId, Verified};

use super::group::{Group, Member};
use super::{Buffer, BufferEffect, FrameKey, FrameState, MAX_FRAMES, MAX_SAMPLERS};

/// When a frame that was not taken may come again.
const RETRY_MS: u32 = 500;

impl Buffer {
    pub(super) fn frame(
        &mut self,
        now: Time,
        from: NodeId,
        frame: Verified<RolloutFrame>,
        out: &mut Outbox<BufferEffect>,
    ) {
        let key = FrameKey { sampler: frame.author(), sequence: frame.sequence() };
        let nack = |reason| BufferEffect::Send {
            to: from,
            message: Bulk::Nack { sequence: key.sequence, reason, retry_ms: RETRY_MS },
        };
        if *frame.policy() != self.cfg.policy || key.sampler != from {
            return out.push(nack(Refusal::WrongPolicy));
        }
        if let Some(reason) = self.has_no_room_for(key, &frame) {
            return out.push(nack(reason));
        }
        if self.settled.get(&from).is_some_and(|settled| settled.contains(key.sequence)) {
            return self.acknowledge_again(key, frame.len(), out);
        }
        if self.frames.contains_key(&key) {
            return; // It is on its way to the disk; the answer comes from there.
        }
        self.measure(now, from, &frame);
        let arrived = u32::try_from(frame.len()).unwrap_or(u32::MAX);
        let mut refusals = Vec::new();
        let state = self.take_in(key, &frame, &mut |group, member, reason| refusals.push((group, member, reason)));
        for (group, member, reason) in refusals {
            self.count_refused(reason);
            out.push(BufferEffect::Refused { sampler: from, group, member, reason });
        }
        self.delivered(now, from, arrived, &frame);
        if state.taken == 0 {
            self.settled.entry(from).or_default().insert(key.sequence);
            return out.push(ack(key, &state));
        }
        self.frames.insert(key, state);
        out.push(BufferEffect::Persist { key, frame });
    }

    /// Measures the time from assignment to arrival.
    fn measure(&mut self, now: Time, from: NodeId, frame: &RolloutFrame) {
        for view in frame.rollouts() {
            let member = self.groups.get(&view.group()).and_then(|group| group.members.get(usize::from(view.member())));
            if let Some(Member::Out { to, since, .. }) = member
                && *to == from
            {
                self.pacing.sample.add(now.since(*since).as_secs_f64());
            }
        }
    }

    /// Returns why a frame cannot be taken now, though it may later.
    fn has_no_room_for(&self, key: FrameKey, frame: &RolloutFrame) -> Option<Refusal> {
        let settled = self.settled.get(&key.sampler);
        if settled.is_some_and(|settled| settled.contains(key.sequence)) {
            return None;
        }
        if settled.is_some_and(|settled| !settled.is_near(key.sequence)) {
            return Some(Refusal::TooFarAhead);
        }
        let bytes = 8 * frame.completion_tokens() + 64 * frame.len();
        let crowded = self.frames.len() >= MAX_FRAMES
            || (settled.is_none() && self.settled.len() >= MAX_SAMPLERS)
            || self.held_bytes.saturating_add(bytes) > self.cfg.capacity_bytes;
        crowded.then_some(Refusal::Full)
    }

    /// Puts what counts into its groups.
    pub(super) fn take_in(
        &mut self,
        key: FrameKey,
        frame: &RolloutFrame,
        refuse: &mut dyn FnMut(GroupId, u16, Refusal),
    ) -> FrameState {
        let mut state = FrameState { durable: false, live: 0, taken: 0, refused: BTreeMap::new() };
        for view in frame.rollouts() {
            let (group, member) = (view.group(), view.member());
            match self.judge(key.sampler, &view) {
                Ok(oldest) => {
                    let rollout = Arc::new(view.to_rollout());
                    self.held_bytes = self.held_bytes.saturating_add(rollout.weight());
                    self.put(group, member, Member::Here { frame: key, rollout, oldest, durable: false });
                    state.taken += 1;
                    state.live += 1;
                    self.tally.taken += 1;
                }
                Err(reason) => {
                    self.release(key.sampler, group, member);
                    *state.refused.entry(reason).or_default() += 1;
                    refuse(group, member, reason);
                }
            }
        }
        state
    }

    /// Decides on one rollout. Returns the step of its oldest weights if it counts.
    fn judge(&mut self, sampler: NodeId, view: &RolloutView<'_>) -> Result<u64, Refusal> {
        let (id, member) = (view.group(), usize::from(view.member()));
        if id > self.opened && id <= self.adopt_until {
            // Handed out before a crash, after the last checkpoint. Its task is still the plan's.
            while self.opened < id {
                self.adopt(GroupId(self.opened.0 + 1));
            }
        }
        let group = self.groups.get(&id).ok_or(Refusal::ClosedGroup)?;
        if group.environment != *view.environment() || group.seed != view.seed() {
            return Err(Refusal::WrongTask);
        }
        match group.members.get(member) {
            None => return Err(Refusal::NotAssigned),
            Some(Member::Here { .. }) => return Err(Refusal::Duplicate),
            Some(_) if !group.was_given_to(&sampler) => return Err(Refusal::NotAssigned),
            Some(_) => {}
        }
        if 4 * view.prompt().len() + 8 * view.completion().len() + 128 > self.cfg.max_rollout_bytes {
            return Err(Refusal::TooLong);
        }
        let mut oldest = u64::MAX;
        for segment in view.segments() {
            oldest = oldest.min(*self.versions.get(&segment.version).ok_or(Refusal::UnknownVersion)?);
        }
        let fresh = oldest.saturating_add(u64::from(self.cfg.staleness())) >= self.next_step();
        if fresh { Ok(oldest) } else { Err(Refusal::Stale) }
    }

    /// Opens a group that was open before a restart.
    pub(super) fn adopt(&mut self, id: GroupId) {
        self.groups.insert(id, Group::new(self.cfg.plan.task(id), self.cfg.members, true));
        self.opened = self.opened.max(id);
    }

    /// Sets where a member stands; whoever was asked for it is asked no more.
    pub(super) fn put(&mut self, id: GroupId, member: u16, to: Member) {
        let slot = self.groups.get_mut(&id).and_then(|group| group.members.get_mut(usize::from(member)));
        let Some(slot) = slot else { return };
        if let Member::Out { to, .. } = slot
            && let Some(session) = self.sessions.get_mut(to)
        {
            session.out.remove(&(id, member));
        }
        *slot = to;
    }

    /// Takes a member back from a sampler, if it is still that one's.
    pub(super) fn release(&mut self, sampler: NodeId, id: GroupId, member: u16) -> bool {
        let slot = self.groups.get(&id).and_then(|group| group.members.get(usize::from(member)));
        let theirs = matches!(slot, Some(Member::Out { to, .. }) if *to == sampler);
        if theirs {
            self.put(id, member, Member::Idle);
        }
        theirs
    }

    pub(super) fn persisted(&mut self, key: FrameKey, out: &mut Outbox<BufferEffect>) {
        self.disk_failed = false;
        self.settled.entry(key.sampler).or_default().insert(key.sequence);
        self.mark_durable(key);
        if let Some(state) = self.frames.get(&key) {
            out.push(ack(key, state));
        }
    }

    pub(super) fn mark_durable(&mut self, key: FrameKey) {
        let Some(state) = self.frames.get_mut(&key) else { return };
        state.durable = true;
        for member in self.groups.values_mut().flat_map(|group| &mut group.members) {
            if let Member::Here { frame, durable, .. } = member {
                *durable |= *frame == key;
            }
        }
    }

    /// The disk did not take it: nothing of it is here, and it may come again.
    pub(super) fn persist_failed(&mut self, key: FrameKey, out: &mut Outbox<BufferEffect>) {
        self.disk_failed = true;
        let Some(state) = self.frames.remove(&key) else { return };
        for member in self.groups.values_mut().flat_map(|group| &mut group.members) {
            if let Member::Here { frame, rollout, .. } = member
                && *frame == key
            {
                self.held_bytes = self.held_bytes.saturating_sub(rollout.weight());
                *member = Member::Idle;
            }
        }
        self.tally.taken = self.tally.taken.saturating_sub(u64::from(state.taken));
        let message = Bulk::Nack { sequence: key.sequence, reason: Refusal::Disk, retry_ms: RETRY_MS };
        out.push(BufferEffect::Send { to: key.sampler, message });
    }

    fn acknowledge_again(&mut self, key: FrameKey, rollouts: usize, out: &mut Outbox<BufferEffect>) {
        match self.frames.get(&key) {
            Some(state) => out.push(ack(key, state)),
            None => {
                let many = u32::try_from(rollouts).unwrap_or(u32::MAX);
                let refused = [(Refusal::Duplicate, many)].into();
                out.push(ack(key, &FrameState { durable: true, live: 0, taken: 0, refused }));
            }
        }
    }
}

fn ack(key: FrameKey, state: &FrameState) -> BufferEffect {
    let refused = List::truncated(state.refused.iter().map(|(reason, many)| (*reason, *many)));
    BufferEffect::Send { to: key.sampler, message: Bulk::Ack { sequence: key.sequence, taken: state.taken, refused } }
}
