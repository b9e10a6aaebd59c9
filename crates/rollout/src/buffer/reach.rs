//! How long a version takes to reach every sampler.

use std::collections::VecDeque;

use chorus_machine::Time;

use crate::pacing::Mean;

/// Versions on their way that are timed; of more, the oldest are not.
const MAX_TIMED: usize = 64;

/// Times versions from their publication until no sampler serves an older one. Samplers may pass versions by.
#[derive(Clone, Debug, Default)]
pub(super) struct Reach {
    /// Steps that are not everywhere yet, the oldest first, and when they were published.
    under_way: VecDeque<(u64, Time)>,
    mean: Mean,
}

impl Reach {
    /// A version is published.
    pub(super) fn published(&mut self, now: Time, step: u64) {
        if self.under_way.len() >= MAX_TIMED {
            self.under_way.pop_front();
        }
        self.under_way.push_back((step, now));
    }

    /// Every sampler serves this step or a later one.
    pub(super) fn served(&mut self, now: Time, step: u64) {
        while let Some((_, at)) = self.under_way.front().copied().filter(|(least, _)| *least <= step) {
            self.under_way.pop_front();
            self.mean.add(now.since(at).as_secs_f64());
        }
    }

    /// Returns how long it takes in seconds, a moving mean, once a version was everywhere.
    pub(super) fn seconds(&self) -> Option<f64> {
        self.mean.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_everywhere_when_the_last_sampler_has_it_or_a_later_one() {
        let mut reach = Reach::default();
        let at = |seconds: u64| Time::from_nanos(seconds * 1_000_000_000);
        reach.published(at(0), 1);
        reach.served(at(1), 0);
        assert_eq!(reach.seconds(), None);
        reach.published(at(2), 2);
        reach.served(at(4), 2);
        let mean = reach.seconds().unwrap_or_default();
        assert!((2.0..4.0).contains(&mean), "between the 4 s of the first and the 2 s of the second: {mean}");
        (10..200).for_each(|step| reach.published(at(step), step));
        assert_eq!(reach.under_way.len(), MAX_TIMED);
    }
}
