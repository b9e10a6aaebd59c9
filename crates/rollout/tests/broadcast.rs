//! The broadcast in virtual time: nodes whose uplinks carry so many bytes a second and no more, on a full mesh.
#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation, missing_docs, unreachable_pub)]

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::time::Duration;

use chorus_machine::{Ctx, Machine, Outbox, Rng, Time, WallTime};
use chorus_protocol::policy::{Manifest, ManifestBuilder, PolicyId, Version};
use chorus_protocol::rollout::Bulk;
use chorus_protocol::{List, NetworkId, NodeId, SecretKey, Text, Verified};
use chorus_rollout::broadcast::{Awaits, Broadcast, BroadcastConfig, BroadcastEffect, BroadcastFault, BroadcastInput};

/// 100 Mbit/s.
const UPLINK: f64 = 12_500_000.0;
const LATENCY: Duration = Duration::from_millis(10);
const OWNER: usize = 0;

fn network() -> NetworkId {
    "test".parse().unwrap()
}

fn key(n: usize) -> SecretKey {
    SecretKey::from_bytes(&[n as u8 + 1; 32])
}

fn policy() -> PolicyId {
    PolicyId { owner: key(OWNER).node_id(), name: Text::new("p").unwrap() }
}

#[derive(Debug)]
enum Event {
    Deliver { from: usize, to: usize, message: Bulk },
    Input { node: usize, input: BroadcastInput },
    Wake { node: usize },
}

struct Node {
    id: NodeId,
    machine: Broadcast,
    rng: Rng,
    alive: bool,
    liar: bool,
    /// Whether chunks that are sent to it leave at all.
    reads: bool,
    disk_full_until: Time,
    uplink: f64,
    uplink_free: Time,
    disk: BTreeMap<(Version, u32), Vec<u8>>,
    whole: BTreeMap<Version, Time>,
    sent: u64,
    strikes: Vec<(NodeId, BroadcastFault)>,
}

struct World {
    now: Time,
    nodes: Vec<Node>,
    queue: BinaryHeap<Reverse<(Time, u64)>>,
    events: BTreeMap<u64, Event>,
    count: u64,
    /// A simulated byte stands for this many: chunks are small in memory and long on the wire.
    scale: f64,
}

impl World {
    fn new(nodes: usize, cfg: &BroadcastConfig, seed: u64) -> Self {
        let node = |n: usize| Node {
            id: key(n).node_id(),
            machine: Broadcast::new(cfg.clone(), network(), policy(), key(n).node_id()),
            rng: Rng::from_u64(seed * 1000 + n as u64),
            alive: true,
            liar: false,
            reads: true,
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
        }
    }

    fn at(&mut self, time: Time, event: Event) {
        self.count += 1;
        self.events.insert(self.count, event);
        self.queue.push(Reverse((time, self.count)));
    }

    fn input(&mut self, node: usize, input: BroadcastInput) {
        self.at(self.now, Event::Input { node, input });
    }

    fn connect(&mut self, a: usize, b: usize) {
        let (a_id, b_id) = (self.nodes[a].id, self.nodes[b].id);
        self.input(a, BroadcastInput::PeerUp(b_id));
        self.input(b, BroadcastInput::PeerUp(a_id));
    }

    fn mesh(&mut self) {
        for a in 0..self.nodes.len() {
            for b in 0..a {
                self.connect(a, b);
            }
        }
    }

    /// Makes a version of `chunks` chunks of `chunk_bytes` and puts it on the owner's disk.
    fn publish(&mut self, step: u64, chunks: u32, chunk_bytes: u32) -> Version {
        let manifest = version(step, chunks, chunk_bytes, |version, index, bytes| {
            self.nodes[OWNER].disk.insert((version, index), bytes);
        });
        let version = manifest.version;
        self.input(OWNER, BroadcastInput::Publish(manifest));
        version
    }

    /// Joins everybody with the owner, and nobody with anybody else.
    fn spokes(&mut self) {
        for node in 1..self.nodes.len() {
            self.connect(OWNER, node);
        }
    }

