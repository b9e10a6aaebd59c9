//! What a merge changed, gathered until it is handed to the disk and to whoever listens.

use std::collections::{BTreeMap, BTreeSet};

use chorus_protocol::entry::{Entry, Equivocation};
use chorus_protocol::{NodeId, Verified};

use crate::io::LedgerEvent;

/// Where an entry stands on disk: its author and its number. No author has two entries of one number there.
pub type EntryKey = (NodeId, u64);

/// What the ledger remembers of an author beyond its entries, as opaque bytes for the disk; `None` forgets it.
pub type MarkUpdate = (NodeId, Option<Vec<u8>>);

/// Changes in the order in which they must be seen. Of two changes to one key the later one stands.
#[derive(Debug, Default)]
pub(crate) struct Delta {
    pub(crate) entries: BTreeMap<EntryKey, Option<Verified<Entry>>>,
    /// Authors whose mark may have changed.
    pub(crate) marks: BTreeSet<NodeId>,
    /// Authors convicted, with the proof, or forgotten again.
    pub(crate) proofs: BTreeMap<NodeId, Option<Equivocation>>,
    pub(crate) events: Vec<LedgerEvent>,
}

impl Delta {
    pub(crate) fn put(&mut self, entry: &Verified<Entry>) {
        self.entries.insert((entry.author(), entry.seq), Some(entry.clone()));
    }

    pub(crate) fn delete(&mut self, key: EntryKey) {
        self.entries.insert(key, None);
    }

    pub(crate) fn has_writes(&self) -> bool {
        !self.entries.is_empty() || !self.marks.is_empty() || !self.proofs.is_empty()
    }
}
