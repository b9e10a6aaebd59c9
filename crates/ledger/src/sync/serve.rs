//! The responder's side of a reconciliation: it answers what it is asked, and keeps nothing of the set between two messages.

use chorus_machine::{Outbox, Time};
use chorus_protocol::entry::{Entry, Equivocation};
use chorus_protocol::limits::{ENVELOPE_OVERHEAD_BYTES, MAX_SYNC_BATCH_BYTES, MAX_SYNC_ENTRIES};
use chorus_protocol::sync::SyncMessage;
use chorus_protocol::{Hash, List, NodeId, Received};

use super::{MAX_ROUNDS, MIN_OPEN_INTERVAL, Serving};
use crate::io::LedgerEffect;
use crate::ledger::Ledger;
use crate::refusal::Misconduct;
use crate::state::Slot;

/// Reconciliations that this node answers at a time.
const MAX_SERVING: usize = 64;
/// Requests of one reconciliation that are answered.
const MAX_WANTS: u32 = 256;
/// Proofs in one message.
const MAX_PAGE_PROOFS: usize = 16;

impl Ledger {
    pub(super) fn serve_open(
        &mut self,
        now: Time,
        peer: NodeId,
        (session, digest): (u64, Hash),
        frame: &[u8],
        out: &mut Outbox<LedgerEffect>,
    ) {
        // Its reconciliation serves both: the one that this node planned is not needed.
        self.sync.set_due(peer, None);
        if digest == self.digest() {
            return out.push(LedgerEffect::Send { to: peer, message: SyncMessage::Same { session } });
        }
        self.sync.serving.retain(|_, session| session.deadline > now);
        let known = self.sync.serving.get(&peer);
        let hasty =
            known.is_some_and(|last| now.since(last.since) < MIN_OPEN_INTERVAL && last.rounds + last.wants == 0);
        if hasty || (known.is_none() && self.sync.serving.len() >= MAX_SERVING) {
            return out.push(LedgerEffect::Send { to: peer, message: SyncMessage::Abort { session } });
        }
        let deadline = now + self.cfg.sync_timeout;
        let serving = Serving { session, since: now, deadline, rounds: 0, wants: 0, taken: 0 };
        self.sync.serving.insert(peer, serving);
        self.respond(peer, session, frame, out);
    }

    pub(super) fn serve_reply(
        &mut self,
        timeout: Time,
        peer: NodeId,
        session: u64,
        frame: &[u8],
        out: &mut Outbox<LedgerEffect>,
    ) {
        let Some(serving) = self.sync.theirs(&peer, session) else {
            return out.push(LedgerEffect::Send { to: peer, message: SyncMessage::Abort { session } });
        };
        serving.deadline = timeout;
        serving.rounds += 1;
        if serving.rounds > MAX_ROUNDS {
            self.sync.serving.remove(&peer);
            return out.push(LedgerEffect::Penalise { peer, reason: Misconduct::Endless });
        }
        self.respond(peer, session, frame, out);
    }

    fn respond(&mut self, peer: NodeId, session: u64, frame: &[u8], out: &mut Outbox<LedgerEffect>) {
        match self.state.items().respond(frame).map(List::new) {
            Ok(Ok(frame)) => out.push(LedgerEffect::Send { to: peer, message: SyncMessage::Reply { session, frame } }),
            Ok(Err(_)) => out.push(LedgerEffect::Send { to: peer, message: SyncMessage::Abort { session } }),
            Err(error) => {
                self.sync.serving.remove(&peer);
                out.push(LedgerEffect::Penalise { peer, reason: Misconduct::Frame(error.to_string()) });
            }
        }
    }

    pub(super) fn serve_want(
        &mut self,
        timeout: Time,
        peer: NodeId,
        session: u64,
        ids: &[Hash],
        out: &mut Outbox<LedgerEffect>,
    ) {
        let Some(serving) = self.sync.theirs(&peer, session) else {
            return out.push(LedgerEffect::Send { to: peer, message: SyncMessage::Abort { session } });
        };
        serving.deadline = timeout;
        serving.wants += 1;
        if serving.wants > MAX_WANTS {
            self.sync.serving.remove(&peer);
            return out.push(LedgerEffect::Penalise { peer, reason: Misconduct::Endless });
        }
        // One page for one request; an empty one says "none of these". What did not fit is asked for again.
        let page = self.pages(ids).into_iter().next().unwrap_or_default();
        out.push(LedgerEffect::Send { to: peer, message: items(session, page) });
    }

    /// Packs what is known of `hashes` into pages, chain by chain.
    pub(super) fn pages(&self, hashes: &[Hash]) -> Vec<Page> {
        let (mut keys, mut convicted) = (Vec::new(), Vec::new());
        for hash in hashes {
            match self.state.slot(hash) {
                Some(Slot::Entry(author, seq)) => keys.push((author, seq)),
                Some(Slot::Conviction(author)) => convicted.push(author),
                None => {}
            }
        }
        keys.sort_unstable();
        let (mut pages, mut page, mut room) = (Vec::new(), Page::default(), MAX_SYNC_BATCH_BYTES);
        let mut turn = |page: &mut Page, room: &mut usize, bytes: usize, crowded: bool| {
            if crowded || bytes > *room {
                pages.push(std::mem::take(page));
                *room = MAX_SYNC_BATCH_BYTES;
            }
            *room = room.saturating_sub(bytes);
        };
        for proof in convicted.iter().filter_map(|author| self.state.proof(author)) {
            let bytes = proof.first.len() + proof.second.len() + 2 * ENVELOPE_OVERHEAD_BYTES;
            let crowded = page.1.len() >= MAX_PAGE_PROOFS;
            turn(&mut page, &mut room, bytes, crowded);
            page.1.push(proof.clone());
        }
        for entry in keys.iter().filter_map(|(author, seq)| self.state.entry(author, *seq)) {
            let crowded = page.0.len() >= MAX_SYNC_ENTRIES;
            turn(&mut page, &mut room, entry.encoded_len() + ENVELOPE_OVERHEAD_BYTES, crowded);
            page.0.push(entry.to_wire());
        }
        if !page.0.is_empty() || !page.1.is_empty() {
            pages.push(page);
        }
        pages
    }
}

/// Entries and proofs of one message.
pub(super) type Page = (Vec<Received<Entry>>, Vec<Equivocation>);

pub(super) fn items(session: u64, page: Page) -> SyncMessage {
    SyncMessage::Items { session, entries: List::truncated(page.0), proofs: List::truncated(page.1) }
}
