//! A training run in virtual time: one trainer, hundreds of samplers, and what goes wrong between them.
//!
//! What runs here are the shipped machines of `chorus_rollout`: a `Buffer`, a `Hiring` and a `Broadcast` at the trainer, a `Sampler` and
//! a `Broadcast` at every sampler. Every message between them is really encoded and decoded. Links, disks, engines and the learner are
//! models.
//!
//! ```text
//!            ┌──────────────────────────── World ────────────────────────────┐
//!  Scenario ▶│ trainer: Buffer ◀─▶ learner ─▶ checkpoint ─▶ publish          │──▶ Report, trace hash
//!  seed      │     ▲  │                                        │ Broadcast   │
//!            │   Bulk over sessions that break                 ▼             │──▶ the first Violation
//!            │     │  ▼                                                      │
//!            │ samplers: Sampler ◀─▶ engine ◀─ loads ◀─ whole versions ◀─▶   │
//!            └───────────────────────────────────────────────────────────────┘
//! ```
//!
//! | module | subject |
//! |---|---|
//! | [`scenario`] | a run as data |
//! | `world` | time, the queue of events, whose turn it is |
//! | `session`, `disk` | what carries and what keeps |
//! | `trainer`, `sampler`, `weights` | the shell around each machine, by the rules of `chorus_rollout` |
//! | `counter` | hiring, and a model of the leases that the beacon grants |
//! | `fault` | what goes wrong |
//! | [`invariant`] | what must never happen |
//! | [`report`] | what came of it |

mod counter;
mod disk;
mod fault;
mod host;
pub mod invariant;
pub mod report;
mod sampler;
pub mod scenario;
mod session;
mod trainer;
mod weights;
mod world;

pub use invariant::{Rule, Violation};
pub use report::{Outcome, Report};
pub use scenario::Scenario;
pub use world::Mutant;
use world::World;

/// Runs a scenario with a seed. Where it has faults, it is run without them as well, to compare the learner's pace.
#[must_use]
pub fn run(scenario: &Scenario, seed: u64) -> Outcome {
    run_broken(scenario, seed, Mutant::None)
}

/// Runs a scenario with something broken on purpose.
#[must_use]
pub fn run_broken(scenario: &Scenario, seed: u64, mutant: Mutant) -> Outcome {
    let calm = scenario.without_faults().map(|calm| World::new(calm, seed, mutant).run(None).report.steps);
    World::new(scenario.clone(), seed, mutant).run(calm)
}
