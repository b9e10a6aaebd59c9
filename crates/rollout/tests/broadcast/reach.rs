//! Who reaches whom, and who does not do his part.

use std::time::Duration;

use chorus_machine::Time;
use chorus_rollout::broadcast::{Broadcast, BroadcastConfig};

use crate::world::{OWNER, World, key, network, policy, scaled};

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
fn a_buffer_that_takes_long_to_empty_makes_nobody_suspicious() {
    let mut world = scaled(9, 1);
    world.buffers = true;
    // 4 MiB each: sixteen of them are offered at once, and take longer than anybody would wait for one.
    world.scale = 1024.0;
    world.mesh();
    for step in 1..=2 {
        let before = world.nodes[OWNER].sent;
        let took = spread(&mut world, step, 17);
        assert!(took < Duration::from_millis(8_500), "{took:?}");
        assert!(world.nodes[OWNER].sent - before <= 17, "{}", world.nodes[OWNER].sent - before);
    }
}

#[test]
fn a_neighbour_that_reads_nothing_stops_nobody() {
    // What one copy takes is 5.4 s, and 16.9 s.
    for (chunks, limit) in [(64, 10_000), (200, 24_000)] {
        let mut world = scaled(5, 1);
        world.nodes[3].reads = false;
        world.mesh();
        let version = world.publish(1, chunks, 4096);
        let others = [1, 2, 4];
        world.run(|world| others.iter().all(|node| world.nodes[*node].whole.contains_key(&version)));
        assert!(world.now < Time::from_millis(limit), "{}", world.now);
        assert!(world.nodes[3].whole.is_empty());
    }
}

#[test]
fn workers_that_reach_nobody_but_the_owner_get_all_from_it() {
    let mut world = scaled(5, 1);
    world.spokes();
    // What one copy takes is 5.4 s; four of them leave one uplink.
    for (step, limit) in [(1, 24_000), (2, 23_500), (3, 23_500)] {
        let before = world.nodes[OWNER].sent;
        let took = spread(&mut world, step, 64);
        assert!(took < Duration::from_millis(limit), "{took:?}");
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
fn a_neighbour_that_takes_back_whatever_it_asks_for_stops_nobody() {
    let mut world = scaled(5, 1);
    world.nodes[3].fickle = true;
    world.mesh();
    for step in 1..=2 {
        let version = world.publish(step, 64, 4096);
        let start = world.now;
        world.run(|world| [1, 2, 4].iter().all(|node| world.nodes[*node].whole.contains_key(&version)));
        assert!(world.now.since(start) < Duration::from_millis(10_000), "{:?}", world.now.since(start));
    }
}

/// Publishes a version and returns how long it takes to everybody.
fn spread(world: &mut World, step: u64, chunks: u32) -> Duration {
    let start = world.now;
    let version = world.publish(step, chunks, 4096);
    world.run(|world| world.all_whole(version));
    world.now.since(start)
}

/// Publishes so many versions, one every so many seconds.
fn publish_steadily(world: &mut World, versions: u64, seconds: u64) {
    for step in 1..=versions {
        world.publish(step, 64, 4096);
        world.pass(Duration::from_secs(seconds));
    }
}

#[test]
fn who_is_alone_beside_a_mesh_gets_versions_though_others_follow_at_once() {
    let mut world = scaled(5, 1);
    world.spokes();
    for (a, b) in [(1, 2), (1, 3), (2, 3)] {
        world.connect(a, b);
    }
    // Two copies take 10.8 s of the uplink.
    publish_steadily(&mut world, 20, 8);
    let whole: Vec<usize> = world.nodes[1..].iter().map(|node| node.whole.len()).collect();
    assert!(whole[..3].iter().all(|whole| *whole >= 12), "{whole:?}");
    assert!(whole[3] >= 8, "{whole:?}");
}

#[test]
fn workers_that_reach_nobody_else_get_versions_though_others_follow_at_once() {
    for seconds in [1, 10] {
        let mut world = scaled(4, 1);
        world.spokes();
        // Three copies take 16 s.
        publish_steadily(&mut world, 120 / seconds, seconds);
        let whole: Vec<usize> = world.nodes[1..].iter().map(|node| node.whole.len()).collect();
        assert!(whole.iter().all(|whole| *whole >= 5), "{whole:?}");
    }
}

#[test]
fn one_that_keeps_to_itself_gets_all_from_the_owner_if_the_others_do_not_reach_it() {
    let mut world = scaled(4, 1);
    world.keeps_to_itself(2);
    world.spokes();
    for step in 1..=2 {
        let took = spread(&mut world, step, 64);
        assert!(took < Duration::from_millis(30_000), "{took:?}");
    }
}

#[test]
fn a_disk_that_was_full_for_long_does_not_shut_a_worker_out() {
    let mut world = scaled(4, 1);
    world.nodes[2].disk_full_until = Time::from_millis(80_000);
    world.spokes();
    publish_steadily(&mut world, 5, 20);
    assert!(world.now >= Time::from_millis(100_000));
    let last = world.publish(6, 64, 4096);
    world.run(|world| world.all_whole(last));
    assert!(world.now < Time::from_millis(130_000), "{}", world.now);
}

#[test]
fn a_newcomer_that_takes_no_version_holds_up_nobody() {
    let mut world = scaled(5, 1);
    for node in 1..4 {
        world.connect(OWNER, node);
    }
    let first = world.publish(1, 64, 4096);
    world.run(|world| (1..4).all(|node| world.nodes[node].whole.contains_key(&first)));
    let cfg = BroadcastConfig { max_bytes: 4096, ..BroadcastConfig::default() };
    world.nodes[4].machine = Broadcast::new(cfg, network(), policy(), key(4).node_id());
    world.connect(OWNER, 4);
    world.pass(Duration::from_secs(1));
    let (start, second) = (world.now, world.publish(2, 64, 4096));
    world.run(|world| (1..4).all(|node| world.nodes[node].whole.contains_key(&second)));
    assert!(world.now.since(start) < Duration::from_millis(20_000), "{:?}", world.now.since(start));
}

#[test]
fn where_nobody_passes_anything_on_the_next_version_follows_at_once() {
    let mut world = scaled(4, 1);
    (1..4).for_each(|node| world.keeps_to_itself(node));
    world.spokes();
    for step in 1..=4 {
        let took = spread(&mut world, step, 16);
        assert!(took < Duration::from_millis(20_000), "{step}: {took:?}");
    }
}
