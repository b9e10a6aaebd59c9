//! Thousands of `core::Node` in virtual time, with faults and adversaries.
//!
//! What runs here is the shipped node: the same ledger, beacon, scheduler and router, driven by a virtual clock and by models of
//! network, disk, embedder and engine. Every frame is really encoded by its sender and decoded by each receiver.
//!
//! | module | subject |
//! |---|---|
//! | [`scenario`] | a run as data: nodes, work, faults, adversaries, bounds |
//! | [`world`] | time, the queue of events, and whose turn it is |
//! | [`link`], [`gossip`] | how frames travel |
//! | [`disk`], [`engine`], [`embedder`], [`clock`] | what a machine has |
//! | [`adversary`] | nodes that mean harm |
//! | [`invariant`], [`mutant`] | what must never happen, and proof that the checks would notice |
//! | [`workload`], [`report`] | what is asked, and what came of it |
//! | [`training`] | another kind of run: samplers and a trainer, with worlds and rules of their own |
//!
//! A run is decided by its scenario and its seed alone: run twice, it gives one trace hash. The shape is iroh-gossip's simulator
//! and turmoil's durability model; madsim's habit of printing the line that runs a failure again is kept.

pub mod adversary;
mod any;
pub mod clock;
pub mod disk;
mod effects;
pub mod embedder;
pub mod engine;
mod fault;
pub mod gossip;
pub mod host;
pub mod invariant;
pub mod link;
mod look;
pub mod mutant;
mod network;
pub mod queue;
pub mod report;
pub mod scenario;
pub mod trace;
pub mod training;
pub mod workload;
pub mod world;

pub use any::{AnyScenario, Ran};
pub use invariant::{Invariant, Violation};
pub use mutant::Mutant;
pub use report::{Outcome, Report};
pub use scenario::{Scenario, ScenarioError};
pub use world::World;

/// Runs a scenario with a seed.
#[must_use]
pub fn run(scenario: &Scenario, seed: u64) -> Outcome {
    World::new(scenario.clone(), seed, Mutant::None).run()
}

/// Runs a scenario with a seed, and keeps the events of all tasks.
#[must_use]
pub fn watch(scenario: &Scenario, seed: u64) -> Outcome {
    World::new(scenario.clone(), seed, Mutant::None).watching().run()
}
