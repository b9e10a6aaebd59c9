//! The owner's part: which chunk it offers to whom.
//!
//! Neighbours that pass on what they get are *the mesh*: each chunk goes to one of them, and the others have it from there. Who does
//! not take part in that is served for itself. The owner tells them apart by what they announce:
//!
//! | [`Manner`] | how it is found out | what it is offered |
//! |---|---|---|
//! | `PassesOn` | | chunks that nobody in the mesh has; when all are out, some that are rare |
//! | `Alone` | it lacks for a while what the mesh has, and announces nothing but what the owner gave it: the others cannot reach it | all that it lacks of one version, until it has all of that |
//! | `Silent` | a chunk has left for it, or does not leave, and it announces nothing: its disk is full, or it keeps to itself, or hangs | the newest version, one chunk at a time, when nobody else wants any |
//!
//! The mesh and those who are alone take turns at the uplink. Where everybody is alone the broadcast is a star. No verdict is for good:
//! a chunk from elsewhere makes a neighbour a part of the mesh again, and any chunk that it announces ends its silence.
//!
//! What is not solved: of several groups that only the owner joins, each passes chunks on within itself, so one member of each must be
//! found to be alone, for every version anew; with versions that come faster than that, all but one may get none whole.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use chorus_machine::{Outbox, Time, earliest};
use chorus_protocol::NodeId;
use chorus_protocol::policy::Version;
use chorus_protocol::rollout::Bulk;

use super::versions::{Held, Offer};
use super::{Bitmap, Broadcast, BroadcastConfig, BroadcastEffect, Peer};

/// How many times the owner's offers to one neighbour may widen when there are few.
const WIDEN: usize = 4;
/// How long a neighbour may be quiet before it counts as alone or silent, in times of the offers' patience.
const QUIET: u32 = 2;
/// The next one counts as alone after this part of that time, if what the one before got did not reach it.
const QUARTER: u32 = 4;

/// What a neighbour does with what the owner gives it. See the module.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Manner {
    #[default]
    PassesOn,
    Alone,
    Silent,
}

/// What the owner knows of a neighbour that it gives chunks to.
#[derive(Debug, Default)]
pub(super) struct Dealing {
    pub(super) manner: Manner,
    /// The mesh has what it lacks. When it counts as alone, if nothing comes to it by then but from the owner.
    alone_at: Option<Time>,
    /// It let an offer of this version lapse: others go first.
    lapsed: bool,
    /// If it is served for itself: with which version, and since when that makes no progress.
    version: Option<(Version, Time)>,
}

impl BroadcastConfig {
    fn quiet(&self) -> Duration {
        self.offer_timeout * QUIET
    }
}

impl Broadcast {
    /// Offers what the windows allow.
    pub(super) fn offer(&mut self, now: Time, out: &mut Outbox<BroadcastEffect>) {
        if !self.is_owner() || self.peers.is_empty() {
            return;
        }
        let Some(newest) = self.newest_whole().map(|manifest| manifest.version) else { return };
        if !self.cfg.share {
            return self.offer_all(newest, out);
        }
        self.turn(now, newest);
        self.mark_alone(now);
        self.deal_round(now, out);
        let apart = |(id, peer): (&NodeId, &Peer)| (peer.dealing.manner != Manner::PassesOn).then_some(*id);
        for to in self.peers.iter().filter_map(apart).collect::<Vec<_>>() {
            self.deal_to(now, to, out);
        }
    }

    fn window(&self) -> usize {
        let window = usize::try_from(self.cfg.window).unwrap_or(usize::MAX);
        (window * WIDEN / self.peers.len().max(1)).clamp(window, window * WIDEN)
    }

