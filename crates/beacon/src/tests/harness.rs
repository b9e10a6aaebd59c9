//! A few nodes in virtual time, with a network that loses, doubles and reorders, and engines that take their time.
//!
//! Every message is really encoded and decoded. After each step the slots of every executor are counted, and every requester is
//! watched by a [`LeaseAudit`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use chorus_machine::{Ctx, Machine, Outbox, Rng, Time};
use chorus_protocol::beacon::{Beacon, Receipt};
use chorus_protocol::bounded::Text;
use chorus_protocol::capability::Capability;
use chorus_protocol::entry::Body;
use chorus_protocol::job::{Failure, Pool};
use chorus_protocol::message::{BeaconGossip, Direct, Frame};
use chorus_protocol::{JobId, NodeId, SecretKey, Verified, WallTime};

use crate::audit::LeaseAudit;
use crate::testing::{key, network, output};
use crate::*;

const WALL: u64 = 1_700_000_000_000;

/// What a node is like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Nature {
    Honest,
    /// Bids a perfect score, no load and no time.
    Boasts,
    /// Accepts, then says nothing more.
    Mute,
    /// Its engine fails.
    Broken,
    /// Sends a text that is not the one it signed.
    Forges,
    /// Takes a hundred times as long.
    Slow,
    /// Calls every payload unusable.
    Picky,
}

#[derive(Debug)]
pub(super) struct Node {
    pub(super) id: NodeId,
    key: SecretKey,
    pub(super) requester: Requester,
    pub(super) executor: Executor,
    pub(super) audit: LeaseAudit,
    pub(super) nature: Nature,
    pub(super) alive: bool,
    /// How far its wall clock is ahead, in milliseconds.
    pub(super) skew_ms: i64,
    slots: u16,
    engine: BTreeSet<RunId>,
    pub(super) started: u32,
}

#[derive(Debug)]
enum Happening {
    Direct { from: usize, to: usize, bytes: Vec<u8> },
    Gossip { to: usize, bytes: Vec<u8> },
    Engine { node: usize, run: RunId },
    Requester { node: usize, input: RequesterInput },
    Crash { node: usize, told: bool },
}

#[derive(Debug)]
pub(super) struct World {
    pub(super) now: Time,
    pub(super) nodes: Vec<Node>,
    pub(super) rng: Rng,
    pub(super) loss: f64,
    pub(super) doubling: f64,
    pub(super) delay: (Duration, Duration),
    pub(super) run_time: Duration,
    config: BeaconConfig,
    queue: BTreeMap<(Time, u64), Happening>,
    sequence: u64,
    pub(super) done: BTreeMap<JobId, (Time, Result<Box<JobDone>, JobError>)>,
    pub(super) events: Vec<(Time, JobEvent)>,
    pub(super) receipts: Vec<Receipt>,
    pub(super) penalties: Vec<(NodeId, Fault)>,
    pub(super) sent: BTreeMap<&'static str, u32>,
}

impl World {
    /// `natures.len()` nodes with one slot each; all know all. Node 0 is the usual requester.
    pub(super) fn new(seed: u64, config: BeaconConfig, natures: &[Nature]) -> Self {
        let mut world = Self {
            now: Time::from_millis(1),
            nodes: Vec::new(),
            rng: Rng::from_u64(seed),
            loss: 0.0,
            doubling: 0.0,
            delay: (Duration::from_millis(1), Duration::from_millis(3)),
            run_time: Duration::from_millis(400),
            config,
            queue: BTreeMap::new(),
            sequence: 0,
            done: BTreeMap::new(),
            events: Vec::new(),
            receipts: Vec::new(),
            penalties: Vec::new(),
            sent: BTreeMap::new(),
        };
        for (n, &nature) in (1u8..).zip(natures) {
            let node = world.fresh(n, nature);
            world.nodes.push(node);
        }
        for node in 0..natures.len() {
            world.offer(node, 1, testing::capability(1, 4096));
        }
        world
    }

    fn fresh(&self, n: u8, nature: Nature) -> Node {
        Node {
            id: key(n).node_id(),
            key: key(n),
            requester: Requester::new(self.config.clone(), network(), key(n)),
            executor: Executor::new(self.config.clone(), network(), key(n)),
            audit: LeaseAudit::default(),
            nature,
            alive: true,
            skew_ms: 0,
            slots: 0,
            engine: BTreeSet::new(),
            started: 0,
        }
    }

