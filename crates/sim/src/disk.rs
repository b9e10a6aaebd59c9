//! A virtual disk: writes take time, and a crash takes what was not on it yet.
//!
//! ```text
//!  Persist ──▶ waiting ──commit──▶ cache ──┬─▶ platter     acknowledged when committed
//!                                          │
//!               lost by any crash          └ lost by a power failure, unless a durable write came after it
//! ```
//!
//! Writes reach the disk in order, as in a write-ahead log. What waits is committed as a group: while one commit is under way the
//! next one gathers. A commit that holds a durable batch is synchronised, and so is everything before it.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use chorus_core::PersistBatch;
use chorus_ledger::EntryKey;
use chorus_machine::Rng;
use chorus_protocol::entry::{Entry, Equivocation};
use chorus_protocol::{Hash, NodeId, Verified};

/// What the disk holds of a ledger.
#[derive(Clone, Debug, Default)]
pub struct Content {
    /// Entries by author and number.
    pub entries: BTreeMap<EntryKey, Verified<Entry>>,
    /// What the ledger remembers of authors.
    pub marks: BTreeMap<NodeId, Vec<u8>>,
    /// Proofs by the author they convict.
    pub proofs: BTreeMap<NodeId, Equivocation>,
}

impl Content {
    fn apply(&mut self, batch: &PersistBatch) {
        for entry in &batch.puts {
            self.entries.insert((entry.author(), entry.seq), entry.clone());
        }
        for key in &batch.deletes {
            self.entries.remove(key);
        }
        for (author, mark) in &batch.marks {
            match mark {
                Some(mark) => self.marks.insert(*author, mark.clone()),
                None => self.marks.remove(author),
            };
        }
        for (author, proof) in &batch.proofs {
            self.proofs.insert(*author, proof.clone());
        }
        for author in &batch.pardons {
            self.proofs.remove(author);
        }
    }
}

/// How a disk may be broken on purpose, to see whether the invariants notice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DiskBug {
    /// A disk as it should be.
    #[default]
    None,
    /// It acknowledges writes that it loses in a crash.
    ForgetsAcknowledged,
    /// It acknowledges before it writes.
    AcknowledgesEarly,
}

/// One node's disk.
#[derive(Debug)]
pub struct Disk {
    /// Fastest and slowest commit.
    commit_ms: [f64; 2],
    /// A slow disk takes so many times longer.
    pub slowness: f64,
    /// A full disk refuses writes.
    pub full: bool,
    bug: DiskBug,
    platter: Content,
    /// Committed, but gone when the power fails.
    cache: VecDeque<PersistBatch>,
    committing: Vec<PersistBatch>,
    waiting: Vec<PersistBatch>,
}

/// What a commit brings its node.
#[derive(Debug)]
pub struct Committed {
    /// Durable batches that are done, or all that were refused; oldest first.
    pub batches: Vec<u64>,
    /// Whether they were refused.
    pub refused: bool,
    /// When the next commit is done, if one has begun.
    pub next: Option<Duration>,
}

impl Disk {
    /// Makes an empty disk whose commits take between `fastest` and `slowest` milliseconds.
    #[must_use]
    pub fn new([fastest, slowest]: [f64; 2], bug: DiskBug) -> Self {
        Self {
            commit_ms: [fastest, slowest],
            slowness: 1.0,
            full: false,
            bug,
            platter: Content::default(),
            cache: VecDeque::new(),
            committing: Vec::new(),
            waiting: Vec::new(),
        }
    }

    fn commit_time(&self, rng: &mut Rng) -> Duration {
        let [fastest, slowest] = self.commit_ms;
        Duration::from_secs_f64((fastest + (slowest - fastest) * rng.unit()) * self.slowness / 1_000.0)
    }

    /// Takes a batch. Returns when the commit that it started is done; `None` while one is under way.
    pub fn write(&mut self, batch: PersistBatch, rng: &mut Rng) -> Option<Duration> {
        self.waiting.push(batch);
        self.begin(rng)
    }

    fn begin(&mut self, rng: &mut Rng) -> Option<Duration> {
        if !self.committing.is_empty() || self.waiting.is_empty() {
            return None;
        }
        std::mem::swap(&mut self.committing, &mut self.waiting);
        Some(self.commit_time(rng))
    }

    /// Ends the commit under way.
    pub fn commit(&mut self, rng: &mut Rng) -> Committed {
        let done = std::mem::take(&mut self.committing);
        // A node waits for durable batches only; of the others it wants to hear what went wrong.
        let told = done.iter().filter(|batch| batch.durable || self.full);
        let batches = told.map(|batch| batch.batch).collect();
        if !self.full {
            let durable = done.iter().any(|batch| batch.durable);
            if self.bug != DiskBug::AcknowledgesEarly {
                self.cache.extend(done);
            } else {
                self.waiting.splice(0..0, done.into_iter().map(|batch| PersistBatch { batch: 0, ..batch }));
            }
            if durable && self.bug == DiskBug::None {
                self.synchronise();
            }
        }
        Committed { batches, refused: self.full, next: self.begin(rng) }
    }

