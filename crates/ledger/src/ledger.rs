//! The ledger as a machine: what is done on each input, and in which order it goes out.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use chorus_machine::{Ctx, Machine, Outbox, Time, earliest};
use chorus_protocol::capability::Capability;
use chorus_protocol::entry::{Body, Entry, Equivocation};
use chorus_protocol::limits::MAX_ENTRY_LIFE_MS;
use chorus_protocol::message::LedgerGossip;
use chorus_protocol::policy::PolicyId;
use chorus_protocol::{Admitted, Hash, NetworkId, NodeId, Received, SecretKey, Verified, WallTime};

use crate::author::{Mark, Topic, topic};
use crate::config::LedgerConfig;
use crate::delta::Delta;
use crate::io::{LedgerEffect, LedgerEvent, LedgerInput, PersistBatch, Stats};
use crate::own::{Own, Pending};
use crate::refusal::{Acceptance, AppendError, Refusal};
use crate::rules::{check_body, check_dates};
use crate::state::{Slot, State};
use crate::sync::Sync;

/// Own entries that may wait for the disk at a time.
const MAX_PENDING_APPENDS: usize = 256;
/// Entries of a reconciliation that are verified in one call, so that no call takes longer than a few milliseconds.
const VERIFY_SLICE: usize = 16;
/// How far ahead a wake-up for an expiry is planned at most: the wall clock may be set in the meantime.
const MAX_EXPIRY_WAIT: Duration = Duration::from_secs(60);

/// What a neighbour handed over and nobody looked at yet.
#[derive(Debug)]
pub(crate) enum Inbound {
    Entry(Received<Entry>),
    Proof(Equivocation),
    /// The page is through.
    End {
        session: u64,
    },
}

/// The replicated ledger of one node.
#[derive(Debug)]
pub struct Ledger {
    pub(crate) cfg: LedgerConfig,
    pub(crate) network: NetworkId,
    key: SecretKey,
    me: NodeId,
    pub(crate) state: State,
    own: Own,
    pub(crate) sync: Sync,
    pub(crate) inbox: VecDeque<(NodeId, Inbound)>,
    pub(crate) delta: Delta,
    pub(crate) stats: Stats,
    next_batch: u64,
    expiry_at: Option<Time>,
}

impl Ledger {
    /// Makes an empty ledger that signs with `key`.
    #[must_use]
    pub fn new(cfg: LedgerConfig, network: NetworkId, key: SecretKey) -> Self {
        Self {
            me: key.node_id(),
            state: State::new(cfg.clone(), network.clone()),
            own: Own::default(),
            sync: Sync::default(),
            inbox: VecDeque::new(),
            delta: Delta::default(),
            stats: Stats::default(),
            next_batch: 1,
            expiry_at: None,
            cfg,
            network,
            key,
        }
    }

    /// Takes back what the disk held, before anything else is handled. No event is emitted: look at [`Ledger::entries`]. What
    /// expired while the node was down is deleted with the next batch.
    pub fn restore(
        &mut self,
        wall: WallTime,
        entries: Vec<Verified<Entry>>,
        proofs: Vec<Equivocation>,
        marks: Vec<(NodeId, Vec<u8>)>,
    ) {
        for (id, bytes) in marks {
            let Some(mark) = Mark::decode(&bytes) else { continue };
            if id == self.me {
                self.own.restore(mark.head_seq, mark.head);
            }
            self.state.restore_mark(id, &mark);
        }
        let mut delta = Delta::default();
        for proof in proofs {
            // Both halves were verified before they were written.
            let first = proof.first.clone().trust_own_disk(&self.network);
            let second = proof.second.clone().trust_own_disk(&self.network);
            if let (Ok(first), Ok(second)) = (first, second)
                && let Ok(proof) = Equivocation::new(&first, &second)
            {
                self.state.convict(first.author(), proof, &mut delta);
            }
        }
        delta.proofs.retain(|_, change| change.is_none());
        for entry in entries {
            if entry.author() == self.me {
                self.own.restore(entry.seq, entry.hash());
            }
            let key = (entry.author(), entry.seq);
            let merged = self.state.merge(Admitted::new(entry), &mut delta);
            if !matches!(merged, Ok(()) | Err(Refusal::Known | Refusal::Superseded)) {
                delta.delete(key);
            }
        }
        self.state.expire(wall, &mut delta);
        // All of it is on disk; what is left to write is what has to go.
        delta.entries.retain(|_, change| change.is_none());
        delta.events.clear();
        self.delta = delta;
    }

