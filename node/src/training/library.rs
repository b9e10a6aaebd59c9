//! A policy's versions on disk.
//!
//! ```text
//!  <data>/policies/<name>@<owner>/<version>/…          the version's files, as a loader wants them
//!                                 <version>.manifest   the owner's signed manifest
//! ```
//!
//! A version's files are made at their full size when its manifest is kept, and filled chunk by chunk. Nothing on disk says that a
//! version is whole: what is there is hashed at every start ([`Library::scan`]), so a torn or altered file is only a missing chunk.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use chorus_protocol::limits::{ENVELOPE_OVERHEAD_BYTES, MAX_MANIFEST_BYTES};
use chorus_protocol::policy::{Manifest, ManifestBuilder, ManifestError, PolicyId, Version};
use chorus_protocol::{Hash, NetworkId, Received, Verified, WallTime, codec};

/// What is read at a time when a version is made from files.
const READ_BYTES: usize = 1 << 20;
/// A signed manifest on disk.
const MAX_MANIFEST_FILE: usize = MAX_MANIFEST_BYTES + ENVELOPE_OVERHEAD_BYTES;

/// Where one policy's versions lie.
#[derive(Clone, Debug)]
pub(crate) struct Library {
    root: PathBuf,
    network: NetworkId,
}

/// Why a directory cannot be published.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImportError {
    /// A file cannot be read or written.
    #[error("{path}: {error}; check that the directory is there and that the disk has room")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's word.
        error: io::Error,
    },
    /// The files make no manifest.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
}

impl Library {
    /// Opens the library of a policy, and makes its directory if there is none.
    pub(crate) fn open(data_dir: &Path, policy: &PolicyId, network: &NetworkId) -> io::Result<Self> {
        let root = Self::root(data_dir, policy);
        fs::create_dir_all(&root)?;
        Ok(Self { root, network: network.clone() })
    }

    /// Deletes all of a policy's versions.
    pub(crate) fn delete(data_dir: &Path, policy: &PolicyId) {
        if let Err(error) = fs::remove_dir_all(Self::root(data_dir, policy)) {
            tracing::warn!(%error, %policy, "its versions were not deleted");
        }
    }

    /// Returns where a policy's versions lie. The name is only shown, since it may hold what no file system takes.
    pub(super) fn root(data_dir: &Path, policy: &PolicyId) -> PathBuf {
        let shown: String =
            policy.name.as_str().chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        let id =
            Hash::derive("chorus policy directory v1", &[policy.owner.as_bytes(), policy.name.as_str().as_bytes()]);
        data_dir.join("policies").join(format!("{shown}-{}", id.fmt_short()))
    }

