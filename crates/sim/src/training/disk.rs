//! A node's disk: what waits is committed together, and a crash takes what was not committed.
//!
//! Everything that a node does with its disk goes through one queue in order, as in the shell's one thread: frames, chunks, manifests,
//! checkpoints, and reading too.

use std::collections::BTreeMap;
use std::time::Duration;

use chorus_machine::Rng;
use chorus_protocol::policy::{Manifest, Version};
use chorus_protocol::rollout::RolloutFrame;
use chorus_protocol::{NetworkId, Verified};
use chorus_rollout::buffer::FrameKey;

use super::session::Place;

/// What a trainer restarts from.
#[derive(Clone, Debug)]
pub(super) struct Checkpoint {
    pub(super) step: u64,
    /// The buffer's part, as bytes.
    pub(super) progress: Vec<u8>,
    /// Every version that this trainer can name the step of, this one included, the oldest first.
    pub(super) versions: Vec<(Version, u64)>,
    pub(super) manifest: Verified<Manifest>,
    pub(super) chunks: Vec<Vec<u8>>,
}

/// Something to be done.
#[derive(Debug)]
pub(super) enum Op {
    /// Write a frame.
    Frame { key: FrameKey, frame: Verified<RolloutFrame> },
    /// Delete frames.
    Delete(Vec<FrameKey>),
    /// Read a frame.
    Load(FrameKey),
    /// Write a manifest.
    Manifest(Verified<Manifest>),
    /// Write a chunk.
    Chunk { version: Version, index: u32, bytes: Vec<u8> },
    /// Read a chunk to send it.
    Read { to: Place, version: Version, index: u32 },
    /// Delete a version.
    Forget(Version),
    /// Write a checkpoint with the version that is made of it, as a whole or not at all.
    Checkpoint(Box<Checkpoint>),
}

impl Op {
    /// Returns whether a full disk refuses it.
    fn needs_room(&self) -> bool {
        matches!(self, Self::Frame { .. } | Self::Chunk { .. })
    }
}

/// One node's disk.
#[derive(Debug)]
pub(super) struct Disk {
    commit_ms: [f64; 2],
    /// It refuses frames and chunks.
    pub(super) full: bool,
    pub(super) frames: BTreeMap<FrameKey, Verified<RolloutFrame>>,
    pub(super) manifests: BTreeMap<Version, Verified<Manifest>>,
    pub(super) chunks: BTreeMap<(Version, u32), Vec<u8>>,
    pub(super) checkpoint: Option<Checkpoint>,
    waiting: Vec<Op>,
    committing: Vec<Op>,
}

impl Disk {
    pub(super) fn new(commit_ms: [f64; 2]) -> Self {
        Self {
            commit_ms,
            full: false,
            frames: BTreeMap::new(),
            manifests: BTreeMap::new(),
            chunks: BTreeMap::new(),
            checkpoint: None,
            waiting: Vec::new(),
            committing: Vec::new(),
        }
    }

    /// Takes an operation. Returns when the commit that it started is done; `None` while one is under way.
    pub(super) fn ask(&mut self, op: Op, rng: &mut Rng) -> Option<Duration> {
        self.waiting.push(op);
        self.begin(rng)
    }

    fn begin(&mut self, rng: &mut Rng) -> Option<Duration> {
        if !self.committing.is_empty() || self.waiting.is_empty() {
            return None;
        }
        std::mem::swap(&mut self.committing, &mut self.waiting);
        Some(draw_ms(self.commit_ms, rng))
    }

    /// Ends the commit under way. Returns what was done and whether the disk took it, in order, and when the next commit is done.
    pub(super) fn commit(&mut self, rng: &mut Rng) -> (Vec<(Op, bool)>, Option<Duration>) {
        let done: Vec<(Op, bool)> = std::mem::take(&mut self.committing)
            .into_iter()
            .map(|op| {
                let taken = !(self.full && op.needs_room());
                if taken {
                    self.apply(&op);
                }
                (op, taken)
            })
            .collect();
        (done, self.begin(rng))
    }

    fn apply(&mut self, op: &Op) {
        match op {
            Op::Frame { key, frame } => {
                self.frames.insert(*key, frame.clone());
            }
            Op::Delete(keys) => keys.iter().for_each(|key| {
                self.frames.remove(key);
            }),
            Op::Manifest(manifest) => {
                self.manifests.insert(manifest.version, manifest.clone());
            }
            // A version that was forgotten meanwhile does not come back by a chunk that was on its way.
            Op::Chunk { version, index, bytes } if self.manifests.contains_key(version) => {
                self.chunks.insert((*version, *index), bytes.clone());
            }
            Op::Forget(version) => {
                self.manifests.remove(version);
                self.chunks.retain(|(of, _), _| of != version);
            }
            Op::Checkpoint(checkpoint) => {
                let version = checkpoint.manifest.version;
                self.manifests.insert(version, checkpoint.manifest.clone());
                self.chunks.extend((0u32..).map(|index| (version, index)).zip(checkpoint.chunks.iter().cloned()));
                self.checkpoint = Some(Checkpoint { chunks: Vec::new(), ..(**checkpoint).clone() });
            }
            Op::Chunk { .. } | Op::Load(_) | Op::Read { .. } => {}
        }
    }

    /// The process dies. What was being committed is on the disk or is not; nobody was told.
    pub(super) fn crash(&mut self, rng: &mut Rng) {
        self.waiting.clear();
        let committing = std::mem::take(&mut self.committing);
        if rng.chance(0.5) && !self.full {
            committing.iter().for_each(|op| self.apply(op));
        }
    }

    /// Returns whether every chunk of a version is here with its hash.
    pub(super) fn is_whole(&self, version: Version) -> bool {
        self.manifests.get(&version).is_some_and(|manifest| self.good_chunks(manifest).len() == manifest.chunks.len())
    }

    /// Returns the chunks of a version that are here with their hash, as a shell looks for them at its start.
    pub(super) fn good_chunks(&self, manifest: &Manifest) -> Vec<u32> {
        let here = self.chunks.range((manifest.version, 0)..=(manifest.version, u32::MAX));
        here.filter(|((_, index), bytes)| manifest.is_chunk(*index, bytes)).map(|((_, index), _)| *index).collect()
    }

    /// Returns the versions that are known here, the oldest first, with the chunks that are good.
    pub(super) fn resume(&self) -> Vec<(Verified<Manifest>, Vec<u32>)> {
        let mut found: Vec<_> =
            self.manifests.values().map(|manifest| (manifest.clone(), self.good_chunks(manifest))).collect();
        found.sort_by_key(|(manifest, _)| manifest.step);
        found
    }

    /// Reads all frames, through their bytes, as a process does that starts.
    pub(super) fn read_frames(&self, network: &NetworkId) -> Vec<Verified<RolloutFrame>> {
        self.frames.values().filter_map(|frame| frame.to_wire().trust_own_disk(network).ok()).collect()
    }
}

/// Draws a time between two figures in milliseconds.
pub(super) fn draw_ms([low, high]: [f64; 2], rng: &mut Rng) -> Duration {
    Duration::from_secs_f64((low + (high - low) * rng.unit()) / 1_000.0)
}
