//! Reconciliation with neighbours, one session at a time each.
//!
//! ```text
//!  initiator                                            responder
//!     │ Open { digest, first frame } ───────────────────▶ │ equal: Same. That was all.
//!     │ ◀──────────────────────────────── Reply { frame } │
//!     │ Reply { frame } … until both differences are known  ▶ │
//!     │ Want { a page of ids } ─────────────────────────▶ │
//!     │ ◀──────────────── Items { as many as fit a page } │ … until nothing is wanted
//!     │ Items { what the other lacks } ─────────────────▶ │
//! ```
//!
//! Only a little is handed over unasked. Of more the responder is told by a page with nothing in it, and begins a reconciliation of
//! its own: a node that comes to many neighbours at once would otherwise be given everything by each of them.
//!
//! The responder keeps nothing of the set between two messages, so either set may change at any time: the worst that happens is
//! that something is offered twice. A session is bounded in rounds, ids and bytes. What it had to leave is found by the next
//! one, which then follows at once.

mod serve;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use chorus_machine::{Ctx, Outbox, Time, earliest};
use chorus_protocol::limits::MAX_SYNC_ENTRIES;
use chorus_protocol::sync::SyncMessage;
use chorus_protocol::{Hash, List, NodeId};

use crate::io::{LedgerEffect, LedgerEvent};
use crate::ledger::{Inbound, Ledger};
use crate::refusal::{Misconduct, Refusal};
use serve::{Page, items};

/// Reconciliations that this node begins at a time.
const MAX_OPENED: usize = 4;
/// Neighbours that are remembered.
const MAX_PEERS: usize = 4_096;
/// Frames of one reconciliation.
const MAX_ROUNDS: u32 = 256;
/// Ids in one request: a few milliseconds of verification.
const WANT_PAGE: usize = 256;
/// Ids that one reconciliation looks for on either side; one frame more may slip in.
const MAX_FOUND: usize = 8_192;
/// Entries that one reconciliation hands over unasked. Whoever lacks more is told to ask.
const MAX_PUSHED: usize = WANT_PAGE;
/// Pages that one reconciliation hands over unasked.
const MAX_PUSHED_PAGES: usize = 4;
/// Received entries that wait for verification.
const MAX_INBOX: usize = 4_096;
/// Hashes that were received and refused, so that they are not asked for again and again.
const MAX_REFUSED: usize = 4_096;
/// For how long they are not asked for.
const REFUSED_FOR: Duration = Duration::from_secs(300);
/// After which the same entries are handed over again to a neighbour that did not keep them.
const PUSH_AGAIN_AFTER: Duration = Duration::from_secs(60);
/// Between two reconciliations of one neighbour with different sets.
const MIN_OPEN_INTERVAL: Duration = Duration::from_millis(50);
/// Of two neighbours that meet, one begins at once and the other after this long, if it is still needed.
const PEER_UP_DELAY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_millis(300));

#[derive(Debug, Default)]
struct Peer {
    /// When it wants to be reconciled with, out of turn.
    due: Option<Time>,
    /// What was last handed over unasked, and when.
    pushed: Option<(Hash, Time)>,
}

/// A reconciliation that this node began.
#[derive(Debug)]
struct Opened {
    session: u64,
    deadline: Time,
    rounds: u32,
    /// Whether no further frame is expected.
    compared: bool,
    /// Whether something was left for the next one.
    cut: bool,
    need: VecDeque<Hash>,
    /// Asked for and not yet here.
    asked: BTreeSet<Hash>,
    have: Vec<Hash>,
    received: usize,
}

