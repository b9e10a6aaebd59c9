//! Versions of a policy's weights, and the signed manifests that name their chunks.
//!
//! A policy is named by its owner's key and a word; only the owner signs its manifests. A version is the hash of everything that a
//! node needs to serve it: names, sizes and contents of the weights, the tokenizer and the configuration. It is never chosen, so it
//! can never be reused for other weights. The files stand one after the other, in the manifest's order, and are cut into chunks of
//! one size; the last chunk is what is left.

use std::fmt;

use bincode::{Decode, Encode};
use serde::Serialize;

use crate::bounded::{List, Text};
use crate::codec;
use crate::id::Hash;
use crate::key::NodeId;
use crate::limits::{
    MAX_CHUNK_BYTES, MAX_CHUNKS, MAX_FRAME_ENVIRONMENTS, MAX_MANIFEST_BYTES, MAX_POLICY_FILES, MIN_CHUNK_BYTES,
};
use crate::signed::{Admitted, Signable, Verified};
use crate::wall::WallTime;

/// A policy: a model under training.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize)]
pub struct PolicyId {
    /// Whose word counts: the only key that may sign its manifests.
    pub owner: NodeId,
    /// What the owner calls it.
    pub name: Text<64>,
}

impl fmt::Display for PolicyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.name, self.owner.fmt_short())
    }
}

/// One immutable set of a policy's files, named by their content.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize)]
#[serde(transparent)]
pub struct Version(Hash);

impl Version {
    /// Takes a hash that came from elsewhere. It names nothing until a manifest with that content is at hand.
    #[must_use]
    pub const fn from_hash(hash: Hash) -> Self {
        Self(hash)
    }

    /// Returns the hash.
    #[must_use]
    pub const fn as_hash(&self) -> &Hash {
        &self.0
    }

    /// Returns the first eight hexadecimal digits, for logs and tables.
    #[must_use]
    pub fn fmt_short(&self) -> String {
        self.0.fmt_short()
    }

    fn of(chunk_bytes: u32, files: &List<PolicyFile, MAX_POLICY_FILES>, chunks: &List<Hash, MAX_CHUNKS>) -> Self {
        Self(Hash::derive("chorus policy version v1", &[&codec::encode(&(chunk_bytes, files, chunks))]))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.fmt_short())
    }
}

/// Returns the hash that a manifest has for a chunk of these bytes.
#[must_use]
pub fn chunk_hash(bytes: &[u8]) -> Hash {
    Hash::derive("chorus policy chunk v1", &[bytes])
}

/// One file of a version.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct PolicyFile {
    /// Its name: one to 128 of `A-Z`, `a-z`, `0-9`, `.`, `_` and `-`, not beginning with a dot. Never a path.
    pub name: Text<128>,
    /// Its size in bytes.
    pub bytes: u64,
}

impl PolicyFile {
    fn is_safe(&self) -> bool {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        !self.name.is_empty() && !self.name.starts_with('.') && self.name.chars().all(plain)
    }
}

/// What an author says in the ledger of a policy that it trains; the policy's owner is the author. The latest one stands.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct PolicyNotice {
    /// What the author calls it; at least one byte.
    pub name: Text<64>,
    /// The newest version that is published. Its weights are had from whoever holds them.
    pub version: Version,
    /// Updates of the weights up to that version.
    pub step: u64,
    /// Where its tasks come from.
    pub environments: List<Text<96>, MAX_FRAME_ENVIRONMENTS>,
    /// Whether more versions will come.
    pub running: bool,
}

/// The list of a version's chunks, signed by the policy's owner.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct Manifest {
    /// The policy.
    pub policy: PolicyId,
    /// The version: the hash of the three last fields.
    pub version: Version,
    /// The version it was trained from; none for the first.
    pub parent: Option<Version>,
    /// Updates of the weights up to here. What staleness is counted in.
    pub step: u64,
    /// When it was published.
    pub made: WallTime,
    /// Size of every chunk but the last, in bytes.
    pub chunk_bytes: u32,
    /// The files, in the order in which they are joined and cut.
    pub files: List<PolicyFile, MAX_POLICY_FILES>,
    /// [`chunk_hash`] of each chunk.
    pub chunks: List<Hash, MAX_CHUNKS>,
}

impl Signable for Manifest {
    const KIND: &'static str = "manifest";
    const VERSION: u16 = 1;
    const MAX_BYTES: usize = MAX_MANIFEST_BYTES;
}

/// Why a manifest is not followed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// Only a policy's owner may say what its weights are.
    #[error("{author:?} signed a manifest of {owner:?}'s policy; only its owner may")]
    Stranger {
        /// Who signed.
        author: NodeId,
        /// Who should have.
        owner: NodeId,
    },
    /// The version is not the hash of what it lists.
    #[error("the manifest calls itself version {claimed:?}, but what it lists is {actual:?}")]
    Misnamed {
        /// What it says.
        claimed: Version,
        /// What it is.
        actual: Version,
    },
    /// A chunk size that no manifest may have.
    #[error("chunks of {0} bytes are not between 1 KiB and 4 MiB; choose another size")]
    ChunkSize(u32),
    /// A file name that could mean something to a file system, or stands twice.
    #[error("'{0}' cannot be a policy's file name (letters, digits, '.', '_', '-'; each once)")]
    FileName(String),
    /// Sizes and chunks that do not fit each other.
    #[error("{bytes} bytes in {chunks} chunks do not fit together")]
    Sizes {
        /// Bytes of all files.
        bytes: u64,
        /// Chunks listed.
        chunks: usize,
    },
    /// More than a manifest can list.
    #[error("the files do not fit into {MAX_POLICY_FILES} files and {MAX_CHUNKS} chunks; choose larger chunks")]
    TooLarge,
}

