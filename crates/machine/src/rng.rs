//! The seeded generator: same seed, same stream, on every platform.

use std::time::Duration;

use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};

/// A ChaCha8 stream. The shell seeds it from the operating system in a real node and from the scenario in the simulator.
#[derive(Clone, Debug)]
pub struct Rng(ChaCha8Rng);

impl Rng {
    /// Makes a generator from 32 bytes.
    #[must_use]
    pub fn from_seed(seed: [u8; 32]) -> Self {
        Self(ChaCha8Rng::from_seed(seed))
    }

    /// Makes a generator from a small seed, as scenarios and tests name it.
    #[must_use]
    pub fn from_u64(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    /// Returns a generator whose stream is independent of this one's, and moves this one on.
    #[must_use]
    pub fn fork(&mut self) -> Self {
        Self::from_seed(self.bytes())
    }

    /// Returns the next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// Returns `N` random bytes.
    pub fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        self.0.fill_bytes(&mut out);
        out
    }

    /// Returns a uniform integer below `bound`, or 0 when `bound` is 0. Unbiased (Lemire's multiplication with rejection).
    #[allow(clippy::cast_possible_truncation, reason = "the high half of a 128-bit product")]
    pub fn below(&mut self, bound: u64) -> u64 {
        if bound == 0 {
            return 0;
        }
        let threshold = bound.wrapping_neg() % bound;
        loop {
            let wide = u128::from(self.next_u64()) * u128::from(bound);
            let (high, low) = ((wide >> 64) as u64, wide & u128::from(u64::MAX));
            if low >= u128::from(threshold) {
                return high;
            }
        }
    }

    /// Returns a uniform number in `[0, 1)` with 53 random bits.
    pub fn unit(&mut self) -> f64 {
        #[allow(clippy::cast_precision_loss, reason = "53 bits fit a double exactly")]
        let bits = (self.next_u64() >> 11) as f64;
        bits / 9_007_199_254_740_992.0
    }

    /// Returns whether an event of probability `p` happens.
    pub fn chance(&mut self, p: f64) -> bool {
        self.unit() < p
    }

    /// Returns a duration drawn uniformly from `[low, high]`.
    pub fn between(&mut self, low: Duration, high: Duration) -> Duration {
        let span = high.saturating_sub(low);
        low + span.mul_f64(self.unit())
    }

    /// Returns a uniformly chosen element, or `None` of an empty slice.
    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> Option<&'a T> {
        let index = usize::try_from(self.below(items.len() as u64)).ok()?;
        items.get(index)
    }

    /// Shuffles in place (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            if let Ok(j) = usize::try_from(self.below(i as u64 + 1)) {
                items.swap(i, j);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_seed_same_stream_and_forks_differ() {
        let (mut a, mut b) = (Rng::from_u64(7), Rng::from_u64(7));
        assert_eq!(a.bytes::<16>(), b.bytes::<16>());
        let mut fork = a.fork();
        assert_ne!(fork.next_u64(), a.next_u64());
    }

    #[test]
    fn below_stays_below_and_reaches_every_value() {
        let mut rng = Rng::from_u64(1);
        let mut seen = [0u32; 5];
        for _ in 0..5_000 {
            let index = usize::try_from(rng.below(5)).expect("small");
            seen[index] += 1;
        }
        assert!(seen.iter().all(|&n| n > 850), "{seen:?} is not uniform");
        assert_eq!(rng.below(0), 0);
    }
}