    /// Returns the digest of the set: equal digests, equal sets.
    #[must_use]
    pub fn digest(&self) -> Hash {
        self.state.items().digest()
    }

    /// Returns the number of entries in the set.
    #[must_use]
    pub fn len(&self) -> usize {
        self.state.len()
    }

    /// Returns whether the set has no entry.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns all entries, by author and then by number.
    pub fn entries(&self) -> impl Iterator<Item = &Verified<Entry>> {
        self.state.entries()
    }

    /// Returns what a node offers.
    #[must_use]
    pub fn capability(&self, node: &NodeId) -> Option<&Arc<Capability>> {
        self.state.author(node).and_then(|author| author.capability.as_ref())
    }

    /// Returns what every node offers, by node.
    pub fn capabilities(&self) -> impl Iterator<Item = (NodeId, &Arc<Capability>)> {
        self.state.authors().iter().filter_map(|(id, author)| author.capability.as_ref().map(|found| (*id, found)))
    }

    /// Returns the entry by which an owner says what became of a policy last.
    #[must_use]
    pub fn policy(&self, policy: &PolicyId) -> Option<&Verified<Entry>> {
        let author = self.state.author(&policy.owner)?;
        author.standing(&Topic::Policy(policy.name.clone())).map(|entry| &**entry)
    }

    /// Returns the entries by which owners say what became of their policies last, by owner and then by name.
    pub fn policies(&self) -> impl Iterator<Item = &Verified<Entry>> {
        self.state.authors().values().flat_map(|author| author.standing_policies()).map(|entry| &**entry)
    }

    /// Returns number and hash of a node's latest entry in the set.
    #[must_use]
    pub fn head(&self, node: &NodeId) -> Option<(u64, Hash)> {
        self.state.author(node).and_then(|author| author.head())
    }

    /// Returns whether a node is a proven fraud.
    #[must_use]
    pub fn is_quarantined(&self, node: &NodeId) -> bool {
        self.state.proof(node).is_some()
    }

    /// Returns every proven fraud, by node.
    pub fn quarantined(&self) -> impl Iterator<Item = NodeId> {
        self.state.convictions().keys().copied()
    }

    /// Returns the pair of entries that convicts a node.
    #[must_use]
    pub fn proof(&self, node: &NodeId) -> Option<&Equivocation> {
        self.state.proof(node)
    }

    /// Returns an entry of the set.
    #[must_use]
    pub fn get(&self, hash: &Hash) -> Option<&Verified<Entry>> {
        match self.state.slot(hash)? {
            Slot::Entry(author, seq) => self.state.entry(&author, seq),
            Slot::Conviction(_) => None,
        }
    }

