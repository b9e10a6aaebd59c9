//! Which of a sampler's frames are settled.

use std::collections::BTreeSet;

/// How far ahead of the first missing frame one may lie.
pub(super) const MAX_AHEAD: u64 = 4096;

/// The numbers of settled frames: all up to one, and some above it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Sequences {
    pub(super) through: u64,
    pub(super) above: BTreeSet<u64>,
}

impl Sequences {
    pub(super) fn contains(&self, sequence: u64) -> bool {
        sequence <= self.through || self.above.contains(&sequence)
    }

    /// Returns whether a frame may be taken, so that what is remembered stays bounded.
    pub(super) fn is_near(&self, sequence: u64) -> bool {
        sequence <= self.through.saturating_add(MAX_AHEAD)
    }

    /// Returns the first number above all that are settled.
    pub(super) fn next(&self) -> u64 {
        self.above.last().copied().unwrap_or(self.through).saturating_add(1)
    }

    pub(super) fn insert(&mut self, sequence: u64) {
        self.above.insert(sequence);
        self.close_up();
    }

    /// Takes the sampler's word that all before `first` is settled.
    pub(super) fn skip_to(&mut self, first: u64) {
        if first > self.through + 1 {
            self.through = first - 1;
            self.above = self.above.split_off(&first);
            self.close_up();
        }
    }

    fn close_up(&mut self) {
        while self.above.first() == Some(&(self.through + 1)) {
            self.above.pop_first();
            self.through += 1;
        }
        self.above.retain(|sequence| *sequence > self.through);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_close_in_any_order() {
        let mut settled = Sequences::default();
        for sequence in [2, 4, 1] {
            settled.insert(sequence);
        }
        assert_eq!((settled.through, settled.contains(3), settled.contains(4), settled.next()), (2, false, true, 5));
        settled.insert(3);
        assert_eq!(settled, Sequences { through: 4, above: BTreeSet::new() });
        settled.insert(9);
        settled.skip_to(9);
        assert_eq!(settled.through, 9);
        settled.skip_to(3);
        assert!(settled.contains(9) && !settled.contains(10) && !settled.is_near(10 + MAX_AHEAD));
    }
}
