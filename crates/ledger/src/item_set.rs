//! The sorted set of (time, hash) items over which two nodes reconcile, with its digest.
//!
//! Items stand in chunks of a few hundred, so that an insertion moves a few kilobytes and not the whole set. The digest is a
//! running sum, and the first frame of a reconciliation is remembered until the set changes: beginning one costs nothing when
//! nothing happened. The frames are those of the Negentropy protocol, version 1.

use chorus_protocol::Hash;
use chorus_protocol::limits::MAX_RECONCILE_BYTES;
use negentropy::{Bound, Error, Id, Item, Negentropy, NegentropyStorageBase};

/// Items in a chunk before it is split in two.
const MAX_CHUNK: usize = 512;
/// What a frame may hold.
const FRAME_LIMIT: u64 = MAX_RECONCILE_BYTES as u64;

/// A sum of hashes modulo 2^256, lanes in little-endian order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sum([u64; 4]);

impl Sum {
    fn lanes(hash: &Hash) -> [u64; 4] {
        let mut lanes = [0; 4];
        for (lane, bytes) in lanes.iter_mut().zip(hash.as_bytes().as_chunks::<8>().0) {
            *lane = u64::from_le_bytes(*bytes);
        }
        lanes
    }

    fn add(&mut self, hash: &Hash) {
        let mut carry = false;
        for (lane, other) in self.0.iter_mut().zip(Self::lanes(hash)) {
            let (sum, first) = lane.overflowing_add(other);
            let (sum, second) = sum.overflowing_add(u64::from(carry));
            (*lane, carry) = (sum, first || second);
        }
    }

    fn subtract(&mut self, hash: &Hash) {
        let mut borrow = false;
        for (lane, other) in self.0.iter_mut().zip(Self::lanes(hash)) {
            let (rest, first) = lane.overflowing_sub(other);
            let (rest, second) = rest.overflowing_sub(u64::from(borrow));
            (*lane, borrow) = (rest, first || second);
        }
    }
}

/// What a responder's frame told an initiator.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    /// Hashes that only this node holds.
    pub(crate) have: Vec<Hash>,
    /// Hashes that only the other holds.
    pub(crate) need: Vec<Hash>,
    /// The next frame; `None` when all is known.
    pub(crate) next: Option<Vec<u8>>,
}

/// The set. An item is a moment in milliseconds and a hash, and stands in it at most once.
#[derive(Debug, Default)]
pub(crate) struct ItemSet {
    /// Sorted, and none is empty.
    chunks: Vec<Vec<Item>>,
    len: usize,
    sum: Sum,
    first_frame: Option<Vec<u8>>,
}

fn item(millis: u64, hash: &Hash) -> Item {
    Item::with_timestamp_and_id(millis, Id::from_byte_array(*hash.as_bytes()))
}

impl ItemSet {
    /// Returns the digest of the whole set.
    pub(crate) fn digest(&self) -> Hash {
        let mut bytes = [0; 32];
        for (out, lane) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(self.sum.0) {
            *out = lane.to_le_bytes();
        }
        Hash::derive("chorus ledger digest v1", &[&bytes, &(self.len as u64).to_le_bytes()])
    }

    /// Adds an item that may already be there; returns whether it was new.
    pub(crate) fn insert(&mut self, millis: u64, hash: &Hash) -> bool {
        let item = item(millis, hash);
        let at = self.chunk_of(&item);
        match self.chunks.get_mut(at) {
            None => self.chunks.push(vec![item]),
            Some(chunk) => {
                let Err(slot) = chunk.binary_search(&item) else { return false };
                chunk.insert(slot, item);
                if chunk.len() > MAX_CHUNK {
                    let upper = chunk.split_off(MAX_CHUNK / 2);
                    self.chunks.insert(at + 1, upper);
                }
            }
        }
        self.len += 1;
        self.sum.add(hash);
        self.first_frame = None;
        true
    }

    /// Removes an item that may not be there; returns whether it was.
    pub(crate) fn remove(&mut self, millis: u64, hash: &Hash) -> bool {
        let item = item(millis, hash);
        let at = self.chunk_of(&item);
        let Some(chunk) = self.chunks.get_mut(at) else { return false };
        let Ok(slot) = chunk.binary_search(&item) else { return false };
        chunk.remove(slot);
        let left = chunk.len();
        if left == 0 {
            self.chunks.remove(at);
        } else if self.chunks.get(at + 1).is_some_and(|next| left + next.len() <= MAX_CHUNK / 2) {
            let next = self.chunks.remove(at + 1);
            self.chunks[at].extend(next);
        }
        self.len -= 1;
        self.sum.subtract(hash);
        self.first_frame = None;
        true
    }

    /// The chunk in which an item stands or belongs: the last one that begins at or before it.
    fn chunk_of(&self, item: &Item) -> usize {
        self.chunks.partition_point(|chunk| chunk.first().is_some_and(|first| first <= item)).saturating_sub(1)
    }

    /// Returns the frame with which a reconciliation begins.
    pub(crate) fn first_frame(&mut self) -> Result<Vec<u8>, Error> {
        if let Some(frame) = &self.first_frame {
            return Ok(frame.clone());
        }
        let frame = Negentropy::borrowed(self, FRAME_LIMIT)?.initiate()?;
        self.first_frame = Some(frame.clone());
        Ok(frame)
    }

    /// Answers an initiator's frame.
    pub(crate) fn respond(&self, frame: &[u8]) -> Result<Vec<u8>, Error> {
        Negentropy::borrowed(self, FRAME_LIMIT)?.reconcile(frame)
    }