/// A reconciliation that a neighbour began.
#[derive(Debug)]
struct Serving {
    session: u64,
    since: Time,
    deadline: Time,
    rounds: u32,
    wants: u32,
    taken: usize,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Sync {
    peers: BTreeMap<NodeId, Peer>,
    opened: BTreeMap<NodeId, Opened>,
    serving: BTreeMap<NodeId, Serving>,
    /// Neighbours with a reconciliation out of turn.
    due: BTreeSet<(Time, NodeId)>,
    /// When the next one in turn begins; `None` without neighbours.
    tick: Option<Time>,
    refused: BTreeSet<Hash>,
    refused_since: Time,
}

impl Sync {
    pub(crate) fn deadline(&self) -> Option<Time> {
        let due = self.due.first().map(|(at, _)| *at).filter(|_| self.opened.len() < MAX_OPENED);
        let sessions = self.opened.values().map(|session| session.deadline).min();
        earliest(self.tick, earliest(due, sessions))
    }

    fn set_due(&mut self, peer: NodeId, at: Option<Time>) {
        let Some(known) = self.peers.get_mut(&peer) else { return };
        if let Some(old) = std::mem::replace(&mut known.due, at) {
            self.due.remove(&(old, peer));
        }
        if let Some(at) = at {
            self.due.insert((at, peer));
        }
    }

    fn refuse(&mut self, now: Time, hash: Hash) {
        if now.since(self.refused_since) > REFUSED_FOR || self.refused.len() >= MAX_REFUSED {
            self.refused.clear();
            self.refused_since = now;
        }
        self.refused.insert(hash);
    }

    fn mine(&mut self, peer: &NodeId, session: u64) -> Option<&mut Opened> {
        self.opened.get_mut(peer).filter(|opened| opened.session == session)
    }

    /// Returns whether some reconciliation has asked for this and waits for it.
    fn is_asked(&self, hash: &Hash) -> bool {
        self.opened.values().any(|opened| opened.asked.contains(hash))
    }

    fn theirs(&mut self, peer: &NodeId, session: u64) -> Option<&mut Serving> {
        self.serving.get_mut(peer).filter(|serving| serving.session == session)
    }
}

impl Ledger {
    pub(crate) fn on_peer_up(&mut self, cx: &mut Ctx<'_>, peer: NodeId, out: &mut Outbox<LedgerEffect>) {
        if peer == self.id() || self.sync.peers.len() >= MAX_PEERS {
            return;
        }
        self.sync.peers.entry(peer).or_default();
        let wait = if self.id() < peer { Duration::ZERO } else { cx.rng.between(PEER_UP_DELAY.0, PEER_UP_DELAY.1) };
        self.sync.set_due(peer, Some(cx.now + wait));
        if self.sync.tick.is_none() {
            self.sync.tick = Some(cx.now + self.interval(cx));
        }
        self.on_sync_time(cx, out);
    }

    pub(crate) fn on_peer_down(&mut self, peer: NodeId) {
        self.sync.set_due(peer, None);
        self.sync.peers.remove(&peer);
        self.sync.serving.remove(&peer);
        if self.sync.opened.remove(&peer).is_some() {
            self.stats.syncs_broken += 1;
        }
        if self.sync.peers.is_empty() {
            self.sync.tick = None;
        }
    }

    fn interval(&self, cx: &mut Ctx<'_>) -> Duration {
        let mean = self.cfg.sync_interval;
        cx.rng.between(mean * 3 / 4, mean * 5 / 4)
    }

    /// Begins what is due, and gives up what waits for too long.
    pub(crate) fn on_sync_time(&mut self, cx: &mut Ctx<'_>, out: &mut Outbox<LedgerEffect>) {
        let now = cx.now;
        let late: Vec<NodeId> =
            self.sync.opened.iter().filter(|(_, session)| session.deadline <= now).map(|(peer, _)| *peer).collect();
        for peer in late {
            self.break_off(peer, out);
        }
        if self.sync.tick.is_some_and(|tick| tick <= now) {
            self.sync.serving.retain(|_, session| session.deadline > now);
            let free: Vec<NodeId> =
                self.sync.peers.keys().filter(|peer| !self.sync.opened.contains_key(peer)).copied().collect();
            if let Some(peer) = cx.rng.pick(&free).copied() {
                self.open(cx, peer, out);
            }
            self.sync.tick = Some(now + self.interval(cx));
        }
        while let Some((_, peer)) = self.sync.due.first().copied().filter(|(at, _)| *at <= now) {
            if self.sync.opened.len() >= MAX_OPENED {
                break;
            }
            self.open(cx, peer, out);
        }
    }

