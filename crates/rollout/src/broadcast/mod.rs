//! How a new version reaches every node: a peer-assisted, pipelined broadcast of chunks.
//!
//! ```text
//!  owner ──offers each chunk to one neighbour──▶ worker ◀──▶ worker    chunks are passed on
//!    │ ◀──────────────── HaveOne ────────────────┘  ▲            ▲     while others still arrive
//!    └──offers the next──▶ worker ◀─────────────────┴────────────┘
//! ```
//!
//! 1. The owner publishes; its signed manifest runs from neighbour to neighbour.
//! 2. The owner offers each chunk to *one* neighbour, two or so at a time, the next when one has arrived. It sends about one copy in
//!    all, however many wait for it; beyond that it helps with what is rare, up to a share that is set. A neighbour that the others
//!    do not reach gets all of it from the owner.
//! 3. A node asks several neighbours at once, for what few have first. It checks each chunk against the manifest, stores it, and only
//!    then offers it. What it is asked for most urgently (what fewest have) goes out first.
//! 4. A chunk with another hash convicts its sender. A neighbour that does not deliver is passed over for a while.
//! 5. When every chunk is stored, and not before, the version is [`BroadcastEffect::Ready`].
//!
//! One version arrives at a time. While it does, only the newest announced one waits: with versions that come faster than they can
//! travel, every other one is skipped, but each one begun is finished, unless it stalls or another is needed
//! ([`BroadcastInput::Prefer`]).
//!
//! What this machine does not do: read or write chunks (the shell does, and verifies what it finds on disk before
//! [`BroadcastInput::Resume`]), load weights, or choose neighbours.

mod bitmap;
mod deal;
mod fetch;
mod serve;
mod versions;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use chorus_machine::{Ctx, Machine, Outbox, Time, earliest};
use chorus_protocol::limits::MAX_CHUNK_BYTES;
use chorus_protocol::policy::{Manifest, ManifestError, PolicyId, Version};
use chorus_protocol::rollout::Bulk;
use chorus_protocol::{Admitted, List, NetworkId, NodeId, Verified, VerifyError};

pub use bitmap::Bitmap;
use deal::Dealing;
use serve::Uploads;
use versions::Held;

/// Neighbours of one broadcast.
pub const MAX_NEIGHBOURS: usize = 64;

/// What an operator may set.
#[derive(Clone, Debug, PartialEq)]
pub struct BroadcastConfig {
    /// Chunks that may be asked of one neighbour at a time, when many have some. With few neighbours it is up to four times as many.
    /// Default 2.
    pub window: u32,
    /// Chunks that are sent at a time. Default 2.
    pub upload_slots: usize,
    /// Versions kept for others. Default 3.
    pub keep: usize,
    /// What the owner may send beyond one copy when everything is out, in percent of a version. Default 40.
    pub extra_percent: u32,
    /// How long a neighbour has for a chunk before another one is asked too. Grows with the neighbour's measured pace. Default 10 s.
    pub chunk_timeout: Duration,
    /// How long the owner waits for a neighbour to ask for what it was offered. Default 2 s.
    pub offer_timeout: Duration,
    /// How long a neighbour that did not deliver is passed over, and a full disk left alone. Default 5 s.
    pub pause: Duration,
    /// How long a version may make no progress before a newer one takes its place. Default 15 s.
    pub stall: Duration,
    /// And how long if nobody offers what it lacks, while a newer one is offered. Default 200 ms.
    pub dead_end: Duration,
    /// Whether this node serves others at all. Only a comparison turns it off. Default true.
    pub share: bool,
    /// The largest version that is taken from others, in bytes. Default 16 GiB.
    pub max_bytes: u64,
}

impl Default for BroadcastConfig {
    fn default() -> Self {
        Self {
            window: 2,
            upload_slots: 2,
            keep: 3,
            extra_percent: 40,
            chunk_timeout: Duration::from_secs(10),
            offer_timeout: Duration::from_secs(2),
            pause: Duration::from_secs(5),
            stall: Duration::from_secs(15),
            dead_end: Duration::from_millis(200),
            share: true,
            max_bytes: 16 << 30,
        }
    }
}