    /// Decides which version the mesh gets, and which everybody who is served for himself. The mesh stays with one until all of it is
    /// out, and who is alone until all of it is there; both turn to the newest when it makes no progress.
    fn turn(&mut self, now: Time, newest: Version) {
        let lapse = self.uploads.patience(self.cfg.quiet());
        let (held, uploads) = (&self.held, &self.uploads);
        let mesh = |version: &Version| held.get(version).is_none_or(|held| mesh_has(held, &self.peers).is_full());
        let mut stays = self.offering.filter(|(version, _)| *version == newest || !mesh(version));
        if let Some((version, since)) = &mut stays
            && *since + lapse <= now
        {
            (*version, *since) = (if uploads.is_sending(*version, None) { *version } else { newest }, now);
        }
        let turned = stays.map(|(version, _)| version) != self.offering.map(|(version, _)| version);
        self.offering = stays.or(Some((newest, now)));
        for (id, peer) in &mut self.peers {
            let whole = |version: &Version| {
                held.get(version)
                    .is_none_or(|held| peer.has.get(version).is_some_and(|has| has.count() == held.have.len()))
            };
            let dealing = &mut peer.dealing;
            dealing.lapsed &= !turned;
            let stays = dealing
                .version
                .filter(|(version, _)| *version == newest || (dealing.manner == Manner::Alone && !whole(version)));
            dealing.version = stays.or(Some((newest, now)));
            if let Some((version, since)) = &mut dealing.version
                && *since + lapse <= now
            {
                (*version, *since) = (if uploads.is_sending(*version, Some(*id)) { *version } else { newest }, now);
            }
        }
    }

    /// Finds the neighbours that nobody but the owner serves: one at a time, because what that one gets may reach the others.
    fn mark_alone(&mut self, now: Time) {
        let Some(held) = self.offering.and_then(|(version, _)| self.held.get(&version)) else { return };
        let quiet = self.uploads.patience(self.cfg.quiet());
        let between = self.uploads.patience(self.cfg.quiet() / QUARTER);
        let out = mesh_has(held, &self.peers).count();
        let peers = self.peers.values_mut();
        let mut mesh: Vec<&mut Peer> = peers.filter(|peer| peer.dealing.manner == Manner::PassesOn).collect();
        for peer in &mut mesh {
            let has = peer.has.get(&held.manifest.version).map_or(0, Bitmap::count);
            let at = &mut peer.dealing.alone_at;
            // While nothing of a version is out nobody can be behind; that ends no wait that began with the one before.
            *at = if has < out || out == 0 { at.or((out > 0).then_some(now + quiet)) } else { None };
        }
        let due =
            mesh.iter_mut().map(|peer| &mut peer.dealing).filter(|peer| peer.alone_at.is_some_and(|at| at <= now));
        if let Some(first) = due.min_by_key(|peer| peer.alone_at) {
            (first.manner, first.alone_at) = (Manner::Alone, None);
            for peer in mesh {
                peer.dealing.alone_at = peer.dealing.alone_at.map(|at| at.max(now + between));
            }
        }
    }

