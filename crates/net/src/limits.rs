//! Rates: token buckets, and what one peer has left of them.
//!
//! A refusal costs a strike. Strikes heal with time; a peer that has none left is flooding and is to be banned. So a peer that goes
//! over its rate now and then loses single messages, and one that does so all the time loses its connection.

use std::time::{Duration, Instant};

use crate::config::RateLimits;

/// A bucket holds this many seconds of its rate.
const BURST_SECONDS: f64 = 2.0;
/// Strikes that heal in a second.
const STRIKES_HEALED_PER_SECOND: f64 = 10.0;
/// Strikes that a malformed frame costs: nobody sends one by accident.
pub(crate) const MALFORMED_STRIKES: u32 = 20;

/// A token bucket.
#[derive(Clone, Debug)]
pub(crate) struct Bucket {
    capacity: f64,
    per_second: f64,
    tokens: f64,
    filled_at: Instant,
}

impl Bucket {
    /// Makes a full bucket.
    pub(crate) fn new(capacity: f64, per_second: f64, now: Instant) -> Self {
        Self { capacity, per_second, tokens: capacity, filled_at: now }
    }

    fn fill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.filled_at).as_secs_f64();
        self.tokens = (self.tokens + passed * self.per_second).min(self.capacity);
        self.filled_at = now;
    }

    /// Takes `amount`, or nothing.
    pub(crate) fn take(&mut self, amount: f64, now: Instant) -> bool {
        self.fill(now);
        let enough = self.tokens >= amount;
        if enough {
            self.tokens -= amount;
        }
        enough
    }

    fn has(&mut self, amount: f64, now: Instant) -> bool {
        self.fill(now);
        self.tokens >= amount
    }

    /// Whether it has been full for a while, so that forgetting it changes nothing.
    pub(crate) fn is_full(&mut self, now: Instant) -> bool {
        self.fill(now);
        self.tokens >= self.capacity
    }
}

/// What a peer's message is to be met with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Admission {
    /// Take it.
    Granted,
    /// Refuse it.
    Refused,
    /// Refuse it and ban the peer.
    Flood,
}

/// One peer's buckets.
#[derive(Debug)]
pub(crate) struct Meter {
    direct: [Bucket; 2],
    gossip: [Bucket; 2],
    strikes: Bucket,
}

impl Meter {
    pub(crate) fn new(limits: &RateLimits, now: Instant) -> Self {
        let bucket = |rate: u32| Bucket::new(f64::from(rate) * BURST_SECONDS, f64::from(rate), now);
        Self {
            direct: [bucket(limits.direct_messages), bucket(limits.direct_bytes)],
            gossip: [bucket(limits.gossip_messages), bucket(limits.gossip_bytes)],
            strikes: Bucket::new(f64::from(limits.strikes), STRIKES_HEALED_PER_SECOND, now),
        }
    }

    /// Weighs direct messages: all of them or none.
    pub(crate) fn direct(&mut self, messages: usize, bytes: usize, now: Instant) -> Admission {
        let granted = take_both(&mut self.direct, messages, bytes, now);
        self.settle(granted, now)
    }

    /// Weighs one gossiped message.
    pub(crate) fn gossip(&mut self, bytes: usize, now: Instant) -> Admission {
        let granted = take_both(&mut self.gossip, 1, bytes, now);
        self.settle(granted, now)
    }

    /// Notes misbehaviour of the given weight.
    pub(crate) fn strike(&mut self, weight: u32, now: Instant) -> Admission {
        if self.strikes.take(f64::from(weight), now) { Admission::Refused } else { Admission::Flood }
    }

    fn settle(&mut self, granted: bool, now: Instant) -> Admission {
        if granted { Admission::Granted } else { self.strike(1, now) }
    }

    /// Whether the peer starts afresh if it is forgotten now.
    pub(crate) fn is_idle(&mut self, now: Instant) -> bool {
        self.strikes.is_full(now) && self.direct.iter_mut().chain(&mut self.gossip).all(|bucket| bucket.is_full(now))
    }
}

fn take_both([messages, bytes]: &mut [Bucket; 2], count: usize, size: usize, now: Instant) -> bool {
    let (count, size) = (to_f64(count), to_f64(size));
    messages.has(count, now) && bytes.has(size, now) && messages.take(count, now) && bytes.take(size, now)
}

fn to_f64(value: usize) -> f64 {
    f64::from(u32::try_from(value).unwrap_or(u32::MAX))
}

/// Spreads a wait over 75 to 125 % of itself, so that nodes which lost the same peer do not all come back at once. `seed` is
/// anything that differs between nodes and between tries.
pub(crate) fn jitter(wait: Duration, seed: &[u8]) -> Duration {
    let hash = blake3::hash(seed);
    let spread = u32::from(hash.as_bytes()[0]) * 500 / 255;
    wait * (750 + spread) / 1000
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_bucket_grants_its_rate_and_no_more() {
        let start = Instant::now();
        let mut bucket = Bucket::new(20.0, 10.0, start);
        let mut granted = 0;
        for ms in 0..10_000 {
            granted += u32::from(bucket.take(1.0, start + Duration::from_millis(ms)));
        }
        assert!((118..=120).contains(&granted), "burst of 20 and 10 a second for 10 s: {granted}");
        assert!(!bucket.take(1.0, start), "time that runs backwards adds nothing");
    }

    #[test]
    fn a_steady_peer_is_never_struck_and_a_flood_is_banned() {
        let limits = RateLimits { direct_messages: 100, strikes: 50, ..RateLimits::default() };
        let start = Instant::now();
        let mut steady = Meter::new(&limits, start);
        for ms in (0..20_000).step_by(11) {
            assert_eq!(steady.direct(1, 100, start + Duration::from_millis(ms)), Admission::Granted);
        }
        let mut flood = Meter::new(&limits, start);
        let answers: Vec<_> = (0..400).map(|_| flood.direct(1, 100, start)).collect();
        assert_eq!(answers.iter().filter(|a| **a == Admission::Granted).count(), 200);
        assert_eq!(answers.iter().filter(|a| **a == Admission::Refused).count(), 50);
        assert_eq!(answers.last(), Some(&Admission::Flood));
        assert!(!flood.is_idle(start));
        assert!(flood.is_idle(start + Duration::from_secs(60)), "it heals");
    }

    #[test]
    fn bytes_count_as_well_as_messages() {
        let limits = RateLimits { gossip_bytes: 1000, ..RateLimits::default() };
        let now = Instant::now();
        let mut meter = Meter::new(&limits, now);
        assert_eq!(meter.gossip(1500, now), Admission::Granted);
        assert_eq!(meter.gossip(600, now), Admission::Refused);
        assert_eq!(meter.gossip(500, now), Admission::Granted);
    }

    #[test]
    fn jitter_stays_within_a_quarter() {
        let wait = Duration::from_secs(8);
        let waits: Vec<_> = (0..=255u8).map(|seed| jitter(wait, &[seed])).collect();
        assert!(waits.iter().all(|w| *w >= Duration::from_secs(6) && *w <= Duration::from_secs(10)));
        assert!(
            waits.iter().max().unwrap().checked_sub(*waits.iter().min().unwrap()).unwrap() > Duration::from_secs(3)
        );
    }
}
