//! The receiving side: whom to ask for what, and what becomes of what comes.

use std::collections::BTreeMap;
use std::time::Duration;

use chorus_machine::{Ctx, Outbox, Time};
use chorus_protocol::limits::MAX_CHUNK_BYTES;
use chorus_protocol::policy::Version;
use chorus_protocol::rollout::Bulk;
use chorus_protocol::{List, NodeId};

use super::versions::{Asked, Held};
use super::{Bitmap, Broadcast, BroadcastEffect, BroadcastFault, Peer};

/// Chunks asked for in one message.
const MAX_ASK: usize = 64;
/// Chunks that were not asked for, or came too late, before their sender is struck.
const MAX_UNASKED: u32 = 256;
/// How many times the window may widen when there are few providers.
const WIDEN: u32 = 4;
/// A neighbour has this many times its usual pace for what is asked of it.
const PATIENCE: u32 = 4;

impl Broadcast {
    /// Asks every neighbour that has room in its window, for what fewest have first.
    pub(super) fn ask(&mut self, cx: &mut Ctx<'_>, out: &mut Outbox<BroadcastEffect>) {
        let Some(held) = self.arriving.and_then(|version| self.held.get_mut(&version)) else { return };
        let version = held.manifest.version;
        let missing = usize::try_from(held.have.len() - held.have.count()).unwrap_or(usize::MAX);
        if self.disk_retry.is_some() || missing <= held.storing.len() + held.asked.len() {
            return;
        }
        let mut providers: Vec<NodeId> =
            self.peers.iter().filter(|(_, peer)| peer.offers(version)).map(|(id, _)| *id).collect();
        let many = u32::try_from(providers.len()).unwrap_or(u32::MAX);
        let window = (self.cfg.window * WIDEN / many.max(1)).clamp(self.cfg.window, self.cfg.window * WIDEN);
        cx.rng.shuffle(&mut providers);
        let mut orders: BTreeMap<NodeId, Vec<u32>> = BTreeMap::new();
        // One chunk each in turn, so that nobody is asked for all while others stand by.
        for _ in 0..window {
            for id in &providers {
                let Some(peer) = self.peers.get_mut(id).filter(|peer| peer.asked < window) else { continue };
                let Some(index) = peer.has.get(&version).and_then(|has| rarest(held, has, cx)) else { continue };
                let patience = peer.pace.map_or(Duration::ZERO, |pace| pace * PATIENCE * window);
                let deadline = cx.now + self.cfg.chunk_timeout.max(patience);
                held.asked.insert(index, Asked { of: *id, deadline });
                peer.asked += 1;
                orders.entry(*id).or_default().push(index);
            }
        }
        for (to, indices) in orders {
            for part in indices.chunks(MAX_ASK) {
                let indices = List::truncated(part.iter().copied());
                out.push(BroadcastEffect::Send { to, message: Bulk::WantChunks { version, indices } });
            }
        }
    }

    pub(super) fn chunk(
        &mut self,
        now: Time,
        from: NodeId,
        (version, index): (Version, u32),
        bytes: List<u8, MAX_CHUNK_BYTES>,
        out: &mut Outbox<BroadcastEffect>,
    ) -> Result<(), BroadcastFault> {
        let (Some(held), Some(peer)) = (self.held.get_mut(&version), self.peers.get_mut(&from)) else { return Ok(()) };
        let asked = held.asked.get(&index).filter(|asked| asked.of == from).copied();
        if asked.is_none() && peer.owed > 0 {
            peer.owed -= 1;
        } else if asked.is_none() {
            peer.unasked += 1;
            if peer.unasked > MAX_UNASKED {
                return Err(BroadcastFault::Unasked);
            }
        }
        if held.have.contains(index) || held.storing.contains(&index) {
            self.wasted += 1;
            return Ok(());
        }
        if !held.manifest.is_chunk(index, &bytes) {
            peer.ban();
            held.asked.retain(|_, asked| asked.of != from);
            self.recount();
            return Err(BroadcastFault::Lie { version, index });
        }
        peer.delivered(now);
        // Whoever was asked for it, it is here; the one that is late need not send it any more.
        if let Some(other) = held.asked.remove(&index) {
            if let Some(peer) = self.peers.get_mut(&other.of) {
                peer.asked = peer.asked.saturating_sub(1);
            }
            if other.of != from {
                let indices = List::truncated([index]);
                out.push(BroadcastEffect::Send { to: other.of, message: Bulk::Cancel { version, indices } });
            }
        }
        held.storing.insert(index);
        self.progress_at = now;
        out.push(BroadcastEffect::Store { version, index, bytes });
        Ok(())
    }

    pub(super) fn no_chunk(
        &mut self,
        now: Time,
        from: NodeId,
        (version, index): (Version, u32),
        out: &mut Outbox<BroadcastEffect>,
    ) {
        let (Some(held), Some(peer)) = (self.held.get_mut(&version), self.peers.get_mut(&from)) else { return };
        if held.asked.get(&index).is_none_or(|asked| asked.of != from) {
            return;
        }
        held.asked.remove(&index);
        peer.asked = peer.asked.saturating_sub(1);
        // It is not asked for that one again until it offers it again.
        if let Some(has) = peer.has.get_mut(&version) {
            has.remove(index);
        }
        if from == self.policy.owner && self.next.is_some() && self.arriving == Some(version) {
            // Its owner has moved on, and is not to blame for it: what is left of it here is of no use to anybody.
            self.forget(version, out);
            self.give_up(now);
        } else {
            peer.paused_until = Some(now + self.cfg.pause);
        }
    }

