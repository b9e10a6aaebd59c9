//! Twins: another process that uses this node's key.
//!
//! A connection that turns out to end at our own id is either the node talking to itself, through an address it did not know to
//! be its own, or a twin. In the first case this process sees *both* ends of it within moments; in the second only one.

use std::time::{Duration, Instant};

use crate::addr::Addr;

/// The two ends of one connection are seen within this time.
const PATIENCE: Duration = Duration::from_secs(2);
/// A twin is reported this often at most.
const REPORT_EVERY: Duration = Duration::from_secs(60);
/// Sightings that wait for their other end.
const MAX_SIGHTINGS: usize = 16;

/// Our own id at the other end of a connection.
#[derive(Debug)]
struct Sighting {
    at: Instant,
    addr: Option<Addr>,
    /// It was judged, and is kept only as the possible other end of a later one.
    judged: bool,
}

/// What was seen lately.
#[derive(Debug, Default)]
pub(crate) struct Twins {
    /// Connections that this node opened.
    outbound: Vec<Sighting>,
    /// Connections that it accepted.
    inbound: Vec<Sighting>,
    /// When a connection last broke during an inbound handshake: it may have been our own.
    broken: Option<Instant>,
    reported: Option<Instant>,
}

fn near(a: Instant, b: Instant) -> bool {
    a.max(b).duration_since(a.min(b)) <= PATIENCE
}

fn note(list: &mut Vec<Sighting>, addr: Option<Addr>, at: Instant) {
    if list.len() < MAX_SIGHTINGS {
        list.push(Sighting { at, addr, judged: false });
    }
}

/// Judges the old sightings of `list`: one without a partner within reach is a twin's.
fn lone(list: &mut [Sighting], now: Instant, has_partner: impl Fn(&Sighting) -> bool) -> Option<Option<Addr>> {
    let mut twin = None;
    for seen in list.iter_mut().filter(|seen| !seen.judged && now.saturating_duration_since(seen.at) >= PATIENCE) {
        seen.judged = true;
        if !has_partner(seen) {
            twin = Some(seen.addr.clone());
        }
    }
    twin
}

impl Twins {
    pub(crate) fn on_outbound(&mut self, addr: Option<Addr>, now: Instant) {
        note(&mut self.outbound, addr, now);
    }

    pub(crate) fn on_inbound(&mut self, addr: Option<Addr>, now: Instant) {
        note(&mut self.inbound, addr, now);
    }

    pub(crate) fn on_broken_inbound(&mut self, now: Instant) {
        self.broken = Some(now);
    }

    /// Judges the sightings that are old enough; returns where a twin was met.
    pub(crate) fn judge(&mut self, now: Instant, is_ours: impl Fn(&Addr) -> bool) -> Option<Option<Addr>> {
        let Self { outbound, inbound, broken, .. } = self;
        let lone_out = lone(outbound, now, |seen| {
            seen.addr.as_ref().is_some_and(&is_ours)
                || inbound.iter().any(|other| near(seen.at, other.at))
                || broken.is_some_and(|other| near(seen.at, other))
        });
        let lone_in = lone(inbound, now, |seen| outbound.iter().any(|other| near(seen.at, other.at)));
        for list in [outbound, inbound] {
            list.retain(|seen| now.saturating_duration_since(seen.at) < PATIENCE * 3);
        }
        let fresh = self.reported.is_none_or(|at| now.saturating_duration_since(at) >= REPORT_EVERY);
        let twin = lone_out.or(lone_in).filter(|_| fresh);
        if twin.is_some() {
            self.reported = Some(now);
        }
        twin
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addr() -> Addr {
        Addr::tcp(([192, 0, 2, 1], 7600).into())
    }

    #[test]
    fn talking_to_oneself_is_no_twin() {
        let start = Instant::now();
        let mut twins = Twins::default();
        twins.on_outbound(Some(addr()), start);
        twins.on_inbound(None, start + Duration::from_millis(3));
        for ms in (0..10_000).step_by(250) {
            assert_eq!(twins.judge(start + Duration::from_millis(ms), |_| false), None, "both ends were ours");
        }
        twins.on_outbound(Some(addr()), start);
        assert_eq!(twins.judge(start + PATIENCE, |own| *own == addr()), None, "an address of ours");
        let mut twins = Twins::default();
        twins.on_outbound(Some(addr()), start);
        twins.on_broken_inbound(start);
        assert_eq!(twins.judge(start + PATIENCE, |_| false), None, "the other end broke off");
    }

    #[test]
    fn one_end_alone_is_a_twin_and_is_reported_once_a_minute() {
        let start = Instant::now();
        let mut twins = Twins::default();
        twins.on_outbound(Some(addr()), start);
        assert_eq!(twins.judge(start, |_| false), None, "the other end may still show");
        assert_eq!(twins.judge(start + PATIENCE, |_| false), Some(Some(addr())));
        twins.on_inbound(None, start + PATIENCE);
        assert_eq!(twins.judge(start + PATIENCE * 2, |_| false), None, "just reported");
        let later = start + REPORT_EVERY * 2;
        twins.on_inbound(None, later);
        assert_eq!(twins.judge(later + PATIENCE, |_| false), Some(None));
    }
}
