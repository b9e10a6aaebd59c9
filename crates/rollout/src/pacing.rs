//! How much may be begun, so that nothing is made to be thrown away.
//!
//! The bound is kept by *counting*, not by guessing times. Updates use groups in the order in which they were opened, `B` at a time.
//! So a group that is opened when `A` others are open is used `⌊A/B⌋` updates after the next one, whatever the samplers' speed; and its
//! rollouts are within `S` exactly if the weights they are sampled with are at least of step `next + ⌊A/B⌋ − S`. That step is the
//! assignment's floor ([`floor`]), and a group may be opened as long as a version of that step is published.
//!
//! Measured times only make the queue *shorter* than the bound allows ([`Pacing::enough`]): more than what keeps the learner busy
//! while a rollout is sampled and a version travels would only make rollouts older.

use std::time::Duration;

use chorus_machine::Time;

/// Weight of a new measurement against all before it.
const NEWS: f64 = 0.3;

/// A mean that forgets.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Mean(Option<f64>);

impl Mean {
    /// Takes one measurement.
    pub fn add(&mut self, value: f64) {
        if value.is_finite() {
            self.0 = Some(self.0.map_or(value, |mean| mean + NEWS * (value - mean)));
        }
    }

    /// Returns the mean, once anything was measured.
    #[must_use]
    pub fn get(self) -> Option<f64> {
        self.0
    }
}

/// How many come in a second: how many come at a time, by how long that takes. A mean of rates would count a short pause for far too
/// much: of two that come 50 ms apart every ten seconds, it makes ten a second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rate {
    many: Mean,
    span: Mean,
    last: Option<Time>,
    waiting: f64,
}

impl Rate {
    /// Begins to measure: somebody who had nothing to do has something now. Without it the time before would count as work, and the
    /// first two arrivals would say how fast somebody is who does several things at a time.
    pub fn begin(&mut self, now: Time) {
        (self.last, self.waiting) = (Some(now), 0.0);
    }

    /// Counts `many` at `now`. Arrivals within 50 ms of each other count as one.
    pub fn add(&mut self, now: Time, many: u32) {
        self.waiting += f64::from(many);
        let Some(last) = self.last else {
            (self.last, self.waiting) = (Some(now), 0.0);
            return;
        };
        let span = now.since(last);
        if span >= Duration::from_millis(50) {
            self.many.add(self.waiting);
            self.span.add(span.as_secs_f64());
            (self.last, self.waiting) = (Some(now), 0.0);
        }
    }

    /// Returns how many come in a second, once two arrivals were seen.
    #[must_use]
    pub fn per_second(self) -> Option<f64> {
        Some(self.many.get()? / self.span.get()?)
    }
}

/// Returns the oldest step of weights with which a group may be sampled when `ahead` others will be used before it, `batch` in each
/// update, and the next update leads away from step `next`. Weights of that step may not exist yet; then the group must wait.
#[must_use]
pub fn floor(next: u64, ahead: usize, batch: usize, staleness: u32) -> u64 {
    let rank = ahead / batch.max(1);
    next.saturating_add(u64::try_from(rank).unwrap_or(u64::MAX)).saturating_sub(u64::from(staleness))
}

/// What is measured of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pacing {
    /// From a batch to the end of its update, in seconds.
    pub step: Mean,
    /// From an assignment to its rollouts, in seconds.
    pub sample: Mean,
    /// From a version's publication to a sampler that serves it, in seconds.
    pub spread: Mean,
}

impl Pacing {
    /// Returns how many groups need to be open to keep the learner busy: one batch, and those it uses while a rollout is sampled and
    /// a version travels; with one batch to spare. Without measurements there is no such limit.
    #[must_use]
    pub fn enough(&self, batch: usize) -> usize {
        let (Some(step), Some(sample)) = (self.step.get(), self.sample.get()) else { return usize::MAX };
        if step <= 0.0 {
            return usize::MAX;
        }
        let updates = ((sample + self.spread.get().unwrap_or(0.0)) / step).ceil().min(1e6);
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and a million")]
        let updates = updates as usize;
        batch.saturating_mul(updates.saturating_add(2))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_floor_is_the_bound_counted_back_from_the_use() {
        // Nothing open, nothing stale allowed: only the weights of this very step.
        assert_eq!(floor(7, 0, 4, 0), 7);
        // The fifth group is used by the update after the next one.
        assert_eq!(floor(7, 4, 4, 0), 8);
        assert_eq!(floor(7, 4, 4, 1), 7);
        assert_eq!(floor(7, 11, 4, 4), 5);
        assert_eq!(floor(1, 0, 4, 9), 0);
    }

    #[test]
    fn a_slow_learner_needs_no_long_queue() {
        let mut pacing = Pacing::default();
        assert_eq!(pacing.enough(4), usize::MAX);
        pacing.step.add(10.0);
        pacing.sample.add(3.0);
        pacing.spread.add(2.0);
        assert_eq!(pacing.enough(4), 12);
        pacing.step = Mean::default();
        pacing.step.add(1.0);
        assert_eq!(pacing.enough(4), 28);
    }

    #[test]
    fn a_rate_counts_bursts_once() {
        let mut rate = Rate::default();
        for ms in (0..5_000).step_by(100) {
            rate.add(Time::from_millis(ms), 1);
            rate.add(Time::from_millis(ms + 1), 1);
        }
        assert!((rate.per_second().unwrap() - 20.0).abs() < 1.0, "{rate:?}");
    }

    #[test]
    fn a_short_pause_makes_nobody_fast() {
        // Two slots of ten seconds each, which end 100 ms apart: from the first such pair on it is known what that means.
        let mut rate = Rate::default();
        rate.begin(Time::ZERO);
        for ms in (10_000..200_000).step_by(10_000) {
            rate.add(Time::from_millis(ms), 1);
            rate.add(Time::from_millis(ms + 100), 1);
            assert!((0.05..0.4).contains(&rate.per_second().unwrap()), "{rate:?}");
        }
    }

    #[test]
    fn an_idle_hour_makes_nobody_slow() {
        let mut rate = Rate::default();
        for hour in [0, 3_600_000] {
            rate.begin(Time::from_millis(hour));
            for ms in (1_000..=5_000).step_by(1_000) {
                rate.add(Time::from_millis(hour + ms), 1);
            }
        }
        assert!((rate.per_second().unwrap() - 1.0).abs() < 1e-6, "{rate:?}");
    }
}
