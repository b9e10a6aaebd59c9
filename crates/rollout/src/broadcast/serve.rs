//! The sending side: what neighbours ask for, and which chunk goes out next.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use chorus_machine::{Outbox, Time};
use chorus_protocol::NodeId;
use chorus_protocol::policy::Version;
use chorus_protocol::rollout::Bulk;

use super::{Broadcast, BroadcastEffect, BroadcastFault};

/// Chunks that one neighbour may have asked for and not got.
const MAX_QUEUED: usize = 64;
/// A chunk has this many times the usual time to leave.
const PATIENCE: u32 = 4;

/// A chunk on its way out.
#[derive(Clone, Copy, Debug)]
struct Leaving {
    since: Time,
    /// When others no longer wait for it; none once they do not.
    deadline: Option<Time>,
}

/// What was asked of this node.
#[derive(Debug, Default)]
pub(super) struct Uploads {
    queues: BTreeMap<NodeId, VecDeque<(Version, u32)>>,
    active: BTreeMap<(NodeId, Version, u32), Leaving>,
    /// Mean time that a chunk takes to leave.
    pace: Option<Duration>,
    /// Who was served when, in chunks since the start: of two equally urgent requests, the neighbour that waits longer goes first.
    served: BTreeMap<NodeId, u64>,
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

    pub(super) fn sent(&mut self, now: Time, to: NodeId, version: Version, index: u32) {
        if let Some(leaving) = self.active.remove(&(to, version, index)) {
            let took = now.since(leaving.since);
            self.pace = Some(self.pace.map_or(took, |pace| (pace * 3 + took) / 4));
        }
    }

    /// Returns when a chunk that does not leave frees its slot.
    pub(super) fn late_at(&self) -> Option<Time> {
        self.active.values().filter_map(|leaving| leaving.deadline).min()
    }

    /// Frees the slots of chunks that do not leave, because their neighbour reads nothing: others need not wait for it. Returns them.
    pub(super) fn expire(&mut self, now: Time) -> Vec<(NodeId, Version, u32)> {
        let late = self.active.iter_mut().filter(|(_, leaving)| leaving.deadline.is_some_and(|at| at <= now));
        late.map(|(chunk, leaving)| {
            leaving.deadline = None;
            *chunk
        })
        .collect()
    }

    /// Returns how long a chunk may take to leave: this long, or longer if they all do.
    pub(super) fn patience(&self, least: Duration) -> Duration {
        least.max(self.pace.unwrap_or_default() * PATIENCE)
    }

    fn under_way(&self, to: NodeId) -> usize {
        self.active.keys().filter(|(of, ..)| *of == to).count()
    }

    /// Returns whether a neighbour reads nothing.
    fn is_stuck(&self, to: NodeId) -> bool {
        self.active.iter().any(|((of, ..), leaving)| *of == to && leaving.deadline.is_none())
    }

    fn in_slots(&self) -> usize {
        self.active.values().filter(|leaving| leaving.deadline.is_some()).count()
    }
}

impl Broadcast {
    pub(super) fn wanted(
        &mut self,
        now: Time,
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
            let offered = !owner || held.is_offered(from, *index);
            if !offered || !held.have.contains(*index) || queue.len() >= MAX_QUEUED {
                out.push(refuse(*index));
            } else if !queue.contains(&(version, *index)) {
                queue.push_back((version, *index));
            }
            if let Some(offer) = held.offers.get_mut(index).filter(|offer| offer.to == from) {
                offer.expires = None;
                self.offering = Some((version, now));
            }
        }
        Ok(())
    }

    /// Sends what is most urgent, while slots are free: the chunk that fewest have, to whom nothing is under way, to who waited
    /// longest.
    pub(super) fn upload(&mut self, now: Time, out: &mut Outbox<BroadcastEffect>) {
        let patience = self.uploads.patience(self.cfg.chunk_timeout);
        while self.uploads.in_slots() < self.cfg.upload_slots.max(1) {
            let urgency = |to: &NodeId, position: usize, (version, index): (Version, u32)| {
                let holders = self.held.get(&version).map_or(u16::MAX, |held| held.holders_of(index));
                (holders, self.uploads.under_way(*to), self.uploads.served.get(to).copied().unwrap_or(0), position)
            };
            let queues = self.uploads.queues.iter().filter(|(to, _)| !self.uploads.is_stuck(**to));
            let waiting = queues
                .flat_map(|(to, queue)| queue.iter().enumerate().map(move |(position, item)| (to, position, *item)));
            let next = waiting.min_by_key(|(to, position, item)| urgency(to, *position, *item));
            let Some((to, position, (version, index))) = next.map(|(to, position, item)| (*to, position, item)) else {
                return;
            };
            if let Some(queue) = self.uploads.queues.get_mut(&to) {
                queue.remove(position);
            }
            self.uploads.sent += 1;
            self.uploads.served.insert(to, self.uploads.sent);
            let leaving = Leaving { since: now, deadline: Some(now + patience) };
            self.uploads.active.insert((to, version, index), leaving);
            out.push(BroadcastEffect::SendChunk { to, version, index });
        }
    }
}
