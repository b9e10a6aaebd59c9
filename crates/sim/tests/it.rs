//! The simulator on itself: every scenario holds, a run repeats, and a broken node is caught.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use chorus_sim::disk::DiskBug;
use chorus_sim::scenario::{Adversary, BUILT_IN, Fault};
use chorus_sim::{Invariant, Mutant, Outcome, Scenario, World, run};

fn built_in(name: &str) -> Scenario {
    Scenario::built_in(name).unwrap_or_else(|| panic!("there is no scenario {name}"))
}

/// A swarm of twelve that is small enough to be run many times.
fn small(name: &str) -> Scenario {
    let mut scenario = built_in("small-5");
    scenario.name = name.to_owned();
    scenario.nodes = 12;
    scenario.seconds = 30;
    scenario.work.tasks = 12;
    scenario.work.until_ms = 18_000;
    scenario.work.deadline_ms = 10_000;
    scenario.bounds = chorus_sim::scenario::Bounds::default();
    scenario
}

fn holds(name: &str) -> Outcome {
    let scenario = built_in(name);
    let outcome = run(&scenario, scenario.seed);
    assert!(outcome.is_good(), "{}", outcome.report);
    outcome
}

fn breaks(scenario: &Scenario, mutant: Mutant) -> Invariant {
    let outcome = World::new(scenario.clone(), scenario.seed, mutant).run();
    match outcome.violation {
        Some(violation) => violation.invariant,
        None => panic!("{mutant:?} was not noticed:\n{}", outcome.report),
    }
}

#[test]
fn five_nodes_on_a_lan() {
    holds("small-5");
}

/// The window learns how long bids take over long links; with a fixed one of 150 ms most come too late.
#[test]
fn far_bidders() {
    let adaptive = holds("far-bidders").report;
    let mut scenario = built_in("far-bidders");
    scenario.swarm.bid_window_max_ms = Some(150);
    scenario.bounds.bids = None;
    let fixed = run(&scenario, scenario.seed).report;
    assert!(adaptive.bids_at_first > 1.5 * fixed.bids_at_first, "{adaptive}\n{fixed}");
    assert!(adaptive.bids_later > fixed.bids_later, "{adaptive}\n{fixed}");
}

#[test]
fn loss() {
    let outcome = holds("lossy");
    assert!(outcome.report.gossip_deliveries < outcome.report.gossip_copies);
}

#[test]
fn churn() {
    let outcome = holds("churn");
    assert!(outcome.report.crashes >= 40 && outcome.report.engine_crashes >= 20, "{}", outcome.report);
    assert!(outcome.report.leases_lost > 0, "nobody was hit while it worked: {}", outcome.report);
}

#[test]
fn partition_and_heal() {
    let outcome = holds("partition-heal");
    assert!(outcome.report.sends_failed > 0, "{}", outcome.report);
}

#[test]
fn liars() {
    holds("liars");
}

#[test]
fn equivocators() {
    let outcome = holds("equivocators");
    assert!(outcome.report.attacks >= 6, "{}", outcome.report);
}

#[test]
fn forgers_and_replayers() {
    let outcome = holds("forgers-and-replayers");
    assert!(outcome.report.gossip_rejected > 0 && outcome.report.penalties > 0, "{}", outcome.report);
}

#[test]
fn stale_tokens() {
    holds("stale-tokens");
}

#[test]
fn flooders() {
    let outcome = holds("flooders");
    assert!(outcome.report.attacks > 1_000, "{}", outcome.report);
}

#[test]
fn slow_disks_and_skewed_clocks() {
    let outcome = holds("slow-disks-and-skewed-clocks");
    assert!(outcome.report.crashes > 0, "{}", outcome.report);
}

/// The big ones at a tenth of their size; `chorus-sim run calm-1000` runs one whole.
#[test]
fn a_hundred_nodes() {
    for mut scenario in [built_in("calm-1000"), built_in("crowd-1000")] {
        scenario.nodes = 100;
        scenario.swarm.models = 5;
        scenario.work.tasks = 30;
        let outcome = run(&scenario, scenario.seed);
        assert!(outcome.is_good(), "{}", outcome.report);
    }
}

#[test]
fn every_built_in_scenario_has_a_test() {
    let source = include_str!("it.rs");
    for (name, _) in BUILT_IN {
        assert!(source.contains(&format!("(\"{name}\")")), "{name} has no test");
    }
}

