//! What the wire must do, seen from outside the crate: every record and frame round trips, nothing altered is believed, nothing
//! hostile panics, and not one byte of the format changes unnoticed.
#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation, missing_docs, unreachable_pub)]

mod frames;
mod golden;
mod identity;
mod random;
mod rollout_samples;
mod rollouts;
mod samples;
mod signing;
mod strategies;
mod values;