    /// Returns figures for metrics.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let (policies, accusations) = self.state.policy_and_accusation_count();
        Stats {
            entries: self.len(),
            bytes: self.state.bytes(),
            authors: self.state.authors().len(),
            capabilities: self.state.capability_count(),
            policies,
            accusations,
            quarantined: self.state.convictions().len(),
            superseded_bytes: self.state.past_bytes(),
            pending_appends: self.own.pending.len(),
            inbox: self.inbox.len(),
            ..self.stats
        }
    }

    pub(crate) fn id(&self) -> NodeId {
        self.me
    }

    /// Climbs the ladder with one received entry: signature, dates, what it says, what it contradicts.
    pub(crate) fn admit(
        &mut self,
        wall: WallTime,
        received: Received<Entry>,
        out: &mut Outbox<LedgerEffect>,
    ) -> (Option<Hash>, Result<(), Refusal>) {
        let author = received.claimed_author();
        let quarantined = if self.is_quarantined(&author) { Err(Refusal::Quarantined(author)) } else { Ok(()) };
        let verified = match quarantined.and_then(|()| received.verify(&self.network).map_err(Refusal::Invalid)) {
            Ok(verified) => verified,
            Err(refusal) => return (None, Err(self.count(refusal))),
        };
        let hash = verified.hash();
        let ruled = check_dates(&verified, wall).and_then(|()| {
            let known = self.state.author(&author).is_some_and(|author| author.knows(&verified));
            if known { Err(Refusal::Known) } else { check_body(&verified, &self.network) }
        });
        let merged = ruled.and_then(|()| self.state.merge(Admitted::new(verified.clone()), &mut self.delta));
        if author == self.me {
            self.report_foreign(verified, &merged);
        }
        if let Err(Refusal::Equivocates(fraud)) = &merged {
            self.publish_proof(fraud, out);
        }
        match merged {
            Ok(()) => {
                self.stats.admitted += 1;
                (Some(hash), Ok(()))
            }
            Err(refusal) => (Some(hash), Err(self.count(refusal))),
        }
    }

    fn count(&mut self, refusal: Refusal) -> Refusal {
        if matches!(refusal, Refusal::ContradictsTrace(_)) {
            self.stats.unproven += 1;
        }
        if matches!(refusal, Refusal::FutureDated { .. }) {
            self.stats.future_dated += 1;
        }
        *(if refusal.is_senders_fault() { &mut self.stats.refused } else { &mut self.stats.passed_over }) += 1;
        refusal
    }

    /// An own entry that came from the network and was not known here was written by somebody else.
    fn report_foreign(&mut self, entry: Verified<Entry>, merged: &Result<(), Refusal>) {
        let contradicts = matches!(merged, Err(Refusal::Equivocates(_) | Refusal::ContradictsTrace(_)));
        if !(contradicts || matches!(merged, Ok(()) | Err(Refusal::Superseded))) {
            return;
        }
        let Some(while_running) = self.own.judge_foreign(&entry, contradicts) else { return };
        // A superseded entry from an earlier run may be one's own, compacted away long ago.
        if while_running || merged.is_ok() {
            self.delta.events.push(LedgerEvent::DuplicateKey { entry, while_running });
        }
    }

    pub(crate) fn publish_proof(&self, author: &NodeId, out: &mut Outbox<LedgerEffect>) {
        if let Some(proof) = self.state.proof(author) {
            out.push(LedgerEffect::Publish(LedgerGossip::Equivocation(proof.clone())));
        }
    }

    fn on_gossip(&mut self, wall: WallTime, frame: LedgerGossip, out: &mut Outbox<LedgerEffect>) {
        let judged = match frame {
            LedgerGossip::Entry(received) => match self.admit(wall, received, out).1 {
                Ok(()) => Acceptance::Accept,
                Err(refusal) => refusal.into(),
            },
            LedgerGossip::Equivocation(proof) => match self.admit_proof(proof) {
                Ok(Some(_)) => Acceptance::Accept,
                Ok(None) => Acceptance::Ignore,
                Err(refusal) => refusal.into(),
            },
        };
        out.push(LedgerEffect::Judged(judged));
    }

    /// Takes a proof. Returns the author if the conviction is new.
    pub(crate) fn admit_proof(&mut self, proof: Equivocation) -> Result<Option<NodeId>, Refusal> {
        let claimed = proof.first.claimed_author();
        if self.is_quarantined(&claimed) && proof.second.claimed_author() == claimed {
            return Ok(None);
        }
        let author = proof.verify(&self.network).map_err(|error| self.count(Refusal::NoProof(error)))?;
        Ok(self.state.convict(author, proof, &mut self.delta).then_some(author))
    }

    fn on_append(&mut self, wall: WallTime, request: u64, body: Body, out: &mut Outbox<LedgerEffect>) {
        match self.prepare(wall, body) {
            Ok(entry) => {
                let batch = self.take_batch();
                self.own.written(entry.seq, entry.hash());
                let mark = self.mark(&self.me.clone()).0;
                out.push(LedgerEffect::Persist(PersistBatch {
                    batch,
                    puts: vec![entry.clone()],
                    marks: vec![(self.me, mark)],
                    durable: true,
                    ..PersistBatch::default()
                }));
                self.own.pending.insert(batch, Pending { request, entry });
            }
            Err(error) => out.push(LedgerEffect::AppendFailed { request, error }),
        }
    }

    /// Signs the next entry of the own chain, if every other node would take it.
    fn prepare(&self, wall: WallTime, body: Body) -> Result<Verified<Entry>, AppendError> {
        let waiting = self.own.pending.len();
        if waiting >= MAX_PENDING_APPENDS {
            return Err(AppendError::Overloaded { waiting });
        }
        if self.is_quarantined(&self.me) {
            return Err(Refusal::Quarantined(self.me).into());
        }
        let (seq, prev) = self.own.next(wall).ok_or(Refusal::SeqZero)?;
        let expires = self.expiry_of(&body, wall);
        let entry = Verified::sign(&self.key, &self.network, Entry { seq, prev, wall_time: wall, expires, body })?;
        check_dates(&entry, wall)?;
        check_body(&entry, &self.network)?;
        Ok(entry)
    }

    /// A capability, retirement or policy outlives what it supersedes, also what still waits for the disk, so that nobody can bring the
    /// old one back.
    fn expiry_of(&self, body: &Body, wall: WallTime) -> WallTime {
        let Some(on) = topic(body) else { return wall.plus(self.cfg.receipt_life) };
        let floor = self.state.author(&self.me).and_then(|author| author.floor_until(&on));
        let replaces = |pending: &&Pending| topic(&pending.entry.body).as_ref() == Some(&on);
        let waiting = self.own.pending.values().filter(replaces);
        let superseded = waiting.map(|pending| pending.entry.expires).chain(floor).max().unwrap_or_default();
        let longest = wall.plus(Duration::from_millis(MAX_ENTRY_LIFE_MS));
        wall.plus(self.cfg.capability_life).max(superseded).min(longest)
    }

    fn on_persisted(&mut self, batch: u64, out: &mut Outbox<LedgerEffect>) {
        let Some(Pending { request, entry }) = self.own.pending.remove(&batch) else { return };
        let key = (entry.author(), entry.seq);
        match self.state.merge(Admitted::new(entry.clone()), &mut self.delta) {
            // A capability may be superseded by the next one before it is on disk: it is in the chain all the same.
            Ok(()) | Err(Refusal::Superseded) => {
                // It is on disk already.
                if matches!(self.delta.entries.get(&key), Some(Some(_))) {
                    self.delta.entries.remove(&key);
                }
                out.push(LedgerEffect::Appended { request, hash: entry.hash(), seq: entry.seq });
                out.push(LedgerEffect::Publish(LedgerGossip::Entry(entry.to_wire())));
            }
            Err(refusal) => {
                if let Refusal::Equivocates(author) = &refusal {
                    self.publish_proof(author, out);
                }
                self.delta.delete(key);
                out.push(LedgerEffect::AppendFailed { request, error: refusal.into() });
            }
        }
    }

    fn on_persist_failed(&mut self, batch: u64, reason: String, out: &mut Outbox<LedgerEffect>) {
        self.stats.persist_failures += 1;
        // What came from the network stays in the state: it can be had from there again. An own entry does not: its number is
        // lost, which the chain allows.
        if let Some(pending) = self.own.pending.remove(&batch) {
            out.push(LedgerEffect::AppendFailed { request: pending.request, error: AppendError::Disk { reason } });
        }
    }

    /// Verifies a slice of what neighbours handed over.
    fn work_inbox(&mut self, cx: &mut Ctx<'_>, out: &mut Outbox<LedgerEffect>) {
        let mut verified = 0;
        while verified < VERIFY_SLICE {
            let Some((peer, inbound)) = self.inbox.pop_front() else { break };
            match inbound {
                Inbound::Entry(received) => {
                    verified += 1;
                    let (hash, result) = self.admit(cx.wall, received, out);
                    self.on_sync_entry(cx, peer, hash, result, out);
                }
                Inbound::Proof(proof) => {
                    verified += 2;
                    let result = self.admit_proof(proof);
                    self.on_sync_proof(peer, result, out);
                }
                Inbound::End { session } => self.on_page_end(cx, peer, session, out),
            }
        }
    }

    fn take_batch(&mut self) -> u64 {
        let batch = self.next_batch;
        self.next_batch += 1;
        batch
    }

    /// Returns what the disk should remember of an author, and whether that must be written.
    fn mark(&mut self, id: &NodeId) -> (Option<Vec<u8>>, bool) {
        let (mut mark, held) = self.state.take_mark(id);
        if *id == self.me {
            let (head_seq, head) = self.own.head();
            mark = Some(Mark { head_seq, head, ..mark.unwrap_or_default() });
        }
        let changed = mark.is_some() || held;
        (mark.map(|mark| mark.encode()), changed)
    }

    /// Hands out what was gathered: first to the disk, then to whoever listens.
    fn finish(&mut self, cx: &Ctx<'_>, out: &mut Outbox<LedgerEffect>) {
        if self.delta.has_writes() {
            self.flush(out);
        }
        for event in self.delta.events.drain(..) {
            out.push(LedgerEffect::Event(event));
        }
        self.expiry_at = self.state.next_expiry().map(|at| cx.now + at.since(cx.wall).min(MAX_EXPIRY_WAIT));
    }

    fn flush(&mut self, out: &mut Outbox<LedgerEffect>) {
        let (mut puts, mut deletes) = (Vec::new(), Vec::new());
        for (key, change) in std::mem::take(&mut self.delta.entries) {
            match change {
                Some(entry) => puts.push(entry),
                None => deletes.push(key),
            }
        }
        let mut marks = Vec::new();
        for id in std::mem::take(&mut self.delta.marks) {
            let (mark, changed) = self.mark(&id);
            if changed {
                marks.push((id, mark));
            }
        }
        let (mut proofs, mut pardons) = (Vec::new(), Vec::new());
        for (id, change) in std::mem::take(&mut self.delta.proofs) {
            match change {
                Some(proof) => proofs.push((id, proof)),
                None => pardons.push(id),
            }
        }
        if puts.is_empty() && deletes.is_empty() && marks.is_empty() && proofs.is_empty() && pardons.is_empty() {
            return;
        }
        let durable = !proofs.is_empty();
        let batch = self.take_batch();
        out.push(LedgerEffect::Persist(PersistBatch { batch, puts, deletes, marks, proofs, pardons, durable }));
    }
}

