//! A node's clocks. The world has one time; no node ever sees it.
//!
//! A monotonic clock starts at an epoch of its own in every life, and may run fast or slow. A wall clock is the world's, off by
//! something that a fault can change at any moment.

use chorus_machine::{Time, WallTime};

/// The wall clock's reading when the world begins: 2026-01-01T00:00:00Z, in milliseconds since the Unix epoch.
pub const WALL_START_MS: u64 = 1_767_225_600_000;
const MILLION: i128 = 1_000_000;

/// One node's clocks.
#[derive(Clone, Copy, Debug, Default)]
pub struct Clock {
    /// What the monotonic clock shows at the world's beginning, in nanoseconds.
    pub epoch: u64,
    /// Parts in a million by which the monotonic clock runs fast.
    pub drift_ppm: i32,
    /// Milliseconds by which the wall clock is ahead.
    pub skew_ms: i64,
}

impl Clock {
    /// Returns what the monotonic clock shows.
    #[must_use]
    pub fn local(&self, world: Time) -> Time {
        let passed = i128::from(world.as_nanos());
        let drift = if self.drift_ppm == 0 { 0 } else { passed * i128::from(self.drift_ppm) / MILLION };
        Time::from_nanos(u64::try_from(i128::from(self.epoch) + passed + drift).unwrap_or(u64::MAX))
    }

    /// Returns the first moment of the world at which the monotonic clock shows at least `local`.
    #[must_use]
    pub fn world(&self, local: Time) -> Time {
        let passed = i128::from(local.as_nanos()) - i128::from(self.epoch);
        if passed <= 0 {
            return Time::ZERO;
        }
        let rate = MILLION + i128::from(self.drift_ppm);
        let scaled = if self.drift_ppm == 0 { passed } else { (passed * MILLION).div_euclid(rate) };
        let mut world = Time::from_nanos(u64::try_from(scaled).unwrap_or(u64::MAX));
        // Both directions round down; at most two steps make up for it.
        while self.local(world) < local && world.as_nanos() < u64::MAX {
            world = Time::from_nanos(world.as_nanos() + 1);
        }
        world
    }

    /// Returns what the wall clock shows.
    #[must_use]
    pub fn wall(&self, world: Time) -> WallTime {
        let millis = WALL_START_MS + world.as_nanos() / 1_000_000;
        WallTime::from_millis(millis.saturating_add_signed(self.skew_ms))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wake_up_is_never_early_and_never_more_than_a_step_late() {
        for drift_ppm in [-200, -1, 0, 1, 37, 200] {
            let clock = Clock { epoch: 123_456_789, drift_ppm, skew_ms: -5 };
            for nanos in [123_456_789, 123_456_790, 1_000_000_007, 60_000_000_001, 86_400_000_000_003] {
                let local = Time::from_nanos(nanos);
                let world = clock.world(local);
                assert!(clock.local(world) >= local, "early at {drift_ppm} ppm");
                let before = Time::from_nanos(world.as_nanos().saturating_sub(1));
                assert!(world == Time::ZERO || clock.local(before) < local, "late at {drift_ppm} ppm");
            }
        }
    }

    #[test]
    fn a_skewed_wall_clock_is_off_by_its_skew() {
        let clock = Clock { skew_ms: -2_500, ..Clock::default() };
        assert_eq!(clock.wall(Time::from_millis(4_000)).as_millis(), WALL_START_MS + 1_500);
    }
}
