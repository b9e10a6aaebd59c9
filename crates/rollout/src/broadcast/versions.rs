//! Which versions this node knows, and which one it fetches.

use std::collections::{BTreeMap, BTreeSet};

use chorus_machine::{Outbox, Time};
use chorus_protocol::policy::{Manifest, Version};
use chorus_protocol::rollout::Bulk;
use chorus_protocol::{Admitted, NodeId, Received, Verified, WallTime};

use super::{Bitmap, Broadcast, BroadcastEffect, BroadcastFault, Peer};

/// Versions a peer is remembered to know.
const MAX_KNOWN: usize = 64;

/// A chunk that was asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    pub(super) of: NodeId,
    pub(super) deadline: Time,
}

/// A chunk that the owner offers to a neighbour.
#[derive(Clone, Copy, Debug)]
pub(super) struct Offer {
    /// When it lapses; none while the neighbour has asked for it and it has not left.
    pub(super) expires: Option<Time>,
    /// When it left, if it has.
    pub(super) sent: Option<Time>,
    /// Chunks that were under way when it left, less those that have arrived since: this one may be behind them.
    pub(super) behind: usize,
    /// It is beyond the first copy.
    pub(super) extra: bool,
}

/// A version that this node knows.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) manifest: Admitted<Manifest>,
    /// Chunks that are stored.
    pub(super) have: Bitmap,
    /// Chunks on their way to the disk.
    pub(super) storing: BTreeSet<u32>,
    pub(super) asked: BTreeMap<u32, Asked>,
    /// How many neighbours offer each chunk.
    pub(super) holders: Vec<u16>,
    /// What the owner offers, and has not heard of since.
    pub(super) offers: BTreeMap<(NodeId, u32), Offer>,
    /// What the owner offered to whom, so that nothing else is asked of it.
    pub(super) offered: BTreeMap<NodeId, Bitmap>,
    /// What was sent to whom.
    pub(super) given: BTreeMap<NodeId, Bitmap>,
    /// Chunks that the owner offered beyond the first copy.
    pub(super) extra: u32,
}

impl Held {
    fn new(manifest: Admitted<Manifest>, have: Bitmap) -> Self {
        let chunks = manifest.chunks.len();
        Self {
            manifest,
            have,
            storing: BTreeSet::new(),
            asked: BTreeMap::new(),
            holders: vec![0; chunks],
            offers: BTreeMap::new(),
            offered: BTreeMap::new(),
            given: BTreeMap::new(),
            extra: 0,
        }
    }

    /// What makes one version newer than another.
    pub(super) fn order(&self) -> (u64, WallTime) {
        (self.manifest.step, self.manifest.made)
    }

    pub(super) fn holders_of(&self, index: u32) -> u16 {
        usize::try_from(index).ok().and_then(|index| self.holders.get(index)).copied().unwrap_or(0)
    }
}

impl Broadcast {
    pub(super) fn publish(&mut self, now: Time, manifest: Verified<Manifest>, out: &mut Outbox<BroadcastEffect>) {
        let all: Vec<u32> = (0u32..).take(manifest.chunks.len()).collect();
        self.resume(now, manifest, &all, out);
    }

    pub(super) fn resume(
        &mut self,
        now: Time,
        manifest: Verified<Manifest>,
        chunks: &[u32],
        out: &mut Outbox<BroadcastEffect>,
    ) {
        // What this node wrote to its own disk was admitted before; a policy that changed hands is not followed.
        let Ok(manifest) = Manifest::admit(manifest) else { return };
        if manifest.policy != self.policy || self.held.contains_key(&manifest.version) {
            return;
        }
        let mut have = Bitmap::new(manifest.chunks.len());
        for index in chunks {
            have.insert(*index);
        }
        self.learn(now, manifest, have, None, out);
    }

    pub(super) fn announced(
        &mut self,
        now: Time,
        from: NodeId,
        manifest: Received<Manifest>,
        out: &mut Outbox<BroadcastEffect>,
    ) -> Result<(), BroadcastFault> {
        let manifest = manifest.verify(&self.network)?;
        if manifest.policy != self.policy {
            return Err(BroadcastFault::OtherPolicy(manifest.policy.clone()));
        }
        if let Some(peer) = self.peers.get_mut(&from) {
            note(peer, manifest.version);
        }
        let order = (manifest.step, manifest.made);
        let newest = self.held.values().map(Held::order).max();
        if newest.is_some_and(|newest| order <= newest) || self.is_owner() {
            return Ok(());
        }
        let manifest = Manifest::admit(manifest)?;
        let bytes = manifest.total_bytes();
        self.too_large = (bytes > self.cfg.max_bytes).then_some(bytes);
        if self.too_large.is_some() {
            return Ok(());
        }
        out.push(BroadcastEffect::Keep(manifest.clone()));
        let have = Bitmap::new(manifest.chunks.len());
        self.learn(now, manifest, have, Some(from), out);
        Ok(())
    }

    fn learn(
        &mut self,
        now: Time,
        manifest: Admitted<Manifest>,
        have: Bitmap,
        from: Option<NodeId>,
        out: &mut Outbox<BroadcastEffect>,
    ) {
        let version = manifest.version;
        for (id, peer) in &mut self.peers {
            if Some(*id) != from && !peer.knows.contains(&version) {
                note(peer, version);
                let message = Bulk::Announce(Box::new(manifest.to_wire()));
                out.push(BroadcastEffect::Send { to: *id, message });
                if self.me != self.policy.owner && self.cfg.share && !have.is_empty() {
                    let message = Bulk::Have { version, chunks: have.to_wire() };
                    out.push(BroadcastEffect::Send { to: *id, message });
                }
            }
        }
        if have.is_full() {
            out.push(BroadcastEffect::Ready(manifest.clone()));
        }
        self.held.insert(version, Held::new(manifest, have));
        self.choose_arriving(now);
        self.retire(out);
    }

