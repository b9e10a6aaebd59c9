//! Values of up to some megabytes that are deleted soon, such as a training room's frames, in files beside the database.
//!
//! ```text
//!  stage: large values into one file ─▶ Staged ─▶ commit: the file is synced; then, synced too, one record for each value,
//!                                                          which holds it or says where it lies
//!  delete: the records go; a file that none points at any more ──after the next commit──▶ is written over by a later stage
//! ```
//!
//! A database writes a value into its log, and once more if it outlives the memory buffer; here it is written once. Files are written
//! over rather than made anew because the disk then takes half as much again: no block is to be found for it and no file system's
//! journal waits. The two steps are apart so that the next values are written while the disk takes those before them ([`Committer`]).
//!
//! 1. A value is acknowledged when its file and then its record are on the disk, so a record never points at bytes that are not there.
//! 2. A file is written over only when the deletion of every record that pointed at it is on the disk as well. Until then such a record
//!    could come back with a loss of power.
//! 3. A file is held while one of its values is: values that come together should be such that they go together.
//! 4. The files hold no sums: what is kept here is signed, or hashed by whoever keeps it, and is verified by who reads it.

mod committer;
mod files;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use chorus_protocol::NetworkId;

pub use self::committer::Committer;
use self::files::{Files, Place};
use crate::batch::{Batch, Durability, Record};
use crate::error::StoreError;
use crate::store::Store;

/// A value from which on it lies in a file.
const LARGE_BYTES: usize = 16 << 10;
/// The directory of the files, within the database's.
const DIRECTORY: &str = "blobs";
/// How a record begins that is the value itself. A [`Place`] begins in another way.
const HERE: u8 = 0;

/// A key and its value.
pub type Pair = (Vec<u8>, Vec<u8>);
/// A value in parts, one behind the other: large ones are shared on their way to the disk, and not copied.
pub type Parts = Vec<Arc<[u8]>>;

/// One table of such values, in a database of its own. Clones share it.
#[derive(Clone, Debug)]
pub struct Blobs {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    store: Store,
    table: &'static str,
    directory: PathBuf,
    known: Mutex<Known>,
    /// Held while values are written to a file, so that none is written by two.
    staging: Mutex<()>,
    /// Held while a commit is under way, so that there is one at a time.
    committing: Mutex<()>,
}

/// What is known of the files.
#[derive(Debug, Default)]
struct Known {
    /// `None` after a failed write, of which anything may be on disk: the next call looks.
    files: Option<Files>,
    /// How many times it was forgotten. A look does not find what was staged before it, so that is not committed any more.
    forgotten: u64,
}

/// Values that are written and not yet on the disk: there when they are committed, and never there if they are not.
#[derive(Debug, Default)]
#[must_use = "values that are not committed are lost"]
pub struct Staged {
    forgotten: u64,
    small: Vec<Pair>,
    large: Vec<(Vec<u8>, Place)>,
    file: Option<File>,
}

