//! The trace: one hash over everything that happened, in order. Two runs with one hash were the same run.

use chorus_machine::Time;

/// Bytes gathered before they are hashed: a longer run hashes faster.
const BUFFER: usize = 64 * 1024;

/// See the module.
#[derive(Debug, Default)]
pub struct Trace {
    hasher: blake3::Hasher,
    buffer: Vec<u8>,
    events: u64,
}

impl Trace {
    /// Adds an event: when, what kind, where, and what tells it apart from others of its kind.
    pub fn add(&mut self, at: Time, kind: u8, host: u32, detail: u64) {
        self.events += 1;
        self.buffer.extend_from_slice(&at.as_nanos().to_le_bytes());
        self.buffer.push(kind);
        self.buffer.extend_from_slice(&host.to_le_bytes());
        self.buffer.extend_from_slice(&detail.to_le_bytes());
        if self.buffer.len() >= BUFFER {
            self.hasher.update(&self.buffer);
            self.buffer.clear();
        }
    }

    /// Returns how many events were added.
    #[must_use]
    pub fn events(&self) -> u64 {
        self.events
    }

    /// Returns the hash of all events so far.
    pub fn hash(&mut self) -> String {
        self.hasher.update(&self.buffer);
        self.buffer.clear();
        self.hasher.finalize().to_hex().to_string()
    }
}

/// Returns eight bytes that tell frames apart.
#[must_use]
pub fn tag(bytes: &[u8]) -> u64 {
    let mut tag = [0; 8];
    tag.copy_from_slice(&blake3::hash(bytes).as_bytes()[..8]);
    u64::from_le_bytes(tag)
}