    /// Lets a node keep to itself what it gets.
    fn keeps_to_itself(&mut self, node: usize) {
        let cfg = BroadcastConfig { share: false, ..BroadcastConfig::default() };
        let node = &mut self.nodes[node];
        node.machine = Broadcast::new(cfg, network(), policy(), node.id);
    }

    fn kill(&mut self, node: usize) {
        self.nodes[node].alive = false;
        let id = self.nodes[node].id;
        for other in 0..self.nodes.len() {
            self.input(other, BroadcastInput::PeerDown(id));
        }
    }

    fn handle(&mut self, n: usize, input: Option<BroadcastInput>) {
        if !self.nodes[n].alive {
            return;
        }
        let mut out = Outbox::new();
        let node = &mut self.nodes[n];
        let mut cx = Ctx { now: self.now, wall: WallTime::default(), rng: &mut node.rng };
        match input {
            Some(input) => node.machine.handle(&mut cx, input, &mut out),
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

    fn index_of(&self, id: NodeId) -> usize {
        self.nodes.iter().position(|node| node.id == id).unwrap()
    }

    fn effect(&mut self, n: usize, effect: BroadcastEffect) {
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
                self.at(end, Event::Input { node: n, input: BroadcastInput::Sent { to, version, index } });
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
    fn run(&mut self, mut done: impl FnMut(&Self) -> bool) {
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
                    if self.nodes[from].alive {
                        let from = self.nodes[from].id;
                        self.handle(to, Some(BroadcastInput::Message { from, message }));
                    }
                }
                Event::Input { node, input } => self.handle(node, Some(input)),
                Event::Wake { node } => self.handle(node, None),
            }
        }
    }

    fn all_whole(&self, version: Version) -> bool {
        self.nodes.iter().filter(|node| node.alive).all(|node| node.whole.contains_key(&version))
    }
}

