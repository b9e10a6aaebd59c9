//! How long answers to a beacon take to come, so that an election waits for them as long as they need and no longer.
//!
//! On a LAN an answer is there in milliseconds. Over long links it crosses a few hops of gossip, and a bidder that has no
//! connection yet makes one first. The window follows what was seen: a smoothed time and its mean deviation, kept as RFC 6298
//! keeps them for round trips, and `smoothed + 4 · deviation` between the configured bounds.
//!
//! Every first answer counts, also one that comes after its election was decided: if only those in time counted, the window
//! could never find out that it is too short. An answer later than the upper bound counts as that bound, so that a node that
//! dawdles moves the window no further than one that is merely far away.

use std::time::Duration;

use crate::config::BeaconConfig;

/// Weight of a new time in the smoothed one, and of a new deviation in the mean one: one part in so many.
const SMOOTHING: u32 = 8;
const DEVIATION_SMOOTHING: u32 = 4;
/// Deviations added to the smoothed time.
const DEVIATIONS: u32 = 4;

/// The times that answers took, smoothed.
#[derive(Debug, Default)]
pub(super) struct Pace(Option<Smoothed>);

#[derive(Clone, Copy, Debug)]
struct Smoothed {
    time: Duration,
    deviation: Duration,
}

impl Pace {
    /// Takes the time from a beacon to an answer.
    pub(super) fn take(&mut self, took: Duration, config: &BeaconConfig) {
        let took = took.min(config.window_max);
        let first = Smoothed { time: took, deviation: took / 2 };
        self.0 = Some(self.0.map_or(first, |old| {
            let off = old.time.abs_diff(took);
            Smoothed {
                time: (old.time * (SMOOTHING - 1) + took) / SMOOTHING,
                deviation: (old.deviation * (DEVIATION_SMOOTHING - 1) + off) / DEVIATION_SMOOTHING,
            }
        }));
    }

    /// Returns how long an election that opens now compares bids.
    pub(super) fn window(&self, config: &BeaconConfig) -> Duration {
        let needed = self.0.map_or(Duration::ZERO, |seen| seen.time + seen.deviation * DEVIATIONS);
        needed.clamp(config.window, config.window_max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn after(times: impl IntoIterator<Item = u64>) -> Duration {
        let (mut pace, config) = (Pace::default(), BeaconConfig::default());
        times.into_iter().for_each(|time| pace.take(ms(time), &config));
        pace.window(&config)
    }

    #[test]
    fn it_is_short_until_something_was_seen_and_on_a_lan() {
        let shortest = BeaconConfig::default().window;
        assert_eq!(after([]), shortest);
        assert_eq!(after([2, 3, 2, 40, 3]), shortest);
    }

    #[test]
    fn it_follows_what_answers_take_up_and_down() {
        // Near nodes take 60 ms, far ones 260 ms.
        let far = after((0..40).map(|n| if n % 2 == 0 { 60 } else { 260 }));
        assert!(far >= ms(260) && far < ms(600), "{far:?}");
        let steady = after([250; 40]);
        assert!(steady >= ms(250) && steady < ms(270), "{steady:?}");
        let near_again = after([250; 40].into_iter().chain([10; 40]));
        assert_eq!(near_again, BeaconConfig::default().window);
    }

    #[test]
    fn nobody_moves_it_past_its_bound() {
        assert_eq!(after([60_000; 100]), BeaconConfig::default().window_max);
        let spoilt = after([10; 40].into_iter().chain([60_000]));
        assert!(spoilt <= BeaconConfig::default().window_max);
        assert_eq!(
            after([60_000; 100].into_iter().chain([10; 60])),
            BeaconConfig::default().window,
            "one that dawdled is forgotten"
        );
    }
}
