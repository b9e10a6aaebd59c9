//! The sending side: what the owner offers to whom, and which chunk goes out next.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use chorus_machine::{Outbox, Time};
use chorus_protocol::NodeId;
use chorus_protocol::policy::Version;
use chorus_protocol::rollout::Bulk;

use super::versions::{Held, Offer};
use super::{Bitmap, Broadcast, BroadcastEffect, BroadcastFault};

/// Chunks that one neighbour may have asked for and not got.
const MAX_QUEUED: usize = 64;
/// How many times the owner's offers to one neighbour may widen when there are few.
const WIDEN: usize = 4;

/// What was asked of this node.
#[derive(Debug, Default)]
pub(super) struct Uploads {
    queues: BTreeMap<NodeId, VecDeque<(Version, u32)>>,
    active: BTreeSet<(NodeId, Version, u32)>,
    /// Who was served when, in chunks since the start: of two equally urgent requests, the neighbour that waits longer goes first.
    served: BTreeMap<NodeId, u64>,
    /// Chunks sent since the start.
    pub(super) sent: u64,
}

impl Uploads {
    pub(super) fn peer_down(&mut self, peer: NodeId) {
        self.queues.remove(&peer);
        self.served.remove(&peer);
        self.active.retain(|(to, ..)| *to != peer);
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

    pub(super) fn sent(&mut self, to: NodeId, version: Version, index: u32) {
        self.active.remove(&(to, version, index));
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
            let offered = !owner || held.is_offered(from, *index) || held.grant(from, *index);
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

    /// Sends what is most urgent, while slots are free: the chunk that fewest have, to who waited longest.
    pub(super) fn upload(&mut self, out: &mut Outbox<BroadcastEffect>) {
        while self.uploads.active.len() < self.cfg.upload_slots.max(1) {
            let urgency = |to: &NodeId, position: usize, (version, index): (Version, u32)| {
                let holders = self.held.get(&version).map_or(u16::MAX, |held| held.holders_of(index));
                (holders, self.uploads.served.get(to).copied().unwrap_or(0), position)
            };
            let waiting =
                self.uploads.queues.iter().flat_map(|(to, queue)| {
                    queue.iter().enumerate().map(move |(position, item)| (to, position, *item))
                });
            let next = waiting.min_by_key(|(to, position, item)| urgency(to, *position, *item));
            let Some((to, position, (version, index))) = next.map(|(to, position, item)| (*to, position, item)) else {
                return;
            };
            if let Some(queue) = self.uploads.queues.get_mut(&to) {
                queue.remove(position);
            }
            self.uploads.sent += 1;
            self.uploads.served.insert(to, self.uploads.sent);
            self.uploads.active.insert((to, version, index));
            out.push(BroadcastEffect::SendChunk { to, version, index });
        }
    }

    /// The owner's part: each chunk to one neighbour first, and to another only when nobody reachable has it; what is rare when all
    /// is out, up to the share that is set.
    pub(super) fn offer(&mut self, now: Time, out: &mut Outbox<BroadcastEffect>) {
        if !self.is_owner() || self.peers.is_empty() {
            return;
        }
        let Some(version) = self.choose_offering(now) else { return };
        let Some(held) = self.held.get_mut(&version) else { return };
        if !self.cfg.share {
            return offer_all(held, version, self.peers.keys(), out);
        }
        let window = usize::try_from(self.cfg.window).unwrap_or(usize::MAX);
        let window = (window * WIDEN / self.peers.len()).clamp(window, window * WIDEN);
        let mut open: BTreeMap<NodeId, usize> =
            self.peers.iter().filter(|(_, peer)| !peer.banned).map(|(id, _)| (*id, 0)).collect();
        for offer in held.offers.values() {
            open.entry(offer.to).and_modify(|many| *many += 1);
        }
        let budget = held.have.len() * self.cfg.extra_percent / 100;
        let mut cursor = 0;
        // The neighbour with the fewest open offers is next, so that chunks are dealt round.
        while let Some((to, many)) = open.iter().min_by_key(|(_, many)| **many).map(|(id, many)| (*id, *many)) {
            let has = self.peers.get(&to).and_then(|peer| peer.has.get(&version));
            let chosen = (many < window).then(|| choose(held, to, has, budget, &mut cursor)).flatten();
            let Some((index, extra)) = chosen else {
                open.remove(&to);
                continue;
            };
            held.extra += u32::from(extra);
            held.offers.insert(index, Offer { to, expires: Some(now + self.cfg.offer_timeout) });
            let chunks = held.manifest.chunks.len();
            held.offered.entry(to).or_insert_with(|| Bitmap::new(chunks)).insert(index);
            open.insert(to, many + 1);
            out.push(BroadcastEffect::Send { to, message: Bulk::HaveOne { version, index } });
        }
    }
}

impl Broadcast {
    /// Stays with a version until all of it is out, or nobody asks for it any more; then turns to the newest.
    fn choose_offering(&mut self, now: Time) -> Option<Version> {
        let newest = self.newest_whole()?.version;
        let lapse = self.cfg.offer_timeout * 2;
        let stays = self.offering.filter(|(version, asked)| {
            let out = |held: &Held| held.holders.iter().all(|holders| *holders > 0);
            *version == newest || (*asked + lapse > now && self.held.get(version).is_some_and(|held| !out(held)))
        });
        self.offering = stays.or(Some((newest, now)));
        self.offering.map(|(version, _)| version)
    }
}

impl Held {
    fn is_offered(&self, to: NodeId, index: u32) -> bool {
        self.offered.get(&to).is_some_and(|map| map.contains(index))
    }

    /// Decides on a chunk that a neighbour asks of the owner without an offer: whoever else offered it to the neighbour may have
    /// lied. One neighbour at a time gets it, and each no more than a quarter of a version.
    fn grant(&mut self, to: NodeId, index: u32) -> bool {
        let pleas = self.pleas.entry(to).or_default();
        if self.offers.contains_key(&index) || *pleas > self.have.len() / 4 {
            return false;
        }
        *pleas += 1;
        self.offers.insert(index, Offer { to, expires: None });
        let chunks = self.manifest.chunks.len();
        self.offered.entry(to).or_insert_with(|| Bitmap::new(chunks)).insert(index)
    }
}

/// One to many, for comparison: everything is offered to everybody.
fn offer_all<'a>(
    held: &mut Held,
    version: Version,
    peers: impl Iterator<Item = &'a NodeId>,
    out: &mut Outbox<BroadcastEffect>,
) {
    for to in peers {
        if !held.offered.contains_key(to) {
            held.offered.insert(*to, held.have.clone());
            let message = Bulk::Have { version, chunks: held.have.to_wire() };
            out.push(BroadcastEffect::Send { to: *to, message });
        }
    }
}

/// Returns the chunk to offer to a neighbour next, and whether it is one beyond the first copy.
fn choose(held: &Held, to: NodeId, has: Option<&Bitmap>, budget: u32, cursor: &mut u32) -> Option<(u32, bool)> {
    let lacks = |index: u32| has.is_none_or(|has| !has.contains(index));
    let offered = |index: u32| held.is_offered(to, index);
    // Offers only ever take chunks away, so what was passed over in this round need not be looked at again.
    while *cursor < held.have.len() {
        let index = *cursor;
        if held.holders_of(index) == 0 && !held.offers.contains_key(&index) {
            return Some((index, false));
        }
        *cursor += 1;
    }
    if held.extra >= budget {
        return None;
    }
    let spare =
        (0..held.have.len()).filter(|index| lacks(*index) && !offered(*index) && !held.offers.contains_key(index));
    spare.min_by_key(|index| held.holders_of(*index)).map(|index| (index, true))
}
