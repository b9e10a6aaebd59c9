//! Both sides together, and each against a hostile other.
#![allow(clippy::unwrap_used, clippy::panic)]

mod faults;
mod fuzz;
mod harness;
mod hostile;
mod life;