    /// Takes a responder's frame as the initiator. Neither side keeps anything between two frames, so the set may change.
    pub(crate) fn advance(&self, frame: &[u8]) -> Result<Findings, Error> {
        let mut negentropy = Negentropy::borrowed(self, FRAME_LIMIT)?;
        negentropy.set_initiator();
        let (mut have, mut need) = (Vec::new(), Vec::new());
        let next = negentropy.reconcile_with_ids(frame, &mut have, &mut need)?;
        // The crate gathers what is needed in a hash set with a random seed: sorted, so that every run does the same.
        need.sort_unstable();
        let hashes = |ids: Vec<Id>| ids.into_iter().map(|id| Hash::from_bytes(id.to_bytes())).collect();
        Ok(Findings { have: hashes(have), need: hashes(need), next })
    }
}

impl NegentropyStorageBase for ItemSet {
    fn size(&self) -> Result<usize, Error> {
        Ok(self.len)
    }

    fn get_item(&self, index: usize) -> Result<Option<Item>, Error> {
        let mut skip = index;
        for chunk in &self.chunks {
            if let Some(item) = chunk.get(skip) {
                return Ok(Some(*item));
            }
            skip -= chunk.len();
        }
        Ok(None)
    }

    fn iterate(
        &self,
        begin: usize,
        end: usize,
        cb: &mut dyn FnMut(Item, usize) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        if begin > end || end > self.len {
            return Err(Error::BadRange);
        }
        let mut base = 0;
        for chunk in &self.chunks {
            if base >= end {
                break;
            }
            let (from, to) = (begin.saturating_sub(base).min(chunk.len()), (end - base).min(chunk.len()));
            for (offset, item) in chunk.iter().enumerate().take(to).skip(from) {
                if !cb(*item, base + offset)? {
                    return Ok(());
                }
            }
            base += chunk.len();
        }
        Ok(())
    }

    fn find_lower_bound(&self, first: usize, last: usize, value: &Bound) -> usize {
        let bound = &value.item;
        let at = self.chunks.partition_point(|chunk| chunk.last().is_some_and(|last| last < bound));
        let before: usize = self.chunks.iter().take(at).map(Vec::len).sum();
        let within = self.chunks.get(at).map_or(0, |chunk| chunk.partition_point(|item| item < bound));
        (before + within).clamp(first, last)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use negentropy::NegentropyStorageVector;
    use proptest::prelude::*;

    use super::*;

    fn hash(n: u64) -> Hash {
        Hash::derive("test", &[&n.to_le_bytes()])
    }

    /// The crate's own storage, as the yardstick.
    fn reference(items: &[(u64, Hash)]) -> NegentropyStorageVector {
        let mut vector = NegentropyStorageVector::new();
        for (millis, hash) in items {
            vector.insert(*millis, Id::from_byte_array(*hash.as_bytes())).unwrap();
        }
        vector.seal().unwrap();
        vector
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn it_is_the_reference_storage_under_any_insertions_and_removals(
            ops in proptest::collection::vec((any::<bool>(), 0u64..40, 0u64..900), 0..2_500),
            ranges in proptest::collection::vec((0usize..3_000, 0usize..3_000, 0u64..42), 8),
        ) {
            let mut set = ItemSet::default();
            let mut model = std::collections::BTreeSet::new();
            for (add, millis, n) in ops {
                // Removals are rarer than insertions, so that chunks split.
                if add || n % 3 != 0 {
                    prop_assert_eq!(set.insert(millis, &hash(n)), model.insert((millis, hash(n))));
                } else {
                    prop_assert_eq!(set.remove(millis, &hash(n)), model.remove(&(millis, hash(n))));
                }
            }
            let items: Vec<_> = model.into_iter().collect();
            let vector = reference(&items);
            prop_assert_eq!(set.size().unwrap(), items.len());
            for (a, b, millis) in ranges {
                let (a, b) = (a.min(b).min(items.len()), a.max(b).min(items.len()));
                prop_assert_eq!(*set.fingerprint(a, b).unwrap(), *vector.fingerprint(a, b).unwrap());
                prop_assert_eq!(set.get_item(a).unwrap(), vector.get_item(a).unwrap());
                let bound = Bound::with_timestamp(millis);
                prop_assert_eq!(set.find_lower_bound(a, b, &bound), vector.find_lower_bound(a, b, &bound));
            }
            // The digest is of the set, not of its history.
            let mut fresh = ItemSet::default();
            for (millis, hash) in items.iter().rev() {
                fresh.insert(*millis, hash);
            }
            prop_assert_eq!(set.digest(), fresh.digest());
        }

        #[test]
        fn a_hostile_frame_is_an_error_and_never_a_panic(frame in proptest::collection::vec(any::<u8>(), 0..400), version in any::<bool>()) {
            let mut set = ItemSet::default();
            for n in 0..2_000 {
                set.insert(n / 7, &hash(n));
            }
            let mut frame = frame;
            if version {
                frame.insert(0, 0x61);
            }
            let _ = set.respond(&frame);
            let _ = set.advance(&frame);
        }
    }

    #[test]
    fn the_first_frame_is_remembered_until_the_set_changes() {
        let mut set = ItemSet::default();
        for n in 0..1_000 {
            set.insert(n, &hash(n));
        }
        let first = set.first_frame().unwrap();
        assert_eq!(first, Negentropy::borrowed(&set, FRAME_LIMIT).unwrap().initiate().unwrap());
        set.insert(5, &hash(5_000));
        assert_ne!(first, set.first_frame().unwrap());
        set.remove(5, &hash(5_000));
        assert_eq!(first, set.first_frame().unwrap());
    }
}
