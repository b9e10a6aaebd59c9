//! What can go wrong with the disk, and what to do about it.

use std::path::{Path, PathBuf};

/// Why the disk did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Another process has the directory open.
    #[error(
        "{path} is in use by another process; stop that node, or start this one with another --data-dir or --instance"
    )]
    Locked {
        /// The directory.
        path: PathBuf,
    },
    /// There is nothing to read.
    #[error("{path} holds no node's data; check --data-dir, or run `chorus node run` once to create it")]
    Missing {
        /// The directory.
        path: PathBuf,
    },
    /// Written by another version of this software.
    #[error(
        "{path} has schema version {found} and this program reads {supported}; use the version that wrote it, or move the directory away and let the node fetch the ledger anew"
    )]
    Schema {
        /// The directory.
        path: PathBuf,
        /// The version on disk.
        found: u32,
        /// The version this program reads and writes.
        supported: u32,
    },
    /// Belongs to another swarm.
    #[error("{path} belongs to network '{found}', not '{expected}'; use another --data-dir for another network")]
    WrongNetwork {
        /// The directory.
        path: PathBuf,
        /// The network on disk.
        found: String,
        /// The network asked for.
        expected: String,
    },
    /// The bytes are not what was written.
    #[error(
        "{path} is damaged ({detail}); move it away (keep the key file) and start again: the node fetches the ledger from its neighbours"
    )]
    Corrupt {
        /// The directory.
        path: PathBuf,
        /// What was found.
        detail: String,
    },
    /// No room.
    #[error("no room left to write {path} ({detail}); free some space, the node goes on by itself")]
    DiskFull {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        detail: String,
    },
    /// Opened to be looked at.
    #[error("the store was opened to be read only")]
    ReadOnly,
    /// Anything else that the system refuses.
    #[error("cannot use {path}: {detail}; check the path, its permissions and the disk")]
    Io {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        detail: String,
    },
}

impl StoreError {
    /// Returns whether the same write may succeed later without anybody restarting the node.
    #[must_use]
    pub const fn is_retryable(&self) -> bool {
        matches!(self, Self::DiskFull { .. } | Self::Io { .. })
    }

    /// Tells the system's errors apart.
    pub(crate) fn from_io(path: &Path, error: &std::io::Error) -> Self {
        use std::io::ErrorKind;
        let (path, detail) = (path.to_owned(), error.to_string());
        match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
                Self::DiskFull { path, detail }
            }
            _ => Self::Io { path, detail },
        }
    }

    /// Tells RocksDB's errors apart. Beyond its coarse kinds it has only their text.
    pub(crate) fn from_rocksdb(path: &Path, error: &rocksdb::Error) -> Self {
        let (path, detail) = (path.to_owned(), error.as_ref().to_owned());
        let says = |needles: &[&str]| needles.iter().any(|needle| detail.contains(needle));
        if says(&["No space left on device", "Disk quota exceeded", "File too large"]) {
            return Self::DiskFull { path, detail };
        }
        if says(&["While lock file", "lock hold by current process"]) {
            return Self::Locked { path };
        }
        match error.kind() {
            rocksdb::ErrorKind::Corruption => Self::Corrupt { path, detail },
            rocksdb::ErrorKind::InvalidArgument if says(&["does not exist (create_if_missing is false)"]) => {
                Self::Missing { path }
            }
            _ => Self::Io { path, detail },
        }
    }
}
