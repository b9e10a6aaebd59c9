//! The owner's part: which chunk it offers to whom.
//!
//! Each chunk goes to one neighbour, which passes it on. That fails with two kinds of neighbours, which the owner tells by what they
//! announce:
//!
//! | [`Manner`] | how it is found out | what it is offered |
//! |---|---|---|
//! | `PassesOn` | | chunks that nobody has; when all are out, some that are rare |
//! | `Alone` | it lacks for a while what others have, and announces nothing but what the owner gave it: the others cannot reach it, or keep to themselves | all that it lacks, after what nobody has |
//! | `Silent` | a chunk has left for it, and it does not announce it: its disk is full, or it keeps to itself | nothing, while there are others; they serve it |
//!
//! Where nobody passes anything on, the broadcast is a star: everybody is offered everything, one chunk after the other.

use std::collections::BTreeMap;
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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Manner {
    #[default]
    PassesOn,
    Alone,
    Silent,
}

impl BroadcastConfig {
    fn quiet(&self) -> Duration {
        self.offer_timeout * QUIET
    }
}

impl Broadcast {
    /// Offers what the windows allow. When all is out, what is rare goes to more than one, up to the share that is set.
    pub(super) fn offer(&mut self, now: Time, out: &mut Outbox<BroadcastEffect>) {
        if !self.is_owner() || self.peers.is_empty() {
            return;
        }
        let Some(version) = self.choose_offering(now) else { return };
        let Some(held) = self.held.get_mut(&version) else { return };
        if !self.cfg.share {
            return offer_all(held, version, self.peers.keys(), out);
        }
        mark_alone(held, &mut self.peers, now, (self.cfg.quiet(), self.uploads.patience(self.cfg.quiet() / QUARTER)));
        let window = usize::try_from(self.cfg.window).unwrap_or(usize::MAX);
        let window = (window * WIDEN / self.peers.len()).clamp(window, window * WIDEN);
        let mut open: BTreeMap<NodeId, usize> =
            self.peers.iter().filter(|(_, peer)| !peer.banned).map(|(id, _)| (*id, 0)).collect();
        for offer in held.offers.values() {
            open.entry(offer.to).and_modify(|many| *many += 1);
        }
        let best = self.peers.values().filter(|peer| !peer.banned).map(|peer| peer.manner).min().unwrap_or_default();
        let mut choice = Choice { best, budget: held.have.len() * self.cfg.extra_percent / 100, cursor: 0 };
        // The neighbour with the fewest open offers is next, so that chunks are dealt round.
        while let Some((to, many)) = open.iter().min_by_key(|(_, many)| **many).map(|(id, many)| (*id, *many)) {
            let peer = self.peers.get(&to).filter(|_| many < window);
            let Some(index) = peer.and_then(|peer| choice.next(held, to, peer)) else {
                open.remove(&to);
                continue;
            };
            held.offers.insert(index, Offer { to, expires: Some(now + self.cfg.offer_timeout), sent: false });
            let chunks = held.manifest.chunks.len();
            held.offered.entry(to).or_insert_with(|| Bitmap::new(chunks)).insert(index);
            open.insert(to, many + 1);
            out.push(BroadcastEffect::Send { to, message: Bulk::HaveOne { version, index } });
        }
    }

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

    /// A chunk has left for a neighbour, or could not: now that neighbour has to announce it.
    pub(super) fn given(&mut self, now: Time, to: NodeId, version: Version, index: u32) {
        let (Some(held), Some(peer)) = (self.held.get_mut(&version), self.peers.get(&to)) else { return };
        if let Some(offer) = held.offers.get_mut(&index).filter(|offer| offer.to == to) {
            (offer.sent, offer.expires) = (true, Some(now + self.cfg.quiet()));
            if peer.manner == Manner::Silent {
                // Nothing more will be heard of it.
                held.offers.remove(&index);
            }
        }
    }

    /// A chunk does not leave, because its neighbour reads nothing.
    pub(super) fn stuck(&mut self, to: NodeId, version: Version, index: u32) {
        let offers = self.held.get_mut(&version).map(|held| &mut held.offers);
        if let Some(offers) = offers.filter(|offers| offers.get(&index).is_some_and(|offer| offer.to == to)) {
            offers.remove(&index);
        }
        if let Some(peer) = self.peers.get_mut(&to) {
            peer.manner = Manner::Silent;
        }
    }