#[test]
fn a_run_repeats_event_for_event_and_another_seed_is_another_run() {
    let mut scenario = small("repeats");
    scenario.faults.push(Fault::Crash { at_ms: 5_000, count: 4, within_ms: 8_000, down_ms: Some(1_500), power: true });
    scenario.adversaries = ["forger", "replayer", "liar"]
        .map(|kind| Adversary {
            kind: serde_json::from_str(&format!("\"{kind}\"")).unwrap(),
            count: 1,
            from_ms: 2_000,
            every_ms: 500,
        })
        .into();
    let (first, again, other) = (run(&scenario, 7), run(&scenario, 7), run(&scenario, 8));
    assert!(first.violation.is_none(), "{}", first.report);
    assert_eq!(first.report.trace, again.report.trace);
    assert_eq!(serde_json::to_string(&first.report).unwrap(), serde_json::to_string(&again.report).unwrap());
    assert_ne!(first.report.trace, other.report.trace);
}

#[test]
fn many_seeds_of_a_rough_swarm() {
    let mut scenario = small("rough");
    scenario.link.loss = 0.05;
    scenario.swarm.skew_ms = 2_000;
    scenario.swarm.drift_ppm = 100;
    scenario.faults = vec![
        Fault::Crash { at_ms: 4_000, count: 5, within_ms: 12_000, down_ms: Some(1_000), power: false },
        Fault::Crash { at_ms: 6_000, count: 3, within_ms: 10_000, down_ms: Some(2_000), power: true },
        Fault::EngineCrash { at_ms: 4_000, count: 6, within_ms: 12_000 },
        Fault::Partition { at_ms: 9_000, share: 0.4, for_ms: 5_000 },
        Fault::SlowDisk { at_ms: 5_000, count: 4, factor: 100.0, for_ms: 5_000 },
    ];
    for seed in 0..8 {
        let outcome = run(&scenario, seed);
        assert!(outcome.violation.is_none(), "{}", outcome.report);
        assert!(outcome.report.converge_ms.is_some(), "ledgers differ: {}", outcome.report);
    }
}

#[test]
fn a_disk_that_forgets_what_it_acknowledged_is_noticed() {
    let mut scenario = small("forgets");
    scenario.faults.push(Fault::Crash { at_ms: 8_000, count: 6, within_ms: 4_000, down_ms: Some(1_000), power: false });
    assert_eq!(breaks(&scenario, Mutant::Disk(DiskBug::ForgetsAcknowledged)), Invariant::NothingAcknowledgedIsLost);
}

#[test]
fn a_disk_that_acknowledges_before_it_writes_is_noticed() {
    assert_eq!(breaks(&small("early"), Mutant::Disk(DiskBug::AcknowledgesEarly)), Invariant::NothingAcknowledgedIsLost);
}

#[test]
fn a_requester_that_ignores_fences_is_noticed() {
    let mut scenario = built_in("stale-tokens");
    scenario.bounds = chorus_sim::scenario::Bounds::default();
    assert_eq!(breaks(&scenario, Mutant::IgnoresFences), Invariant::NoStaleResult);
}

#[test]
fn a_requester_that_grants_a_job_twice_is_noticed() {
    assert_eq!(breaks(&small("twice"), Mutant::GrantsTwice), Invariant::OneValidLease);
}

#[test]
fn an_executor_that_runs_a_lease_twice_is_noticed() {
    assert_eq!(breaks(&small("anything"), Mutant::RunsAnything), Invariant::NoRunWithoutLease);
}

#[test]
fn tasks_that_end_twice_or_never_are_noticed() {
    assert_eq!(breaks(&small("ends-twice"), Mutant::EndsTwice), Invariant::TaskEndsOnce);
    assert_eq!(breaks(&small("never-ends"), Mutant::NeverEnds), Invariant::TaskEndsOnce);
}

#[test]
fn a_violation_prints_the_line_that_runs_it_again() {
    let scenario = small("twice");
    let outcome = World::new(scenario, 42, Mutant::EndsTwice).run();
    let text = outcome.report.to_string();
    assert!(text.contains("VIOLATION") && text.contains("chorus-sim run twice --seed 42"), "{text}");
}
