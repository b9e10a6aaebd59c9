//! Training runs on themselves: every scenario holds, a run repeats, and a broken machine or shell is noticed.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use chorus_sim::training::scenario::{BUILT_IN, Bounds, Fault};
use chorus_sim::training::{Mutant, Outcome, Rule, Scenario, run, run_broken};

fn built_in(name: &str) -> Scenario {
    Scenario::built_in(name).unwrap_or_else(|| panic!("there is no scenario {name}"))
}

/// At a tenth of its size; `chorus-sim run` runs it whole. What depends on the size is not held against it.
fn holds(name: &str) -> Outcome {
    let mut scenario = built_in(name);
    let whole = scenario.samplers;
    scenario.samplers = whole / 10;
    scenario.learner.batch = (scenario.learner.batch / 10).max(2);
    for fault in &mut scenario.faults {
        if let Fault::Crash { count, .. } | Fault::BrokenSessions { count, .. } | Fault::FullDisk { count, .. } = fault
        {
            *count = (*count / 10).max(1);
        }
    }
    let Bounds { counted, bytes_per_token, refused_full, .. } = scenario.bounds;
    scenario.bounds =
        Bounds { counted: counted.map(|share| share - 0.1), bytes_per_token, refused_full, ..Bounds::default() };
    let outcome = run(&scenario, scenario.seed);
    assert!(outcome.is_good(), "{}", outcome.report);
    assert!(outcome.report.steps >= 5 && outcome.report.counted > 200, "{}", outcome.report);
    outcome
}

#[test]
fn a_calm_run_throws_nothing_away() {
    let report = holds("train-calm").report;
    assert!(report.refused.is_empty() && report.went_stale == 0 && report.died == 0, "{report}");
}

#[test]
fn the_sequential_mode_has_no_lag() {
    assert_eq!(holds("train-sequential").report.lags.len(), 1);
}

#[test]
fn churn() {
    let report = holds("train-churn").report;
    assert!(report.crashes >= 10 && report.lost_messages > 0 && report.reissued > 0, "{report}");
}

#[test]
fn slow_links() {
    holds("train-slow-links");
}

#[test]
fn a_trainer_that_crashes_keeps_what_it_acknowledged() {
    let report = holds("train-crash").report;
    assert!(report.crashes == 2 && report.kept_over_crash > 0 && report.batches > report.steps, "{report}");
}

#[test]
fn a_partition() {
    // Who is cut off gets no version meanwhile; all the rest goes on.
    let report = holds("train-partition").report;
    assert!(report.spread99_ms.max > 10_000.0 && report.not_spread == 0, "{report}");
}

#[test]
fn everything_at_once() {
    let report = holds("train-storm").report;
    assert!(report.crashes >= 10 && !report.put_off.is_empty(), "{report}");
}

#[test]
fn every_built_in_scenario_has_a_test() {
    let source = include_str!("training.rs");
    for (name, _) in BUILT_IN {
        assert!(source.contains(&format!("(\"{name}\")")), "{name} has no test");
    }
}

/// A few samplers and a trainer that crashes in the middle of an update.
fn small() -> Scenario {
    let mut scenario = built_in("train-crash");
    (scenario.samplers, scenario.seconds, scenario.learner.batch) = (16, 30, 2);
    scenario.learner.publish_every = 3;
    scenario.faults = vec![Fault::TrainerCrash { at_ms: 15_300, down_ms: 2_000, power: false }];
    scenario.bounds = Bounds::default();
    scenario
}

#[test]
fn a_run_repeats_event_for_event_and_another_seed_is_another_run() {
    let (first, again, other) = (run(&small(), 7), run(&small(), 7), run(&small(), 8));
    assert!(first.is_good(), "{}", first.report);
    assert_eq!(first.report.trace, again.report.trace);
    assert_eq!(serde_json::to_string(&first.report).unwrap(), serde_json::to_string(&again.report).unwrap());
    assert_ne!(first.report.trace, other.report.trace);
}

#[test]
fn many_seeds_of_a_storm() {
    let mut scenario = built_in("train-storm");
    (scenario.samplers, scenario.learner.batch, scenario.bounds) = (20, 2, Bounds::default());
    for seed in 0..6 {
        let outcome = run(&scenario, seed);
        assert!(outcome.is_good(), "{}", outcome.report);
    }
}

/// Restored trainers whose disks have two frames with a rollout for one place: one of them goes, and nothing is lost.
#[test]
fn a_storm_at_its_full_size() {
    let mut scenario = built_in("train-storm");
    scenario.bounds = Bounds::default();
    for seed in [21, 34] {
        let outcome = run(&scenario, seed);
        assert!(outcome.is_good(), "{}", outcome.report);
    }
}

#[test]
fn what_is_broken_on_purpose_is_noticed() {
    for (mutant, rule) in [
        (Mutant::LosesFrames, Rule::NothingAcknowledgedIsLost),
        (Mutant::AcknowledgesEarly, Rule::NothingAcknowledgedIsLost),
        (Mutant::LearnsTwice, Rule::CountedOnce),
        (Mutant::Lax, Rule::WithinStaleness),
        (Mutant::ServesEarly, Rule::WholeVersions),
        (Mutant::PublishesEarly, Rule::WholeVersions),
        (Mutant::HiresEarly, Rule::NoWorkWithoutLease),
    ] {
        let outcome = run_broken(&small(), 1, mutant);
        let found = outcome.violation.map(|violation| violation.rule);
        assert_eq!(found, Some(rule), "{mutant:?}:\n{}", outcome.report);
        assert!(outcome.report.to_string().contains("chorus-sim run train-crash --seed 1"));
    }
}
