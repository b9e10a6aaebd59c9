//! The broadcast in virtual time.
#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation, missing_docs, unreachable_pub)]

mod reach;
mod world;

use std::collections::BTreeSet;
use std::time::Duration;

use chorus_machine::Time;
use chorus_protocol::Verified;
use chorus_protocol::rollout::Bulk;
use chorus_rollout::broadcast::{Awaits, Broadcast, BroadcastConfig, BroadcastFault, BroadcastInput};

use world::{Event, OWNER, World, key, network, policy, scaled, version};

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
