//! Sessions: ordered, reliable links between two nodes, until they break.
//!
//! A node's uplink is a pipe: what it sends leaves byte after byte, one message behind the other, whoever they are for. Then a message
//! takes the access times of both ends. A session that breaks loses what is under way. A side that has not noticed the break goes on
//! sending into it, and is told of the end before it is told of the session that takes its place.

use std::collections::BTreeMap;
use std::time::Duration;

use chorus_machine::Time;

/// A node by its place in the world: the trainer is 0.
pub(super) type Place = u32;

/// Two nodes, the smaller place first.
pub(super) type Pair = (Place, Place);

/// Orders two places.
pub(super) fn pair(a: Place, b: Place) -> Pair {
    (a.min(b), a.max(b))
}

/// One session, or the lack of one.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Session {
    /// Bytes pass.
    pub(super) up: bool,
    /// Grows with every break, so that what was under way does not arrive on the next one.
    pub(super) epoch: u32,
    /// Whether the smaller and the greater side believe that it is there.
    pub(super) believes: [bool; 2],
    /// An attempt to connect is planned.
    pub(super) dialling: bool,
}

impl Session {
    /// What one side believes.
    pub(super) fn belief(&mut self, (small, _): Pair, side: Place) -> &mut bool {
        &mut self.believes[usize::from(side != small)]
    }
}

/// A node's way into the network.
#[derive(Clone, Copy, Debug)]
pub(super) struct Access {
    /// To the middle of the network.
    pub(super) delay: Duration,
    /// Bytes a second.
    pub(super) uplink: f64,
    /// When what was handed over so far has left.
    pub(super) free: Time,
    /// The part of the network that it is in.
    pub(super) part: u8,
}

impl Access {
    /// Hands over so many bytes. Returns when the last has left.
    pub(super) fn leave(&mut self, now: Time, bytes: u64) -> Time {
        #[allow(clippy::cast_precision_loss, reason = "a message is far below 2^52 bytes")]
        let seconds = bytes as f64 / self.uplink;
        self.free = self.free.max(now) + Duration::from_secs_f64(seconds);
        self.free
    }
}

/// All pairs that may be connected.
pub(super) type Sessions = BTreeMap<Pair, Session>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_uplink_is_one_pipe() {
        let mut access = Access { delay: Duration::ZERO, uplink: 1_000.0, free: Time::ZERO, part: 0 };
        assert_eq!(access.leave(Time::from_millis(10), 500), Time::from_millis(510));
        assert_eq!(access.leave(Time::from_millis(20), 500), Time::from_millis(1_010));
        assert_eq!(access.leave(Time::from_millis(5_000), 1_000), Time::from_millis(6_000));
    }
}
