//! The HTTP layer over real sockets on loopback, above a backend that answers by rote.
#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_precision_loss, missing_docs, unreachable_pub)]

mod backend;
mod chat;
mod client;
mod journal;
mod limits;
mod node;
mod security;
mod tasks;
mod training;
