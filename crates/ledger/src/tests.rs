//! Ledgers on an imagined network and disk: every message is really encoded and decoded, time is a number.
#![allow(clippy::unwrap_used, clippy::panic)]

mod gossip;
mod merge;
mod own;
mod reconcile;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Mutex;
use std::time::Duration;

use chorus_machine::{Ctx, Machine, Outbox, Rng, Time};
use chorus_protocol::beacon::{Receipt, Verdict, Work};
use chorus_protocol::capability::Capability;
use chorus_protocol::entry::{Body, Entry, Equivocation};
use chorus_protocol::job::JobKind;
use chorus_protocol::message::{Direct, Frame, LedgerGossip};
use chorus_protocol::misbehaviour::{Charge, Misbehaviour};
use chorus_protocol::policy::{PolicyId, PolicyNotice, Version};
use chorus_protocol::sync::SyncMessage;
use chorus_protocol::{Hash, JobId, List, NetworkId, NodeId, SecretKey, Text, Verified, WallTime};

use crate::{
    Acceptance, EntryKey, Ledger, LedgerConfig, LedgerEffect, LedgerEvent, LedgerInput, Misconduct, PersistBatch,
};

/// When every test begins, in milliseconds since 1970.
const START: u64 = 1_800_000_000_000;
const HOUR: u64 = 3_600_000;

fn network() -> NetworkId {
    "test".parse().unwrap()
}

fn key(n: u8) -> SecretKey {
    SecretKey::from_bytes(&[n; 32])
}

fn id(n: u8) -> NodeId {
    key(n).node_id()
}

fn wall(millis: u64) -> WallTime {
    WallTime::from_millis(millis)
}

fn capability(name: &str, padding: usize) -> Body {
    let tools = (0..padding.div_ceil(1_000)).map(|n| chorus_protocol::capability::Tool {
        name: Text::truncated(&format!("tool-{n}")),
        description: Text::default(),
        schema: Text::truncated(&"x".repeat(1_000)),
    });
    Body::Capability(std::sync::Arc::new(Capability {
        name: Text::truncated(name),
        software: Text::truncated("chorus/test"),
        models: List::default(),
        devices: List::default(),
        slots: 1,
        skills: List::default(),
        tools: List::truncated(tools),
        sampling: None,
    }))
}

fn work(requester: NodeId, n: u64) -> Work {
    let mut job = [0; 16];
    job[..8].copy_from_slice(&n.to_le_bytes());
    Work {
        job: JobId::from_bytes(job),
        requester,
        fence: 1,
        kind: JobKind::Answer,
        requirement: Hash::derive("t", &[b"requirement"]),
        output: Hash::derive("t", &[&n.to_le_bytes()]),
        model: Hash::derive("t", &[b"model"]),
        prompt_tokens: 100,
        completion_tokens: 60,
        elapsed_ms: 900,
        failure: None,
    }
}

/// A receipt of job `n` that `requester` asked for and `executor` did.
fn receipt(requester: u8, executor: u8, n: u64) -> Body {
    let work = Verified::sign(&key(executor), &network(), work(id(requester), n)).unwrap().to_wire();
    Body::Receipt(Box::new(Receipt { work, verdict: Verdict::Accepted, observed_ms: 1_000 }))
}

/// A notice of a policy at a step.
fn policy(name: &str, step: u64) -> Body {
    Body::Policy(Box::new(PolicyNotice {
        name: Text::truncated(name),
        version: Version::from_hash(Hash::derive("t", &[&step.to_le_bytes()])),
        step,
        environments: List::truncated([Text::truncated("arithmetic-2")]),
        running: true,
    }))
}

fn policy_id(owner: u8, name: &str) -> PolicyId {
    PolicyId { owner: id(owner), name: Text::truncated(name) }
}

/// Accusation `n` of a node, by `author`.
fn accusation(author: u8, accused: u8, n: u64) -> Body {
    Body::Misbehaviour(Box::new(Misbehaviour {
        accused: id(accused),
        policy: policy_id(author, "adder"),
        version: Version::default(),
        charge: Charge::WrongReward,
        evidence: Hash::derive("t", &[&n.to_le_bytes()]),
        evidence_bytes: 1_000,
    }))
}