    fn open(&mut self, cx: &mut Ctx<'_>, peer: NodeId, out: &mut Outbox<LedgerEffect>) {
        self.sync.set_due(peer, None);
        if self.sync.opened.len() >= MAX_OPENED || self.sync.opened.contains_key(&peer) {
            return;
        }
        let digest = self.digest();
        // A frame of one's own cannot fail; if it did, the neighbours still begin reconciliations with this node.
        let Some(frame) = self.state.items_mut().first_frame().ok().and_then(|frame| List::new(frame).ok()) else {
            return;
        };
        let opened = Opened {
            session: cx.rng.next_u64(),
            deadline: cx.now + self.cfg.sync_timeout,
            rounds: 0,
            compared: false,
            cut: false,
            need: VecDeque::new(),
            asked: BTreeSet::new(),
            have: Vec::new(),
            received: 0,
        };
        let message = SyncMessage::Open { session: opened.session, digest, frame };
        out.push(LedgerEffect::Send { to: peer, message });
        self.sync.opened.insert(peer, opened);
        self.stats.syncs_opened += 1;
    }

    /// Gives up a reconciliation of one's own.
    fn break_off(&mut self, peer: NodeId, out: &mut Outbox<LedgerEffect>) {
        if let Some(opened) = self.sync.opened.remove(&peer) {
            self.stats.syncs_broken += 1;
            out.push(LedgerEffect::Send { to: peer, message: SyncMessage::Abort { session: opened.session } });
        }
    }

    pub(crate) fn on_sync(
        &mut self,
        cx: &mut Ctx<'_>,
        from: NodeId,
        message: SyncMessage,
        out: &mut Outbox<LedgerEffect>,
    ) {
        let timeout = cx.now + self.cfg.sync_timeout;
        match message {
            SyncMessage::Open { session, digest, frame } => {
                self.serve_open(cx.now, from, (session, digest), &frame, out)
            }
            SyncMessage::Same { session } => {
                if self.sync.mine(&from, session).is_some() {
                    self.stats.syncs_equal += 1;
                    self.close(cx, from, 0);
                }
            }
            SyncMessage::Reply { session, frame } => match self.sync.mine(&from, session) {
                Some(opened) => {
                    opened.deadline = timeout;
                    self.on_reply(cx, from, &frame, out);
                }
                None => self.serve_reply(timeout, from, session, &frame, out),
            },
            SyncMessage::Want { session, ids } => self.serve_want(timeout, from, session, &ids, out),
            SyncMessage::Items { session, entries, proofs } => {
                self.on_items(cx.now, from, session, (entries.into_vec(), proofs.into_vec()), out);
            }
            SyncMessage::Abort { session } => {
                if self.sync.mine(&from, session).is_some() {
                    self.sync.opened.remove(&from);
                    self.stats.syncs_broken += 1;
                } else if self.sync.theirs(&from, session).is_some() {
                    self.sync.serving.remove(&from);
                }
            }
        }
    }

    fn on_reply(&mut self, cx: &mut Ctx<'_>, peer: NodeId, frame: &[u8], out: &mut Outbox<LedgerEffect>) {
        let findings = match self.state.items().advance(frame) {
            Ok(findings) => findings,
            Err(error) => {
                out.push(LedgerEffect::Penalise { peer, reason: Misconduct::Frame(error.to_string()) });
                return self.break_off(peer, out);
            }
        };
        let full = self.state.is_full();
        let refused = &self.sync.refused;
        let need = findings
            .need
            .into_iter()
            .filter(|hash| !full && self.state.slot(hash).is_none() && !refused.contains(hash));
        let need: Vec<Hash> = need.collect();
        let Some(opened) = self.sync.opened.get_mut(&peer) else { return };
        opened.rounds += 1;
        opened.need.extend(need);
        opened.have.extend(findings.have);
        let next = findings.next.and_then(|frame| List::new(frame).ok());
        match next {
            None => opened.compared = true,
            Some(_) if opened.need.len() >= MAX_FOUND || opened.have.len() >= MAX_FOUND => {
                (opened.compared, opened.cut) = (true, true);
            }
            Some(_) if opened.rounds >= MAX_ROUNDS => {
                out.push(LedgerEffect::Penalise { peer, reason: Misconduct::Endless });
                return self.break_off(peer, out);
            }
            Some(frame) => {
                let message = SyncMessage::Reply { session: opened.session, frame };
                out.push(LedgerEffect::Send { to: peer, message });
            }
        }
        self.pump(cx, peer, out);
    }