    /// Offers the mesh what nobody in it has, dealt round; then what is rare, up to the share that is set.
    fn deal_round(&mut self, now: Time, out: &mut Outbox<BroadcastEffect>) {
        let window = self.window();
        let Some(held) = self.offering.and_then(|(version, _)| self.held.get_mut(&version)) else { return };
        let passes_on = |peer: &Peer| peer.dealing.manner == Manner::PassesOn;
        let mut open: BTreeMap<NodeId, usize> =
            self.peers.iter().filter(|(_, peer)| passes_on(peer)).map(|(id, _)| (*id, 0)).collect();
        let mut taken = mesh_has(held, &self.peers);
        let all_out = taken.is_full();
        for (to, index) in held.offers.keys() {
            if let Some(many) = open.get_mut(to) {
                *many += 1;
                taken.insert(*index);
            }
        }
        let willing = self.peers.values().any(|peer| passes_on(peer) && !peer.dealing.lapsed);
        // No more at once than leave at once: who asks for one behind a queue would have it sooner from the others.
        let mut spares = self.cfg.upload_slots.saturating_sub(held.offers.values().filter(|offer| offer.extra).count());
        let budget = held.have.len() * self.cfg.extra_percent / 100;
        // The neighbour with the fewest open offers is next.
        while let Some((to, many)) = open.iter().min_by_key(|(_, many)| **many).map(|(id, many)| (*id, *many)) {
            let Some(peer) = self.peers.get(&to).filter(|_| many < window) else {
                open.remove(&to);
                continue;
            };
            let first = !willing || !peer.dealing.lapsed;
            let new = first.then(|| held.unheld(to, &taken)).flatten();
            let extra = new.is_none();
            let allowed = all_out && held.extra < budget && spares > 0;
            let index = new.or_else(|| if allowed { held.spare(to, peer, &open) } else { None });
            let Some(index) = index else {
                open.remove(&to);
                continue;
            };
            taken.insert(index);
            open.insert(to, many + 1);
            held.extra += u32::from(extra);
            spares -= usize::from(extra);
            held.offer(
                to,
                index,
                Offer { expires: Some(now + self.cfg.offer_timeout), sent: None, behind: 0, extra },
                out,
            );
        }
    }

    /// Offers a neighbour outside the mesh what it lacks.
    fn deal_to(&mut self, now: Time, to: NodeId, out: &mut Outbox<BroadcastEffect>) {
        let window = self.window();
        let Some(peer) = self.peers.get(&to) else { return };
        let Some(held) = peer.dealing.version.and_then(|(version, _)| self.held.get_mut(&version)) else { return };
        let window = if peer.dealing.manner == Manner::Silent { 1 } else { window };
        let open = held.offers.keys().filter(|(of, _)| *of == to).count();
        let has = peer.has.get(&held.manifest.version);
        let lacks = |index: &u32| has.is_none_or(|has| !has.contains(*index)) && !held.is_offered(to, *index);
        for index in (0..held.have.len()).filter(lacks).take(window.saturating_sub(open)).collect::<Vec<_>>() {
            let expires = Some(now + self.cfg.offer_timeout);
            held.offer(to, index, Offer { expires, sent: None, behind: 0, extra: false }, out);
        }
    }

    /// One to many, for comparison: everything is offered to everybody.
    fn offer_all(&mut self, version: Version, out: &mut Outbox<BroadcastEffect>) {
        let Some(held) = self.held.get_mut(&version) else { return };
        for to in self.peers.keys() {
            if !held.offered.contains_key(to) {
                held.offered.insert(*to, held.have.clone());
                let message = Bulk::Have { version, chunks: held.have.to_wire() };
                out.push(BroadcastEffect::Send { to: *to, message });
            }
        }
    }
}

impl Broadcast {
    /// A chunk has left for a neighbour: now that neighbour has to announce it.
    pub(super) fn given(&mut self, now: Time, to: NodeId, version: Version, index: u32) {
        let quiet = self.uploads.patience(self.cfg.quiet());
        let sent = self.held.values().flat_map(|held| held.offers.values()).filter(|offer| offer.sent.is_some());
        let behind = sent.count();
        let (Some(held), Some(peer)) = (self.held.get_mut(&version), self.peers.get_mut(&to)) else { return };
        peer.dealing.lapsed = false;
        if peer.dealing.manner == Manner::Silent {
            // Nothing more may be heard of it.
            held.offers.remove(&(to, index));
        } else if let Some(offer) = held.offers.get_mut(&(to, index)) {
            (offer.sent, offer.behind, offer.expires) = (Some(now), behind, Some(now + quiet));
        }
    }

