//! The merge: a pure function from the set of entries (and the time) to the state.
//!
//! Why the order of arrival does not matter:
//!
//! - the highest number among an author's capabilities and retirements stands, and every lower one is superseded; the same goes
//!   for its policies, name by name, and of too many names those with the highest numbers stay;
//! - superseded entries stay known until they expire, so a contradiction is found whichever of the two came first;
//! - a conviction absorbs: nothing of its author counts before or after;
//! - of an author's receipts, and of its accusations, the highest numbers stay, which is the same choice in any order.
//!
//! The bounds on the whole set and on what is kept of superseded entries are the exceptions: at a bound, who came first matters.

use std::collections::BTreeMap;
use std::sync::Arc;

use chorus_protocol::capability::Capability;
use chorus_protocol::entry::{Body, Entry, Equivocation};
use chorus_protocol::policy::PolicyId;
use chorus_protocol::{Admitted, Hash, NetworkId, NodeId, Verified, WallTime};

use crate::author::{Author, Clash, Mark, Past, Topic, topic};
use crate::config::LedgerConfig;
use crate::delta::Delta;
use crate::expiry::Expiry;
use crate::io::LedgerEvent;
use crate::item_set::ItemSet;
use crate::refusal::Refusal;

/// In the expiry index, the number that stands for an author's floors. No entry has it.
const FLOOR: u64 = 0;

/// What an item of the set stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slot {
    /// An entry, by author and number.
    Entry(NodeId, u64),
    /// The conviction of an author.
    Conviction(NodeId),
}

/// See the module.
#[derive(Debug)]
pub(crate) struct State {
    cfg: LedgerConfig,
    network: NetworkId,
    authors: BTreeMap<NodeId, Author>,
    convictions: BTreeMap<NodeId, Equivocation>,
    /// Every item of the set by its hash.
    index: BTreeMap<Hash, Slot>,
    items: ItemSet,
    /// What expires when: entries in the set, superseded ones, and floors.
    expiry: Expiry,
    bytes: usize,
    past_bytes: usize,
    capabilities: usize,
    policies: usize,
    accusations: usize,
}

/// Returns the item that stands for a convicted author, whichever proof a node holds.
fn conviction_item(author: &NodeId) -> Hash {
    Hash::derive("chorus ledger quarantine v1", &[author.as_bytes()])
}

impl State {
    pub(crate) fn new(cfg: LedgerConfig, network: NetworkId) -> Self {
        Self {
            cfg,
            network,
            authors: BTreeMap::new(),
            convictions: BTreeMap::new(),
            index: BTreeMap::new(),
            items: ItemSet::default(),
            expiry: Expiry::new(),
            bytes: 0,
            past_bytes: 0,
            capabilities: 0,
            policies: 0,
            accusations: 0,
        }
    }

    pub(crate) fn items(&self) -> &ItemSet {
        &self.items
    }

    pub(crate) fn items_mut(&mut self) -> &mut ItemSet {
        &mut self.items
    }