    fn synchronise(&mut self) {
        for batch in self.cache.drain(..) {
            self.platter.apply(&batch);
        }
    }

    /// The process dies, or with `power` the machine.
    pub fn crash(&mut self, power: bool, rng: &mut Rng) {
        self.slowness = 1.0;
        self.waiting.clear();
        // What was being committed is on the disk as a whole or not at all; nobody was told.
        let committing = std::mem::take(&mut self.committing);
        if rng.chance(0.5) {
            self.cache.extend(committing);
        }
        if self.bug == DiskBug::ForgetsAcknowledged {
            self.cache.clear();
        } else if power {
            // Some of what the system had not written yet may have been written all the same.
            let kept = usize::try_from(rng.below(self.cache.len() as u64 + 1)).unwrap_or(0);
            self.cache.truncate(kept);
        }
        self.synchronise();
    }

    /// Returns whether an entry would survive the process.
    #[must_use]
    pub fn holds(&self, key: &EntryKey, hash: &Hash) -> bool {
        let later = self.cache.iter().rev().find_map(|batch| {
            if batch.deletes.contains(key) {
                return Some(false);
            }
            let mut puts = batch.puts.iter().filter(|entry| (entry.author(), entry.seq) == *key);
            puts.next().map(|entry| entry.hash() == *hash)
        });
        later.unwrap_or_else(|| self.platter.entries.get(key).is_some_and(|entry| entry.hash() == *hash))
    }

    /// Returns how many batches wait for their acknowledgement.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.len() + self.committing.len()
    }

    /// Reads everything, as a process does that starts.
    #[must_use]
    pub fn read(&self) -> Content {
        self.platter.clone()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use chorus_protocol::entry::Body;
    use chorus_protocol::{SecretKey, WallTime};

    use super::*;

    fn batch(number: u64, durable: bool) -> PersistBatch {
        let key = SecretKey::from_bytes(&[1; 32]);
        let entry = Entry {
            seq: number,
            prev: Hash::ZERO,
            wall_time: WallTime::from_millis(1),
            expires: WallTime::from_millis(2),
            body: Body::Retire,
        };
        let entry = Verified::sign(&key, &"test".parse().unwrap(), entry).unwrap();
        PersistBatch {
            batch: number,
            puts: vec![entry],
            deletes: Vec::new(),
            marks: Vec::new(),
            proofs: Vec::new(),
            pardons: Vec::new(),
            durable,
        }
    }

    fn numbers(disk: &Disk) -> Vec<u64> {
        disk.read().entries.keys().map(|(_, seq)| *seq).collect()
    }

    #[test]
    fn what_was_acknowledged_survives_a_crash_and_what_waits_does_not() {
        let (mut disk, mut rng) = (Disk::new([1.0, 1.0], DiskBug::None), Rng::from_u64(1));
        assert!(disk.write(batch(1, true), &mut rng).is_some());
        assert!(disk.write(batch(2, true), &mut rng).is_none(), "the next group gathers");
        assert!(disk.write(batch(3, true), &mut rng).is_none());
        let committed = disk.commit(&mut rng);
        assert_eq!((committed.batches, committed.next.is_some()), (vec![1], true));
        assert_eq!(disk.commit(&mut rng).batches, [2, 3]);
        disk.write(batch(4, true), &mut rng);
        disk.write(batch(5, true), &mut rng);
        disk.crash(false, &mut rng);
        let left = numbers(&disk);
        assert!(left.starts_with(&[1, 2, 3]) && !left.contains(&5), "{left:?}");
    }

    #[test]
    fn a_power_failure_takes_only_what_nobody_waited_for() {
        let mut lost = 0;
        for seed in 0..20 {
            let (mut disk, mut rng) = (Disk::new([1.0, 1.0], DiskBug::None), Rng::from_u64(seed));
            for (number, durable) in [(1, false), (2, true), (3, false), (4, false)] {
                disk.write(batch(number, durable), &mut rng);
                disk.commit(&mut rng);
            }
            disk.crash(true, &mut rng);
            let left = numbers(&disk);
            assert!(left.starts_with(&[1, 2]), "{left:?}");
            lost += usize::from(left.len() < 4);
        }
        assert!(lost > 0);
    }

    #[test]
    fn a_full_disk_refuses_and_keeps_nothing() {
        let (mut disk, mut rng) = (Disk::new([1.0, 1.0], DiskBug::None), Rng::from_u64(1));
        disk.full = true;
        disk.write(batch(1, true), &mut rng);
        let committed = disk.commit(&mut rng);
        assert!(committed.refused && committed.batches == [1]);
        disk.crash(false, &mut rng);
        assert!(numbers(&disk).is_empty());
    }
}
