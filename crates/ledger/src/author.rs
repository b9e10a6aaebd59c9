//! One author's part of the state: what stands, what was superseded, and what is left of the rest.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use chorus_protocol::capability::Capability;
use chorus_protocol::codec;
use chorus_protocol::entry::{Body, Entry};
use chorus_protocol::limits::{MAX_AUTHOR_POLICIES, MAX_ENTRY_BYTES};
use chorus_protocol::{Admitted, Hash, Received, Text, Verified, WallTime};

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

/// What entries replace each other in: of one author's entries on a topic, the latest stands.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Topic {
    /// What the author can do.
    Capability,
    /// The policy of that name.
    Policy(Text<64>),
}

/// Returns the topic of an entry that says this; `None` for one that replaces no other.
#[must_use]
pub fn topic(body: &Body) -> Option<Topic> {
    match body {
        Body::Capability(_) | Body::Retire => Some(Topic::Capability),
        Body::Policy(notice) => Some(Topic::Policy(notice.name.clone())),
        Body::Receipt(_) | Body::Misbehaviour(_) => None,
    }
}

/// The numbers below which an author's policies count no more, by name. They end together: who is pushed out by the bound on
/// names then leaves no trace here, and that the state depends on the set alone stays true.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PolicyFloors {
    pub(crate) seqs: BTreeMap<Text<64>, u64>,
    /// When everything that they keep out has expired by itself.
    pub(crate) until: WallTime,
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
    /// In the set, by number: receipts, accusations, and the one entry of each topic that stands.
    pub(crate) live: BTreeMap<u64, Admitted<Entry>>,
    /// Those of them that are accusations.
    pub(crate) accusations: BTreeSet<u64>,
    /// Superseded, by number.
    pub(crate) past: BTreeMap<u64, Past>,
    pub(crate) floor: Option<Floor>,
    /// Empty or in force, never anything between.
    pub(crate) policies: PolicyFloors,
    /// What stands, ready to be shared.
    pub(crate) capability: Option<Arc<Capability>>,
    /// Whether the disk holds a mark of this author.
    pub(crate) marked: bool,
}

impl Author {
    pub(crate) fn is_empty(&self) -> bool {
        self.live.is_empty() && self.past.is_empty() && self.floor_ends().next().is_none()
    }

    /// Returns the number and hash of the latest entry in the set.
    pub(crate) fn head(&self) -> Option<(u64, Hash)> {
        self.live.last_key_value().map(|(seq, entry)| (*seq, entry.hash()))
    }

    /// Returns the number of receipts in the set.
    pub(crate) fn receipts(&self) -> usize {
        let standing = usize::from(self.standing(&Topic::Capability).is_some()) + self.standing_policies().count();
        self.live.len() - standing - self.accusations.len()
    }

    /// Returns the entry of a topic that stands.
    pub(crate) fn standing(&self, on: &Topic) -> Option<&Admitted<Entry>> {
        self.live.get(&self.floor_seq(on)?).filter(|entry| topic(&entry.body).as_ref() == Some(on))
    }

    /// Returns the notices of policies that stand, by name.
    pub(crate) fn standing_policies(&self) -> impl Iterator<Item = &Admitted<Entry>> {
        let found = self.policies.seqs.iter().filter_map(|(name, seq)| Some((name, self.live.get(seq)?)));
        found
            .filter(|(name, entry)| matches!(&entry.body, Body::Policy(notice) if notice.name == **name))
            .map(|(_, e)| e)
    }

    /// Returns the oldest receipt in the set.
    pub(crate) fn oldest_receipt(&self) -> Option<u64> {
        self.live.iter().find(|(_, entry)| matches!(entry.body, Body::Receipt(_))).map(|(seq, _)| *seq)
    }

    /// Returns the number below which entries on a topic count no more.
    pub(crate) fn floor_seq(&self, on: &Topic) -> Option<u64> {
        match on {
            Topic::Capability => self.floor.map(|floor| floor.seq),
            Topic::Policy(name) => self.policies.seqs.get(name).copied(),
        }
    }

    /// Returns until when something on a topic is kept out.
    pub(crate) fn floor_until(&self, on: &Topic) -> Option<WallTime> {
        match on {
            Topic::Capability => self.floor.map(|floor| floor.until),
            Topic::Policy(_) => (!self.policies.seqs.is_empty()).then_some(self.policies.until),
        }
    }

    /// Returns the policy that has to go if one of a new name is to stand, and its number: of too many names those with the highest
    /// numbers stay, which is the same choice in any order.
    pub(crate) fn crowded_out_by(&self, on: &Topic) -> Option<(Text<64>, u64)> {
        let Topic::Policy(name) = on else { return None };
        let full = self.policies.seqs.len() >= MAX_AUTHOR_POLICIES && !self.policies.seqs.contains_key(name);
        let lowest = self.policies.seqs.iter().min_by_key(|(_, seq)| **seq);
        lowest.filter(|_| full).map(|(name, seq)| (name.clone(), *seq))
    }

