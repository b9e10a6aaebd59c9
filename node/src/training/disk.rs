//! The thread that reads and writes for a training room: chunks into files, frames into a store for large values.
//!
//! ```text
//!  Room ──Job (bounded)──▶ thread: one after the other ──Done──▶ Room
//!                            └ frames that wait together ─▶ Committer: waits for the disk ──Done──▶ Room
//! ```
//!
//! One thread, so that what was asked first is done first: a version's files are made before its chunks come, and are forgotten after.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use chorus_protocol::bounded::List;
use chorus_protocol::limits::{ENVELOPE_OVERHEAD_BYTES, MAX_CHUNK_BYTES, MAX_ROLLOUT_FRAME_BYTES};
use chorus_protocol::misbehaviour::{Charge, Misbehaviour};
use chorus_protocol::policy::{Manifest, Version};
use chorus_protocol::rollout::{GroupId, RolloutFrame};
use chorus_protocol::{Admitted, Hash, NetworkId, NodeId, Received, Verified, codec};
use chorus_rollout::buffer::FrameKey;
use chorus_store::{Blobs, Committer, Staged, StoreError};
use tokio::sync::mpsc;

use super::evidence;
use super::exchange::Piece;
use super::library::Library;

/// Jobs that may wait.
const QUEUE: usize = 1_024;
/// Frames that are written together at most.
const MAX_GROUP: usize = 64;
/// Bytes that are written together; one frame more may slip in. Their room on the disk is free again when all of them are deleted.
const MAX_GROUP_BYTES: usize = 16 << 20;
/// How long the end of the thread is waited for.
const FAREWELL: Duration = Duration::from_secs(5);
/// Where frames lie: a trainer's that it took, a sampler's that are not acknowledged.
const FRAMES: &str = "frames";
/// A signed frame on disk.
const MAX_FRAME_VALUE: usize = MAX_ROLLOUT_FRAME_BYTES + ENVELOPE_OVERHEAD_BYTES;

/// What the disk is asked.
pub(super) enum Job {
    /// Make a version's files.
    Keep(Box<Admitted<Manifest>>),
    /// Write a chunk.
    Store { manifest: Box<Admitted<Manifest>>, index: u32, bytes: List<u8, MAX_CHUNK_BYTES> },
    /// Read a chunk for somebody.
    Read { to: NodeId, manifest: Box<Admitted<Manifest>>, index: u32 },
    /// Delete a version.
    Forget(Version),
    /// Write a frame.
    Persist { key: FrameKey, frame: Verified<RolloutFrame> },
    /// Read a frame.
    Load(FrameKey),
    /// Delete frames.
    Delete(Vec<FrameKey>),
    /// Keep the frame in which a sampler signed a rollout, where nothing deletes it.
    Evidence { sampler: NodeId, group: GroupId, member: u16, charge: Charge },
    /// Read a piece of evidence for somebody.
    ReadEvidence { to: NodeId, evidence: Hash, from: u64 },
    /// Read all of it.
    LoadEvidence(Hash),
    /// Keep what came from somebody else and has this hash.
    KeepEvidence { evidence: Hash, bytes: Vec<u8> },
}

/// What became of it.
#[derive(Debug)]
pub(super) enum Done {
    Stored {
        version: Version,
        index: u32,
        ok: bool,
    },
    Read {
        to: NodeId,
        version: Version,
        index: u32,
        bytes: Option<Vec<u8>>,
    },
    Persisted {
        key: FrameKey,
        ok: bool,
    },
    /// The frame could not be read just now.
    Unread(FrameKey),
    Loaded {
        key: FrameKey,
        frame: Option<Verified<RolloutFrame>>,
    },
    /// The evidence is kept: this can be said in the ledger.
    Evidence(Box<Misbehaviour>),
    EvidenceRead(Piece),
    EvidenceLoaded {
        evidence: Hash,
        bytes: Option<Vec<u8>>,
    },
}

/// The way to the thread. When it is dropped, what was asked is still done, and waited for: a process that ends while its database is
/// being closed aborts.
pub(super) struct Disk {
    queue: Option<SyncSender<Job>>,
    /// Nothing comes here. It ends with the thread.
    ended: Receiver<()>,
    evidence: PathBuf,
}

