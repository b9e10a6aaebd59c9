//! Nodes in virtual time whose uplinks carry so many bytes a second and no more.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::Duration;

use chorus_machine::{Ctx, Machine, Outbox, Rng, Time, WallTime};
use chorus_protocol::policy::{Manifest, ManifestBuilder, PolicyId, Version};
use chorus_protocol::rollout::Bulk;
use chorus_protocol::{List, NetworkId, NodeId, SecretKey, Text, Verified};
use chorus_rollout::broadcast::{Broadcast, BroadcastConfig, BroadcastEffect, BroadcastFault, BroadcastInput};

/// 100 Mbit/s.
pub const UPLINK: f64 = 12_500_000.0;
pub const LATENCY: Duration = Duration::from_millis(10);
pub const OWNER: usize = 0;

pub fn network() -> NetworkId {
    "test".parse().unwrap()
}

pub fn key(n: usize) -> SecretKey {
    SecretKey::from_bytes(&[n as u8 + 1; 32])
}

pub fn policy() -> PolicyId {
    PolicyId { owner: key(OWNER).node_id(), name: Text::new("p").unwrap() }
}

#[derive(Debug)]
pub enum Event {
    Deliver { from: usize, to: usize, message: Bulk },
    Input { node: usize, input: BroadcastInput },
    Wake { node: usize },
}

pub struct Node {
    pub id: NodeId,
    pub machine: Broadcast,
    pub rng: Rng,
    pub alive: bool,
    pub liar: bool,
    /// Whether chunks that are sent to it leave at all.
    pub reads: bool,
    /// It asks the owner for whatever is offered, and takes that back at once.
    pub fickle: bool,
    pub disk_full_until: Time,
    pub uplink: f64,
    pub uplink_free: Time,
    pub disk: BTreeMap<(Version, u32), Vec<u8>>,
    pub whole: BTreeMap<Version, Time>,
    pub sent: u64,
    pub strikes: Vec<(NodeId, BroadcastFault)>,
}

pub struct World {
    pub now: Time,
    pub nodes: Vec<Node>,
    pub queue: BinaryHeap<Reverse<(Time, u64)>>,
    pub events: BTreeMap<u64, Event>,
    pub count: u64,
    /// A simulated byte stands for this many: chunks are small in memory and long on the wire.
    pub scale: f64,
    /// The owner's chunks leave at once, into a buffer that its uplink then empties.
    pub buffers: bool,
}

impl World {
    pub fn new(nodes: usize, cfg: &BroadcastConfig, seed: u64) -> Self {
        let node = |n: usize| Node {
            id: key(n).node_id(),
            machine: Broadcast::new(cfg.clone(), network(), policy(), key(n).node_id()),
            rng: Rng::from_u64(seed * 1000 + n as u64),
            alive: true,
            liar: false,
            reads: true,
            fickle: false,
            disk_full_until: Time::ZERO,
            uplink: UPLINK,
            uplink_free: Time::ZERO,
            disk: BTreeMap::new(),
            whole: BTreeMap::new(),
            sent: 0,
            strikes: Vec::new(),
        };
        Self {
            now: Time::ZERO,
            nodes: (0..nodes).map(node).collect(),
            queue: BinaryHeap::new(),
            events: BTreeMap::new(),
            count: 0,
            scale: 1.0,
            buffers: false,
        }
    }

    pub fn at(&mut self, time: Time, event: Event) {
        self.count += 1;
        self.events.insert(self.count, event);
        self.queue.push(Reverse((time, self.count)));
    }

    pub fn input(&mut self, node: usize, input: BroadcastInput) {
        self.at(self.now, Event::Input { node, input });
    }

    pub fn connect(&mut self, a: usize, b: usize) {
        let (a_id, b_id) = (self.nodes[a].id, self.nodes[b].id);
        self.input(a, BroadcastInput::PeerUp(b_id));
        self.input(b, BroadcastInput::PeerUp(a_id));
    }

