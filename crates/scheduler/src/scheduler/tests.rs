//! Whole tasks in virtual time, against a beacon and an embedder that the test plays.
#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation)]

mod harness;
mod paths;
mod properties;