fn entry(author: u8, seq: u64, prev: Hash, expires: u64, body: Body) -> Verified<Entry> {
    let entry = Entry { seq, prev, wall_time: wall(START), expires: wall(expires), body };
    Verified::sign(&key(author), &network(), entry).unwrap()
}

/// `count` receipts in one chain, a millisecond apart. Signed once for all tests: without optimisation that is slow.
fn chain(author: u8, count: u64) -> Vec<Verified<Entry>> {
    static CHAINS: Mutex<BTreeMap<u8, Vec<Verified<Entry>>>> = Mutex::new(BTreeMap::new());
    let mut chains = CHAINS.lock().unwrap();
    let chain = chains.entry(author).or_default();
    while (chain.len() as u64) < count {
        let (seq, prev) = (chain.len() as u64 + 1, chain.last().map_or(Hash::ZERO, Verified::hash));
        let body = receipt(author, author.wrapping_add(1), seq);
        let entry = Entry { seq, prev, wall_time: wall(START - HOUR + seq), expires: wall(START + 24 * HOUR), body };
        chain.push(Verified::sign(&key(author), &network(), entry).unwrap());
    }
    chain[..usize::try_from(count).unwrap()].to_vec()
}

/// What a node would find after a crash.
#[derive(Clone, Debug, Default)]
struct Disk {
    entries: BTreeMap<EntryKey, Verified<Entry>>,
    proofs: BTreeMap<NodeId, Equivocation>,
    marks: BTreeMap<NodeId, Vec<u8>>,
}

impl Disk {
    fn write(&mut self, batch: &PersistBatch) {
        for entry in &batch.puts {
            self.entries.insert((entry.author(), entry.seq), entry.clone());
        }
        for key in &batch.deletes {
            self.entries.remove(key);
        }
        for (id, mark) in &batch.marks {
            match mark {
                Some(mark) => self.marks.insert(*id, mark.clone()),
                None => self.marks.remove(id),
            };
        }
        self.proofs.extend(batch.proofs.iter().cloned());
        for id in &batch.pardons {
            self.proofs.remove(id);
        }
    }

    fn restore(&self, cfg: LedgerConfig, key: SecretKey, at: u64) -> Ledger {
        let mut ledger = Ledger::new(cfg, network(), key);
        ledger.restore(
            wall(at),
            self.entries.values().cloned().collect(),
            self.proofs.values().cloned().collect(),
            self.marks.iter().map(|(id, mark)| (*id, mark.clone())).collect(),
        );
        ledger
    }
}

/// One node of the imagined network.
struct Node {
    ledger: Ledger,
    rng: Rng,
    disk: Disk,
    /// Whether the disk takes its time: batches wait here until [`Net::settle`].
    slow_disk: bool,
    writing: VecDeque<PersistBatch>,
    published: Vec<LedgerGossip>,
    judged: Vec<Acceptance>,
    penalties: Vec<(NodeId, Misconduct)>,
    events: Vec<LedgerEvent>,
    appended: Vec<(u64, u64)>,
    failed: Vec<(u64, crate::AppendError)>,
    /// Every own entry that was ever handed to the disk.
    signed: Vec<Verified<Entry>>,
}

/// The network: messages between linked nodes arrive in order, at once.
struct Net {
    nodes: Vec<Node>,
    keys: Vec<u8>,
    now: Time,
    wall: u64,
    links: std::collections::BTreeSet<(usize, usize)>,
    queue: VecDeque<(usize, usize, Direct)>,
    /// Whether what is published reaches linked nodes.
    gossip: bool,
    messages: usize,
    bytes: usize,
    /// Bytes of entries and proofs in messages, envelopes included.
    payload: usize,
}

impl Net {
    fn new(keys: &[u8]) -> Self {
        Self::with(keys, LedgerConfig::default())
    }

