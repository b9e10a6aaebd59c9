//! This node's own chain: which number comes next, and what waits for the disk.

use std::collections::BTreeMap;

use chorus_protocol::entry::Entry;
use chorus_protocol::{Hash, Verified, WallTime};

/// An own entry that is on its way to the disk. Nobody has heard of it.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) request: u64,
    pub(crate) entry: Verified<Entry>,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Own {
    /// The last number used, also by entries that failed on their way, and its hash.
    head: (u64, Hash),
    /// The first number of this run; `None` until something was written.
    first_of_run: Option<u64>,
    /// The highest number under this key that this node did not write, from before this run.
    lost: u64,
    /// When this run began.
    started: Option<WallTime>,
    /// By the batch that carries it.
    pub(crate) pending: BTreeMap<u64, Pending>,
}

impl Own {
    pub(crate) fn head(&self) -> (u64, Hash) {
        self.head
    }

    pub(crate) fn start(&mut self, wall: WallTime) {
        self.started.get_or_insert(wall);
    }

    /// Takes a number that was used in an earlier run.
    pub(crate) fn restore(&mut self, seq: u64, hash: Hash) {
        if seq > self.head.0 {
            self.head = (seq, hash);
        }
    }

    /// Returns number and predecessor of the next entry. A run begins at the wall clock, so that it never shares a number with
    /// entries that this disk has lost.
    pub(crate) fn next(&self, wall: WallTime) -> Option<(u64, Hash)> {
        let after = self.head.0.max(self.lost).checked_add(1)?;
        let seq = if self.first_of_run.is_some() { after } else { after.max(wall.as_millis()) };
        Some((seq, self.head.1))
    }

    pub(crate) fn written(&mut self, seq: u64, hash: Hash) {
        self.first_of_run.get_or_insert(seq);
        self.head = (seq, hash);
    }

    /// Judges an entry under this node's key that came from the network and was not known. Returns `Some(while_running)` when
    /// this node cannot have written it.
    pub(crate) fn judge_foreign(&mut self, entry: &Verified<Entry>, contradicts: bool) -> Option<bool> {
        let while_running = self.started.is_some_and(|started| entry.wall_time >= started);
        let of_this_run = self.first_of_run.is_some_and(|first| (first..=self.head.0).contains(&entry.seq));
        if of_this_run && !contradicts {
            return None;
        }
        if !while_running {
            self.lost = self.lost.max(entry.seq);
        }
        Some(while_running || contradicts)
    }
}