    /// Opens every library that a node has.
    pub(crate) fn all(data_dir: &Path, network: &NetworkId) -> Vec<Self> {
        let Ok(entries) = fs::read_dir(data_dir.join("policies")) else { return Vec::new() };
        let mut roots: Vec<PathBuf> =
            entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.is_dir()).collect();
        roots.sort();
        roots.into_iter().map(|root| Self { root, network: network.clone() }).collect()
    }

    /// Returns the directory of a version's files.
    pub(crate) fn directory(&self, version: Version) -> PathBuf {
        self.root.join(version.to_string())
    }

    fn manifest_path(&self, version: Version) -> PathBuf {
        self.root.join(format!("{version}.manifest"))
    }

    /// Writes a manifest, and makes its version's files.
    pub(crate) fn keep(&self, manifest: &Verified<Manifest>) -> io::Result<()> {
        let directory = self.directory(manifest.version);
        fs::create_dir_all(&directory)?;
        for file in &manifest.files {
            let made =
                OpenOptions::new().create(true).truncate(false).write(true).open(directory.join(file.name.as_str()))?;
            made.set_len(file.bytes)?;
        }
        write_whole(&self.manifest_path(manifest.version), &codec::encode(&manifest.to_wire()))
    }

    /// Writes a chunk where it belongs. It must have been checked. A version whose files the disk did not take when they were to be made
    /// gets them now.
    pub(crate) fn write_chunk(&self, manifest: &Verified<Manifest>, index: u32, bytes: &[u8]) -> io::Result<()> {
        // The manifest is written last, so where it is the files are.
        if !self.manifest_path(manifest.version).exists() {
            self.keep(manifest)?;
        }
        let mut rest = bytes;
        for (path, offset, len) in self.spans(manifest, index) {
            let (now, later) = rest.split_at(len.min(rest.len()));
            let mut file = OpenOptions::new().write(true).open(path)?;
            file.seek(SeekFrom::Start(offset))?;
            file.write_all(now)?;
            rest = later;
        }
        Ok(())
    }

    /// Reads a chunk.
    pub(crate) fn read_chunk(&self, manifest: &Manifest, index: u32) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(manifest.chunk_len(index).unwrap_or_default());
        for (path, offset, len) in self.spans(manifest, index) {
            let mut file = File::open(path)?;
            file.seek(SeekFrom::Start(offset))?;
            let before = bytes.len();
            file.take(len as u64).read_to_end(&mut bytes)?;
            if bytes.len() - before < len {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(bytes)
    }

    /// Returns the parts of files that a chunk consists of: path, offset and length.
    fn spans(&self, manifest: &Manifest, index: u32) -> Vec<(PathBuf, u64, usize)> {
        let directory = self.directory(manifest.version);
        let mut from = u64::from(index) * u64::from(manifest.chunk_bytes);
        let mut left = manifest.chunk_len(index).unwrap_or_default() as u64;
        let mut spans = Vec::new();
        for file in &manifest.files {
            let here = file.bytes.saturating_sub(from).min(left);
            if here > 0 {
                let len = usize::try_from(here).unwrap_or(usize::MAX);
                spans.push((directory.join(file.name.as_str()), from, len));
                (from, left) = (0, left - here);
            } else {
                from -= file.bytes.min(from);
            }
        }
        spans
    }

    /// Deletes a version.
    pub(crate) fn forget(&self, version: Version) -> io::Result<()> {
        // Without its manifest a version does not exist, so that goes first.
        let gone = |result: io::Result<()>| match result {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
        gone(fs::remove_file(self.manifest_path(version)))?;
        gone(fs::remove_dir_all(self.directory(version)))
    }

    /// Returns the versions on disk with the chunks that are really there, the oldest step first.
    pub(crate) fn scan(&self) -> Vec<(Verified<Manifest>, Vec<u32>)> {
        let mut found: Vec<(Verified<Manifest>, Vec<u32>)> = self
            .manifests()
            .into_iter()
            .map(|manifest| {
                let there = (0u32..).take(manifest.chunks.len()).filter(|index| self.has(&manifest, *index)).collect();
                (manifest, there)
            })
            .collect();
        found.sort_by_key(|(manifest, _)| (manifest.step, manifest.made));
        found
    }

    /// Returns the chunks that are not there as they should be.
    pub(crate) fn missing(&self, manifest: &Manifest) -> Vec<u32> {
        (0u32..).take(manifest.chunks.len()).filter(|index| !self.has(manifest, *index)).collect()
    }

    fn has(&self, manifest: &Manifest, index: u32) -> bool {
        self.read_chunk(manifest, index).is_ok_and(|bytes| manifest.is_chunk(index, &bytes))
    }

    /// Returns the manifests on disk whose signature holds and whose version is named by them.
    pub(crate) fn manifests(&self) -> Vec<Verified<Manifest>> {
        let Ok(entries) = fs::read_dir(&self.root) else { return Vec::new() };
        let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
        let read = |path: PathBuf| {
            let bytes = fs::read(&path).ok()?;
            let manifest: Received<Manifest> = codec::decode("manifest", &bytes, MAX_MANIFEST_FILE).ok()?;
            manifest.verify(&self.network).ok()
        };
        paths.filter(|path| path.extension().is_some_and(|end| end == "manifest")).filter_map(read).collect()
    }

    /// Makes a version of a directory's files: copies them in, and says what they are. The manifest is still to be signed and kept.
    pub(crate) fn import(
        &self,
        source: &Path,
        policy: &PolicyId,
        chunk_bytes: u32,
        (parent, step, made): (Option<Version>, u64, WallTime),
    ) -> Result<Manifest, ImportError> {
        let at = |path: &Path| {
            let path = path.to_owned();
            move |error| ImportError::Io { path, error }
        };
        let mut names: Vec<String> = fs::read_dir(source)
            .map_err(at(source))?
            .filter_map(|entry| entry.ok().filter(|entry| entry.path().is_file()))
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort();
        let mut builder = ManifestBuilder::new(chunk_bytes);
        let mut buffer = vec![0; READ_BYTES];
        for name in &names {
            builder.file(name)?;
            let path = source.join(name);
            let mut file = File::open(&path).map_err(at(&path))?;
            loop {
                let read = file.read(&mut buffer).map_err(at(&path))?;
                if read == 0 {
                    break;
                }
                builder.write(&buffer[..read]);
            }
        }
        let (manifest, _) = builder.finish(policy.clone(), parent, step, made)?;
        let directory = self.directory(manifest.version);
        fs::create_dir_all(&directory).map_err(at(&directory))?;
        for file in &manifest.files {
            let target = directory.join(file.name.as_str());
            // It may be here already, and others may be reading it: an update that changes no weight makes the same version again.
            if fs::metadata(&target).is_ok_and(|found| found.len() == file.bytes) {
                continue;
            }
            let fresh = directory.join(format!(".{}.new", file.name));
            fs::copy(source.join(file.name.as_str()), &fresh).map_err(at(&fresh))?;
            fs::rename(&fresh, &target).map_err(at(&target))?;
        }
        Ok(manifest)
    }
}

/// Writes a file whole or not at all.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(".new");
    let fresh = PathBuf::from(fresh);
    let mut file = File::create(&fresh)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&fresh, path)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use chorus_protocol::{SecretKey, Text};

    use super::*;

    fn world() -> (tempfile::TempDir, Library, Verified<Manifest>) {
        let dir = tempfile::tempdir().unwrap();
        let key = SecretKey::from_bytes(&[7; 32]);
        let policy = PolicyId { owner: key.node_id(), name: Text::new("tiny/one").unwrap() };
        let network: NetworkId = "library".parse().unwrap();
        let library = Library::open(dir.path(), &policy, &network).unwrap();
        let source = dir.path().join("source");
        fs::create_dir(&source).unwrap();
        // Sizes that make chunks span files, and end within one.
        for (name, len) in [("a.json", 700usize), ("b.safetensors", 5_000), ("c.json", 3)] {
            let bytes: Vec<u8> = (0..len).map(|at| u8::try_from(at % 251).unwrap()).collect();
            fs::write(source.join(name), bytes).unwrap();
        }
        let manifest = library.import(&source, &policy, 1024, (None, 3, WallTime::from_millis(9))).unwrap();
        let manifest = Verified::sign(&key, &network, manifest).unwrap();
        library.keep(&manifest).unwrap();
        (dir, library, manifest)
    }

    #[test]
    fn a_version_is_what_its_files_are_and_damage_is_a_missing_chunk() {
        let (_dir, library, manifest) = world();
        assert_eq!(manifest.chunks.len(), 6);
        let found = library.scan();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].1, (0..6).collect::<Vec<u32>>());
        let weights = library.directory(manifest.version).join("b.safetensors");
        let mut bytes = fs::read(&weights).unwrap();
        bytes[400] ^= 1;
        fs::write(&weights, &bytes).unwrap();
        assert_eq!(library.scan()[0].1, [0, 2, 3, 4, 5], "byte 1,100 of all is in chunk 1");
        fs::remove_file(library.directory(manifest.version).join("c.json")).unwrap();
        assert_eq!(library.scan()[0].1, [0, 2, 3, 4]);
    }

    #[test]
    fn chunks_written_one_by_one_make_the_same_files() {
        let (_dir, library, manifest) = world();
        let chunks: Vec<Vec<u8>> = (0..6).map(|index| library.read_chunk(&manifest, index).unwrap()).collect();
        assert!(chunks.iter().zip(0..).all(|(bytes, index)| manifest.is_chunk(index, bytes)));
        library.forget(manifest.version).unwrap();
        assert!(library.scan().is_empty());
        library.keep(&manifest).unwrap();
        assert_eq!(library.scan()[0].1, [] as [u32; 0], "files of the right size with nothing in them");
        for index in [5, 0, 3, 1, 4, 2] {
            library.write_chunk(&manifest, index, &chunks[usize::try_from(index).unwrap()]).unwrap();
        }
        assert_eq!(library.scan()[0].1.len(), 6);
        library.forget(manifest.version).unwrap();
        library.forget(manifest.version).unwrap();
    }

    #[test]
    fn a_version_whose_files_could_not_be_made_gets_them_with_its_first_chunk() {
        let (_dir, library, manifest) = world();
        let chunk = library.read_chunk(&manifest, 2).unwrap();
        library.forget(manifest.version).unwrap();
        // What a full disk leaves of an attempt: a directory, one file that is too short, and no manifest.
        fs::create_dir(library.directory(manifest.version)).unwrap();
        fs::write(library.directory(manifest.version).join("a.json"), [0; 9]).unwrap();
        library.write_chunk(&manifest, 2, &chunk).unwrap();
        assert_eq!(library.scan()[0].1, [2]);
    }

    #[test]
    fn a_manifest_that_was_altered_is_not_there() {
        let (_dir, library, manifest) = world();
        let path = library.manifest_path(manifest.version);
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&path, bytes).unwrap();
        assert!(library.scan().is_empty());
    }
}