    /// Returns when the version that arrives is given up: after a long time without progress, or, if nobody offers what it lacks while
    /// another one is offered, after a short one; at once if nothing of it is here. An owner does not come back to what it has left.
    pub(super) fn give_up_at(&self) -> Option<Time> {
        let wait = match self.arriving.and_then(|version| self.held.get(&version)) {
            Some(held) if self.offered_instead(held).is_none() => self.next.map(|_| self.cfg.stall),
            Some(held) if held.have.is_empty() => Some(Duration::ZERO),
            Some(_) => Some(self.cfg.dead_end),
            None => None,
        };
        wait.map(|wait| self.progress_at + wait)
    }

    /// Turns from a version that does not come to one that does.
    pub(super) fn give_up(&mut self, now: Time) {
        let held = self.arriving.and_then(|version| self.held.get(&version));
        self.arriving = held.and_then(|held| self.offered_instead(held));
        self.drop_asked();
        self.progress_at = now;
        self.choose_arriving(now);
    }

    /// Returns the newest version that somebody offers, when nothing is under way of the one that arrives.
    fn offered_instead(&self, arriving: &Held) -> Option<Version> {
        if !arriving.asked.is_empty() || !arriving.storing.is_empty() || self.disk_retry.is_some() {
            return None;
        }
        let whole = self.held.values().filter(|held| held.have.is_full()).map(Held::order).max();
        let open =
            |held: &&Held| !held.have.is_full() && Some(held.order()) > whole && held.order() != arriving.order();
        let offered = |held: &&Held| {
            let news = |has: &Bitmap| has.iter().any(|index| !held.have.contains(index));
            let version = held.manifest.version;
            self.peers.values().any(|peer| peer.offers(version) && peer.has.get(&version).is_some_and(news))
        };
        let newest = self.held.values().filter(open).filter(offered).max_by_key(|held| held.order());
        newest.map(|held| held.manifest.version)
    }

    pub(super) fn stored(&mut self, now: Time, version: Version, index: u32, out: &mut Outbox<BroadcastEffect>) {
        let Some(held) = self.held.get_mut(&version) else { return };
        if !held.storing.remove(&index) || !held.have.insert(index) {
            return;
        }
        if self.cfg.share {
            for to in self.peers.keys() {
                out.push(BroadcastEffect::Send { to: *to, message: Bulk::HaveOne { version, index } });
            }
        }
        if held.have.is_full() {
            out.push(BroadcastEffect::Ready(held.manifest.clone()));
            self.choose_arriving(now);
        }
    }

    pub(super) fn store_failed(&mut self, now: Time, version: Version, index: u32) {
        if let Some(held) = self.held.get_mut(&version) {
            held.storing.remove(&index);
            self.disk_retry = Some(now + self.cfg.pause);
        }
    }

    /// Takes back what did not come in time, and leaves its neighbour alone for a while.
    pub(super) fn expire_asked(&mut self, now: Time, out: &mut Outbox<BroadcastEffect>) {
        for (version, held) in &mut self.held {
            let late: Vec<(u32, NodeId)> = held
                .asked
                .iter()
                .filter(|(_, asked)| asked.deadline <= now)
                .map(|(index, asked)| (*index, asked.of))
                .collect();
            for (index, of) in late {
                held.asked.remove(&index);
                if let Some(peer) = self.peers.get_mut(&of) {
                    peer.asked = peer.asked.saturating_sub(1);
                    peer.paused_until = Some(now + self.cfg.pause);
                }
                let indices = List::truncated([index]);
                out.push(BroadcastEffect::Send { to: of, message: Bulk::Cancel { version: *version, indices } });
            }
        }
    }
}

impl Peer {
    fn offers(&self, version: Version) -> bool {
        !self.banned && self.paused_until.is_none() && self.has.contains_key(&version)
    }

    fn ban(&mut self) {
        self.banned = true;
        self.has.clear();
        self.asked = 0;
    }

    fn delivered(&mut self, now: Time) {
        if let Some(last) = self.last_chunk {
            let gap = now.since(last);
            self.pace = Some(self.pace.map_or(gap, |pace| (pace * 3 + gap) / 4));
        }
        self.last_chunk = Some(now);
    }
}

/// Returns the chunk that fewest neighbours have, of those that this one has and this node lacks; any of them with the same chance.
fn rarest(held: &Held, has: &Bitmap, cx: &mut Ctx<'_>) -> Option<u32> {
    let (mut best, mut ties): (Option<(u16, u32)>, u64) = (None, 0);
    for index in has.iter() {
        if held.have.contains(index) || held.storing.contains(&index) || held.asked.contains_key(&index) {
            continue;
        }
        let holders = held.holders_of(index);
        match best {
            Some((fewest, _)) if holders > fewest => continue,
            Some((fewest, _)) if holders == fewest => ties += 1,
            _ => ties = 1,
        }
        if cx.rng.below(ties) == 0 {
            best = Some((holders, index));
        }
    }
    best.map(|(_, index)| index)
}