    /// Asks for the next page, or ends the reconciliation when nothing is left to ask for.
    fn pump(&mut self, cx: &mut Ctx<'_>, peer: NodeId, out: &mut Outbox<LedgerEffect>) {
        let Some(opened) = self.sync.opened.get_mut(&peer) else { return };
        if !opened.asked.is_empty() {
            return;
        }
        // Several reconciliations that begin together look for the same entries: each asks for a part of them. What another one
        // has asked for is left to it, and comes back to the end of the line for as long as this one goes on.
        let mut need = std::mem::take(&mut opened.need);
        let (mut page, mut elsewhere) = (BTreeSet::new(), Vec::new());
        while page.len() < WANT_PAGE {
            let Some(hash) = need.pop_front() else { break };
            // Gossip may have brought it in the meantime.
            if self.state.slot(&hash).is_some() {
                continue;
            }
            if self.sync.is_asked(&hash) {
                elsewhere.push(hash);
            } else {
                page.insert(hash);
            }
        }
        need.extend(elsewhere);
        let Some(opened) = self.sync.opened.get_mut(&peer) else { return };
        (opened.need, opened.asked) = (need, page);
        if !opened.asked.is_empty() {
            let ids = List::truncated(opened.asked.iter().copied());
            let message = SyncMessage::Want { session: opened.session, ids };
            out.push(LedgerEffect::Send { to: peer, message });
        } else if opened.compared {
            let (session, have) = (opened.session, std::mem::take(&mut opened.have));
            let sent = self.push(cx, peer, session, have, out);
            self.close(cx, peer, sent);
        }
    }

    /// Hands over what the neighbour lacks, unless it was given the very same a moment ago and did not keep it.
    fn push(
        &mut self,
        cx: &Ctx<'_>,
        peer: NodeId,
        session: u64,
        mut have: Vec<Hash>,
        out: &mut Outbox<LedgerEffect>,
    ) -> usize {
        if have.is_empty() {
            return 0;
        }
        have.sort_unstable();
        let bytes: Vec<&[u8]> = have.iter().map(|hash| hash.as_bytes().as_slice()).collect();
        let digest = Hash::derive("chorus ledger push v1", &bytes);
        if let Some(known) = self.sync.peers.get_mut(&peer) {
            if known.pushed.is_some_and(|(last, at)| last == digest && cx.now.since(at) < PUSH_AGAIN_AFTER) {
                return 0;
            }
            known.pushed = Some((digest, cx.now));
        }
        if have.len() > MAX_PUSHED {
            out.push(LedgerEffect::Send { to: peer, message: items(session, Page::default()) });
            return 0;
        }
        let mut sent = 0;
        for page in self.pages(&have).into_iter().take(MAX_PUSHED_PAGES) {
            sent += page.0.len() + page.1.len();
            out.push(LedgerEffect::Send { to: peer, message: items(session, page) });
        }
        sent
    }

    fn close(&mut self, cx: &Ctx<'_>, peer: NodeId, sent: usize) {
        let Some(opened) = self.sync.opened.remove(&peer) else { return };
        if opened.cut && opened.received > 0 {
            self.sync.set_due(peer, Some(cx.now));
        }
        self.delta.events.push(LedgerEvent::Synced { peer, received: opened.received, sent });
    }