    pub fn mesh(&mut self) {
        for a in 0..self.nodes.len() {
            for b in 0..a {
                self.connect(a, b);
            }
        }
    }

    /// Makes a version of `chunks` chunks of `chunk_bytes` and puts it on the owner's disk.
    pub fn publish(&mut self, step: u64, chunks: u32, chunk_bytes: u32) -> Version {
        let manifest = version(step, chunks, chunk_bytes, |version, index, bytes| {
            self.nodes[OWNER].disk.insert((version, index), bytes);
        });
        let version = manifest.version;
        self.input(OWNER, BroadcastInput::Publish(manifest));
        version
    }

    /// Joins everybody with the owner, and nobody with anybody else.
    pub fn spokes(&mut self) {
        for node in 1..self.nodes.len() {
            self.connect(OWNER, node);
        }
    }

    /// Lets a node keep to itself what it gets.
    pub fn keeps_to_itself(&mut self, node: usize) {
        let cfg = BroadcastConfig { share: false, ..BroadcastConfig::default() };
        let node = &mut self.nodes[node];
        node.machine = Broadcast::new(cfg, network(), policy(), node.id);
    }

    pub fn kill(&mut self, node: usize) {
        self.nodes[node].alive = false;
        let id = self.nodes[node].id;
        for other in 0..self.nodes.len() {
            self.input(other, BroadcastInput::PeerDown(id));
        }
    }

    pub fn handle(&mut self, n: usize, input: Option<BroadcastInput>) {
        if !self.nodes[n].alive {
            return;
        }
        let mut out = Outbox::new();
        let node = &mut self.nodes[n];
        let mut cx = Ctx { now: self.now, wall: WallTime::default(), rng: &mut node.rng };
        match input {
            Some(input) => node.machine.handle(&mut cx, input, &mut out),
            // Whatever has to happen has a deadline: without one nothing does.
            None if node.machine.deadline().is_none_or(|at| at > self.now) => return,
            None => node.machine.expire(&mut cx, &mut out),
        }
        if let Some(deadline) = node.machine.deadline() {
            self.at(deadline.max(self.now + Duration::from_nanos(1)), Event::Wake { node: n });
        }
        let effects: Vec<_> = out.drain().collect();
        for effect in effects {
            self.effect(n, effect);
        }
    }

    pub fn index_of(&self, id: NodeId) -> usize {
        self.nodes.iter().position(|node| node.id == id).unwrap()
    }

    pub fn effect(&mut self, n: usize, effect: BroadcastEffect) {
        match effect {
            BroadcastEffect::Send { to, message } => {
                // Whatever is said is really encoded and decoded.
                let message = Bulk::from_bytes(&message.to_bytes().unwrap()).unwrap();
                let to = self.index_of(to);
                self.at(self.now + LATENCY, Event::Deliver { from: n, to, message });
            }
            BroadcastEffect::SendChunk { to, version, index } => {
                let target = self.index_of(to);
                let node = &mut self.nodes[n];
                let mut bytes = node.disk[&(version, index)].clone();
                if node.liar {
                    bytes[0] ^= 1;
                }
                let seconds = bytes.len() as f64 * self.scale / node.uplink;
                node.sent += 1;
                if !self.nodes[target].reads {
                    return;
                }
                let node = &mut self.nodes[n];
                let end = node.uplink_free.max(self.now) + Duration::from_secs_f64(seconds);
                node.uplink_free = end;
                let message = Bulk::Chunk { version, index, bytes: List::new(bytes).unwrap() };
                let left = if self.buffers && n == OWNER { self.now } else { end };
                self.at(left, Event::Input { node: n, input: BroadcastInput::Sent { to, version, index } });
                self.at(end + LATENCY, Event::Deliver { from: n, to: target, message });
            }
            BroadcastEffect::Store { version, index, bytes } => {
                let full = self.now < self.nodes[n].disk_full_until;
                let input = if full {
                    BroadcastInput::StoreFailed { version, index }
                } else {
                    self.nodes[n].disk.insert((version, index), bytes.into_vec());
                    BroadcastInput::Stored { version, index }
                };
                self.at(self.now + Duration::from_millis(1), Event::Input { node: n, input });
            }
            BroadcastEffect::Ready(manifest) => {
                // The invariant: a version that is called whole is whole, and every chunk is the manifest's.
                let disk = &self.nodes[n].disk;
                for index in (0u32..).take(manifest.chunks.len()) {
                    assert!(manifest.is_chunk(index, &disk[&(manifest.version, index)]), "node {n} is not whole");
                }
                assert!(self.nodes[n].whole.insert(manifest.version, self.now).is_none(), "whole twice");
            }
            BroadcastEffect::Forget(version) => self.nodes[n].disk.retain(|(of, _), _| *of != version),
            BroadcastEffect::Strike { peer, fault } => self.nodes[n].strikes.push((peer, fault)),
            BroadcastEffect::Keep(_) => {}
        }
    }

