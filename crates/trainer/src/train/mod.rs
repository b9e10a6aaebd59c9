//! Learning: AdamW, the supervised warm start, and GRPO.
//!
//! ```text
//!  environment ──task──▶ sampler (here, or nodes of the swarm) ──rollouts──▶ groups ──▶ Learner::step ──▶ policy, checkpoint
//!       └────────────────────── reward ◀──────────────────────┘
//! ```

mod adam;
mod batch;
mod colocated;
mod curve;
mod error;
mod grpo;
mod learner;
mod warm;

#[cfg(test)]
mod tests;

pub use adam::{AdamW, AdamWConfig};
pub use batch::Batch;
pub use colocated::{Round, evaluate, roll_out};
pub use curve::{Curve, Point};
pub use error::StepError;
pub use grpo::{Grpo, GrpoConfig, StepReport, Trajectory, advantages};
pub use learner::{Learner, LearnerConfig};
pub use warm::{WarmStart, imitate};
