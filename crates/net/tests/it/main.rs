//! Real swarms on loopback: 2 to 20 nodes of one process, each with its own sockets, keys and actor.

#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation, missing_docs)]

mod bulk;
mod direct;
mod gossip;
mod harness;
mod hostile;
mod identity;
mod provide;
mod rejoin;
mod relay;