    /// Moves a topic's floor up to a number, and on in time so that it outlives whatever it keeps out. A policy for which there is no
    /// room gets no floor.
    pub(crate) fn raise_floor(&mut self, on: &Topic, seq: u64, until: WallTime) {
        match on {
            Topic::Capability => {
                let old = self.floor.unwrap_or(Floor { seq, until });
                self.floor = Some(Floor { seq: old.seq.max(seq), until: old.until.max(until) });
            }
            Topic::Policy(name) => {
                if self.crowded_out_by(on).is_none() {
                    let floor = self.policies.seqs.entry(name.clone()).or_insert(seq);
                    *floor = seq.max(*floor);
                }
                self.policies.until = self.policies.until.max(until);
            }
        }
    }

    /// Returns when floors end.
    pub(crate) fn floor_ends(&self) -> impl Iterator<Item = WallTime> + use<> {
        let policies = (!self.policies.seqs.is_empty()).then_some(self.policies.until);
        self.floor.map(|floor| floor.until).into_iter().chain(policies)
    }

    /// Lets go of the floors that end by `at`.
    pub(crate) fn end_floors(&mut self, at: WallTime) {
        self.floor = self.floor.filter(|floor| floor.until > at);
        if self.policies.until <= at {
            self.policies = PolicyFloors::default();
        }
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
        self.policies = mark.policies.clone();
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
        if self.are_floors_told() && traces.is_empty() {
            return None;
        }
        let floor = self.floor.unwrap_or(Floor { seq: 0, until: WallTime::default() });
        let policies = self.policies.clone();
        Some(Mark { floor_seq: floor.seq, floor_until: floor.until, traces, policies, ..Mark::default() })
    }

    /// Whether the floors follow from the entries that stand on them: none of those expired, and nothing outlives them.
    fn are_floors_told(&self) -> bool {
        let standing = self.standing(&Topic::Capability).map(|entry| entry.expires);
        let capability = self.floor.is_none_or(|floor| standing.is_some_and(|expires| expires >= floor.until));
        let policies: Vec<WallTime> = self.standing_policies().map(|entry| entry.expires).collect();
        let all = policies.len() == self.policies.seqs.len();
        let longest = policies.into_iter().max().unwrap_or_default();
        capability && all && longest >= self.policies.until
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
    pub(crate) policies: PolicyFloors,
}

/// The layout of a mark on disk.
const MARK_VERSION: u8 = 2;
type Trace = (u64, Hash, Hash, WallTime);
/// What stands behind the version.
type MarkWire = (u64, Hash, u64, WallTime, Vec<Trace>);
type PoliciesWire = (WallTime, Vec<(Text<64>, u64)>);

impl Mark {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let wire: MarkWire = (self.head_seq, self.head, self.floor_seq, self.floor_until, self.traces.clone());
        let seqs = self.policies.seqs.iter().map(|(name, seq)| (name.clone(), *seq)).collect();
        let policies: PoliciesWire = (self.policies.until, seqs);
        codec::encode(&(MARK_VERSION, wire, policies))
    }

    /// Reads this layout, and the one before there were policies: its last number of the own chain must not be lost.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        const WHAT: &str = "ledger mark";
        let (wire, (until, seqs)) = match bytes.first()? {
            1 => (codec::decode::<(u8, MarkWire)>(WHAT, bytes, MAX_ENTRY_BYTES).ok()?.1, PoliciesWire::default()),
            &MARK_VERSION => {
                let (_, wire, policies) =
                    codec::decode::<(u8, MarkWire, PoliciesWire)>(WHAT, bytes, MAX_ENTRY_BYTES).ok()?;
                (wire, policies)
            }
            _ => return None,
        };
        let (head_seq, head, floor_seq, floor_until, traces) = wire;
        let policies = PolicyFloors { seqs: seqs.into_iter().collect(), until };
        Some(Self { head_seq, head, floor_seq, floor_until, traces, policies })
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
            policies: PolicyFloors {
                seqs: BTreeMap::from([(Text::truncated("adder"), 4)]),
                until: WallTime::from_millis(11),
            },
        };
        let mut bytes = mark.encode();
        assert_eq!(Mark::decode(&bytes), Some(mark.clone()));
        let before = (1u8, (mark.head_seq, mark.head, mark.floor_seq, mark.floor_until, mark.traces.clone()));
        let read = Mark::decode(&codec::encode(&before));
        assert_eq!(read, Some(Mark { policies: PolicyFloors::default(), ..mark }), "what an older node wrote");
        bytes[0] = 9;
        assert_eq!(Mark::decode(&bytes), None);
        assert_eq!(Mark::decode(&[]), None);
    }
}