fn version(
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

struct Outcome {
    seconds: f64,
    copies: f64,
}

/// The time until all of `workers` have 64 chunks of 1 MiB, and how many copies the owner sent.
fn broadcast(workers: usize, share: bool, seed: u64) -> Outcome {
    let cfg = BroadcastConfig { share, ..BroadcastConfig::default() };
    let mut world = World::new(workers + 1, &cfg, seed);
    // 4 KiB in memory, 1 MiB on the wire.
    world.scale = 256.0;
    world.mesh();
    let version = world.publish(1, 64, 4096);
    world.run(|world| world.all_whole(version));
    Outcome { seconds: (world.now - Time::ZERO).as_secs_f64(), copies: world.nodes[OWNER].sent as f64 / 64.0 }
}

#[test]
fn eight_workers_wait_hardly_longer_than_one() {
    for seed in 0..4 {
        let (one, eight, star) = (broadcast(1, true, seed), broadcast(8, true, seed), broadcast(8, false, seed));
        println!(
            "seed {seed}: 1 worker {:.2} s ({:.2} copies), 8 workers {:.2} s ({:.2} copies, {:.2} x), star of 8 {:.2} s ({:.2} \
             copies, {:.2} x)",
            one.seconds,
            one.copies,
            eight.seconds,
            eight.copies,
            eight.seconds / one.seconds,
            star.seconds,
            star.copies,
            star.seconds / one.seconds,
        );
        assert!(eight.seconds / one.seconds <= 1.3);
        assert!(eight.copies <= 1.5 && one.copies == 1.0);
        assert!(star.seconds / one.seconds > 7.0);
    }
}

#[test]
fn twenty_workers_neither() {
    let (one, twenty) = (broadcast(1, true, 1), broadcast(20, true, 1));
    println!("20 workers {:.2} s ({:.2} copies, {:.2} x)", twenty.seconds, twenty.copies, twenty.seconds / one.seconds);
    assert!(twenty.seconds / one.seconds <= 1.4 && twenty.copies <= 1.5);
}

/// The same with chunks that really have 1 MiB.
#[test]
fn the_full_size_behaves_as_the_scaled_one() {
    let mut times = Vec::new();
    for workers in [1, 8] {
        let mut world = World::new(workers + 1, &BroadcastConfig::default(), 3);
        world.mesh();
        let version = world.publish(1, 64, 1 << 20);
        world.run(|world| world.all_whole(version));
        assert!(world.nodes[OWNER].sent <= 96);
        times.push((world.now - Time::ZERO).as_secs_f64());
    }
    assert!(times[1] / times[0] <= 1.3, "{times:?}");
}

#[test]
fn the_same_seed_gives_the_same_broadcast() {
    let (a, b) = (broadcast(8, true, 5), broadcast(8, true, 5));
    assert_eq!((a.seconds.to_bits(), a.copies.to_bits()), (b.seconds.to_bits(), b.copies.to_bits()));
}

fn scaled(nodes: usize, seed: u64) -> World {
    let mut world = World::new(nodes, &BroadcastConfig::default(), seed);
    world.scale = 256.0;
    world
}

#[test]
fn a_peer_that_dies_in_the_middle_costs_little() {
    for seed in 0..3 {
        let mut world = scaled(9, seed);
        world.mesh();
        let version = world.publish(1, 64, 4096);
        world.run(|world| world.now > Time::from_millis(2_500));
        world.kill(3);
        world.kill(4);
        world.run(|world| world.all_whole(version));
        assert!(world.now < Time::from_millis(9_000), "{}", world.now);
        assert!(world.nodes[OWNER].sent <= 96, "{}", world.nodes[OWNER].sent);
    }
}

#[test]
fn a_liar_is_convicted_by_everybody_and_stops_nobody() {
    for seed in 0..3 {
        let mut world = scaled(9, seed);
        world.nodes[2].liar = true;
        world.mesh();
        let version = world.publish(1, 64, 4096);
        world.run(|world| world.all_whole(version));
        let liar = world.nodes[2].id;
        let strikes: Vec<_> = world.nodes.iter().flat_map(|node| node.strikes.clone()).collect();
        assert!(strikes.len() >= 3, "{strikes:?}");
        assert!(strikes.iter().all(|(who, fault)| *who == liar && matches!(fault, BroadcastFault::Lie { .. })));
        let convicted: BTreeSet<_> =
            world.nodes.iter().filter(|node| !node.strikes.is_empty()).map(|node| node.id).collect();
        assert_eq!(convicted.len(), strikes.len(), "nobody believes it twice");
        assert!(world.now < Time::from_millis(12_000), "{}", world.now);
    }
}

#[test]
fn a_neighbour_that_passes_nothing_on_costs_the_others_little() {
    for seed in 0..3 {
        let mut world = scaled(9, seed);
        world.keeps_to_itself(3);
        world.mesh();
        let version = world.publish(1, 64, 4096);
        world.run(|world| world.all_whole(version));
        assert!(world.now < Time::from_millis(8_000), "{}", world.now);
        assert!(world.nodes[OWNER].sent <= 96, "{}", world.nodes[OWNER].sent);
        // It is known by now.
        let (start, before) = (world.now, world.nodes[OWNER].sent);
        let next = world.publish(2, 64, 4096);
        world.run(|world| world.all_whole(next));
        assert!(world.now.since(start) < Duration::from_millis(7_500), "{:?}", world.now.since(start));
        assert!(world.nodes[OWNER].sent - before <= 96, "{}", world.nodes[OWNER].sent - before);
    }
}

#[test]
fn a_neighbour_that_reads_nothing_stops_nobody() {
    let mut world = scaled(5, 1);
    world.nodes[3].reads = false;
    world.mesh();
    let version = world.publish(1, 64, 4096);
    let others = [1, 2, 4];
    world.run(|world| others.iter().all(|node| world.nodes[*node].whole.contains_key(&version)));
    assert!(world.now < Time::from_millis(18_000), "{}", world.now);
    assert!(world.nodes[3].whole.is_empty());
}

#[test]
fn workers_that_reach_nobody_but_the_owner_get_all_from_it() {
    let mut world = scaled(5, 1);
    world.spokes();
    // What one copy takes is 5.4 s; four of them leave one uplink.
    for (step, limit) in [(1, 24_000), (2, 23_500), (3, 23_500)] {
        let (start, before) = (world.now, world.nodes[OWNER].sent);
        let version = world.publish(step, 64, 4096);
        world.run(|world| world.all_whole(version));
        assert!(world.now.since(start) < Duration::from_millis(limit), "{:?}", world.now.since(start));
        assert_eq!(world.nodes[OWNER].sent - before, 4 * 64, "each gets each chunk once");
    }
}

#[test]
fn islands_that_only_the_owner_joins_each_get_all_of_it() {
    let mut world = scaled(7, 1);
    world.spokes();
    for (a, b) in [(1, 2), (1, 3), (2, 3), (4, 5), (4, 6), (5, 6)] {
        world.connect(a, b);
    }
    let version = world.publish(1, 64, 4096);
    world.run(|world| world.all_whole(version));
    assert!(world.now < Time::from_millis(18_000), "{}", world.now);
    assert!(world.nodes[OWNER].sent < 3 * 64, "{}", world.nodes[OWNER].sent);
}

#[test]
fn where_nobody_passes_anything_on_the_owner_serves_everybody() {
    let mut world = scaled(5, 1);
    (1..5).for_each(|node| world.keeps_to_itself(node));
    world.mesh();
    let version = world.publish(1, 64, 4096);
    world.run(|world| world.all_whole(version));
    assert!(world.now < Time::from_millis(28_000), "{}", world.now);
    assert_eq!(world.nodes[OWNER].sent, 4 * 64, "each gets each chunk once");
}

#[test]
fn a_late_joiner_is_served_by_the_others_even_without_the_owner() {
    let mut world = scaled(6, 1);
    for a in 0..5 {
        for b in 0..a {
            world.connect(a, b);
        }
    }
    let version = world.publish(1, 64, 4096);
    world.run(|world| world.nodes[..5].iter().all(|node| node.whole.contains_key(&version)));
    let before = world.nodes[OWNER].sent;
    world.kill(OWNER);
    let start = world.now;
    for peer in 1..5 {
        world.connect(5, peer);
    }
    world.run(|world| world.nodes[5].whole.contains_key(&version));
    assert!(world.now.since(start) < Duration::from_millis(2_500), "{:?}", world.now.since(start));
    assert_eq!(world.nodes[OWNER].sent, before);
}

#[test]
fn a_restarted_node_asks_only_for_what_its_disk_lacks() {
    let mut world = scaled(3, 1);
    world.mesh();
    let version = world.publish(1, 64, 4096);
    world.run(|world| world.nodes[2].disk.len() >= 40);
    world.kill(2);
    let node = &mut world.nodes[2];
    node.alive = true;
    node.machine = Broadcast::new(BroadcastConfig::default(), network(), policy(), node.id);
    let chunks: Vec<u32> = node.disk.keys().map(|(_, index)| *index).collect();
    let found = chunks.len() as u64;
    world.input(2, BroadcastInput::Resume { manifest: self::version(1, 64, 4096, |_, _, _| {}), chunks });
    let before = world.nodes[OWNER].sent + world.nodes[1].sent;
    world.connect(2, 0);
    world.connect(2, 1);
    world.run(|world| world.all_whole(version));
    // The other worker's own missing chunks are sent in that time too.
    assert!(world.nodes[OWNER].sent + world.nodes[1].sent - before <= 64 - found + 40);
    assert_eq!(world.nodes[2].machine.status().wasted, 0);
}

#[test]
fn versions_that_come_faster_than_they_travel_skip_but_never_starve() {
    let mut world = scaled(5, 1);
    world.mesh();
    let mut versions = vec![world.publish(1, 64, 4096)];
    for step in 2..=9 {
        let until = world.now + Duration::from_millis(2_000);
        world.run(|world| world.now > until);
        versions.push(world.publish(step, 64, 4096));
    }
    let last = *versions.last().unwrap();
    world.run(|world| world.all_whole(last));
    for node in &world.nodes[1..] {
        assert!(node.whole.len() >= 3, "only {} versions arrived", node.whole.len());
        assert!(node.whole.len() < 9);
        assert!(node.disk.len() <= 3 * 64 + 64, "old versions are forgotten");
    }
}

#[test]
fn an_owner_that_has_moved_on_is_followed_at_once() {
    for workers in 1..=3 {
        let mut world = scaled(workers + 1, 1);
        world.mesh();
        // Sixteen chunks of 1 MiB take 1.3 s; a new version comes five times as often.
        for step in 1..=80 {
            let until = world.now + Duration::from_millis(250);
            world.publish(step, 16, 4096);
            world.at(until, Event::Wake { node: OWNER });
            world.run(|world| world.now >= until);
        }
        for node in &world.nodes[1..] {
            let mut whole: Vec<Time> = node.whole.values().copied().chain([Time::ZERO, world.now]).collect();
            whole.sort();
            let longest = whole.windows(2).map(|pair| pair[1].since(pair[0])).max().unwrap();
            assert!(longest < Duration::from_millis(4_500), "{workers} workers: nothing new for {longest:?}");
        }
    }
}

#[test]
fn a_full_disk_is_waited_for_and_named() {
    let mut world = scaled(3, 1);
    world.nodes[1].disk_full_until = Time::from_millis(8_000);
    world.mesh();
    let version = world.publish(1, 16, 4096);
    world.run(|world| world.now > Time::from_millis(1_000));
    assert_eq!(world.nodes[1].machine.status().awaits, Awaits::Disk);
    world.run(|world| world.all_whole(version));
    assert!(world.now >= Time::from_millis(8_000));
}

#[test]
fn nobody_but_the_owner_says_what_the_weights_are() {
    let mut world = scaled(3, 1);
    world.mesh();
    let honest = world.publish(1, 4, 4096);
    world.run(|world| world.all_whole(honest));
    let mut forged = (*version(2, 4, 4096, |_, _, _| {})).clone();
    let stranger = Verified::sign(&key(1), &network(), forged.clone()).unwrap();
    forged.version = honest;
    let misnamed = Verified::sign(&key(OWNER), &network(), forged.clone()).unwrap();
    let elsewhere = Verified::sign(&key(OWNER), &"other".parse().unwrap(), forged).unwrap();
    let from = world.nodes[1].id;
    for manifest in [stranger, misnamed, elsewhere] {
        let message = Bulk::Announce(Box::new(manifest.to_wire()));
        world.input(2, BroadcastInput::Message { from, message });
    }
    let until = world.now + Duration::from_secs(1);
    world.at(until, Event::Wake { node: 2 });
    world.run(|world| world.now >= until);
    let faults: Vec<_> = world.nodes[2].strikes.iter().map(|(_, fault)| fault.clone()).collect();
    assert!(matches!(
        faults[..],
        [BroadcastFault::Manifest(_), BroadcastFault::Manifest(_), BroadcastFault::Unsigned(_)]
    ));
    assert_eq!(world.nodes[2].machine.newest_whole().map(|manifest| manifest.version), Some(honest));
    assert_eq!(world.nodes[2].machine.status().awaits, Awaits::Nothing);
}

#[test]
fn a_version_that_is_too_large_is_not_taken_and_is_named() {
    let cfg = BroadcastConfig { max_bytes: 8 * 4096, ..BroadcastConfig::default() };
    let mut world = World::new(2, &cfg, 1);
    world.mesh();
    world.publish(1, 16, 4096);
    world.at(Time::from_millis(1_000), Event::Wake { node: 1 });
    world.run(|world| world.now >= Time::from_millis(1_000));
    let status = world.nodes[1].machine.status();
    assert_eq!((status.awaits, status.whole), (Awaits::Smaller { bytes: 16 * 4096 }, None));
    let small = world.publish(2, 4, 4096);
    world.run(|world| world.all_whole(small));
    assert_eq!(world.nodes[1].machine.status().awaits, Awaits::Nothing);
}