    fn with(keys: &[u8], cfg: LedgerConfig) -> Self {
        let nodes = keys.iter().enumerate().map(|(n, &k)| Node {
            ledger: Ledger::new(cfg.clone(), network(), key(k)),
            rng: Rng::from_u64(n as u64),
            disk: Disk::default(),
            slow_disk: false,
            writing: VecDeque::new(),
            published: Vec::new(),
            judged: Vec::new(),
            penalties: Vec::new(),
            events: Vec::new(),
            appended: Vec::new(),
            failed: Vec::new(),
            signed: Vec::new(),
        });
        Self {
            nodes: nodes.collect(),
            keys: keys.to_vec(),
            now: Time::from_millis(1),
            wall: START,
            links: std::collections::BTreeSet::new(),
            queue: VecDeque::new(),
            gossip: true,
            messages: 0,
            bytes: 0,
            payload: 0,
        }
    }

    fn index(&self, id: &NodeId) -> Option<usize> {
        self.keys.iter().position(|k| key(*k).node_id() == *id)
    }

    fn ledger(&self, n: usize) -> &Ledger {
        &self.nodes[n].ledger
    }

    fn input(&mut self, n: usize, input: LedgerInput) {
        self.call(n, |ledger, cx, out| ledger.handle(cx, input, out));
    }