/// What a broadcast is told.
#[derive(Debug)]
pub enum BroadcastInput {
    /// The owner made a version; all its chunks are on disk.
    Publish(Verified<Manifest>),
    /// A version from this node's own disk, with the chunks that were found there and have their hash. Oldest first.
    Resume {
        /// The manifest, verified before it was written.
        manifest: Verified<Manifest>,
        /// The chunks.
        chunks: Vec<u32>,
    },
    /// This version is needed now: it goes before any other.
    Prefer(Version),
    /// A neighbour that speaks of this policy.
    PeerUp(NodeId),
    /// It is gone.
    PeerDown(NodeId),
    /// It said something. Messages that are not about weights are ignored.
    Message {
        /// Who.
        from: NodeId,
        /// What.
        message: Bulk,
    },
    /// A chunk is on disk.
    Stored {
        /// Of which version.
        version: Version,
        /// Which.
        index: u32,
    },
    /// The disk did not take a chunk.
    StoreFailed {
        /// Of which version.
        version: Version,
        /// Which.
        index: u32,
    },
    /// A chunk has left.
    Sent {
        /// To whom.
        to: NodeId,
        /// Of which version.
        version: Version,
        /// Which.
        index: u32,
    },
    /// A chunk could not be read or sent.
    NotSent {
        /// To whom.
        to: NodeId,
        /// Of which version.
        version: Version,
        /// Which.
        index: u32,
    },
}

/// What a broadcast wants done.
#[derive(Debug)]
pub enum BroadcastEffect {
    /// Send this.
    Send {
        /// To whom.
        to: NodeId,
        /// What.
        message: Bulk,
    },
    /// Read a chunk from disk, send it as [`Bulk::Chunk`], and say [`BroadcastInput::Sent`] when it has left. Where there is none, say
    /// [`Bulk::NoChunk`] instead, and [`BroadcastInput::NotSent`] here.
    SendChunk {
        /// To whom.
        to: NodeId,
        /// Of which version.
        version: Version,
        /// Which.
        index: u32,
    },
    /// Keep a manifest: its version is arriving.
    Keep(Admitted<Manifest>),
    /// Write a chunk, and say [`BroadcastInput::Stored`] or [`BroadcastInput::StoreFailed`].
    Store {
        /// Of which version.
        version: Version,
        /// Which.
        index: u32,
        /// Its bytes, which have the manifest's hash.
        bytes: List<u8, MAX_CHUNK_BYTES>,
    },
    /// Every chunk is stored: the version may be loaded.
    Ready(Admitted<Manifest>),
    /// Delete a version's manifest and chunks.
    Forget(Version),
    /// A neighbour did what no honest node does.
    Strike {
        /// Who.
        peer: NodeId,
        /// What.
        fault: BroadcastFault,
    },
}

/// What no honest node does.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BroadcastFault {
    /// It passed on a manifest whose signature does not hold.
    #[error("passed on a manifest that is not signed: {0}")]
    Unsigned(#[from] VerifyError),
    /// It passed on a manifest that its own check refuses.
    #[error("passed on a manifest that is not valid: {0}")]
    Manifest(#[from] ManifestError),
    /// A manifest of another policy, on a connection about this one.
    #[error("announced a version of {0}, which this connection is not about")]
    OtherPolicy(PolicyId),
    /// A chunk that is not what it is called.
    #[error("sent a chunk {index} of {version:?} with another hash")]
    Lie {
        /// Of which version.
        version: Version,
        /// Which.
        index: u32,
    },
    /// A bitmap of another size, or a chunk number beyond the last.
    #[error("spoke of chunks of {0:?} that do not exist")]
    NoSuchChunk(Version),
    /// Chunks that nobody asked for, again and again.
    #[error("keeps sending chunks that nobody asked for")]
    Unasked,
}

/// Why a version is not whole yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Awaits {
    /// Nothing: the newest version is whole, or none is known.
    Nothing,
    /// No neighbour that is asked offers what is missing.
    Provider,
    /// Chunks that were asked for.
    Chunks {
        /// How many.
        asked: usize,
        /// Of how many neighbours.
        of: usize,
    },
    /// The disk to have room again.
    Disk,
    /// Its operator to allow larger versions: this one was not taken.
    Smaller {
        /// Its size.
        bytes: u64,
    },
}

impl std::fmt::Display for Awaits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Nothing => f.write_str("nothing"),
            Self::Provider => f.write_str("a neighbour that has what is missing"),
            Self::Chunks { asked, of } => write!(f, "{asked} chunks asked of {of} neighbours"),
            Self::Disk => f.write_str("the disk to take it; is it full?"),
            Self::Smaller { bytes } => {
                write!(f, "leave to take {bytes} bytes: sampler.max_policy_mb allows less")
            }
        }
    }
}

