//! The sending side: what neighbours ask for, and which chunk goes out next.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use chorus_machine::{Outbox, Time, earliest};
use chorus_protocol::NodeId;
use chorus_protocol::policy::Version;
use chorus_protocol::rollout::Bulk;

use super::deal::Manner;
use super::{Bitmap, Broadcast, BroadcastEffect, BroadcastFault};

/// Chunks that one neighbour may have asked for and not got.
const MAX_QUEUED: usize = 64;
/// A chunk has this many times the usual time to leave.
const PATIENCE: u32 = 4;

/// And the longest patience is so many times the shortest: nobody makes all others wait by being slow.
const MAX_PATIENCE: u32 = 6;

/// A chunk on its way out.
#[derive(Clone, Copy, Debug)]
struct Leaving {
    since: Time,
    /// Until when it has a slot to itself; none once others do not wait for it any more.
    slot: Option<Time>,
    /// When its neighbour counts as one that reads nothing; none once it does.
    stuck: Option<Time>,
}

/// What was asked of this node.
#[derive(Debug, Default)]
pub(super) struct Uploads {
    queues: BTreeMap<NodeId, VecDeque<(Version, u32)>>,
    active: BTreeMap<(NodeId, Version, u32), Leaving>,
    /// Mean time that a chunk takes to leave.
    pace: Option<Duration>,
    /// Mean time from there until its neighbour announces it.
    arrival: Option<Duration>,
    /// Who was served when, in chunks since the start: of two equally urgent requests, the neighbour that waits longer goes first.
    served: BTreeMap<NodeId, u64>,
    /// Whether the last chunk went to the mesh.
    to_mesh: bool,
    /// Chunks sent since the start.
    pub(super) sent: u64,
}

impl Uploads {
    pub(super) fn peer_down(&mut self, peer: NodeId) {
        self.queues.remove(&peer);
        self.served.remove(&peer);
        self.active.retain(|(to, ..), _| *to != peer);
    }

    /// Forgets what was asked of a version that is not here any more, and says so to whoever waits for it.
    pub(super) fn forget(&mut self, version: Version, out: &mut Outbox<BroadcastEffect>) {
        for (to, queue) in &mut self.queues {
            queue.retain(|(of, index)| {
                let gone = *of == version;
                if gone {
                    let message = Bulk::NoChunk { version, index: *index };
                    out.push(BroadcastEffect::Send { to: *to, message });
                }
                !gone
            });
        }
    }

    pub(super) fn cancel(&mut self, from: NodeId, version: Version, indices: &[u32]) {
        if let Some(queue) = self.queues.get_mut(&from) {
            queue.retain(|(of, index)| *of != version || !indices.contains(index));
        }
    }

    /// Forgets what a neighbour asked for.
    pub(super) fn drain(&mut self, to: NodeId) {
        self.queues.remove(&to);
    }

    pub(super) fn sent(&mut self, now: Time, to: NodeId, version: Version, index: u32) {
        if let Some(leaving) = self.active.remove(&(to, version, index)) {
            self.pace = Some(smooth(self.pace, now.since(leaving.since)));
        }
    }

    /// A chunk took so long from having left to being announced.
    pub(super) fn arrived(&mut self, took: Duration) {
        self.arrival = Some(smooth(self.arrival, took));
    }

    pub(super) fn not_sent(&mut self, to: NodeId, version: Version, index: u32) {
        self.active.remove(&(to, version, index));
    }

    /// Returns when a chunk that does not leave frees its slot, or is given up.
    pub(super) fn late_at(&self) -> Option<Time> {
        self.active.values().filter_map(|leaving| earliest(leaving.slot, leaving.stuck)).min()
    }

    /// Frees the slots of chunks that do not leave: others need not wait for them. Returns neighbours that have read nothing for long.
    pub(super) fn expire(&mut self, now: Time) -> BTreeSet<NodeId> {
        let mut stuck = BTreeSet::new();
        for ((to, ..), leaving) in &mut self.active {
            leaving.slot = leaving.slot.filter(|at| *at > now);
            if leaving.stuck.is_some_and(|at| at <= now) {
                leaving.stuck = None;
                stuck.insert(*to);
            }
        }
        stuck
    }

    /// Returns how long something may take: so long at least, and longer if chunks take long to leave and arrive.
    pub(super) fn patience(&self, least: Duration) -> Duration {
        let usual = self.pace.unwrap_or_default() + self.arrival.unwrap_or_default();
        (usual * PATIENCE).clamp(least, least * MAX_PATIENCE)
    }

    /// Returns whether a chunk of a version leaves, to this neighbour or to any.
    pub(super) fn is_sending(&self, version: Version, to: Option<NodeId>) -> bool {
        let leaves = |((of, which, _), leaving): (&(NodeId, Version, u32), &Leaving)| {
            *which == version && leaving.stuck.is_some() && to.is_none_or(|to| to == *of)
        };
        self.active.iter().any(leaves)
    }