    /// Returns the number of entries in the set.
    pub(crate) fn len(&self) -> usize {
        self.index.len() - self.convictions.len()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn past_bytes(&self) -> usize {
        self.past_bytes
    }

    pub(crate) fn capability_count(&self) -> usize {
        self.capabilities
    }

    /// Returns the numbers of policies that stand and of accusations in the set.
    pub(crate) fn policy_and_accusation_count(&self) -> (usize, usize) {
        (self.policies, self.accusations)
    }

    pub(crate) fn is_full(&self) -> bool {
        self.len() >= self.cfg.max_entries || self.bytes >= self.cfg.max_bytes
    }

    pub(crate) fn slot(&self, item: &Hash) -> Option<Slot> {
        self.index.get(item).copied()
    }

    pub(crate) fn entry(&self, author: &NodeId, seq: u64) -> Option<&Verified<Entry>> {
        self.authors.get(author).and_then(|author| author.live.get(&seq)).map(|entry| &**entry)
    }

    pub(crate) fn entries(&self) -> impl Iterator<Item = &Verified<Entry>> {
        self.authors.values().flat_map(|author| author.live.values()).map(|entry| &**entry)
    }

    pub(crate) fn author(&self, id: &NodeId) -> Option<&Author> {
        self.authors.get(id)
    }

    pub(crate) fn authors(&self) -> &BTreeMap<NodeId, Author> {
        &self.authors
    }

    pub(crate) fn proof(&self, author: &NodeId) -> Option<&Equivocation> {
        self.convictions.get(author)
    }

    pub(crate) fn convictions(&self) -> &BTreeMap<NodeId, Equivocation> {
        &self.convictions
    }

    /// Returns when the next thing expires.
    pub(crate) fn next_expiry(&self) -> Option<WallTime> {
        self.expiry.soonest()
    }

    /// Returns the mark that the disk should hold of an author and whether it holds one now, and notes that it will.
    pub(crate) fn take_mark(&mut self, id: &NodeId) -> (Option<Mark>, bool) {
        let Some(author) = self.authors.get_mut(id) else { return (None, true) };
        let mark = author.mark();
        let held = std::mem::replace(&mut author.marked, mark.is_some());
        (mark, held)
    }

    /// Takes what the disk remembers of an author; before its entries.
    pub(crate) fn restore_mark(&mut self, id: NodeId, mark: &Mark) {
        if mark.floor_seq == 0 && mark.traces.is_empty() && mark.policies.seqs.is_empty() {
            return;
        }
        let author = self.authors.entry(id).or_default();
        author.restore(mark);
        for until in author.floor_ends() {
            self.expiry.insert((until, id, FLOOR));
        }
        for (seq, past) in &author.past {
            self.expiry.insert((past.expires, id, *seq));
        }
    }

    /// Merges one entry whose signature and dates hold.
    pub(crate) fn merge(&mut self, entry: Admitted<Entry>, delta: &mut Delta) -> Result<(), Refusal> {
        let id = entry.author();
        if self.convictions.contains_key(&id) {
            return Err(Refusal::Quarantined(id));
        }
        let author = self.authors.entry(id).or_default();
        let merged = if author.knows(&entry) {
            Err(Refusal::Known)
        } else if let Some(clash) = author.clash(&entry) {
            Err(self.on_clash(&entry, clash, delta))
        } else if let Some(topic) = topic(&entry.body) {
            self.merge_standing(&entry, &topic, delta)
        } else {
            self.merge_lasting(&entry, delta)
        };
        self.forget_if_empty(&id);
        merged
    }

    fn on_clash(&mut self, entry: &Admitted<Entry>, clash: Clash, delta: &mut Delta) -> Refusal {
        let id = entry.author();
        let Clash::Whole(other) = clash else { return Refusal::ContradictsTrace(id) };
        // The other half was verified when it came in; all that is left is to put the two together.
        let proof = other.trust_own_disk(&self.network).ok().and_then(|other| Equivocation::new(&other, entry).ok());
        match proof {
            Some(proof) => {
                self.convict(id, proof, delta);
                Refusal::Equivocates(id)
            }
            None => Refusal::ContradictsTrace(id),
        }
    }

    fn merge_standing(&mut self, entry: &Admitted<Entry>, on: &Topic, delta: &mut Delta) -> Result<(), Refusal> {
        let id = entry.author();
        let author = self.authors.entry(id).or_default();
        let crowded_out = author.crowded_out_by(on);
        let lowest = author.floor_seq(on).or(crowded_out.as_ref().map(|(_, seq)| *seq));
        if lowest.is_some_and(|seq| entry.seq < seq) {
            self.raise_floor(id, on, entry, delta);
            self.retain(entry, delta);
            return Err(Refusal::Superseded);
        }
        let gone = crowded_out.map(|(name, _)| name);
        let instead_of = gone.clone().map_or_else(|| on.clone(), Topic::Policy);
        let old = author.standing(&instead_of).map(|old| (**old).clone());
        if old.is_none() && self.is_full() {
            return Err(Refusal::Full);
        }
        if let Some(old) = old {
            self.remove_live(id, old.seq, delta);
            self.retain(&old, delta);
            if let Some(name) = &gone {
                delta
                    .events
                    .push(LedgerEvent::Policy { policy: PolicyId { owner: id, name: name.clone() }, stands: None });
            }
        }
        if let Some(author) = self.authors.get_mut(&id)
            && let Some(name) = gone
        {
            author.policies.seqs.remove(&name);
        }
        self.raise_floor(id, on, entry, delta);
        self.insert_live(entry, delta);
        self.tell_standing(entry, delta);
        Ok(())
    }

    /// Tells what stands now on an entry's topic.
    fn tell_standing(&mut self, entry: &Admitted<Entry>, delta: &mut Delta) {
        let id = entry.author();
        match &entry.body {
            Body::Capability(capability) => self.set_capability(id, Some(Arc::clone(capability)), delta),
            Body::Retire => self.set_capability(id, None, delta),
            Body::Policy(notice) => {
                let policy = PolicyId { owner: id, name: notice.name.clone() };
                delta.events.push(LedgerEvent::Policy { policy, stands: Some((**entry).clone()) });
            }
            Body::Receipt(_) | Body::Misbehaviour(_) => {}
        }
    }

    /// Merges what replaces nothing: receipts and accusations, each up to its own number for each author.
    fn merge_lasting(&mut self, entry: &Admitted<Entry>, delta: &mut Delta) -> Result<(), Refusal> {
        let id = entry.author();
        let author = self.authors.entry(id).or_default();
        let accuses = matches!(entry.body, Body::Misbehaviour(_));
        let over = if accuses {
            author
                .accusations
                .first()
                .copied()
                .filter(|_| author.accusations.len() >= self.cfg.max_accusations_per_author)
        } else {
            let full = author.receipts() >= self.cfg.max_entries_per_author;
            if full { author.oldest_receipt() } else { None }
        };
        match over {
            Some(oldest) if entry.seq < oldest => return Err(Refusal::AuthorQuota),
            Some(oldest) => {
                self.remove_live(id, oldest, delta);
                delta.delete((id, oldest));
            }
            None if self.is_full() => return Err(Refusal::Full),
            None => {}
        }
        self.insert_live(entry, delta);
        let entry = (**entry).clone();
        delta.events.push(if accuses { LedgerEvent::Misbehaviour { entry } } else { LedgerEvent::Receipt { entry } });
        Ok(())
    }

    fn insert_live(&mut self, entry: &Admitted<Entry>, delta: &mut Delta) {
        let id = entry.author();
        self.items.insert(entry.wall_time.as_millis(), &entry.hash());
        self.index.insert(entry.hash(), Slot::Entry(id, entry.seq));
        self.expiry.insert((entry.expires, id, entry.seq));
        self.bytes += entry.encoded_len();
        self.policies += usize::from(matches!(entry.body, Body::Policy(_)));
        delta.put(entry);
        let author = self.authors.entry(id).or_default();
        if matches!(entry.body, Body::Misbehaviour(_)) {
            author.accusations.insert(entry.seq);
            self.accusations += 1;
        }
        author.live.insert(entry.seq, entry.clone());
    }

    /// Takes an entry out of the set. Whether it leaves the disk too is the caller's to say.
    fn remove_live(&mut self, id: NodeId, seq: u64, delta: &mut Delta) {
        let Some(author) = self.authors.get_mut(&id) else { return };
        let Some(entry) = author.live.remove(&seq) else { return };
        author.accusations.remove(&seq);
        self.unlist(&entry);
        // What the entry said of its author's floors, the mark has to say from now on.
        if topic(&entry.body).is_some() {
            delta.marks.insert(id);
        }
    }

    /// Takes what left the set out of everything that counts it.
    fn unlist(&mut self, entry: &Verified<Entry>) {
        self.items.remove(entry.wall_time.as_millis(), &entry.hash());
        self.index.remove(&entry.hash());
        self.expiry.remove(&(entry.expires, entry.author(), entry.seq));
        self.bytes -= entry.encoded_len();
        self.policies -= usize::from(matches!(entry.body, Body::Policy(_)));
        self.accusations -= usize::from(matches!(entry.body, Body::Misbehaviour(_)));
    }

    /// Moves a topic's floor up to `entry`, see [`Author::raise_floor`].
    fn raise_floor(&mut self, id: NodeId, on: &Topic, entry: &Verified<Entry>, delta: &mut Delta) {
        let author = self.authors.entry(id).or_default();
        for until in author.floor_ends() {
            self.expiry.remove(&(until, id, FLOOR));
        }
        author.raise_floor(on, entry.seq, entry.expires);
        for until in author.floor_ends() {
            self.expiry.insert((until, id, FLOOR));
        }
        delta.marks.insert(id);
    }

    /// Keeps a superseded entry, whole while there is room, then as a trace, then not at all.
    fn retain(&mut self, entry: &Verified<Entry>, delta: &mut Delta) {
        let (id, key) = (entry.author(), (entry.author(), entry.seq));
        let room = self.past_bytes + entry.encoded_len() <= self.cfg.max_superseded_bytes;
        let author = self.authors.entry(id).or_default();
        let wire = room.then(|| entry.to_wire());
        if room {
            self.past_bytes += entry.encoded_len();
            delta.put(entry);
        } else {
            delta.delete(key);
        }
        let past = Past { hash: entry.hash(), prev: entry.prev, expires: entry.expires, wire };
        author.past.insert(entry.seq, past);
        self.expiry.insert((entry.expires, id, entry.seq));
        let whole = author.past.iter().filter(|(_, past)| past.wire.is_some());
        let surplus = whole.clone().count().saturating_sub(self.cfg.max_superseded_per_author);
        let cut: Vec<u64> = whole.map(|(seq, _)| *seq).take(surplus).collect();
        for seq in cut {
            if let Some(past) = author.past.get_mut(&seq) {
                self.past_bytes -= past.bytes();
                past.wire = None;
                delta.delete((id, seq));
            }
        }
        let limit = self.cfg.max_superseded_per_author + self.cfg.max_traces_per_author;
        while author.past.len() > limit {
            let Some((seq, past)) = author.past.pop_first() else { break };
            self.past_bytes -= past.bytes();
            self.expiry.remove(&(past.expires, id, seq));
            delta.delete((id, seq));
        }
        delta.marks.insert(id);
    }

    fn set_capability(&mut self, id: NodeId, capability: Option<Arc<Capability>>, delta: &mut Delta) {
        let Some(author) = self.authors.get_mut(&id) else { return };
        if author.capability.is_none() && capability.is_none() {
            return;
        }
        self.capabilities -= usize::from(author.capability.is_some());
        self.capabilities += usize::from(capability.is_some());
        author.capability.clone_from(&capability);
        delta.events.push(LedgerEvent::Capability { node: id, capability });
    }

    /// Convicts an author by a proof that holds. Returns whether it was new.
    pub(crate) fn convict(&mut self, id: NodeId, proof: Equivocation, delta: &mut Delta) -> bool {
        if self.convictions.contains_key(&id) {
            return false;
        }
        self.set_capability(id, None, delta);
        let author = self.authors.remove(&id).unwrap_or_default();
        for (seq, entry) in &author.live {
            self.unlist(entry);
            self.tell_gone(entry, delta);
            delta.delete((id, *seq));
        }
        for (seq, past) in &author.past {
            self.past_bytes -= past.bytes();
            self.expiry.remove(&(past.expires, id, *seq));
            delta.delete((id, *seq));
        }
        for until in author.floor_ends() {
            self.expiry.remove(&(until, id, FLOOR));
        }
        delta.marks.insert(id);
        let item = conviction_item(&id);
        self.items.insert(0, &item);
        self.index.insert(item, Slot::Conviction(id));
        delta.proofs.insert(id, Some(proof.clone()));
        self.convictions.insert(id, proof);
        delta.events.push(LedgerEvent::Quarantined { node: id });
        self.bound_convictions(delta);
        true
    }

    /// At the bound the greatest id is pardoned, so that nodes agree on who is left.
    fn bound_convictions(&mut self, delta: &mut Delta) {
        while self.convictions.len() > self.cfg.max_quarantined {
            let Some((id, _)) = self.convictions.pop_last() else { break };
            let item = conviction_item(&id);
            self.items.remove(0, &item);
            self.index.remove(&item);
            delta.proofs.insert(id, None);
        }
    }

    /// Lets go of everything that expired by `wall`.
    pub(crate) fn expire(&mut self, wall: WallTime, delta: &mut Delta) {
        while let Some((at, id, seq)) = self.expiry.pop(wall) {
            if seq == FLOOR {
                if let Some(author) = self.authors.get_mut(&id) {
                    author.end_floors(at);
                    delta.marks.insert(id);
                }
            } else {
                self.expire_entry(id, seq, delta);
            }
            self.forget_if_empty(&id);
        }
    }

    fn expire_entry(&mut self, id: NodeId, seq: u64, delta: &mut Delta) {
        let Some(author) = self.authors.get_mut(&id) else { return };
        if let Some(past) = author.past.remove(&seq) {
            self.past_bytes -= past.bytes();
            delta.marks.insert(id);
        }
        if let Some(entry) = author.live.get(&seq).cloned() {
            self.tell_gone(&entry, delta);
        }
        self.remove_live(id, seq, delta);
        delta.delete((id, seq));
    }

    /// Tells that nothing stands any more where this entry stood.
    fn tell_gone(&mut self, entry: &Verified<Entry>, delta: &mut Delta) {
        let id = entry.author();
        match &entry.body {
            Body::Capability(_) | Body::Retire => self.set_capability(id, None, delta),
            Body::Policy(notice) => {
                let policy = PolicyId { owner: id, name: notice.name.clone() };
                delta.events.push(LedgerEvent::Policy { policy, stands: None });
            }
            Body::Receipt(_) | Body::Misbehaviour(_) => {}
        }
    }

    fn forget_if_empty(&mut self, id: &NodeId) {
        if self.authors.get(id).is_some_and(Author::is_empty) {
            self.authors.remove(id);
        }
    }
}