    /// Gives a node slots and a capability, and tells every ledger.
    pub(super) fn offer(&mut self, node: usize, slots: u16, mut capability: Capability) {
        capability.slots = slots;
        let capability = Arc::new(capability);
        let id = self.nodes[node].id;
        self.nodes[node].slots = slots + capability.slots_of(Pool::Sampling);
        for other in 0..self.nodes.len() {
            let capability = Some(Arc::clone(&capability));
            self.requester(other, RequesterInput::Capability { node: id, capability });
        }
        self.executor(node, ExecutorInput::Offer { capability, slots });
    }

    /// A node that only asks.
    pub(super) fn asks_only(&mut self, node: usize) {
        let id = self.nodes[node].id;
        for other in 0..self.nodes.len() {
            self.requester(other, RequesterInput::Capability { node: id, capability: None });
        }
        self.executor(node, ExecutorInput::Offer { capability: testing::shared(0), slots: 0 });
        self.nodes[node].slots = 0;
    }

    pub(super) fn submit(&mut self, node: usize, spec: JobSpec) {
        self.requester(node, RequesterInput::Submit(Box::new(spec)));
    }

    pub(super) fn submit_at(&mut self, at: Time, node: usize, spec: JobSpec) {
        self.schedule(at, Happening::Requester { node, input: RequesterInput::Submit(Box::new(spec)) });
    }

    /// Kills a node at `at`; the others notice their broken connections if `told`.
    pub(super) fn crash_at(&mut self, at: Time, node: usize, told: bool) {
        self.schedule(at, Happening::Crash { node, told });
    }

    fn schedule(&mut self, at: Time, happening: Happening) {
        self.sequence += 1;
        self.queue.insert((at, self.sequence), happening);
    }

    /// Runs until `until`, or until nothing is left to happen.
    pub(super) fn run_until(&mut self, until: Time) {
        for _ in 0..2_000_000 {
            let next = self.queue.first_key_value().map(|((at, _), _)| *at);
            let timer = self
                .nodes
                .iter()
                .filter(|node| node.alive)
                .filter_map(|node| chorus_machine::earliest(node.requester.deadline(), node.executor.deadline()));
            let Some(at) = chorus_machine::earliest(next, timer.min()).filter(|at| *at <= until) else {
                self.now = until;
                return;
            };
            self.now = self.now.max(at);
            if next == Some(at) {
                if let Some((_, happening)) = self.queue.pop_first() {
                    self.happen(happening);
                }
            } else {
                self.expire();
            }
            self.check_slots();
        }
        panic!("time stands still at {}", self.now);
    }