    fn on_items(&mut self, now: Time, peer: NodeId, session: u64, page: Page, out: &mut Outbox<LedgerEffect>) {
        let timeout = now + self.cfg.sync_timeout;
        let count = page.0.len() + page.1.len();
        if let Some(opened) = self.sync.mine(&peer, session) {
            if opened.asked.is_empty() {
                return;
            }
            opened.deadline = timeout;
        } else if let Some(serving) = self.sync.theirs(&peer, session) {
            serving.deadline = timeout;
            serving.taken += count.max(1);
            if serving.taken > MAX_PUSHED + MAX_SYNC_ENTRIES {
                self.sync.serving.remove(&peer);
                return out.push(LedgerEffect::Penalise { peer, reason: Misconduct::Endless });
            }
            if count == 0 {
                // It has more for this node than it hands over unasked.
                return self.sync.set_due(peer, Some(now));
            }
        } else {
            return;
        }
        if self.inbox.len() + count < MAX_INBOX {
            // Proofs first: they save the verification of what the convicted wrote.
            self.inbox.extend(page.1.into_iter().map(|proof| (peer, Inbound::Proof(proof))));
            self.inbox.extend(page.0.into_iter().map(|entry| (peer, Inbound::Entry(entry))));
        }
        self.inbox.push_back((peer, Inbound::End { session }));
    }

    /// An entry from a neighbour has been judged.
    pub(crate) fn on_sync_entry(
        &mut self,
        cx: &Ctx<'_>,
        peer: NodeId,
        hash: Option<Hash>,
        result: Result<(), Refusal>,
        out: &mut Outbox<LedgerEffect>,
    ) {
        match result {
            Ok(()) => self.count_received(peer),
            Err(refusal) if refusal.is_senders_fault() => self.on_misconduct(peer, Misconduct::Entry(refusal), out),
            Err(Refusal::Full) => {}
            Err(_) => {
                if let Some(hash) = hash.filter(|hash| self.state.slot(hash).is_none()) {
                    self.sync.refuse(cx.now, hash);
                }
            }
        }
    }

    /// A proof from a neighbour has been judged.
    pub(crate) fn on_sync_proof(
        &mut self,
        peer: NodeId,
        result: Result<Option<NodeId>, Refusal>,
        out: &mut Outbox<LedgerEffect>,
    ) {
        match result {
            Ok(Some(author)) => {
                self.count_received(peer);
                self.publish_proof(&author, out);
            }
            Ok(None) => {}
            Err(Refusal::NoProof(error)) => self.on_misconduct(peer, Misconduct::Proof(error), out),
            Err(refusal) => self.on_misconduct(peer, Misconduct::Entry(refusal), out),
        }
    }

    fn count_received(&mut self, peer: NodeId) {
        if let Some(opened) = self.sync.opened.get_mut(&peer) {
            opened.received += 1;
        }
    }

    fn on_misconduct(&mut self, peer: NodeId, reason: Misconduct, out: &mut Outbox<LedgerEffect>) {
        self.inbox.retain(|(from, _)| *from != peer);
        self.sync.serving.remove(&peer);
        out.push(LedgerEffect::Penalise { peer, reason });
        self.break_off(peer, out);
    }

    /// A page is through: ask again for what did not fit into it, or go on.
    pub(crate) fn on_page_end(&mut self, cx: &mut Ctx<'_>, peer: NodeId, session: u64, out: &mut Outbox<LedgerEffect>) {
        let timeout = cx.now + self.cfg.sync_timeout;
        let (state, refused) = (&self.state, &self.sync.refused);
        let Some(opened) = self.sync.opened.get_mut(&peer).filter(|opened| opened.session == session) else { return };
        let before = opened.asked.len();
        let rest: VecDeque<Hash> = std::mem::take(&mut opened.asked)
            .into_iter()
            .filter(|hash| state.slot(hash).is_none() && !refused.contains(hash))
            .collect();
        if rest.len() < before {
            opened.need.extend(rest);
        }
        opened.deadline = timeout;
        self.pump(cx, peer, out);
    }
}
