//! Which chunks of a version somebody has.

use chorus_protocol::rollout::MAX_BITMAP_BYTES;
use chorus_protocol::{List, limits::MAX_CHUNKS};

/// One bit for each chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    bytes: Vec<u8>,
    len: u32,
    set: u32,
}

impl Bitmap {
    /// Makes a map of `len` chunks, none of them there. At most [`MAX_CHUNKS`].
    #[must_use]
    pub fn new(len: usize) -> Self {
        let len = len.min(MAX_CHUNKS);
        Self { bytes: vec![0; len.div_ceil(8)], len: u32::try_from(len).unwrap_or(0), set: 0 }
    }

    /// Makes a map of `len` chunks, all of them there.
    #[must_use]
    pub fn full(len: usize) -> Self {
        let mut map = Self::new(len);
        for index in 0..map.len {
            map.insert(index);
        }
        map
    }

    /// Reads a map off the wire: exactly as many bytes as `len` chunks need, and no bit beyond them.
    #[must_use]
    pub fn from_wire(bytes: &[u8], len: usize) -> Option<Self> {
        let map = Self::new(len);
        let spare = map.bytes.len() * 8 - usize::try_from(map.len).ok()?;
        let last = bytes.last().copied().unwrap_or(0);
        if bytes.len() != map.bytes.len() || (spare > 0 && last >> (8 - spare) != 0) {
            return None;
        }
        let set = bytes.iter().map(|byte| byte.count_ones()).sum();
        Some(Self { bytes: bytes.to_vec(), set, ..map })
    }

    /// Returns the map as it travels.
    #[must_use]
    pub fn to_wire(&self) -> List<u8, MAX_BITMAP_BYTES> {
        List::truncated(self.bytes.iter().copied())
    }

    /// Returns whether a chunk is there.
    #[must_use]
    pub fn contains(&self, index: u32) -> bool {
        let byte = usize::try_from(index / 8).ok().and_then(|byte| self.bytes.get(byte));
        byte.is_some_and(|byte| byte >> (index % 8) & 1 == 1)
    }

    /// Marks a chunk as there. Returns whether that is news.
    pub fn insert(&mut self, index: u32) -> bool {
        if index >= self.len || self.contains(index) {
            return false;
        }
        if let Some(byte) = usize::try_from(index / 8).ok().and_then(|byte| self.bytes.get_mut(byte)) {
            *byte |= 1 << (index % 8);
            self.set += 1;
        }
        true
    }

    /// Marks every chunk as there that is in another map of the same version.
    pub fn unite(&mut self, other: &Self) {
        for (byte, more) in self.bytes.iter_mut().zip(&other.bytes) {
            *byte |= more;
        }
        self.set = self.bytes.iter().map(|byte| byte.count_ones()).sum();
    }

    /// Marks a chunk as not there.
    pub fn remove(&mut self, index: u32) {
        if !self.contains(index) {
            return;
        }
        if let Some(byte) = usize::try_from(index / 8).ok().and_then(|byte| self.bytes.get_mut(byte)) {
            *byte &= !(1 << (index % 8));
            self.set -= 1;
        }
    }

    /// Returns how many chunks there are in all.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Returns how many are there.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.set
    }

    /// Returns whether none is there.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.set == 0
    }

    /// Returns whether all are there.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.set == self.len
    }

    /// Returns the chunks that are there.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        let bytes = self.bytes.iter().zip((0u32..).step_by(8)).filter(|(byte, _)| **byte != 0);
        bytes.flat_map(|(byte, first)| (0..8).filter(move |bit| byte >> bit & 1 == 1).map(move |bit| first + bit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_survives_the_wire_and_refuses_bits_that_are_no_chunk() {
        let mut map = Bitmap::new(11);
        assert!(map.insert(0) && map.insert(10) && !map.insert(10) && !map.insert(11));
        assert_eq!(map.iter().collect::<Vec<_>>(), [0, 10]);
        assert_eq!(Bitmap::from_wire(&map.to_wire(), 11), Some(map));
        assert_eq!(Bitmap::from_wire(&[0, 0b1000], 11), None);
        assert_eq!(Bitmap::from_wire(&[0], 11), None);
        assert_eq!(Bitmap::from_wire(&[0, 0, 0], 11), None);
        assert!(Bitmap::full(16).is_full() && Bitmap::from_wire(&[255, 255], 16).is_some_and(|map| map.is_full()));
        assert!(!Bitmap::full(3).contains(3));
    }
}
