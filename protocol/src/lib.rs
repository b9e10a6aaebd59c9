//! What crosses the wire between two Chorus nodes, and nothing else.
//!
//! Every record that a third party may have to judge is *signed* ([`Signable`]), *domain-separated* (the signing context names
//! the network, the kind of record and its version) and *bounded* (a byte limit per kind in [`limits`], checked before anything
//! is allocated). A record climbs a ladder of types, and only the top of it reaches state:
//!
//! ```text
//!  bytes ──decode──▶ Received<T> ──verify──▶ Verified<T> ──the ledger's rules──▶ Admitted<T>
//!          bounded                 strict                   clock, chain, quarantine
//! ```
//!
//! [`Verified`] keeps the very bytes that were signed; they are what is hashed, stored and passed on. Nothing is re-encoded.
//!
//! | module | subject | spec |
//! |---|---|---|
//! | [`codec`] | the only user of bincode | `spec/codec.md` |
//! | [`key`], [`id`] | Ed25519 keys, `did:key`, ids and hashes | `spec/identity.md` |
//! | [`signed`] | the envelope and its ladder | `spec/signed.md` |
//! | [`capability`], [`entry`] | what a node says of itself, and the chain it says it in | `spec/ledger.md` |
//! | [`beacon`], [`job`] | election, lease, payload, outcome, receipt | `spec/beacon.md` |
//! | [`policy`], [`rollout`] | versions of weights, and the rollouts they wrote | `spec/rollout.md` |
//! | [`misbehaviour`] | what a node is accused of, and the evidence | `spec/ledger.md`, `spec/rollout.md` |
//! | [`sync`], [`message`] | reconciliation, and what a frame may hold | `spec/wire.md` |

pub mod beacon;
pub mod bounded;
pub mod capability;
pub mod codec;
pub mod embedding;
pub mod entry;
pub mod id;
pub mod job;
pub mod key;
pub mod limits;
pub mod memo;
pub mod message;
pub mod misbehaviour;
pub mod policy;
pub mod rollout;
pub mod signed;
pub mod sync;
mod wall;

pub use bounded::{List, OutOfBounds, Text};
pub use codec::DecodeError;
pub use embedding::Embedding;
pub use id::{BeaconId, Hash, JobId, NetworkId, TaskId};
pub use key::{NodeId, SecretKey};
pub use signed::{Admitted, Received, Signable, Verified, VerifyError};
pub use wall::WallTime;

/// The version of the wire as a whole. It is part of every protocol id, and of what a node says in `identify`.
pub const WIRE_VERSION: u16 = 1;