    /// A chunk that was given has arrived. What left by then and is still under way may have waited for it: to have left is to lie in a
    /// buffer, and an uplink may take long to empty that.
    fn arrived(&mut self, now: Time, sent: Time) {
        self.uploads.arrived(now.since(sent));
        let quiet = self.uploads.patience(self.cfg.quiet());
        let offers = self.held.values_mut().flat_map(|held| held.offers.values_mut());
        for offer in offers.filter(|offer| offer.sent.is_some() && offer.behind > 0) {
            offer.behind -= 1;
            offer.expires = Some(now + quiet);
        }
    }

    /// A chunk could not be sent. It may be offered again.
    pub(super) fn not_given(&mut self, to: NodeId, version: Version, index: u32) {
        let Some(held) = self.held.get_mut(&version) else { return };
        held.withdraw(to, |of| of == index);
        for maps in [&mut held.offered, &mut held.given] {
            if let Some(map) = maps.get_mut(&to) {
                map.remove(index);
            }
        }
    }

    /// A neighbour does not want chunks any more that it has asked for.
    pub(super) fn cancelled(&mut self, from: NodeId, version: Version, indices: &[u32]) {
        self.uploads.cancel(from, version, indices);
        if let Some(held) = self.held.get_mut(&version) {
            held.withdraw(from, |index| indices.contains(&index));
        }
    }

    /// A chunk does not leave, because its neighbour reads nothing: whatever it was offered, others get.
    pub(super) fn stuck(&mut self, to: NodeId) {
        self.uploads.drain(to);
        self.held.values_mut().for_each(|held| held.withdraw(to, |_| true));
        if let Some(peer) = self.peers.get_mut(&to) {
            peer.dealing.manner = Manner::Silent;
        }
    }

    /// A neighbour of the owner announces a chunk.
    pub(super) fn announced_one(&mut self, now: Time, from: NodeId, version: Version, index: u32) {
        let sent = self.held.get(&version).and_then(|held| held.offers.get(&(from, index))?.sent);
        if let Some(sent) = sent {
            self.arrived(now, sent);
        }
        let Some(peer) = self.peers.get_mut(&from) else { return };
        let dealing = &mut peer.dealing;
        if dealing.manner == Manner::Silent {
            (dealing.manner, dealing.lapsed) = (Manner::PassesOn, false);
        }
        let Some(held) = self.held.get(&version).filter(|held| held.have.contains(index)) else { return };
        if peer.has.get(&version).is_some_and(|has| has.contains(index)) {
            return;
        }
        if !held.given.get(&from).is_some_and(|given| given.contains(index)) {
            (dealing.manner, dealing.alone_at) = (Manner::PassesOn, None);
        }
        let of = if dealing.manner == Manner::Alone { &mut dealing.version } else { &mut self.offering };
        if let Some((_, since)) = of.as_mut().filter(|(of, _)| *of == version) {
            *since = now;
        }
    }

    /// Takes back offers that came to nothing.
    pub(super) fn expire_offers(&mut self, now: Time) {
        for held in self.held.values_mut() {
            let (offers, extra) = (&mut held.offers, &mut held.extra);
            offers.retain(|(to, _), offer| {
                let stays = offer.expires.is_none_or(|at| at > now);
                if let Some(peer) = self.peers.get_mut(to).filter(|_| !stays) {
                    let dealing = &mut peer.dealing;
                    (dealing.lapsed, *extra) =
                        (true, extra.saturating_sub(u32::from(offer.extra && offer.sent.is_none())));
                    if offer.sent.is_some() {
                        dealing.manner = Manner::Silent;
                    }
                }
                stays
            });
        }
    }

