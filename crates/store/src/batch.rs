//! What goes to disk in one piece, and what comes back at the start.

use chorus_protocol::entry::{Entry, Equivocation};
use chorus_protocol::{NodeId, Verified};

/// When a write counts as done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Durability {
    /// When the operating system has it: survives the death of the process, not that of the machine.
    #[default]
    Relaxed,
    /// When the disk has it: survives both.
    Synced,
}

/// A change to one record of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The table: at most 255 bytes.
    pub table: &'static str,
    /// The key within the table.
    pub key: Vec<u8>,
    /// The new value; `None` deletes the record.
    pub value: Option<Vec<u8>>,
}

/// Changes that are written together or not at all. Within a batch, puts go before deletes.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Entries to write, each under its author and number.
    pub puts: Vec<Verified<Entry>>,
    /// Entries to delete, by author and number.
    pub deletes: Vec<(NodeId, u64)>,
    /// Proofs to write, each under the author it convicts.
    pub proofs: Vec<(NodeId, Equivocation)>,
    /// Authors whose proofs are to be deleted.
    pub pardons: Vec<NodeId>,
    /// What the ledger remembers of authors beyond their entries; `None` deletes it.
    pub marks: Vec<(NodeId, Option<Vec<u8>>)>,
    /// Anything else.
    pub records: Vec<Record>,
    /// When the write counts as done.
    pub durability: Durability,
}

impl Batch {
    /// Returns about how many bytes the batch will take on disk.
    #[must_use]
    pub fn approximate_bytes(&self) -> usize {
        const KEY: usize = 40;
        const ENVELOPE: usize = 140;
        let entries: usize = self.puts.iter().map(|entry| entry.encoded_len() + ENVELOPE).sum();
        let proofs: usize =
            self.proofs.iter().map(|(_, proof)| proof.first.len() + proof.second.len() + 2 * ENVELOPE).sum();
        let marks: usize = self.marks.iter().map(|(_, mark)| KEY + mark.as_ref().map_or(0, Vec::len)).sum();
        let records: usize = self
            .records
            .iter()
            .map(|record| record.table.len() + record.key.len() + record.value.as_ref().map_or(0, Vec::len))
            .sum();
        entries + proofs + marks + records + KEY * (self.deletes.len() + self.pardons.len())
    }
}

/// Everything of the ledger that was on disk.
#[derive(Clone, Debug, Default)]
pub struct Loaded {
    /// Entries, by author and number.
    pub entries: Vec<Verified<Entry>>,
    /// Proofs, by the author they convict.
    pub proofs: Vec<(NodeId, Equivocation)>,
    /// What the ledger remembers of authors beyond their entries.
    pub marks: Vec<(NodeId, Vec<u8>)>,
}