/// Where a broadcast stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BroadcastStatus {
    /// The newest version that is whole, and its step.
    pub whole: Option<(Version, u64)>,
    /// The version that arrives, its step, chunks that are stored, and chunks in all.
    pub arriving: Option<(Version, u64, u32, u32)>,
    /// What it waits for.
    pub awaits: Awaits,
    /// Neighbours.
    pub neighbours: usize,
    /// Chunks sent since the start.
    pub sent: u64,
    /// Chunks that came and were there already.
    pub wasted: u64,
}

/// A neighbour.
#[derive(Debug, Default)]
struct Peer {
    /// What it offers, of versions that this node knows.
    has: BTreeMap<Version, Bitmap>,
    /// Versions that it announced, or that were announced to it.
    knows: BTreeSet<Version>,
    /// Chunks asked of it.
    asked: u32,
    /// Mean time between two of its chunks.
    pace: Option<Duration>,
    last_chunk: Option<Time>,
    paused_until: Option<Time>,
    /// If this node is the owner: what it does with what it is given.
    dealing: Dealing,
    /// It lied: nothing is asked of it any more.
    banned: bool,
    unasked: u32,
    /// Chunks of versions that were given up: they were asked of it, and may still come.
    owed: u32,
}

/// The broadcast of one policy's versions, as one node takes part in it.
#[derive(Debug)]
pub struct Broadcast {
    cfg: BroadcastConfig,
    network: NetworkId,
    policy: PolicyId,
    me: NodeId,
    peers: BTreeMap<NodeId, Peer>,
    held: BTreeMap<Version, Held>,
    arriving: Option<Version>,
    next: Option<Version>,
    progress_at: Time,
    disk_retry: Option<Time>,
    uploads: Uploads,
    /// The version that the owner offers the mesh, and since when that makes no progress.
    offering: Option<(Version, Time)>,
    wasted: u64,
    /// The version of which the owner offered something last: it is what others have too.
    dealt: Option<Version>,
    /// The size of the newest version that was announced, if that is more than is taken.
    too_large: Option<u64>,
}

impl Broadcast {
    /// Makes one that knows no version yet.
    #[must_use]
    pub fn new(cfg: BroadcastConfig, network: NetworkId, policy: PolicyId, me: NodeId) -> Self {
        Self {
            cfg,
            network,
            policy,
            me,
            peers: BTreeMap::new(),
            held: BTreeMap::new(),
            arriving: None,
            next: None,
            progress_at: Time::ZERO,
            disk_retry: None,
            uploads: Uploads::default(),
            offering: None,
            wasted: 0,
            dealt: None,
            too_large: None,
        }
    }

    fn is_owner(&self) -> bool {
        self.me == self.policy.owner
    }

    /// Returns what is served of the newest whole version, if any: what a node loads after a restart.
    #[must_use]
    pub fn newest_whole(&self) -> Option<&Admitted<Manifest>> {
        let whole = self.held.values().filter(|held| held.have.is_full());
        whole.max_by_key(|held| held.order()).map(|held| &held.manifest)
    }

    /// Returns where it stands.
    #[must_use]
    pub fn status(&self) -> BroadcastStatus {
        let arriving = self.arriving.and_then(|version| self.held.get(&version));
        let awaits = match arriving {
            None => self.too_large.map_or(Awaits::Nothing, |bytes| Awaits::Smaller { bytes }),
            Some(_) if self.disk_retry.is_some() => Awaits::Disk,
            Some(held) if held.asked.is_empty() => Awaits::Provider,
            Some(held) => {
                let of: BTreeSet<_> = held.asked.values().map(|asked| asked.of).collect();
                Awaits::Chunks { asked: held.asked.len(), of: of.len() }
            }
        };
        BroadcastStatus {
            whole: self.newest_whole().map(|manifest| (manifest.version, manifest.step)),
            arriving: arriving
                .map(|held| (held.manifest.version, held.manifest.step, held.have.count(), held.have.len())),
            awaits,
            neighbours: self.peers.len(),
            sent: self.uploads.sent,
            wasted: self.wasted,
        }
    }

    fn peer_up(&mut self, peer: NodeId, out: &mut Outbox<BroadcastEffect>) {
        if peer == self.me || (self.peers.len() >= MAX_NEIGHBOURS && !self.peers.contains_key(&peer)) {
            return;
        }
        self.peer_down(peer);
        let mut known: Vec<&Held> = self.held.values().collect();
        known.sort_by_key(|held| held.order());
        let knows = known.iter().map(|held| held.manifest.version).collect();
        self.peers.insert(peer, Peer { knows, ..Peer::default() });
        for held in known {
            out.push(BroadcastEffect::Send { to: peer, message: Bulk::Announce(Box::new(held.manifest.to_wire())) });
            if !self.is_owner() && self.cfg.share && !held.have.is_empty() {
                let (version, chunks) = (held.manifest.version, held.have.to_wire());
                out.push(BroadcastEffect::Send { to: peer, message: Bulk::Have { version, chunks } });
            }
        }
    }