    pub(super) fn run_for(&mut self, time: Duration) {
        self.run_until(self.now + time);
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Direct { from, to, bytes } => {
                let from = self.nodes[from].id;
                match Direct::from_bytes(&bytes).expect("what was encoded decodes") {
                    message @ (Direct::Release { .. } | Direct::Grant { .. } | Direct::Cancel { .. }) => {
                        self.executor(to, ExecutorInput::Direct { from, message });
                    }
                    message => self.requester(to, RequesterInput::Direct { from, message }),
                }
            }
            Happening::Gossip { to, bytes } => {
                let BeaconGossip(beacon) = BeaconGossip::from_bytes(&bytes).expect("what was encoded decodes");
                let beacon: Verified<Beacon> = beacon.verify(&network()).expect("it is signed");
                self.executor(to, ExecutorInput::Beacon(beacon));
            }
            Happening::Engine { node, run } => {
                if self.nodes[node].engine.remove(&run) {
                    let broken = self.nodes[node].nature == Nature::Broken;
                    let result = if broken { Err(Failure::Engine(Text::default())) } else { Ok(output("4")) };
                    self.executor(node, ExecutorInput::Done { run, result });
                }
            }
            Happening::Requester { node, input } => self.requester(node, input),
            Happening::Crash { node, told } => self.crash(node, told),
        }
    }

    /// Has a node's engine finish a run now.
    pub(super) fn complete(&mut self, node: usize, run: RunId) {
        self.nodes[node].engine.remove(&run);
        self.executor(node, ExecutorInput::Done { run, result: Ok(output("4")) });
    }

    fn crash(&mut self, node: usize, told: bool) {
        self.nodes[node].alive = false;
        self.nodes[node].engine.clear();
        let id = self.nodes[node].id;
        for other in (0..self.nodes.len()).filter(|other| told && *other != node) {
            self.requester(other, RequesterInput::PeerDown(id));
            self.executor(other, ExecutorInput::PeerDown(id));
        }
    }

    fn expire(&mut self) {
        for node in 0..self.nodes.len() {
            if !self.nodes[node].alive {
                continue;
            }
            let mut effects = Outbox::new();
            let (state, mut cx) = self.context(node);
            state.requester.expire(&mut cx, &mut effects);
            let mut more = Outbox::new();
            state.executor.expire(&mut cx, &mut more);
            effects.drain().for_each(|effect| self.requester_effect(node, effect));
            more.drain().for_each(|effect| self.executor_effect(node, effect));
        }
    }

    fn context(&mut self, node: usize) -> (&mut Node, Ctx<'_>) {
        let state = &mut self.nodes[node];
        let millis = (WALL + self.now.as_nanos() / 1_000_000).saturating_add_signed(state.skew_ms);
        (state, Ctx { now: self.now, wall: WallTime::from_millis(millis), rng: &mut self.rng })
    }

    pub(super) fn requester(&mut self, node: usize, input: RequesterInput) {
        if !self.nodes[node].alive {
            return;
        }
        self.nodes[node].audit.input(&input);
        let mut effects = Outbox::new();
        let (state, mut cx) = self.context(node);
        state.requester.handle(&mut cx, input, &mut effects);
        effects.drain().for_each(|effect| self.requester_effect(node, effect));
    }

    pub(super) fn executor(&mut self, node: usize, input: ExecutorInput) {
        if !self.nodes[node].alive {
            return;
        }
        let mut effects = Outbox::new();
        let (state, mut cx) = self.context(node);
        state.executor.handle(&mut cx, input, &mut effects);
        effects.drain().for_each(|effect| self.executor_effect(node, effect));
    }

    fn requester_effect(&mut self, node: usize, effect: RequesterEffect) {
        let now = self.now;
        self.nodes[node].audit.effect(&effect, now).expect("the invariants hold");
        match effect {
            RequesterEffect::Publish(beacon) => {
                let bytes = BeaconGossip(beacon.to_wire()).to_bytes().expect("a beacon is small");
                for to in 0..self.nodes.len() {
                    self.transmit(node == to, |bytes| Happening::Gossip { to, bytes }, bytes.clone());
                }
            }
            RequesterEffect::Send { to, message } => self.send(node, to, message),
            RequesterEffect::Append(Body::Receipt(receipt)) => self.receipts.push(*receipt),
            RequesterEffect::Append(other) => panic!("a requester appends receipts, not a {}", other.kind()),
            RequesterEffect::Event(event) => self.events.push((now, event)),
            RequesterEffect::Done { job, result } => {
                assert!(self.done.insert(job, (now, result)).is_none(), "{job} ended twice");
            }
            RequesterEffect::Penalise { peer, reason } => self.penalties.push((peer, reason)),
        }
    }

    fn executor_effect(&mut self, node: usize, effect: ExecutorEffect) {
        match effect {
            ExecutorEffect::Send { to, message } => self.send(node, to, message),
            ExecutorEffect::Run { run, .. } => {
                let state = &mut self.nodes[node];
                assert!(state.engine.insert(run), "{run:?} was started twice");
                state.started += 1;
                assert!(state.engine.len() <= usize::from(state.slots), "more runs than slots");
                let factor = if state.nature == Nature::Slow { 100 } else { 1 };
                let time = self.run_time * factor;
                let time = self.rng.between(time.mul_f64(0.8), time.mul_f64(1.2));
                self.schedule(self.now + time, Happening::Engine { node, run });
            }
            ExecutorEffect::Stop { run } => {
                self.nodes[node].engine.remove(&run);
            }
            ExecutorEffect::Event(_) => {}
            ExecutorEffect::Penalise { peer, reason } => self.penalties.push((peer, reason)),
        }
    }

    fn send(&mut self, from: usize, to: NodeId, mut message: Direct) {
        let Some(to) = self.nodes.iter().position(|node| node.id == to) else { return };
        if !self.tamper(from, &mut message) {
            return;
        }
        *self.sent.entry(message.kind()).or_default() += 1;
        let bytes = message.to_bytes().expect("it fits a frame");
        self.transmit(from == to, |bytes| Happening::Direct { from, to, bytes }, bytes);
    }

    /// What a node of bad nature does to what its machines say; false swallows the message.
    fn tamper(&mut self, from: usize, message: &mut Direct) -> bool {
        let node = &self.nodes[from];
        match (node.nature, message) {
            (Nature::Boasts, Direct::Bid(bid)) => {
                let mut lie = (*bid.clone().verify(&network()).expect("it is signed")).clone();
                (lie.score_milli, lie.active, lie.slots, lie.expected_ms) = (u16::MAX, 0, u16::MAX, 0);
                *bid = Verified::sign(&node.key, &network(), lie).expect("it is small").to_wire();
                true
            }
            (Nature::Mute, Direct::Progress { .. } | Direct::Outcome { .. }) => false,
            (Nature::Forges, Direct::Outcome { result: Ok(output), .. }) => {
                output.text = Text::truncated("5");
                true
            }
            (Nature::Picky, Direct::Accept { job, fence }) => {
                let failure = Failure::InvalidPayload(Text::default());
                let (job, fence) = (*job, *fence);
                let to = self.nodes.iter().position(|node| node.audit.open_jobs() > 0).unwrap_or(0);
                let bytes = Direct::Refuse { job, fence, failure }.to_bytes().expect("it fits a frame");
                self.transmit(false, |bytes| Happening::Direct { from, to, bytes }, bytes);
                false
            }
            _ => true,
        }
    }

    fn transmit(&mut self, looped_back: bool, happening: impl Fn(Vec<u8>) -> Happening, bytes: Vec<u8>) {
        if looped_back {
            self.schedule(self.now, happening(bytes));
            return;
        }
        let copies = if self.rng.chance(self.loss) { 0 } else { 1 + u32::from(self.rng.chance(self.doubling)) };
        for _ in 0..copies {
            let delay = self.rng.between(self.delay.0, self.delay.1);
            self.schedule(self.now + delay, happening(bytes.clone()));
        }
    }

    fn check_slots(&self) {
        for node in &self.nodes {
            let runs = node.executor.runs().count();
            let taken = runs + node.executor.reserved();
            assert!(
                taken <= node.executor.slots(),
                "{:?} has {taken} of {} slots taken",
                node.id,
                node.executor.slots()
            );
            assert_eq!(taken + node.executor.free(), node.executor.slots(), "a slot leaked");
            if node.alive {
                assert_eq!(runs, node.engine.len(), "runs and engine disagree at {:?}", node.id);
            }
            let mut ids: Vec<JobId> = node.requester.leases().map(|lease| lease.lease).collect();
            ids.dedup();
            assert_eq!(ids.len(), node.requester.leases().count());
        }
    }

    /// Asserts that everything that was handed in has ended and everything that was taken is free again.
    pub(super) fn assert_settled(&mut self, jobs: usize) {
        assert_eq!(self.done.len(), jobs, "every job ends");
        for node in self.nodes.iter().filter(|node| node.alive) {
            assert_eq!(node.requester.jobs().count(), 0);
            assert_eq!(node.requester.leases().count(), 0);
            assert_eq!(node.requester.deadline(), None, "no timer is left behind");
            assert_eq!(node.audit.open_jobs(), 0);
            assert_eq!(node.executor.free(), node.executor.slots(), "a slot leaked at {:?}", node.id);
            assert_eq!(node.executor.runs().count(), 0);
        }
    }

    pub(super) fn result(&self, n: u8) -> &Result<Box<JobDone>, JobError> {
        &self.done.get(&JobId::from_bytes([n; 16])).unwrap_or_else(|| panic!("job {n} has not ended")).1
    }

    pub(super) fn elected(&self) -> Vec<(NodeId, u64, bool)> {
        let elected = |(_, event): &(Time, JobEvent)| match event.kind {
            JobEventKind::Elected { node, fence, hedge, .. } => Some((node, fence, hedge)),
            _ => None,
        };
        self.events.iter().filter_map(elected).collect()
    }
}