    /// Runs until `done`, or fails after ten simulated minutes.
    pub fn run(&mut self, mut done: impl FnMut(&Self) -> bool) {
        while !done(self) {
            let Some(Reverse((time, id))) = self.queue.pop() else {
                let status: Vec<_> = self.nodes.iter().map(|node| node.machine.status()).collect();
                panic!("nothing happens any more at {}: {status:#?}", self.now);
            };
            assert!(
                time < Time::from_millis(600_000),
                "too long: {:#?}",
                self.nodes.iter().map(|node| node.machine.status()).collect::<Vec<_>>()
            );
            self.now = time;
            match self.events.remove(&id).unwrap() {
                Event::Deliver { from, to, message } => {
                    if self.nodes[to].fickle {
                        self.ask_and_cancel(to, &message);
                    } else if self.nodes[from].alive {
                        let from = self.nodes[from].id;
                        self.handle(to, Some(BroadcastInput::Message { from, message }));
                    }
                }
                Event::Input { node, input } => self.handle(node, Some(input)),
                Event::Wake { node } => self.handle(node, None),
            }
        }
    }

    fn ask_and_cancel(&mut self, node: usize, message: &Bulk) {
        if let Bulk::HaveOne { version, index } = *message {
            let indices = List::truncated([index]);
            for message in [Bulk::WantChunks { version, indices: indices.clone() }, Bulk::Cancel { version, indices }] {
                self.at(self.now + LATENCY, Event::Deliver { from: node, to: OWNER, message });
            }
        }
    }

    /// Lets time pass.
    pub fn pass(&mut self, time: Duration) {
        let until = self.now + time;
        self.at(until, Event::Wake { node: OWNER });
        self.run(|world| world.now >= until);
    }

    pub fn all_whole(&self, version: Version) -> bool {
        self.nodes.iter().filter(|node| node.alive).all(|node| node.whole.contains_key(&version))
    }
}

pub fn version(
    step: u64,
    chunks: u32,
    chunk_bytes: u32,
    mut each: impl FnMut(Version, u32, Vec<u8>),
) -> Verified<Manifest> {
    let mut builder = ManifestBuilder::new(chunk_bytes);
    builder.file("model.safetensors").unwrap();
    let mut rng = Rng::from_u64(step);
    let mut made = Vec::new();
    for _ in 0..chunks {
        let mut bytes = vec![(step % 256) as u8; chunk_bytes as usize];
        bytes[..32].copy_from_slice(&rng.bytes::<32>());
        made.extend(builder.write(&bytes));
    }
    let (manifest, last) = builder.finish(policy(), None, step, WallTime::from_millis(step)).unwrap();
    for (bytes, index) in made.into_iter().chain(last).zip(0u32..) {
        each(manifest.version, index, bytes);
    }
    Verified::sign(&key(OWNER), &network(), manifest).unwrap()
}

pub fn scaled(nodes: usize, seed: u64) -> World {
    let mut world = World::new(nodes, &BroadcastConfig::default(), seed);
    world.scale = 256.0;
    world
}
