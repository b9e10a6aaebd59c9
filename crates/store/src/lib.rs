//! The node's disk: RocksDB behind typed column families.
//!
//! | family | key | value |
//! |---|---|---|
//! | `meta` | name | schema version, network |
//! | `entries` | author, number (big endian) | the signed envelope, byte for byte |
//! | `proofs` | author | the pair that convicts it |
//! | `marks` | author | what the ledger remembers beyond its entries; opaque here |
//! | `records` | table, key | anything else, opaque here |
//!
//! 1. A [`Batch`] is written whole or not at all. With [`Durability::Synced`] the call returns when the disk has it.
//! 2. [`Store::load`] does not verify signatures again: only verified entries are written, and RocksDB keeps a checksum with
//!    every block and every log record, so a flipped bit is [`StoreError::Corrupt`] and never an altered entry. A directory is
//!    as trusted as the key file that lies beside it.
//! 3. A [`StoreHandle`] writes on a thread of its own. Batches that wait together go to disk in one write with one sync, in the
//!    order in which they were handed in.
//!
//! 4. [`Blobs`] are values that are large and deleted soon. They lie in files beside a database that says where.
//!
//! RocksDB's types do not leave this crate. It knows nothing of the ledger's rules either: it stores what it is told.

mod batch;
mod blobs;
mod error;
mod options;
mod store;
mod writer;

#[cfg(test)]
mod tests;

pub use batch::{Batch, Durability, Loaded, Record};
pub use blobs::{Blobs, Committer, Pair, Parts, Staged};
pub use error::StoreError;
pub use store::Store;
pub use writer::{Completion, StoreHandle, SubmitError};