impl Blobs {
    /// Opens the directory, and creates it if there is none.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open(path: &Path, network: &NetworkId, table: &'static str) -> Result<Self, StoreError> {
        let inner = Inner {
            store: Store::open(path, network)?,
            table,
            directory: path.join(DIRECTORY),
            known: Mutex::default(),
            staging: Mutex::default(),
            committing: Mutex::default(),
        };
        let blobs = Self { inner: Arc::new(inner) };
        blobs.with_files(|_, _| ())?;
        Ok(blobs)
    }

    /// Writes values, all or none, each under its key and in place of what was there. Returns when the disk has them.
    ///
    /// # Errors
    /// [`StoreError`]. Whether the values are there is open then; to write them again is right in any case.
    pub fn put(&self, values: Vec<(Vec<u8>, Parts)>) -> Result<(), StoreError> {
        self.commit(self.stage(values)?)
    }

    /// Writes values without waiting for the disk.
    ///
    /// # Errors
    /// [`StoreError`]; the values are not there then.
    pub fn stage(&self, values: Vec<(Vec<u8>, Parts)>) -> Result<Staged, StoreError> {
        if values.is_empty() {
            return Ok(Staged::default());
        }
        let is_large = |(_, value): &(_, Parts)| value.iter().map(|part| part.len()).sum::<usize>() >= LARGE_BYTES;
        let (large, small): (Vec<_>, Vec<_>) = values.into_iter().partition(is_large);
        let small = small.into_iter().map(|(key, value)| (key, value.concat())).collect();
        let _alone = lock(&self.inner.staging);
        let (forgotten, number) =
            self.with_files(|files, forgotten| (forgotten, (!large.is_empty()).then(|| files.take())))?;
        let Some(number) = number else { return Ok(Staged { forgotten, small, large: Vec::new(), file: None }) };
        match files::write(&self.inner.directory, number, large) {
            Ok((file, large)) => Ok(Staged { forgotten, small, large, file: Some(file) }),
            Err(error) => {
                let error = self.failed(&error);
                self.make_room(number)?;
                Err(error)
            }
        }
    }

    /// Deletes a file that could not be written, and those in which nothing lies any more.
    fn make_room(&self, unwritten: u64) -> Result<(), StoreError> {
        let _alone = lock(&self.inner.committing);
        self.with_files(|files, _| {
            files.give_up(unwritten);
            files.give_back();
        })?;
        // Anything that is synced brings what was deleted before onto the disk.
        self.apply(vec![self.record(&[], None)], Durability::Synced)?;
        self.with_files(|files, _| {
            files.synced();
            files.give_back();
        })
    }

    /// Brings staged values onto the disk.
    ///
    /// # Errors
    /// As [`Blobs::put`]. After one, what was staged meanwhile is refused as well.
    pub fn commit(&self, staged: Staged) -> Result<(), StoreError> {
        let Staged { forgotten, small, large, file } = staged;
        if small.is_empty() && large.is_empty() {
            return Ok(());
        }
        let _alone = lock(&self.inner.committing);
        if self.known().forgotten != forgotten {
            let detail = "an earlier write failed, and this one with it; write it again".to_owned();
            return Err(StoreError::Io { path: self.inner.directory.clone(), detail });
        }
        if let Some(Err(error)) = file.map(|file| file.sync_data()) {
            self.forget();
            return Err(self.failed(&error));
        }
        let mut records: Vec<Record> = Vec::with_capacity(small.len() + large.len());
        records.extend(small.iter().map(|(key, value)| self.record(key, Some([&[HERE], &value[..]].concat()))));
        records.extend(large.iter().map(|(key, place)| self.record(key, Some(place.to_bytes()))));
        self.apply(records, Durability::Synced)?;
        let noted = self.with_files(|files, now| {
            if now == forgotten {
                files.synced();
                small.into_iter().for_each(|(key, _)| files.point(key, None));
                large.into_iter().for_each(|(key, place)| files.point(key, Some(place.file)));
            }
            now == forgotten
        })?;
        if !noted {
            // A deletion failed meanwhile, and somebody may have looked before these records were there.
            self.forget();
        }
        Ok(())
    }

    /// Deletes values that are committed. After a loss of power some may be there again.
    ///
    /// # Errors
    /// As [`Store::apply`].
    pub fn delete(&self, keys: Vec<Vec<u8>>) -> Result<(), StoreError> {
        if keys.is_empty() {
            return Ok(());
        }
        // Not while a commit syncs: it would take these deletions for synced as well.
        let _alone = lock(&self.inner.committing);
        self.apply(keys.iter().map(|key| self.record(key, None)).collect(), Durability::Relaxed)?;
        self.with_files(|files, _| keys.into_iter().for_each(|key| files.point(key, None)))
    }

    /// Reads a value.
    ///
    /// # Errors
    /// [`StoreError`] when the disk cannot be read; [`StoreError::Corrupt`] when the value is not where its record says, nor ever will be.
    pub fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.inner.store.heal()?;
        self.inner.store.record(self.inner.table, key)?.map(|record| self.resolve(record)).transpose()
    }

    /// Reads all values, by key. One whose file is gone or too short is left out, and the log says so.
    ///
    /// # Errors
    /// [`StoreError`] when the disk cannot be read just now.
    pub fn all(&self) -> Result<Vec<Pair>, StoreError> {
        self.inner.store.heal()?;
        let records = self.inner.store.records(self.inner.table)?.into_iter();
        let values = records.filter_map(|(key, record)| match self.resolve(record) {
            Ok(value) => Some(Ok((key, value))),
            Err(error @ StoreError::Corrupt { .. }) => {
                tracing::warn!(%error, "a value is gone and counts as lost");
                None
            }
            Err(error) => Some(Err(error)),
        });
        values.collect()
    }

    fn record(&self, key: &[u8], value: Option<Vec<u8>>) -> Record {
        Record { table: self.inner.table, key: key.to_vec(), value }
    }

    /// A failed write may yet be on disk, so what is known of the files is forgotten with it.
    fn apply(&self, records: Vec<Record>, durability: Durability) -> Result<(), StoreError> {
        let applied = self.inner.store.apply(&Batch { records, durability, ..Batch::default() });
        if applied.is_err() {
            self.forget();
        }
        applied
    }

    fn resolve(&self, mut record: Vec<u8>) -> Result<Vec<u8>, StoreError> {
        if record.first() == Some(&HERE) {
            return Ok(record.split_off(1));
        }
        let damaged = |detail| StoreError::Corrupt { path: self.inner.directory.clone(), detail };
        let place = Place::from_bytes(&record)
            .ok_or_else(|| damaged("a record says neither what nor where its value is".to_owned()))?;
        place.read(&self.inner.directory).map_err(|error| match error.kind() {
            ErrorKind::NotFound | ErrorKind::UnexpectedEof => {
                damaged(format!("a value of file {}: {error}", place.file))
            }
            _ => self.failed(&error),
        })
    }

    fn failed(&self, error: &std::io::Error) -> StoreError {
        StoreError::from_io(&self.inner.directory, error)
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        lock(&self.inner.known)
    }

    fn forget(&self) {
        let mut known = self.known();
        known.forgotten += 1;
        // Most writes fail for want of room, which opening the database again needs as well.
        if let Some(mut files) = known.files.take() {
            files.give_back();
        }
    }

    /// Does something with what is known of the files, which is looked up if need be, and with how many times it was forgotten.
    fn with_files<T>(&self, work: impl FnOnce(&mut Files, u64) -> T) -> Result<T, StoreError> {
        let mut known = self.known();
        let forgotten = known.forgotten;
        let files = match known.files.take() {
            Some(files) => files,
            None => self.look()?,
        };
        Ok(work(known.files.insert(files), forgotten))
    }

    fn look(&self) -> Result<Files, StoreError> {
        self.inner.store.heal()?;
        let records = self.inner.store.records(self.inner.table)?.into_iter();
        let places = records.filter_map(|(key, record)| Some((key, Place::from_bytes(&record)?.file))).collect();
        Files::open(self.inner.directory.clone(), places).map_err(|error| self.failed(&error))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
