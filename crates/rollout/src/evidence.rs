//! Evidence on its way in: one holder after the other is asked for piece after piece, until the whole has the hash that was named.
//!
//! What one holder sends is never joined to what another sent: so whoever sends something else is known by it, and costs no more
//! than the time to find out.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use chorus_machine::Time;
use chorus_protocol::limits::MAX_EVIDENCE_BYTES;
use chorus_protocol::misbehaviour::Evidence;
use chorus_protocol::{Hash, NodeId};

/// How long one holder may take to come about, and to send a piece.
const PIECE: Duration = Duration::from_secs(5);
/// How long nothing may come from anybody before the fetch is given up.
const PATIENCE: Duration = Duration::from_secs(20);
/// Holders that are tried.
const MAX_HOLDERS: usize = 64;

/// What a fetch wants next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FetchStep {
    /// Nothing; something is on its way, or a holder is looked for.
    Wait,
    /// Ask this node for the bytes from here on.
    Ask {
        /// Whom.
        holder: NodeId,
        /// The first byte that is missing.
        from: u64,
    },
    /// All of it is there, and it is what was asked for.
    Done(Vec<u8>),
    /// Nobody has it who can be reached.
    Failed {
        /// Nodes that were asked.
        asked: usize,
    },
}

/// See the module.
#[derive(Debug)]
pub struct Fetch {
    evidence: Hash,
    waiting: VecDeque<NodeId>,
    asked: BTreeSet<NodeId>,
    holder: Option<NodeId>,
    bytes: Vec<u8>,
    total: Option<u64>,
    /// When the holder is given up, and when everything is.
    limits: (Time, Time),
}

impl Fetch {
    /// Begins to fetch.
    #[must_use]
    pub fn new(evidence: Hash, now: Time) -> Self {
        Self {
            evidence,
            waiting: VecDeque::new(),
            asked: BTreeSet::new(),
            holder: None,
            bytes: Vec::new(),
            total: None,
            limits: (now + PIECE, now + PATIENCE),
        }
    }

    /// Returns whom it waits for.
    #[must_use]
    pub fn holder(&self) -> Option<NodeId> {
        self.holder
    }

    /// Takes in nodes that may have it. Each is tried once.
    pub fn found(&mut self, nodes: impl IntoIterator<Item = NodeId>, now: Time) -> FetchStep {
        for node in nodes {
            if self.asked.len() < MAX_HOLDERS && self.asked.insert(node) {
                self.waiting.push_back(node);
            }
        }
        if self.holder.is_none() { self.turn(now) } else { FetchStep::Wait }
    }

    /// Takes in a piece.
    pub fn piece(&mut self, holder: NodeId, from: u64, total: u64, bytes: &[u8], now: Time) -> FetchStep {
        if self.holder != Some(holder) {
            return FetchStep::Wait;
        }
        let have = self.bytes.len() as u64;
        let most = MAX_EVIDENCE_BYTES as u64;
        let end = have.saturating_add(bytes.len() as u64);
        let fits = from == have && !bytes.is_empty() && end <= total && total <= most;
        if !fits || self.total.is_some_and(|said| said != total) {
            return self.turn(now);
        }
        self.total = Some(total);
        self.bytes.extend_from_slice(bytes);
        self.limits = (now + PIECE, now + PATIENCE);
        if end < total {
            return FetchStep::Ask { holder, from: end };
        }
        if Evidence::hash(&self.bytes) == self.evidence {
            return FetchStep::Done(std::mem::take(&mut self.bytes));
        }
        self.turn(now)
    }

    /// A node cannot be reached, or not any more.
    pub fn lost(&mut self, node: NodeId, now: Time) -> FetchStep {
        if self.holder == Some(node) { self.turn(now) } else { FetchStep::Wait }
    }

    /// Lets time pass.
    pub fn expire(&mut self, now: Time) -> FetchStep {
        if now >= self.limits.1 {
            return FetchStep::Failed { asked: self.asked.len() - self.waiting.len() };
        }
        if self.holder.is_some() && now >= self.limits.0 { self.turn(now) } else { FetchStep::Wait }
    }

