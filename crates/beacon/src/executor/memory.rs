//! What an executor must not forget too soon: which beacons it heard, which tokens it saw, what it answered.
//!
//! Everything here is bounded in number and in time, and bounded per requester, so that one that floods forgets only its own.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use chorus_machine::Time;
use chorus_protocol::limits::{MAX_BEACON_AGE_MS, MAX_CLOCK_SKEW_MS};
use chorus_protocol::message::Direct;
use chorus_protocol::{BeaconId, JobId, NodeId, WallTime};

/// Beacons remembered, to answer each once.
const MAX_HEARD: usize = 32_768;
/// Beacons remembered of one requester: 45 a second for as long as they are remembered.
const MAX_HEARD_EACH: usize = 4_096;
/// How long a beacon is remembered at least: while a copy of it could still pass for current, by whatever clock.
pub(super) const KEEP_HEARD: Duration = Duration::from_millis(MAX_BEACON_AGE_MS + MAX_CLOCK_SKEW_MS);
/// How often what has had its time is looked for.
const PURGE_EVERY: Duration = Duration::from_secs(5);
/// Tokens remembered, over all requesters and of one.
const MAX_TOKENS: usize = 16_384;
const MAX_TOKENS_EACH: usize = 1_024;
/// Outcomes kept to be repeated, and for how long.
const MAX_OUTCOMES: usize = 32;
const KEEP_OUTCOME: Duration = Duration::from_secs(60);
/// How long a cancellation that came before its grant is remembered.
const KEEP_CANCELLED: Duration = Duration::from_secs(60);
/// Requesters whose lapsed reservations are counted.
const MAX_WASTERS: usize = 1_024;
/// Reservations in a row that a requester may let lapse before it is passed over for a while.
const FORGIVEN_LAPSES: u32 = 3;
/// The longest that a requester is passed over.
const MAX_MUTE: Duration = Duration::from_secs(60);

/// A beacon that was heard: the reference for its requester's clock.
#[derive(Clone, Copy, Debug)]
pub(super) struct Heard {
    pub(super) arrived: Time,
    pub(super) made: WallTime,
    until: Time,
}

#[derive(Clone, Copy, Debug)]
struct Token {
    fence: u64,
    until: Time,
}

#[derive(Debug)]
struct Kept {
    requester: NodeId,
    job: JobId,
    fence: u64,
    until: Time,
    message: Direct,
}

#[derive(Debug, Default)]
pub(super) struct Memory {
    /// By requester: nobody can use up another's id or another's room.
    heard: BTreeMap<NodeId, BTreeMap<BeaconId, Heard>>,
    heard_in_all: usize,
    /// The highest token seen per requester and job, granted or cancelled.
    tokens: BTreeMap<(NodeId, JobId), Token>,
    outcomes: VecDeque<Kept>,
    wasters: BTreeMap<NodeId, (u32, Time)>,
    purge_at: Time,
}

impl Memory {
    /// Notes a beacon until `until`. Returns false when it was heard before, or when its requester has flooded.
    pub(super) fn hear(&mut self, beacon: BeaconId, requester: NodeId, made: WallTime, now: Time, until: Time) -> bool {
        if self.heard_in_all >= MAX_HEARD {
            self.forget_heard(now);
        }
        let own = self.heard.get(&requester);
        if own.is_some_and(|own| own.contains_key(&beacon) || own.len() >= MAX_HEARD_EACH) {
            return false;
        }
        if self.heard_in_all >= MAX_HEARD {
            return false;
        }
        self.heard.entry(requester).or_default().insert(beacon, Heard { arrived: now, made, until });
        self.heard_in_all += 1;
        true
    }

    fn forget_heard(&mut self, now: Time) {
        self.heard.retain(|_, own| {
            own.retain(|_, heard| heard.until > now);
            !own.is_empty()
        });
        self.heard_in_all = self.heard.values().map(BTreeMap::len).sum();
    }

    /// Returns when and with which clock reading a requester's beacon came.
    pub(super) fn heard(&self, beacon: BeaconId, requester: NodeId) -> Option<Heard> {
        self.heard.get(&requester)?.get(&beacon).copied()
    }

    /// Returns whether a token is no newer than one already seen for this job.
    pub(super) fn is_stale(&self, requester: NodeId, job: JobId, fence: u64) -> bool {
        self.tokens.get(&(requester, job)).is_some_and(|token| fence <= token.fence)
    }

    /// Remembers a token until `until`. Returns false when there is no room for another job of this requester.
    pub(super) fn see(&mut self, requester: NodeId, job: JobId, fence: u64, now: Time, until: Time) -> bool {
        let key = (requester, job);
        if !self.tokens.contains_key(&key) && !self.has_room(requester, now) {
            return false;
        }
        let token = self.tokens.entry(key).or_insert(Token { fence, until });
        token.fence = token.fence.max(fence);
        token.until = token.until.max(until);
        true
    }

    /// Remembers that a lease was taken back, also when it never came. Forgotten outcomes of it are dropped.
    pub(super) fn cancel(&mut self, requester: NodeId, job: JobId, fence: u64, now: Time) {
        self.see(requester, job, fence, now, now + KEEP_CANCELLED);
        self.outcomes.retain(|kept| (kept.requester, kept.job) != (requester, job) || kept.fence > fence);
    }