    fn under_way(&self, to: NodeId) -> usize {
        self.active.keys().filter(|(of, ..)| *of == to).count()
    }

    /// Returns whether a neighbour reads nothing.
    fn is_stuck(&self, to: NodeId) -> bool {
        self.active.iter().any(|((of, ..), leaving)| *of == to && leaving.stuck.is_none())
    }

    fn in_slots(&self) -> usize {
        self.active.values().filter(|leaving| leaving.slot.is_some()).count()
    }
}

fn smooth(mean: Option<Duration>, one: Duration) -> Duration {
    mean.map_or(one, |mean| (mean * 3 + one) / 4)
}

impl Broadcast {
    pub(super) fn wanted(
        &mut self,
        from: NodeId,
        version: Version,
        indices: &[u32],
        out: &mut Outbox<BroadcastEffect>,
    ) -> Result<(), BroadcastFault> {
        let owner = self.is_owner();
        let refuse = |index| BroadcastEffect::Send { to: from, message: Bulk::NoChunk { version, index } };
        let Some(held) = self.held.get_mut(&version).filter(|_| self.cfg.share || owner) else {
            indices.iter().for_each(|index| out.push(refuse(*index)));
            return Ok(());
        };
        let queue = self.uploads.queues.entry(from).or_default();
        for index in indices {
            if *index >= held.have.len() {
                return Err(BroadcastFault::NoSuchChunk(version));
            }
            let known =
                queue.contains(&(version, *index)) || self.uploads.active.contains_key(&(from, version, *index));
            let offered = !owner || held.is_offered(from, *index);
            if !offered || !held.have.contains(*index) || (queue.len() >= MAX_QUEUED && !known) {
                out.push(refuse(*index));
                continue;
            }
            if !known {
                queue.push_back((version, *index));
            }
            if let Some(offer) = held.offers.get_mut(&(from, *index)).filter(|offer| offer.sent.is_none()) {
                offer.expires = None;
            }
        }
        Ok(())
    }

    /// Sends what is most urgent, while slots are free. The mesh, and those whom only the owner serves, take turns; in the mesh the chunk
    /// goes first that fewest have, then what is for a neighbour to whom nothing is under way, then for who waited longest.
    pub(super) fn upload(&mut self, now: Time, out: &mut Outbox<BroadcastEffect>) {
        let slot = self.uploads.patience(self.cfg.offer_timeout);
        let stuck = self.uploads.patience(self.cfg.chunk_timeout);
        while self.uploads.in_slots() < self.cfg.upload_slots.max(1) {
            let Some((to, position, (version, index))) = self.most_urgent() else { return };
            if let Some(queue) = self.uploads.queues.get_mut(&to) {
                queue.remove(position);
            }
            self.uploads.sent += 1;
            self.uploads.served.insert(to, self.uploads.sent);
            self.uploads.to_mesh = self.manner(to) == Manner::PassesOn;
            let leaving = Leaving { since: now, slot: Some(now + slot), stuck: Some(now + stuck) };
            self.uploads.active.insert((to, version, index), leaving);
            if let Some(held) = self.held.get_mut(&version) {
                let chunks = held.manifest.chunks.len();
                held.given.entry(to).or_insert_with(|| Bitmap::new(chunks)).insert(index);
            }
            out.push(BroadcastEffect::SendChunk { to, version, index });
        }
    }

    fn most_urgent(&self) -> Option<(NodeId, usize, (Version, u32))> {
        let uploads = &self.uploads;
        let urgency = |to: &NodeId, position: usize, (version, index): (Version, u32)| {
            let holders = || self.held.get(&version).map_or(u16::MAX, |held| held.holders_of(index));
            let (rank, holders) = match self.manner(*to) {
                Manner::PassesOn => (u8::from(uploads.to_mesh), holders()),
                Manner::Alone => (u8::from(!uploads.to_mesh), 0),
                Manner::Silent => (2, 0),
            };
            (rank, holders, uploads.under_way(*to), uploads.served.get(to).copied().unwrap_or(0), position)
        };
        let slots = self.cfg.upload_slots.max(1);
        let open = uploads.queues.iter().filter(|(to, _)| uploads.under_way(**to) < slots && !uploads.is_stuck(**to));
        let waiting =
            open.flat_map(|(to, queue)| queue.iter().enumerate().map(move |(position, item)| (*to, position, *item)));
        waiting.min_by_key(|(to, position, item)| urgency(to, *position, *item))
    }

    fn manner(&self, of: NodeId) -> Manner {
        self.peers.get(&of).map(|peer| peer.dealing.manner).unwrap_or_default()
    }
}