    fn peer_down(&mut self, peer: NodeId) {
        self.peers.remove(&peer);
        self.uploads.peer_down(peer);
        for held in self.held.values_mut() {
            held.asked.retain(|_, asked| asked.of != peer);
            held.offers.retain(|(to, _), _| *to != peer);
            held.offered.remove(&peer);
            held.given.remove(&peer);
        }
        self.recount();
    }

    fn message(&mut self, cx: &mut Ctx<'_>, from: NodeId, message: Bulk, out: &mut Outbox<BroadcastEffect>) {
        if !self.peers.contains_key(&from) {
            return;
        }
        let done = match message {
            Bulk::Announce(manifest) => self.announced(cx.now, from, *manifest, out),
            Bulk::Have { version, chunks } => self.peer_has(from, version, &chunks),
            Bulk::HaveOne { version, index } => self.peer_has_one(cx.now, from, version, index),
            Bulk::WantChunks { version, indices } => self.wanted(from, version, &indices, out),
            Bulk::Cancel { version, indices } => {
                self.cancelled(from, version, &indices);
                Ok(())
            }
            Bulk::Chunk { version, index, bytes } => self.chunk(cx.now, from, (version, index), bytes, out),
            Bulk::NoChunk { version, index } => {
                self.no_chunk(cx.now, from, (version, index), out);
                Ok(())
            }
            _ => Ok(()),
        };
        if let Err(fault) = done {
            out.push(BroadcastEffect::Strike { peer: from, fault });
        }
    }
}

impl Machine for Broadcast {
    type Input = BroadcastInput;
    type Effect = BroadcastEffect;

    fn handle(&mut self, cx: &mut Ctx<'_>, input: BroadcastInput, out: &mut Outbox<BroadcastEffect>) {
        match input {
            BroadcastInput::Publish(manifest) => self.publish(cx.now, manifest, out),
            BroadcastInput::Resume { manifest, chunks } => self.resume(cx.now, manifest, &chunks, out),
            BroadcastInput::Prefer(version) => self.prefer(cx.now, version),
            BroadcastInput::PeerUp(peer) => self.peer_up(peer, out),
            BroadcastInput::PeerDown(peer) => self.peer_down(peer),
            BroadcastInput::Message { from, message } => self.message(cx, from, message, out),
            BroadcastInput::Stored { version, index } => self.stored(cx.now, version, index, out),
            BroadcastInput::StoreFailed { version, index } => self.store_failed(cx.now, version, index),
            BroadcastInput::Sent { to, version, index } => {
                self.uploads.sent(cx.now, to, version, index);
                self.given(cx.now, to, version, index);
            }
            BroadcastInput::NotSent { to, version, index } => {
                self.uploads.not_sent(to, version, index);
                self.not_given(to, version, index);
            }
        }
        self.pump(cx, out);
    }

    fn deadline(&self) -> Option<Time> {
        let asked = self.held.values().flat_map(|held| held.asked.values().map(|asked| asked.deadline)).min();
        let paused = self.peers.values().filter_map(|peer| peer.paused_until).min();
        let sending = earliest(self.deal_at(), self.uploads.late_at());
        [asked, sending, paused, self.give_up_at(), self.disk_retry].into_iter().fold(None, earliest)
    }

    fn expire(&mut self, cx: &mut Ctx<'_>, out: &mut Outbox<BroadcastEffect>) {
        self.expire_asked(cx.now, out);
        self.expire_offers(cx.now);
        for to in self.uploads.expire(cx.now) {
            self.stuck(to);
        }
        for peer in self.peers.values_mut() {
            peer.paused_until = peer.paused_until.filter(|until| *until > cx.now);
        }
        self.disk_retry = self.disk_retry.filter(|at| *at > cx.now);
        if self.give_up_at().is_some_and(|at| at <= cx.now) {
            self.give_up(cx.now);
        }
        self.pump(cx, out);
    }
}

impl Broadcast {
    /// Does whatever has become possible: offer, ask, send.
    fn pump(&mut self, cx: &mut Ctx<'_>, out: &mut Outbox<BroadcastEffect>) {
        self.offer(cx.now, out);
        self.ask(cx, out);
        self.upload(cx.now, out);
    }
}