impl Manifest {
    /// Returns the size of all files together, in bytes.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.files.iter().fold(0, |sum: u64, file| sum.saturating_add(file.bytes))
    }

    /// Returns the size of chunk `index` in bytes, or `None` when there is no such chunk.
    #[must_use]
    pub fn chunk_len(&self, index: u32) -> Option<usize> {
        let start = u64::from(index) * u64::from(self.chunk_bytes);
        let left = self.total_bytes().checked_sub(start).filter(|left| *left > 0)?;
        usize::try_from(left.min(u64::from(self.chunk_bytes))).ok()
    }

    /// Returns whether `bytes` are chunk `index`.
    #[must_use]
    pub fn is_chunk(&self, index: u32, bytes: &[u8]) -> bool {
        let listed = usize::try_from(index).ok().and_then(|index| self.chunks.get(index));
        self.chunk_len(index) == Some(bytes.len()) && listed == Some(&chunk_hash(bytes))
    }

    /// Checks everything that the bytes alone can tell.
    ///
    /// # Errors
    /// [`ManifestError`] names the first rule that is broken.
    pub fn check(&self) -> Result<(), ManifestError> {
        let size = usize::try_from(self.chunk_bytes).unwrap_or(usize::MAX);
        if !(MIN_CHUNK_BYTES..=MAX_CHUNK_BYTES).contains(&size) {
            return Err(ManifestError::ChunkSize(self.chunk_bytes));
        }
        for (index, file) in self.files.iter().enumerate() {
            if !file.is_safe() || self.files[..index].iter().any(|other| other.name == file.name) {
                return Err(ManifestError::FileName(file.name.to_string()));
            }
        }
        let (bytes, chunks) = (self.total_bytes(), self.chunks.len());
        if bytes == 0 || bytes.div_ceil(u64::from(self.chunk_bytes)) != chunks as u64 {
            return Err(ManifestError::Sizes { bytes, chunks });
        }
        let actual = Version::of(self.chunk_bytes, &self.files, &self.chunks);
        if actual != self.version {
            return Err(ManifestError::Misnamed { claimed: self.version, actual });
        }
        Ok(())
    }

    /// Admits a manifest whose signature holds: it must be its policy owner's, and say what it is.
    ///
    /// # Errors
    /// [`ManifestError`] names the first rule that is broken. The author is to blame.
    pub fn admit(verified: Verified<Self>) -> Result<Admitted<Self>, ManifestError> {
        let (author, owner) = (verified.author(), verified.policy.owner);
        if author != owner {
            return Err(ManifestError::Stranger { author, owner });
        }
        verified.check()?;
        Ok(Admitted::new(verified))
    }
}

/// Makes a manifest from files that are read once, piece by piece.
#[derive(Debug)]
pub struct ManifestBuilder {
    chunk_bytes: usize,
    files: Vec<PolicyFile>,
    chunks: Vec<Hash>,
    partial: Vec<u8>,
}

impl ManifestBuilder {
    /// Starts a manifest with chunks of `chunk_bytes` bytes.
    #[must_use]
    pub fn new(chunk_bytes: u32) -> Self {
        let chunk_bytes = usize::try_from(chunk_bytes).unwrap_or(usize::MAX).clamp(MIN_CHUNK_BYTES, MAX_CHUNK_BYTES);
        Self { chunk_bytes, files: Vec::new(), chunks: Vec::new(), partial: Vec::new() }
    }

    /// Begins the next file.
    ///
    /// # Errors
    /// [`ManifestError::FileName`] when the name is too long; [`Self::finish`] checks the rest.
    pub fn file(&mut self, name: &str) -> Result<(), ManifestError> {
        let name = Text::new(name).map_err(|_| ManifestError::FileName(name.to_owned()))?;
        self.files.push(PolicyFile { name, bytes: 0 });
        Ok(())
    }

    /// Appends bytes to the file that was begun last. Returns the chunks that they completed, in order.
    pub fn write(&mut self, mut bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut done = Vec::new();
        if let Some(file) = self.files.last_mut() {
            file.bytes = file.bytes.saturating_add(bytes.len() as u64);
            while !bytes.is_empty() {
                let (now, later) = bytes.split_at(bytes.len().min(self.chunk_bytes - self.partial.len()));
                self.partial.extend_from_slice(now);
                bytes = later;
                if self.partial.len() == self.chunk_bytes {
                    self.chunks.push(chunk_hash(&self.partial));
                    done.push(std::mem::take(&mut self.partial));
                }
            }
        }
        done
    }

    /// Ends the last file and names the version. Returns the last chunk too, if it is a short one.
    ///
    /// # Errors
    /// [`ManifestError`] when the files make no valid manifest.
    pub fn finish(
        mut self,
        policy: PolicyId,
        parent: Option<Version>,
        step: u64,
        made: WallTime,
    ) -> Result<(Manifest, Option<Vec<u8>>), ManifestError> {
        let last = (!self.partial.is_empty()).then(|| std::mem::take(&mut self.partial));
        self.chunks.extend(last.as_deref().map(chunk_hash));
        let chunk_bytes = u32::try_from(self.chunk_bytes).map_err(|_| ManifestError::TooLarge)?;
        let files = List::new(self.files).map_err(|_| ManifestError::TooLarge)?;
        let chunks = List::new(self.chunks).map_err(|_| ManifestError::TooLarge)?;
        let version = Version::of(chunk_bytes, &files, &chunks);
        let manifest = Manifest { policy, version, parent, step, made, chunk_bytes, files, chunks };
        manifest.check()?;
        Ok((manifest, last))
    }
}