    fn has_room(&mut self, requester: NodeId, now: Time) -> bool {
        if self.tokens.len() >= MAX_TOKENS {
            self.tokens.retain(|_, token| token.until > now);
        }
        let first = JobId::from_bytes([0; 16]);
        let last = JobId::from_bytes([0xff; 16]);
        let own = self.tokens.range((requester, first)..=(requester, last)).count();
        self.tokens.len() < MAX_TOKENS && own < MAX_TOKENS_EACH
    }

    /// Keeps an outcome, to be repeated if its grant is.
    pub(super) fn keep(&mut self, requester: NodeId, job: JobId, fence: u64, now: Time, message: Direct) {
        if self.outcomes.len() >= MAX_OUTCOMES {
            self.outcomes.pop_front();
        }
        self.outcomes.push_back(Kept { requester, job, fence, until: now + KEEP_OUTCOME, message });
    }

    /// Returns the outcome of exactly this lease, if it is still kept.
    pub(super) fn outcome(&self, requester: NodeId, job: JobId, fence: u64) -> Option<&Direct> {
        let same = |kept: &&Kept| kept.requester == requester && kept.job == job && kept.fence == fence;
        self.outcomes.iter().find(same).map(|kept| &kept.message)
    }

    /// Counts a reservation that lapsed; from the fourth in a row on its requester is passed over, each time twice as long.
    pub(super) fn lapsed(&mut self, requester: NodeId, hold: Duration, now: Time) {
        if self.wasters.len() >= MAX_WASTERS && !self.wasters.contains_key(&requester) {
            self.wasters.retain(|_, (_, until)| *until > now);
            if self.wasters.len() >= MAX_WASTERS {
                return;
            }
        }
        let (lapses, until) = self.wasters.entry(requester).or_insert((0, now));
        *lapses = lapses.saturating_add(1);
        let doublings = lapses.saturating_sub(FORGIVEN_LAPSES).min(16);
        let mute = if doublings == 0 { Duration::ZERO } else { hold.saturating_mul(1 << doublings).min(MAX_MUTE) };
        *until = now + mute;
    }

    /// Notes that a requester took or gave back what was reserved for it.
    pub(super) fn answered(&mut self, requester: NodeId) {
        self.wasters.remove(&requester);
    }

    /// Returns whether a requester is passed over.
    pub(super) fn is_muted(&self, requester: NodeId, now: Time) -> bool {
        self.wasters.get(&requester).is_some_and(|(_, until)| *until > now)
    }

    /// Forgets what has had its time, once in a while.
    pub(super) fn purge(&mut self, now: Time) {
        if now < self.purge_at {
            return;
        }
        self.purge_at = now + PURGE_EVERY;
        self.forget_heard(now);
        self.tokens.retain(|_, token| token.until > now);
        self.outcomes.retain(|kept| kept.until > now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::id;

    const SOON: Time = Time::from_millis(1_000);

    #[test]
    fn a_flooding_requester_forgets_only_its_own() {
        let mut memory = Memory::default();
        for n in 0..5_000u64 {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&n.to_le_bytes());
            memory.see(id(1), JobId::from_bytes(bytes), 7, Time::ZERO, SOON);
            memory.hear(BeaconId::from_bytes(bytes), id(1), WallTime::default(), Time::ZERO, SOON);
        }
        let job = JobId::from_bytes([9; 16]);
        assert!(memory.see(id(2), job, 7, Time::ZERO, SOON), "another requester still has room");
        assert!(memory.hear(BeaconId::from_bytes([9; 16]), id(2), WallTime::default(), Time::ZERO, SOON));
        assert!(!memory.see(id(1), job, 7, Time::ZERO, SOON));
        assert_eq!((memory.tokens.len(), memory.heard_in_all), (MAX_TOKENS_EACH + 1, MAX_HEARD_EACH + 1));
        memory.purge(SOON);
        assert!(memory.see(id(1), job, 7, SOON, SOON));
        assert_eq!((memory.heard_in_all, memory.heard.len()), (0, 0));
    }

    #[test]
    fn an_id_is_its_requester_s_own() {
        let mut memory = Memory::default();
        let beacon = BeaconId::from_bytes([1; 16]);
        assert!(memory.hear(beacon, id(1), WallTime::default(), Time::ZERO, SOON));
        assert!(!memory.hear(beacon, id(1), WallTime::default(), Time::ZERO, SOON));
        assert!(memory.hear(beacon, id(2), WallTime::default(), Time::ZERO, SOON), "taken by nobody else");
        assert!(memory.heard(beacon, id(1)).is_some() && memory.heard(beacon, id(3)).is_none());
    }

    #[test]
    fn a_requester_that_wastes_slots_is_passed_over_for_longer_and_longer() {
        let (mut memory, hold) = (Memory::default(), Duration::from_secs(1));
        for _ in 0..FORGIVEN_LAPSES {
            memory.lapsed(id(1), hold, Time::ZERO);
            assert!(!memory.is_muted(id(1), Time::ZERO));
        }
        memory.lapsed(id(1), hold, Time::ZERO);
        assert!(memory.is_muted(id(1), Time::from_millis(1_999)) && !memory.is_muted(id(1), Time::from_millis(2_000)));
        for _ in 0..40 {
            memory.lapsed(id(1), hold, Time::ZERO);
        }
        assert!(!memory.is_muted(id(1), Time::ZERO + MAX_MUTE), "never for ever");
        memory.answered(id(1));
        assert!(!memory.is_muted(id(1), Time::ZERO));
    }
}