    /// Returns when an offer lapses, a neighbour counts as alone, or a version counts as abandoned.
    pub(super) fn deal_at(&self) -> Option<Time> {
        let offers = self.held.values().flat_map(|held| held.offers.values().filter_map(|offer| offer.expires)).min();
        if !self.is_owner() || !self.cfg.share || self.peers.is_empty() {
            return offers;
        }
        let newest = self.newest_whole()?.version;
        let dealings = || self.peers.values().map(|peer| &peer.dealing);
        let mesh = dealings().filter(|dealing| dealing.manner == Manner::PassesOn);
        let alone = mesh.filter_map(|dealing| dealing.alone_at).min();
        let versions =
            dealings().filter(|dealing| dealing.manner == Manner::Alone).filter_map(|dealing| dealing.version);
        let old = versions.chain(self.offering).filter(|(version, _)| *version != newest);
        let turns = old.map(|(_, since)| since + self.uploads.patience(self.cfg.quiet())).min();
        earliest(earliest(offers, alone), turns)
    }

    /// Returns the versions that neighbours are given who are alone; not more than are kept for others.
    pub(super) fn given_apart(&self) -> BTreeSet<Version> {
        let alone = self.peers.values().map(|peer| &peer.dealing).filter(|dealing| dealing.manner == Manner::Alone);
        let versions: BTreeSet<Version> =
            alone.filter_map(|dealing| dealing.version.map(|(version, _)| version)).collect();
        let mut newest: Vec<&Held> = versions.iter().filter_map(|version| self.held.get(version)).collect();
        newest.sort_by_key(|held| std::cmp::Reverse(held.order()));
        newest.into_iter().take(self.cfg.keep).map(|held| held.manifest.version).collect()
    }
}

impl Held {
    pub(super) fn is_offered(&self, to: NodeId, index: u32) -> bool {
        self.offered.get(&to).is_some_and(|map| map.contains(index))
    }

    fn offer(&mut self, to: NodeId, index: u32, offer: Offer, out: &mut Outbox<BroadcastEffect>) {
        let (version, chunks) = (self.manifest.version, self.manifest.chunks.len());
        self.offers.insert((to, index), offer);
        self.offered.entry(to).or_insert_with(|| Bitmap::new(chunks)).insert(index);
        out.push(BroadcastEffect::Send { to, message: Bulk::HaveOne { version, index } });
    }

    /// Takes back open offers of chunks that have not left. What was offered may still be asked for.
    fn withdraw(&mut self, to: NodeId, which: impl Fn(u32) -> bool) {
        self.offers.retain(|(of, index), offer| *of != to || offer.sent.is_some() || !which(*index));
    }

    /// A chunk that nobody in the mesh has or is offered; rather one that this neighbour was not offered before.
    fn unheld(&self, to: NodeId, taken: &Bitmap) -> Option<u32> {
        let mut open = (0..self.have.len()).filter(|index| !taken.contains(*index)).peekable();
        let any = open.peek().copied();
        open.find(|index| !self.is_offered(to, *index)).or(any)
    }

    /// The rarest chunk that a neighbour lacks and nobody else in the mesh is offered.
    fn spare(&self, to: NodeId, peer: &Peer, mesh: &BTreeMap<NodeId, usize>) -> Option<u32> {
        let has = peer.has.get(&self.manifest.version);
        let offered: BTreeSet<u32> =
            self.offers.keys().filter(|(of, _)| mesh.contains_key(of)).map(|(_, index)| *index).collect();
        let lacks = |index: &u32| has.is_none_or(|has| !has.contains(*index)) && !self.is_offered(to, *index);
        let spare = (0..self.have.len()).filter(|index| lacks(index) && !offered.contains(index));
        spare.min_by_key(|index| self.holders_of(*index))
    }
}

/// What the mesh has of a version. Without a mesh that is all: there is nothing to be done for it.
fn mesh_has(held: &Held, peers: &BTreeMap<NodeId, Peer>) -> Bitmap {
    let mut has = Bitmap::new(held.manifest.chunks.len());
    let mut mesh = peers.values().filter(|peer| peer.dealing.manner == Manner::PassesOn).peekable();
    if mesh.peek().is_none() {
        return held.have.clone();
    }
    for map in mesh.filter_map(|peer| peer.has.get(&held.manifest.version)) {
        has.unite(map);
    }
    has
}