    /// Takes back offers that came to nothing.
    pub(super) fn expire_offers(&mut self, now: Time) {
        for held in self.held.values_mut() {
            held.offers.retain(|_, offer| {
                let stays = offer.expires.is_none_or(|at| at > now);
                if let Some(peer) = self.peers.get_mut(&offer.to).filter(|_| !stays && offer.sent) {
                    peer.manner = Manner::Silent;
                }
                stays
            });
        }
    }

    /// Returns when an offer lapses, or a neighbour counts as alone.
    pub(super) fn deal_at(&self) -> Option<Time> {
        let offers = self.held.values().flat_map(|held| held.offers.values().filter_map(|offer| offer.expires)).min();
        let waits = self.peers.values().filter(|peer| peer.manner == Manner::PassesOn);
        earliest(offers, waits.filter_map(|peer| peer.alone_at).min())
    }
}

impl Peer {
    /// A neighbour of the owner announces a chunk.
    pub(super) fn announces(&mut self, given: bool) {
        if !given {
            (self.manner, self.alone_at) = (Manner::PassesOn, None);
        } else if self.manner == Manner::Silent {
            self.manner = Manner::PassesOn;
        }
    }
}

impl Held {
    pub(super) fn is_offered(&self, to: NodeId, index: u32) -> bool {
        self.offered.get(&to).is_some_and(|map| map.contains(index))
    }
}

/// Finds the neighbours that nobody but the owner serves: one at a time, because what that one gets may reach the others.
fn mark_alone(held: &Held, peers: &mut BTreeMap<NodeId, Peer>, now: Time, (quiet, between): (Duration, Duration)) {
    let version = held.manifest.version;
    let out = held.holders.iter().filter(|holders| **holders > 0).count();
    for peer in peers.values_mut() {
        let has = peer.has.get(&version).map_or(0, Bitmap::count);
        let behind = usize::try_from(has).unwrap_or(usize::MAX) < out;
        peer.alone_at = behind.then(|| peer.alone_at.unwrap_or(now + quiet));
    }
    let due = |peer: &&mut Peer| peer.manner == Manner::PassesOn && peer.alone_at.is_some_and(|at| at <= now);
    if let Some(first) = peers.values_mut().filter(due).min_by_key(|peer| peer.alone_at) {
        first.manner = Manner::Alone;
        for peer in peers.values_mut() {
            peer.alone_at = peer.alone_at.map(|at| at.max(now + between));
        }
    }
}

/// Which chunk a neighbour is offered, in one round of offers.
struct Choice {
    /// The best manner among the neighbours: they get what nobody has.
    best: Manner,
    /// Chunks that may be offered beyond the first copy.
    budget: u32,
    /// Every chunk before this one is offered or held by somebody. A round only ever adds to these.
    cursor: u32,
}

impl Choice {
    fn next(&mut self, held: &mut Held, to: NodeId, peer: &Peer) -> Option<u32> {
        let first = if peer.manner == self.best { self.unheld(held, to) } else { None };
        first.or_else(|| self.spare(held, to, peer))
    }

    /// A chunk that nobody has, if there is one that this neighbour was not offered already.
    fn unheld(&mut self, held: &Held, to: NodeId) -> Option<u32> {
        let taken = |index: &u32| held.holders_of(*index) > 0 || held.offers.contains_key(index);
        self.cursor = (self.cursor..held.have.len()).find(|index| !taken(index)).unwrap_or(held.have.len());
        let mut open = (self.cursor..held.have.len()).filter(|index| !taken(index));
        let fresh = open.find(|index| !held.is_offered(to, *index));
        // One that it let lapse may be offered to it again; but one that has all of them keeps them to itself.
        fresh.or_else(|| Some(self.cursor).filter(|index| *index < held.have.len() && self.best == Manner::PassesOn))
    }

    /// A chunk that others have.
    fn spare(&self, held: &mut Held, to: NodeId, peer: &Peer) -> Option<u32> {
        let allowed = match peer.manner {
            Manner::PassesOn => held.extra < self.budget,
            Manner::Alone => true,
            Manner::Silent => false,
        };
        let has = peer.has.get(&held.manifest.version);
        let lacks = |index: &u32| has.is_none_or(|has| !has.contains(*index)) && !held.is_offered(to, *index);
        let open = |index: &u32| held.holders_of(*index) > 0 && !held.offers.contains_key(index);
        let spare = (0..held.have.len()).filter(|index| allowed && lacks(index) && open(index));
        let index = spare.min_by_key(|index| held.holders_of(*index))?;
        held.extra += u32::from(peer.manner == Manner::PassesOn);
        Some(index)
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