    fn call(&mut self, n: usize, work: impl FnOnce(&mut Ledger, &mut Ctx<'_>, &mut Outbox<LedgerEffect>)) {
        let mut out = Outbox::new();
        let node = &mut self.nodes[n];
        let mut cx = Ctx { now: self.now, wall: wall(self.wall), rng: &mut node.rng };
        work(&mut node.ledger, &mut cx, &mut out);
        for effect in out.drain().collect::<Vec<_>>() {
            self.effect(n, effect);
        }
    }

    fn effect(&mut self, n: usize, effect: LedgerEffect) {
        let me = self.nodes[n].ledger.id();
        match effect {
            LedgerEffect::Publish(frame) => {
                let bytes = frame.to_bytes().unwrap();
                self.nodes[n].published.push(frame);
                for to in 0..self.nodes.len() {
                    if self.gossip && self.links.contains(&(n, to)) {
                        let frame = LedgerGossip::from_bytes(&bytes).unwrap();
                        self.input(to, LedgerInput::Gossip { from: me, frame });
                    }
                }
            }
            LedgerEffect::Send { to, message } => {
                // Whoever is not part of the network hears nothing, but a test may look at what it was told.
                let to = self.index(&to).unwrap_or(usize::MAX);
                self.queue.push_back((n, to, Direct::Sync(message)));
            }
            LedgerEffect::Persist(batch) => {
                let own = batch.puts.iter().filter(|entry| entry.author() == me && batch.durable).cloned();
                self.nodes[n].signed.extend(own);
                self.nodes[n].writing.push_back(batch);
                if !self.nodes[n].slow_disk {
                    self.settle(n);
                }
            }
            LedgerEffect::Judged(acceptance) => self.nodes[n].judged.push(acceptance),
            LedgerEffect::Penalise { peer, reason } => self.nodes[n].penalties.push((peer, reason)),
            LedgerEffect::Appended { request, seq, .. } => self.nodes[n].appended.push((request, seq)),
            LedgerEffect::AppendFailed { request, error } => self.nodes[n].failed.push((request, error)),
            LedgerEffect::Event(event) => self.nodes[n].events.push(event),
        }
    }

    /// Lets the disk write what waits.
    fn settle(&mut self, n: usize) {
        while let Some(batch) = self.nodes[n].writing.pop_front() {
            self.nodes[n].disk.write(&batch);
            self.input(n, LedgerInput::Persisted { batch: batch.batch });
        }
    }

    /// The process dies and comes back: what the disk has not written is gone, and every connection is a new one.
    fn crash(&mut self, n: usize, cfg: LedgerConfig) {
        let neighbours: Vec<usize> = self.links.iter().filter(|(from, _)| *from == n).map(|(_, to)| *to).collect();
        for to in &neighbours {
            self.cut(n, *to);
        }
        let node = &mut self.nodes[n];
        node.writing.clear();
        node.ledger = node.disk.restore(cfg, key(self.keys[n]), self.wall);
        for to in neighbours {
            self.link(n, to);
        }
    }

    fn link(&mut self, a: usize, b: usize) {
        self.links.insert((a, b));
        self.links.insert((b, a));
        let (a_id, b_id) = (self.ledger(a).id(), self.ledger(b).id());
        self.input(a, LedgerInput::PeerUp(b_id));
        self.input(b, LedgerInput::PeerUp(a_id));
    }

    fn cut(&mut self, a: usize, b: usize) {
        self.links.remove(&(a, b));
        self.links.remove(&(b, a));
        let (a_id, b_id) = (self.ledger(a).id(), self.ledger(b).id());
        self.input(a, LedgerInput::PeerDown(b_id));
        self.input(b, LedgerInput::PeerDown(a_id));
    }

    /// Delivers what is under way, and all that follows from it at this moment.
    fn deliver(&mut self) {
        loop {
            if let Some((from, to, message)) = self.queue.pop_front() {
                let bytes = message.to_bytes().unwrap();
                self.messages += 1;
                self.bytes += bytes.len();
                if let Direct::Sync(SyncMessage::Items { entries, proofs, .. }) = &message {
                    let records = entries.iter().map(|entry| entry.len() + 98);
                    let pairs = proofs.iter().map(|proof| proof.first.len() + proof.second.len() + 196);
                    self.payload += records.chain(pairs).sum::<usize>();
                }
                let Direct::Sync(message) = Direct::from_bytes(&bytes).unwrap() else { continue };
                if self.links.contains(&(from, to)) {
                    let from = self.ledger(from).id();
                    self.input(to, LedgerInput::Sync { from, message });
                }
                continue;
            }
            let due = (0..self.nodes.len()).find(|n| self.ledger(*n).deadline().is_some_and(|at| at <= self.now));
            let Some(due) = due else { break };
            self.call(due, |ledger, cx, out| ledger.expire(cx, out));
        }
    }

    /// Lets time pass, deadline by deadline.
    fn run(&mut self, span: Duration) {
        let end = self.now + span;
        loop {
            self.deliver();
            let next = (0..self.nodes.len()).filter_map(|n| self.ledger(n).deadline()).min();
            let Some(next) = next.filter(|at| *at <= end) else { break };
            self.pass(next - self.now);
        }
        self.pass(end - self.now);
        self.deliver();
    }

    fn pass(&mut self, span: Duration) {
        self.now = self.now + span;
        self.wall += u64::try_from(span.as_millis()).unwrap();
    }

    fn append(&mut self, n: usize, request: u64, body: Body) {
        self.input(n, LedgerInput::Append { request, body });
    }

    fn gossip_entry(&mut self, n: usize, entry: &Verified<Entry>) -> Acceptance {
        let frame = LedgerGossip::Entry(entry.to_wire());
        let before = self.nodes[n].judged.len();
        self.input(n, LedgerInput::Gossip { from: id(200), frame });
        assert_eq!(self.nodes[n].judged.len(), before + 1, "exactly one judgement for a frame");
        self.nodes[n].judged.last().unwrap().clone()
    }

    /// Puts entries into a node as if its disk had held them.
    fn fill(&mut self, n: usize, entries: Vec<Verified<Entry>>) {
        let at = wall(self.wall);
        self.nodes[n].ledger.restore(at, entries, Vec::new(), Vec::new());
    }

    fn agree(&self) -> bool {
        (1..self.nodes.len()).all(|n| self.ledger(n).digest() == self.ledger(0).digest())
    }
}

/// What two ledgers that hold the same state agree on.
fn snapshot(ledger: &Ledger) -> impl PartialEq + std::fmt::Debug + use<> {
    (
        ledger.digest(),
        ledger.entries().map(Verified::hash).collect::<Vec<_>>(),
        ledger.capabilities().map(|(id, capability)| (id, (**capability).clone())).collect::<Vec<_>>(),
        ledger.policies().map(Verified::hash).collect::<Vec<_>>(),
        ledger.quarantined().collect::<Vec<_>>(),
    )
}
