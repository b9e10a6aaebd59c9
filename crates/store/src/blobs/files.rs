//! The files of large values: which value lies where, and which file may be written over.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use chorus_protocol::codec;

use super::Parts;

/// What files to be written over may hold together; more are deleted.
pub(super) const MAX_FREE_BYTES: u64 = 128 << 20;
/// How much longer than twice what it holds a file may be.
const SLACK_BYTES: u64 = 1 << 20;
/// How a record begins that says where its value lies.
const IN_FILE: u8 = 1;
/// Bytes of three integers at most.
const MAX_PLACE_BYTES: usize = 32;

/// A file, and where each value lies in it.
type Written = (File, Vec<(Vec<u8>, Place)>);

/// Part of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) file: u64,
    pub(super) offset: u64,
    pub(super) len: u64,
}

impl Place {
    pub(super) fn to_bytes(self) -> Vec<u8> {
        [&[IN_FILE], &codec::encode(&(self.file, self.offset, self.len))[..]].concat()
    }

    pub(super) fn from_bytes(record: &[u8]) -> Option<Self> {
        let place = record.strip_prefix(&[IN_FILE])?;
        let (file, offset, len) = codec::decode("place", place, MAX_PLACE_BYTES).ok()?;
        Some(Self { file, offset, len })
    }

    pub(super) fn read(self, directory: &Path) -> io::Result<Vec<u8>> {
        let mut file = File::open(path_of(directory, self.file))?;
        // Nothing is set aside for a length that the file does not have.
        if self.offset.saturating_add(self.len) > file.metadata()?.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        file.seek(SeekFrom::Start(self.offset))?;
        let mut value = Vec::with_capacity(usize::try_from(self.len).unwrap_or(0));
        file.take(self.len).read_to_end(&mut value)?;
        Ok(value)
    }
}

/// Which file is used by what.
#[derive(Debug)]
pub(super) struct Files {
    directory: PathBuf,
    /// The file of each value that lies in one.
    places: BTreeMap<Vec<u8>, u64>,
    /// How many values lie in a file, where any do.
    used: BTreeMap<u64, usize>,
    /// Files that no record points at, though one may yet come back.
    emptied: BTreeSet<u64>,
    /// Files to be written over, and how long they are. The last is taken first: the system still has its pages.
    free: Vec<(u64, u64)>,
    next: u64,
}

impl Files {
    pub(super) fn open(directory: PathBuf, places: BTreeMap<Vec<u8>, u64>) -> io::Result<Self> {
        fs::create_dir_all(&directory)?;
        // A kill may have come before that of a file that is here.
        sync_directory(&directory)?;
        directory.parent().map_or(Ok(()), sync_directory)?;
        let mut used = BTreeMap::new();
        for file in places.values() {
            *used.entry(*file).or_default() += 1;
        }
        let mut there = BTreeSet::new();
        for entry in fs::read_dir(&directory)? {
            there.extend(entry?.file_name().to_str().and_then(number_of));
        }
        let next = there.iter().chain(used.keys()).max().map_or(0, |last| last + 1);
        let emptied = there.into_iter().filter(|file| !used.contains_key(file)).collect();
        Ok(Self { directory, places, used, emptied, free: Vec::new(), next })
    }

    /// Returns a file that nobody uses, to be written.
    pub(super) fn take(&mut self) -> u64 {
        let file = self.free.pop().map_or(self.next, |(file, _)| file);
        self.next = self.next.max(file + 1);
        file
    }

    /// Deletes a file that could not be written.
    pub(super) fn give_up(&mut self, file: u64) {
        self.emptied.remove(&file);
        let _ = fs::remove_file(path_of(&self.directory, file));
    }

    /// Deletes the files that are kept to be written over: the disk needs the room.
    pub(super) fn give_back(&mut self) {
        for (file, _) in self.free.drain(..) {
            let _ = fs::remove_file(path_of(&self.directory, file));
        }
    }

    /// Notes where a value lies now, if in a file.
    pub(super) fn point(&mut self, key: Vec<u8>, file: Option<u64>) {
        if let Some(file) = file {
            *self.used.entry(file).or_default() += 1;
        }
        let before = match file {
            Some(file) => self.places.insert(key, file),
            None => self.places.remove(&key),
        };
        let Some(before) = before else { return };
        let left = self.used.get(&before).map_or(0, |values| values - 1);
        if left == 0 {
            self.used.remove(&before);
            self.emptied.insert(before);
        } else {
            self.used.insert(before, left);
        }
    }

    /// Notes that what was deleted until now is so on the disk.
    pub(super) fn synced(&mut self) {
        for file in std::mem::take(&mut self.emptied) {
            // One that is not there was deleted by somebody else, which is no harm.
            if let Ok(found) = fs::metadata(path_of(&self.directory, file)) {
                self.free.push((file, found.len()));
            }
        }
        while self.free.iter().map(|(_, len)| len).sum::<u64>() > MAX_FREE_BYTES {
            let (file, _) = self.free.remove(0);
            let _ = fs::remove_file(path_of(&self.directory, file));
        }
    }
}

/// Writes values one behind the other into a file, and returns it with where each lies.
pub(super) fn write(directory: &Path, number: u64, values: Vec<(Vec<u8>, Parts)>) -> io::Result<Written> {
    let path = path_of(directory, number);
    let fresh = !path.exists();
    let mut file = OpenOptions::new().create(true).write(true).truncate(false).open(path)?;
    if fresh {
        sync_directory(directory)?;
    }
    let mut places = Vec::with_capacity(values.len());
    let mut offset = 0;
    for (key, value) in values {
        let mut len = 0;
        for part in value {
            file.write_all(&part)?;
            len += part.len() as u64;
        }
        places.push((key, Place { file: number, offset, len }));
        offset += len;
    }
    // What a file held before costs room for as long as what it holds now lives.
    if file.metadata()?.len() > 2 * offset + SLACK_BYTES {
        file.set_len(offset)?;
    }
    Ok((file, places))
}

/// A file's name is on the disk when its directory is.
#[cfg(unix)]
fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

#[cfg(not(unix))]
fn sync_directory(_: &Path) -> io::Result<()> {
    Ok(())
}

fn path_of(directory: &Path, file: u64) -> PathBuf {
    directory.join(format!("{file:06}.blob"))
}

fn number_of(name: &str) -> Option<u64> {
    name.strip_suffix(".blob")?.parse().ok()
}
