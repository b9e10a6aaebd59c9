//! Random faults: what must hold always.

use std::time::Duration;

use chorus_machine::{Machine, Time};
use proptest::prelude::*;

use super::harness::{Nature, World};
use crate::testing::spec;
use crate::*;

const SECOND: Duration = Duration::from_secs(1);

fn natures() -> impl Strategy<Value = Vec<Nature>> {
    let one = prop_oneof![
        4 => Just(Nature::Honest),
        1 => Just(Nature::Boasts),
        1 => Just(Nature::Mute),
        1 => Just(Nature::Broken),
        1 => Just(Nature::Forges),
        1 => Just(Nature::Slow),
        1 => Just(Nature::Picky),
    ];
    prop::collection::vec(one, 1..7)
}

fn rules() -> impl Strategy<Value = SelectionRule> {
    prop::sample::select(SelectionRule::ALL.to_vec())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Every job ends exactly once, by its deadline, and every slot is free again, whatever the network and the nodes do. The
    /// harness checks slots, and the audit leases and tokens, after every step.
    #[test]
    fn every_job_ends_once_and_nothing_leaks(
        seed in any::<u64>(),
        natures in natures(),
        rule in rules(),
        loss in 0.0..0.4f64,
        doubling in 0.0..0.5f64,
        delay_ms in 0u64..400,
        run_ms in 0u64..3_000,
        jobs in prop::collection::vec((0u64..4_000, 0usize..7, 200u64..15_000, 0u32..6), 1..12),
        crashes in prop::collection::vec((0u64..8_000, 0usize..7, any::<bool>()), 0..3),
    ) {
        let config = BeaconConfig { selection: rule, ..BeaconConfig::default() };
        let mut world = World::new(seed, config, &natures);
        (world.loss, world.doubling, world.run_time) = (loss, doubling, Duration::from_millis(run_ms));
        world.delay = (Duration::ZERO, Duration::from_millis(delay_ms));
        let count = world.nodes.len();
        let mut asked = Vec::new();
        for (n, &(at, node, deadline, max_leases)) in (1u8..).zip(&jobs) {
            let at = Time::from_millis(1 + at);
            let job = JobSpec { max_leases, ..spec(n, at, Duration::from_millis(deadline)) };
            asked.push((node % count, job.job, job.deadline, max_leases.max(1)));
            world.submit_at(at, node % count, job);
        }
        for &(at, node, told) in &crashes {
            world.crash_at(Time::from_millis(1 + at), node % count, told);
        }
        world.run_until(Time::from_millis(120_000));
        for (node, job, deadline, max_leases) in asked {
            if let Some((at, result)) = world.done.get(&job) {
                prop_assert!(*at <= deadline);
                if let Ok(done) = result {
                    prop_assert_eq!(done.output.text.as_str(), "4", "a forged text was accepted");
                    prop_assert!(done.leases <= max_leases);
                }
            } else {
                prop_assert!(!world.nodes[node].alive, "a job of a living requester never ended");
            }
        }
        for node in world.nodes.iter().filter(|node| node.alive) {
            prop_assert_eq!(node.requester.jobs().count(), 0);
            prop_assert_eq!(node.requester.deadline(), None);
            prop_assert_eq!(node.executor.free(), node.executor.slots());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, ..ProptestConfig::default() })]

    /// Same seed, same world, same history: nothing depends on addresses or on hash order.
    #[test]
    fn the_same_seed_gives_the_same_history(seed in any::<u64>(), natures in natures()) {
        let history = || {
            let mut world = World::new(seed, BeaconConfig::default(), &natures);
            (world.loss, world.doubling) = (0.1, 0.1);
            for n in 1..=4 {
                world.submit(0, spec(n, world.now, 10 * SECOND));
            }
            world.run_for(30 * SECOND);
            format!("{:?}", world.events)
        };
        prop_assert_eq!(history(), history());
    }
}

#[test]
fn with_a_tenth_of_all_messages_lost_nearly_all_jobs_end_well() {
    let (mut well, mut all) = (0, 0);
    for seed in 0..16 {
        let mut world = World::new(seed, BeaconConfig::default(), &[Nature::Honest; 5]);
        (world.loss, world.doubling) = (0.1, 0.1);
        for n in 1..=5 {
            world.submit_at(Time::from_millis(u64::from(n) * 300), 0, spec(n, Time::ZERO, 30 * SECOND));
        }
        world.run_for(40 * SECOND);
        all += world.done.len();
        well += world.done.values().filter(|(_, result)| result.is_ok()).count();
    }
    assert_eq!(all, 80);
    assert!(well >= 79, "{well} of {all}");
}
