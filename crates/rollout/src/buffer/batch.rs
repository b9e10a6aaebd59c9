//! What the learner gets, and what it waits for.

use std::collections::BTreeMap;

use chorus_machine::{Outbox, Time};
use chorus_protocol::NodeId;
use chorus_protocol::rollout::{GroupId, Refusal};

use super::desk::Session;
use super::group::{Group, Member};
use super::{Batch, BatchGroup, Buffer, BufferEffect, LAGS, LearnerAwaits, Mode, Ready};

impl Buffer {
    /// Returns what a batch could use, and which groups it has to wait for.
    ///
    /// A group has to be used by the step `oldest + S`. When all updates up to a step have only just room for the groups that must be
    /// used by then, this batch needs its share of them, also if others are complete; otherwise some would be too old in the end.
    fn ready(&self) -> Ready {
        let staleness = u64::from(self.cfg.staleness());
        let mut ready = Ready::default();
        let (mut complete, mut due) = (Vec::new(), BTreeMap::<u64, u64>::new());
        for (id, group) in &self.groups {
            let Some(oldest) = group.oldest() else { continue };
            *due.entry(oldest.saturating_add(staleness)).or_default() += 1;
            if group.is_ready() {
                complete.push((oldest, *id));
            }
        }
        complete.sort_unstable();
        let batch = u64::try_from(self.cfg.batch).unwrap_or(u64::MAX);
        let (mut all, mut chosen) = (0, complete.iter().take(self.cfg.batch).peekable());
        let mut have = 0;
        for (by, groups) in due {
            all += groups;
            while chosen.next_if(|(oldest, _)| oldest.saturating_add(staleness) <= by).is_some() {
                have += 1;
            }
            let later = batch.saturating_mul(by.saturating_sub(self.step));
            if have < (all.saturating_sub(later)).min(batch) {
                let late = |group: &Group| group.oldest().is_some_and(|oldest| oldest.saturating_add(staleness) <= by);
                let missing = self.groups.iter().filter(|(_, group)| !group.is_ready() && late(group));
                ready.last_call = missing.map(|(id, _)| *id).collect();
                break;
            }
        }
        ready.complete = complete.into_iter().map(|(_, id)| id).collect();
        ready
    }

    pub(super) fn give_batch(&mut self, now: Time, out: &mut Outbox<BufferEffect>) {
        if !self.wanted || self.learning {
            return;
        }
        let ready = self.ready();
        if ready.complete.len() < self.cfg.batch {
            self.last_call = None;
            return;
        }
        if !ready.last_call.is_empty() {
            let since = *self.last_call.get_or_insert(now);
            if since + self.cfg.patience > now {
                return;
            }
        }
        self.last_call = None;
        let mut ids: Vec<GroupId> = ready.complete.into_iter().take(self.cfg.batch).collect();
        ids.sort_unstable();
        let groups = ids.into_iter().filter_map(|id| self.close(id)).collect();
        (self.wanted, self.learning, self.batch_at) = (false, true, Some(now));
        out.push(BufferEffect::Batch(Batch { step: self.step, groups }));
    }

    /// Takes a complete group out of the buffer.
    fn close(&mut self, id: GroupId) -> Option<BatchGroup> {
        let group = self.groups.remove(&id)?;
        let mut rollouts = Vec::with_capacity(group.members.len());
        for member in group.members {
            let Member::Here { frame, rollout, oldest, .. } = member else { continue };
            let lag = self.step.saturating_sub(oldest);
            self.tally.used += 1;
            self.tally.lags[usize::try_from(lag).unwrap_or(LAGS).min(LAGS - 1)] += 1;
            self.held_bytes = self.held_bytes.saturating_sub(rollout.weight());
            self.spent.entry(self.step).or_default().push(frame);
            rollouts.push((frame.sampler, lag, rollout));
        }
        Some(BatchGroup { id, environment: group.environment, seed: group.seed, rollouts })
    }

    /// The learner's weights moved on: what is now too old does not count, and is sampled anew.
    pub(super) fn stepped(&mut self, now: Time, step: u64, out: &mut Outbox<BufferEffect>) {
        if let Some(at) = self.batch_at.take() {
            self.pacing.step.add(now.since(at).as_secs_f64());
        }
        (self.step, self.learning) = (step, false);
        let staleness = u64::from(self.cfg.staleness());
        let mut stale = Vec::new();
        for (id, group) in &mut self.groups {
            for (member, number) in group.members.iter_mut().zip(0u16..) {
                if let Member::Here { frame, rollout, oldest, .. } = member
                    && oldest.saturating_add(staleness) < step
                {
                    stale.push((*frame, *id, number, rollout.weight()));
                    *member = Member::Idle;
                }
            }
        }
        for (frame, group, member, weight) in stale {
            self.held_bytes = self.held_bytes.saturating_sub(weight);
            self.let_go(frame);
            self.count_refused(Refusal::Stale);
            out.push(BufferEffect::Refused { sampler: frame.sampler, group, member, reason: Refusal::Stale });
        }
    }

    /// Returns why the learner has no batch.
    #[must_use]
    pub fn awaits(&self) -> LearnerAwaits {
        if !self.wanted || self.learning {
            return LearnerAwaits::Nothing;
        }
        if self.disk_failed {
            return LearnerAwaits::Disk;
        }
        let ready = self.ready();
        if ready.complete.len() >= self.cfg.batch {
            return ready.last_call.first().map_or(LearnerAwaits::Nothing, |id| LearnerAwaits::LastCall(*id));
        }
        let floor = match self.cfg.mode {
            Mode::Sequential => self.step,
            Mode::Streaming { staleness } => self.step.saturating_sub(u64::from(staleness)),
        };
        if self.published.is_none_or(|(_, step, _)| step < floor) {
            return LearnerAwaits::Version { step: floor };
        }
        if !self.sessions.values().any(Session::samples) {
            return LearnerAwaits::Sampler;
        }
        let out = self.groups.values().flat_map(|group| &group.members).filter_map(|member| match member {
            Member::Out { to, since, .. } => Some((*since, *to)),
            _ => None,
        });
        let longest: Option<NodeId> = out.min().map(|(_, to)| to);
        LearnerAwaits::Rollouts { ready: ready.complete.len(), batch: self.cfg.batch, longest }
    }
}