impl Disk {
    /// Opens the frames' database and starts the thread. Returns the frames that are there, by sampler and number.
    pub(super) fn open(
        directory: &Path,
        library: Library,
        network: NetworkId,
    ) -> Result<(Self, mpsc::Receiver<Done>, Vec<Verified<RolloutFrame>>), StoreError> {
        let store = Blobs::open(&directory.join("rollouts"), &network, FRAMES)?;
        let mut damaged = Vec::new();
        let mut frames = Vec::new();
        for (key, bytes) in store.all()? {
            match decode(&bytes, &network) {
                Some(frame) => frames.push(frame),
                None => damaged.push(key),
            }
        }
        store.delete(damaged)?;
        let (queue, jobs) = sync_channel(QUEUE);
        let (done_tx, done) = mpsc::channel(QUEUE);
        let evidence = directory.join("evidence");
        let (told, blobs) = (done_tx.clone(), store.clone());
        let committer = Committer::spawn(store.clone(), move |ticket, committed| match ticket {
            Ticket::Written(keys) => persisted(&told, keys, &committed),
            Ticket::Delete(keys) => delete(&blobs, keys),
        })?;
        let worker = Worker { store, committer, library, network, evidence: evidence.clone(), done: done_tx };
        let (ends, ended) = sync_channel(0);
        let work = move || {
            worker.run(&jobs);
            drop::<SyncSender<()>>(ends);
        };
        let path = directory.to_owned();
        std::thread::Builder::new()
            .name("chorus-training".to_owned())
            .spawn(work)
            .map_err(|error| StoreError::Io { path, detail: error.to_string() })?;
        Ok((Self { queue: Some(queue), ended, evidence }, done, frames))
    }

    /// Returns where evidence is kept.
    pub(super) fn evidence(&self) -> &Path {
        &self.evidence
    }

    /// Asks for something, or gives it back when too much waits already: the disk does not keep up.
    pub(super) fn submit(&self, job: Job) -> Result<(), Box<Job>> {
        let Some(queue) = &self.queue else { return Err(Box::new(job)) };
        queue.try_send(job).map_err(|error| match error {
            TrySendError::Full(job) | TrySendError::Disconnected(job) => Box::new(job),
        })
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.queue = None;
        // It cannot be joined: it may wait for somebody to take what it has to say, and who does may be waiting here.
        if self.ended.recv_timeout(FAREWELL) == Err(RecvTimeoutError::Timeout) {
            tracing::warn!("the disk does not keep up; what was asked of it last may not be done");
        }
    }
}

/// What the committer does in its turn.
enum Ticket {
    /// Say that frames are on the disk.
    Written(Vec<FrameKey>),
    /// Delete frames. Some of them may have been written just now, so this waits until they are on the disk.
    Delete(Vec<FrameKey>),
}

struct Worker {
    store: Blobs,
    committer: Committer<Ticket>,
    library: Library,
    network: NetworkId,
    /// Where evidence is kept.
    evidence: PathBuf,
    done: mpsc::Sender<Done>,
}

impl Worker {
    fn run(self, jobs: &Receiver<Job>) {
        let mut next = None;
        while let Some(job) = next.take().or_else(|| jobs.recv().ok()) {
            match job {
                Job::Persist { key, frame } => next = self.persist(vec![(key, frame)], jobs),
                other => self.one(other),
            }
        }
    }

    fn one(&self, job: Job) {
        match job {
            Job::Keep(manifest) => {
                if let Err(error) = self.library.keep(&manifest) {
                    // Its chunks will not be stored either, and that is what the room hears of.
                    tracing::warn!(%error, version = ?manifest.version, "a version's files cannot be made");
                }
            }
            Job::Store { manifest, index, bytes } => {
                let written = self.library.write_chunk(&manifest, index, &bytes);
                if let Err(error) = &written {
                    tracing::warn!(%error, version = ?manifest.version, index, "a chunk was not written; is the disk full?");
                }
                self.tell(Done::Stored { version: manifest.version, index, ok: written.is_ok() });
            }
            Job::Read { to, manifest, index } => {
                let bytes = self.library.read_chunk(&manifest, index);
                if let Err(error) = &bytes {
                    tracing::warn!(%error, version = ?manifest.version, index, "a chunk was not read");
                }
                let bytes = bytes.ok();
                self.tell(Done::Read { to, version: manifest.version, index, bytes });
            }
            Job::Forget(version) => {
                if let Err(error) = self.library.forget(version) {
                    tracing::warn!(%error, ?version, "a version was not deleted");
                }
            }
            Job::Persist { key, frame } => {
                self.persist(vec![(key, frame)], &sync_channel(0).1);
            }
            Job::Load(key) => {
                let done = match self.store.get(&bytes_of(key)) {
                    Err(error) if error.is_retryable() => {
                        tracing::warn!(%error, "a frame was not read");
                        Done::Unread(key)
                    }
                    found => {
                        let bytes = found.ok().flatten();
                        Done::Loaded { key, frame: bytes.and_then(|bytes| decode(&bytes, &self.network)) }
                    }
                };
                self.tell(done);
            }
            Job::Evidence { sampler, group, member, charge } => self.keep_evidence((sampler, group, member), charge),
            Job::ReadEvidence { to, evidence, from } => {
                let found = evidence::read_piece(&self.evidence, &evidence, from).ok();
                self.tell(Done::EvidenceRead(Piece { to, evidence, from, found }));
            }
            Job::LoadEvidence(evidence) => {
                let bytes = evidence::load(&self.evidence, &evidence).ok();
                self.tell(Done::EvidenceLoaded { evidence, bytes });
            }
            Job::KeepEvidence { evidence, bytes } => {
                if let Err(error) = evidence::store(&self.evidence, &evidence, &bytes) {
                    tracing::warn!(%error, %evidence, "the evidence was not kept");
                }
            }
            Job::Delete(keys) => {
                self.committer.commit(Ticket::Delete(keys), Staged::default());
            }
        }
    }

