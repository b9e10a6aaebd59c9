//! What expires when.

use std::collections::BTreeSet;

use chorus_protocol::{NodeId, WallTime};

/// Something that expires: when, whose, and under which number.
pub(crate) type Expiring = (WallTime, NodeId, u64);

/// No moment is later.
const NEVER: WallTime = WallTime::from_millis(u64::MAX);

/// The set, with the earliest moment at hand: it is asked for on every input, and changes seldom.
#[derive(Debug)]
pub(crate) struct Expiry {
    set: BTreeSet<Expiring>,
    /// When the first of them expires.
    soonest: WallTime,
}

impl Expiry {
    pub(crate) fn new() -> Self {
        Self { set: BTreeSet::new(), soonest: NEVER }
    }

    pub(crate) fn insert(&mut self, what: Expiring) {
        self.soonest = self.soonest.min(what.0);
        self.set.insert(what);
    }

    pub(crate) fn remove(&mut self, what: &Expiring) {
        if self.set.remove(what) && what.0 == self.soonest {
            self.look();
        }
    }

    fn look(&mut self) {
        self.soonest = self.set.first().map_or(NEVER, |(at, ..)| *at);
    }

    /// Returns when the next thing expires.
    pub(crate) fn soonest(&self) -> Option<WallTime> {
        (!self.set.is_empty()).then_some(self.soonest)
    }

    /// Takes out the earliest of what has expired by `wall`.
    pub(crate) fn pop(&mut self, wall: WallTime) -> Option<Expiring> {
        if wall < self.soonest {
            return None;
        }
        let first = self.set.pop_first();
        self.look();
        first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_had_its_time_comes_out_in_order_and_what_was_removed_does_not() {
        let id = |n: u8| chorus_protocol::SecretKey::from_bytes(&[n; 32]).node_id();
        let at = WallTime::from_millis;
        let mut expiry = Expiry::new();
        assert_eq!((expiry.soonest(), expiry.pop(at(9))), (None, None));
        for (n, ms) in [(1, 5), (2, 3), (3, 7), (4, 3)] {
            expiry.insert((at(ms), id(n), 1));
        }
        assert_eq!((expiry.soonest(), expiry.pop(at(2))), (Some(at(3)), None));
        expiry.remove(&(at(3), id(2), 1));
        expiry.remove(&(at(3), id(4), 1));
        assert_eq!(expiry.soonest(), Some(at(5)));
        expiry.insert((at(3), id(4), 1));
        assert_eq!(expiry.pop(at(6)), Some((at(3), id(4), 1)));
        assert_eq!(expiry.pop(at(6)), Some((at(5), id(1), 1)));
        assert_eq!((expiry.pop(at(6)), expiry.soonest()), (None, Some(at(7))));
        assert_eq!((expiry.pop(at(7)), expiry.soonest()), (Some((at(7), id(3), 1)), None));
    }
}