impl Machine for Ledger {
    type Input = LedgerInput;
    type Effect = LedgerEffect;

    fn handle(&mut self, cx: &mut Ctx<'_>, input: LedgerInput, out: &mut Outbox<LedgerEffect>) {
        self.own.start(cx.wall);
        self.state.expire(cx.wall, &mut self.delta);
        match input {
            LedgerInput::Gossip { frame, .. } => self.on_gossip(cx.wall, frame, out),
            LedgerInput::Sync { from, message } => {
                self.on_sync(cx, from, message, out);
                self.work_inbox(cx, out);
            }
            LedgerInput::PeerUp(peer) => self.on_peer_up(cx, peer, out),
            LedgerInput::PeerDown(peer) => self.on_peer_down(peer),
            LedgerInput::Append { request, body } => self.on_append(cx.wall, request, body, out),
            LedgerInput::Persisted { batch } => self.on_persisted(batch, out),
            LedgerInput::PersistFailed { batch, reason } => self.on_persist_failed(batch, reason, out),
        }
        self.finish(cx, out);
    }

    fn deadline(&self) -> Option<Time> {
        let waiting = (!self.inbox.is_empty()).then_some(Time::ZERO);
        earliest(waiting, earliest(self.expiry_at, self.sync.deadline()))
    }

    fn expire(&mut self, cx: &mut Ctx<'_>, out: &mut Outbox<LedgerEffect>) {
        self.state.expire(cx.wall, &mut self.delta);
        self.work_inbox(cx, out);
        self.on_sync_time(cx, out);
        self.finish(cx, out);
    }
}