    /// Writes a frame and those that wait right behind it, to be synced together. Returns the job that follows them, if it came already.
    fn persist(&self, mut frames: Vec<(FrameKey, Verified<RolloutFrame>)>, jobs: &Receiver<Job>) -> Option<Job> {
        let mut next = None;
        let mut bytes = frames.iter().map(|(_, frame)| frame.encoded_len()).sum::<usize>();
        while frames.len() < MAX_GROUP && bytes < MAX_GROUP_BYTES {
            match jobs.try_recv() {
                Ok(Job::Persist { key, frame }) => {
                    bytes += frame.encoded_len();
                    frames.push((key, frame));
                }
                Ok(other) => {
                    next = Some(other);
                    break;
                }
                Err(_) => break,
            }
        }
        let value = |(key, frame): &(FrameKey, Verified<RolloutFrame>)| {
            let (envelope, rollouts) = frame.to_wire().to_parts();
            (bytes_of(*key), vec![envelope.into(), rollouts])
        };
        let values = frames.iter().map(value).collect();
        let keys = frames.iter().map(|(key, _)| *key).collect();
        match self.store.stage(values) {
            Ok(staged) => self.committer.commit(Ticket::Written(keys), staged),
            Err(error) => persisted(&self.done, keys, &Err(error)),
        }
        next
    }

    /// The frames that are on disk are few, and samplers are seldom convicted, so they are simply all looked at.
    fn keep_evidence(&self, (sampler, group, member): (NodeId, GroupId, u16), charge: Charge) {
        let holds = |frame: &Verified<RolloutFrame>| {
            let mut rollouts = frame.rollouts();
            frame.author() == sampler && rollouts.any(|rollout| (rollout.group(), rollout.member()) == (group, member))
        };
        let there = self.store.all().unwrap_or_default();
        let frames: Vec<_> = there.iter().filter_map(|(_, bytes)| decode(bytes, &self.network)).collect();
        let Some(frame) = frames.iter().find(|frame| holds(frame)).cloned() else {
            return tracing::warn!(sampler = %sampler.fmt_short(), "the frame that convicts it is not on disk any more");
        };
        let involved = if charge == Charge::Copied { evidence::up_to(frames, &frame) } else { vec![frame.clone()] };
        match evidence::keep(&self.evidence, (sampler, group, member), charge, (&frame, &involved)) {
            Ok(accusation) => {
                tracing::warn!(sampler = %sampler, evidence = %accusation.evidence, "what it signed is kept as evidence");
                self.tell(Done::Evidence(Box::new(accusation)));
            }
            Err(error) => tracing::warn!(%error, path = %self.evidence.display(), "the evidence was not kept"),
        }
    }

    /// A room that is gone needs no answer.
    fn tell(&self, done: Done) {
        let _ = self.done.blocking_send(done);
    }
}

/// Says what became of frames. A room that is gone needs no answer.
fn persisted(done: &mpsc::Sender<Done>, keys: Vec<FrameKey>, written: &Result<(), StoreError>) {
    if let Err(error) = written {
        tracing::warn!(%error, frames = keys.len(), "rollouts were not written; is the disk full?");
    }
    for key in keys {
        let _ = done.blocking_send(Done::Persisted { key, ok: written.is_ok() });
    }
}

fn delete(blobs: &Blobs, keys: Vec<FrameKey>) {
    if let Err(error) = blobs.delete(keys.into_iter().map(bytes_of).collect()) {
        tracing::warn!(%error, "frames were not deleted");
    }
}

fn bytes_of(key: FrameKey) -> Vec<u8> {
    [key.sampler.as_bytes().as_slice(), &key.sequence.to_be_bytes()].concat()
}

/// The signature tells whether the disk still holds what was written.
fn decode(bytes: &[u8], network: &NetworkId) -> Option<Verified<RolloutFrame>> {
    let frame = codec::decode::<Received<RolloutFrame>>("rollouts", bytes, MAX_FRAME_VALUE).ok()?.verify(network);
    frame.inspect_err(|error| tracing::warn!(%error, "a frame on disk is damaged and counts as lost")).ok()
}