    /// Goes on with the next holder, from the beginning.
    fn turn(&mut self, now: Time) -> FetchStep {
        self.bytes.clear();
        self.total = None;
        self.holder = self.waiting.pop_front();
        self.limits.0 = now + PIECE;
        self.holder.map_or(FetchStep::Wait, |holder| FetchStep::Ask { holder, from: 0 })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use chorus_protocol::SecretKey;

    use super::*;

    const NOW: Time = Time::from_millis(1_000);

    fn node(n: u8) -> NodeId {
        SecretKey::from_bytes(&[n; 32]).node_id()
    }

    fn fetch(bytes: &[u8]) -> Fetch {
        Fetch::new(Evidence::hash(bytes), NOW)
    }

    #[test]
    fn it_comes_in_pieces_from_one_holder() {
        let mut fetch = fetch(b"abcdef");
        assert_eq!(fetch.found([], NOW), FetchStep::Wait);
        let holder = node(1);
        assert_eq!(fetch.found([holder, node(2)], NOW), FetchStep::Ask { holder, from: 0 });
        assert_eq!(fetch.piece(holder, 0, 6, b"abcd", NOW), FetchStep::Ask { holder, from: 4 });
        assert_eq!(fetch.piece(node(2), 4, 6, b"xx", NOW), FetchStep::Wait, "nobody asked it");
        assert_eq!(fetch.piece(holder, 4, 6, b"ef", NOW), FetchStep::Done(b"abcdef".to_vec()));
    }

    #[test]
    fn whoever_has_it_not_or_sends_something_else_is_passed_over_and_not_asked_again() {
        let mut fetch = fetch(b"abcdef");
        let ask = |n| FetchStep::Ask { holder: node(n), from: 0 };
        assert_eq!(fetch.found((1..=7).map(node), NOW), ask(1));
        assert_eq!(fetch.piece(node(1), 0, 0, b"", NOW), ask(2), "has it not");
        assert_eq!(fetch.piece(node(2), 0, 6, b"", NOW), ask(3), "sends nothing for ever");
        assert_eq!(fetch.piece(node(3), 0, u64::MAX, b"a", NOW), ask(4), "sends without end");
        assert_eq!(fetch.piece(node(4), 0, 6, b"abcdefg", NOW), ask(5), "sends more than it says");
        assert_eq!(fetch.piece(node(5), 0, 6, b"abcdeX", NOW), ask(6), "sends something else");
        assert_eq!(fetch.piece(node(6), 0, 6, b"abc", NOW), FetchStep::Ask { holder: node(6), from: 3 });
        assert_eq!(fetch.piece(node(6), 3, 7, b"def", NOW), ask(7), "says another size than before");
        assert_eq!(fetch.lost(node(7), NOW), FetchStep::Wait);
        assert_eq!(fetch.found([node(1)], NOW), FetchStep::Wait, "once is enough");
        assert_eq!(fetch.found([node(8)], NOW), ask(8));
        assert_eq!(fetch.piece(node(8), 0, 6, b"abcdef", NOW), FetchStep::Done(b"abcdef".to_vec()));
    }

    #[test]
    fn a_silent_holder_is_given_up_and_so_is_all_in_the_end() {
        let mut fetch = fetch(b"abcdef");
        fetch.found([node(1), node(2)], NOW);
        assert_eq!(fetch.expire(NOW + PIECE / 2), FetchStep::Wait);
        assert_eq!(fetch.expire(NOW + PIECE), FetchStep::Ask { holder: node(2), from: 0 });
        assert_eq!(fetch.expire(NOW + PIECE * 2), FetchStep::Wait, "nobody is left to ask");
        assert_eq!(fetch.expire(NOW + PATIENCE), FetchStep::Failed { asked: 2 });
    }

    #[test]
    fn holders_are_bounded() {
        let mut fetch = fetch(b"a");
        fetch.found((0..=u8::MAX).map(node), NOW);
        assert_eq!(fetch.waiting.len() + 1, MAX_HOLDERS);
    }
}