    /// Keeps what arrives; otherwise turns to the newest version that is not whole and newer than the newest whole one.
    pub(super) fn choose_arriving(&mut self, now: Time) {
        let whole = self.held.values().filter(|held| held.have.is_full()).map(Held::order).max();
        let open = self.held.values().filter(|held| !held.have.is_full() && Some(held.order()) > whole);
        let newest = open.max_by_key(|held| held.order()).map(|held| held.manifest.version);
        let keep = self.arriving.filter(|version| self.held.get(version).is_some_and(|held| !held.have.is_full()));
        if keep.is_none() {
            self.progress_at = now;
            self.drop_asked();
        }
        self.arriving = keep.or(newest);
        self.next = newest.filter(|version| Some(*version) != self.arriving);
    }

    pub(super) fn prefer(&mut self, now: Time, version: Version) {
        let open = self.held.get(&version).is_some_and(|held| !held.have.is_full());
        if open && self.arriving != Some(version) {
            self.drop_asked();
            self.arriving = Some(version);
            self.choose_arriving(now);
        }
    }

    /// Forgets what was asked for a version that is given up. What still comes is stored all the same.
    pub(super) fn drop_asked(&mut self) {
        for asked in self.held.values_mut().flat_map(|held| std::mem::take(&mut held.asked).into_values()) {
            if let Some(peer) = self.peers.get_mut(&asked.of) {
                peer.owed = peer.owed.saturating_add(1);
            }
        }
        for peer in self.peers.values_mut() {
            peer.asked = 0;
        }
    }

    /// Forgets the oldest versions, but none that arrives, will arrive, or is the newest whole one.
    fn retire(&mut self, out: &mut Outbox<BroadcastEffect>) {
        let whole = self.newest_whole().map(|manifest| manifest.version);
        let apart = self.given_apart();
        while self.held.len() > self.cfg.keep.max(2) {
            let spared = [self.arriving, self.next, whole, self.offering.map(|(version, _)| version), self.dealt];
            let idle =
                self.held.iter().filter(|(version, _)| !spared.contains(&Some(**version)) && !apart.contains(version));
            let Some(oldest) = idle.min_by_key(|(_, held)| held.order()).map(|(version, _)| *version) else { return };
            self.forget(oldest, out);
        }
    }

    /// Forgets one version.
    pub(super) fn forget(&mut self, version: Version, out: &mut Outbox<BroadcastEffect>) {
        self.held.remove(&version);
        self.uploads.forget(version, out);
        for peer in self.peers.values_mut() {
            peer.has.remove(&version);
        }
        out.push(BroadcastEffect::Forget(version));
    }

    pub(super) fn peer_has(&mut self, from: NodeId, version: Version, bytes: &[u8]) -> Result<(), BroadcastFault> {
        let (Some(held), Some(peer)) = (self.held.get(&version), self.peers.get_mut(&from)) else { return Ok(()) };
        let map = Bitmap::from_wire(bytes, held.manifest.chunks.len());
        peer.has.insert(version, map.ok_or(BroadcastFault::NoSuchChunk(version))?);
        self.recount();
        self.confirm(from, version);
        Ok(())
    }

    pub(super) fn peer_has_one(
        &mut self,
        now: Time,
        from: NodeId,
        version: Version,
        index: u32,
    ) -> Result<(), BroadcastFault> {
        if self.is_owner() {
            self.announced_one(now, from, version, index);
        }
        let (Some(held), Some(peer)) = (self.held.get_mut(&version), self.peers.get_mut(&from)) else { return Ok(()) };
        if from == self.policy.owner {
            self.dealt = Some(version);
        }
        let chunks = held.manifest.chunks.len();
        let slot = usize::try_from(index).ok().and_then(|index| held.holders.get_mut(index));
        let holders = slot.ok_or(BroadcastFault::NoSuchChunk(version))?;
        if peer.has.entry(version).or_insert_with(|| Bitmap::new(chunks)).insert(index) {
            *holders = holders.saturating_add(1);
        }
        held.offers.remove(&(from, index));
        Ok(())
    }

    fn confirm(&mut self, from: NodeId, version: Version) {
        let (Some(held), Some(peer)) = (self.held.get_mut(&version), self.peers.get(&from)) else { return };
        if let Some(has) = peer.has.get(&version) {
            held.offers.retain(|(to, index), _| *to != from || !has.contains(*index));
        }
    }

    /// Counts holders anew, after a neighbour came or went.
    pub(super) fn recount(&mut self) {
        for (version, held) in &mut self.held {
            held.holders.fill(0);
            for map in self.peers.values().filter_map(|peer| peer.has.get(version)) {
                for index in map.iter() {
                    if let Some(holders) = usize::try_from(index).ok().and_then(|index| held.holders.get_mut(index)) {
                        *holders = holders.saturating_add(1);
                    }
                }
            }
        }
    }
}

fn note(peer: &mut Peer, version: Version) {
    if peer.knows.len() >= MAX_KNOWN {
        peer.knows.pop_first();
    }
    peer.knows.insert(version);
}
