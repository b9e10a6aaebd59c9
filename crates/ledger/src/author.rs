//! One author's part of the state: what stands, what was superseded, and what is left of the rest.

use std::collections::BTreeMap;
use std::sync::Arc;

use chorus_protocol::capability::Capability;
use chorus_protocol::codec;
use chorus_protocol::entry::{Body, Entry};
use chorus_protocol::limits::MAX_ENTRY_BYTES;
use chorus_protocol::{Admitted, Hash, Received, Verified, WallTime};

/// A superseded entry: out of the set, but not forgotten while it could still be replayed.
#[derive(Debug)]
pub(crate) struct Past {
    pub(crate) hash: Hash,
    pub(crate) prev: Hash,
    pub(crate) expires: WallTime,
    /// The whole entry, to prove a second version; `None` when only its trace is left.
    pub(crate) wire: Option<Received<Entry>>,
}

impl Past {
    /// Bytes that count against the bound on superseded entries.
    pub(crate) fn bytes(&self) -> usize {
        self.wire.as_ref().map_or(0, Received::len)
    }
}

/// The number below which capabilities and retirements of an author count no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Floor {
    pub(crate) seq: u64,
    /// When everything it keeps out has expired by itself.
    pub(crate) until: WallTime,
}

/// What contradicts an entry that wants in.
#[derive(Debug)]
pub(crate) enum Clash {
    /// The other half of a proof.
    Whole(Received<Entry>),
    /// Only the other's hash is left.
    Trace,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Author {
    /// In the set, by number: receipts, and the one capability or retirement that stands.
    pub(crate) live: BTreeMap<u64, Admitted<Entry>>,
    /// Superseded, by number.
    pub(crate) past: BTreeMap<u64, Past>,
    pub(crate) floor: Option<Floor>,
    /// What stands, ready to be shared.
    pub(crate) capability: Option<Arc<Capability>>,
    /// Whether the disk holds a mark of this author.
    pub(crate) marked: bool,
}

/// Returns whether entries of this kind replace each other.
pub(crate) const fn is_standing(body: &Body) -> bool {
    matches!(body, Body::Capability(_) | Body::Retire)
}

impl Author {
    pub(crate) fn is_empty(&self) -> bool {
        self.live.is_empty() && self.past.is_empty() && self.floor.is_none()
    }

    /// Returns the number and hash of the latest entry in the set.
    pub(crate) fn head(&self) -> Option<(u64, Hash)> {
        self.live.last_key_value().map(|(seq, entry)| (*seq, entry.hash()))
    }

    /// Returns the number of receipts in the set.
    pub(crate) fn receipts(&self) -> usize {
        self.live.len() - usize::from(self.standing().is_some())
    }

    /// Returns the capability or retirement that stands.
    pub(crate) fn standing(&self) -> Option<&Admitted<Entry>> {
        self.floor.and_then(|floor| self.live.get(&floor.seq))
    }

    /// Returns the oldest receipt in the set.
    pub(crate) fn oldest_receipt(&self) -> Option<u64> {
        self.live.iter().find(|(_, entry)| !is_standing(&entry.body)).map(|(seq, _)| *seq)
    }

    pub(crate) fn knows(&self, entry: &Verified<Entry>) -> bool {
        self.link(entry.seq).is_some_and(|(hash, _)| hash == entry.hash())
    }

    /// Returns hash and predecessor of the entry with this number, whole or not.
    fn link(&self, seq: u64) -> Option<(Hash, Hash)> {
        match self.live.get(&seq) {
            Some(entry) => Some((entry.hash(), entry.prev)),
            None => self.past.get(&seq).map(|past| (past.hash, past.prev)),
        }
    }

    /// Returns what stands against an entry: another with its number, or a neighbour whose link does not fit.
    pub(crate) fn clash(&self, entry: &Verified<Entry>) -> Option<Clash> {
        let same = self.link(entry.seq).filter(|(hash, _)| *hash != entry.hash()).map(|_| entry.seq);
        let before = entry.seq.checked_sub(1).filter(|seq| self.link(*seq).is_some_and(|(hash, _)| hash != entry.prev));
        let after =
            entry.seq.checked_add(1).filter(|seq| self.link(*seq).is_some_and(|(_, prev)| prev != entry.hash()));
        let found: Vec<u64> = [same, before, after].into_iter().flatten().collect();
        let whole = found.iter().find_map(|seq| match self.live.get(seq) {
            Some(entry) => Some(entry.to_wire()),
            None => self.past.get(seq).and_then(|past| past.wire.clone()),
        });
        match whole {
            Some(other) => Some(Clash::Whole(other)),
            None => (!found.is_empty()).then_some(Clash::Trace),
        }
    }

    /// Takes what the disk remembers of this author.
    pub(crate) fn restore(&mut self, mark: &Mark) {
        self.marked = true;
        if mark.floor_seq > 0 {
            self.floor = Some(Floor { seq: mark.floor_seq, until: mark.floor_until });
        }
        for (seq, hash, prev, expires) in &mark.traces {
            self.past.insert(*seq, Past { hash: *hash, prev: *prev, expires: *expires, wire: None });
        }
    }

    /// Returns what the disk must remember beyond the entries themselves; `None` when they say it all.
    pub(crate) fn mark(&self) -> Option<Mark> {
        let traces: Vec<_> = self
            .past
            .iter()
            .filter(|(_, past)| past.wire.is_none())
            .map(|(seq, past)| (*seq, past.hash, past.prev, past.expires))
            .collect();
        // The floor follows from the entry that stands on it, unless that one expired or something outlives it.
        let told = self
            .floor
            .is_none_or(|floor| self.live.get(&floor.seq).is_some_and(|standing| standing.expires >= floor.until));
        if told && traces.is_empty() {
            return None;
        }
        let floor = self.floor.unwrap_or(Floor { seq: 0, until: WallTime::default() });
        Some(Mark { floor_seq: floor.seq, floor_until: floor.until, traces, ..Mark::default() })
    }
}

/// What the disk remembers of an author beyond its entries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mark {
    /// Own chain only: the last number ever used, and its hash.
    pub(crate) head_seq: u64,
    pub(crate) head: Hash,
    pub(crate) floor_seq: u64,
    pub(crate) floor_until: WallTime,
    pub(crate) traces: Vec<(u64, Hash, Hash, WallTime)>,
}

/// The layout of a mark on disk.
const MARK_VERSION: u8 = 1;
type MarkWire = (u8, u64, Hash, u64, WallTime, Vec<(u64, Hash, Hash, WallTime)>);

impl Mark {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let wire: MarkWire =
            (MARK_VERSION, self.head_seq, self.head, self.floor_seq, self.floor_until, self.traces.clone());
        codec::encode(&wire)
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (version, head_seq, head, floor_seq, floor_until, traces) =
            codec::decode::<MarkWire>("ledger mark", bytes, MAX_ENTRY_BYTES).ok()?;
        (version == MARK_VERSION).then_some(Self { head_seq, head, floor_seq, floor_until, traces })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_survives_the_disk_and_a_foreign_layout_is_refused() {
        let mark = Mark {
            head_seq: 7,
            head: Hash::derive("t", &[b"h"]),
            floor_seq: 5,
            floor_until: WallTime::from_millis(9),
            traces: vec![(3, Hash::derive("t", &[b"a"]), Hash::ZERO, WallTime::from_millis(4))],
        };
        let mut bytes = mark.encode();
        assert_eq!(Mark::decode(&bytes), Some(mark));
        bytes[0] = 9;
        assert_eq!(Mark::decode(&bytes), None);
        assert_eq!(Mark::decode(&[]), None);
    }
}
