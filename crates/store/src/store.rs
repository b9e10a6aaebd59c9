//! Opening, writing and reading the database.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use chorus_protocol::entry::{Entry, Equivocation};
use chorus_protocol::limits::{ENVELOPE_OVERHEAD_BYTES, MAX_ENTRY_BYTES};
use chorus_protocol::{NetworkId, NodeId, Received, Verified, codec};
use rocksdb::{ColumnFamily, DB, IteratorMode, ReadOptions, WriteBatch, WriteOptions};

use crate::batch::{Batch, Durability, Loaded, Record};
use crate::error::StoreError;
use crate::options::{self, ENTRIES, MARKS, META, PROOFS, RECORDS};

/// The layout on disk. A change that this program could not read raises it.
const SCHEMA: u32 = 1;
const SCHEMA_KEY: &[u8] = b"schema";
const NETWORK_KEY: &[u8] = b"network";
/// An entry's envelope on disk.
const MAX_ENTRY_VALUE: usize = MAX_ENTRY_BYTES + ENVELOPE_OVERHEAD_BYTES;
/// A proof on disk.
const MAX_PROOF_VALUE: usize = 2 * MAX_ENTRY_VALUE;
/// Threads that decode entries at the start.
const MAX_LOAD_THREADS: usize = 8;

type Pairs = Vec<(Box<[u8]>, Box<[u8]>)>;

/// One node's data on disk. Clones share it; it closes with the last of them.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    network: NetworkId,
    writable: bool,
    /// `None` after a failed write, until the next call opens it again: RocksDB refuses everything after a failed write to its
    /// log, and opening is how it recovers.
    db: RwLock<Option<DB>>,
}

impl Store {
    /// Opens the directory of a node, and creates it if there is none.
    ///
    /// # Errors
    /// [`StoreError`] says what is wrong with the directory and what to do.
    pub fn open(path: &Path, network: &NetworkId) -> Result<Self, StoreError> {
        std::fs::create_dir_all(path)
            .map_err(|error| StoreError::Io { path: path.to_owned(), detail: error.to_string() })?;
        let db = open_writable(path, network)?;
        Ok(Self::new(path, network, Some(db), true))
    }

    /// Opens the directory to look at it, also while it cannot be written. Meant for a stopped node; of a running one it shows
    /// the moment of opening.
    ///
    /// # Errors
    /// [`StoreError`] says what is wrong with the directory and what to do.
    pub fn open_read_only(path: &Path, network: &NetworkId) -> Result<Self, StoreError> {
        if !path.join("CURRENT").is_file() {
            return Err(StoreError::Missing { path: path.to_owned() });
        }
        let fail = |error| StoreError::from_rocksdb(path, &error);
        let names = DB::list_cf(&options::database(), path).map_err(fail)?;
        let families = options::families(names.iter().map(String::as_str));
        let db = DB::open_cf_descriptors_read_only(&options::database(), path, families, false).map_err(fail)?;
        check_meta(&db, path, network)?;
        Ok(Self::new(path, network, Some(db), false))
    }

    fn new(path: &Path, network: &NetworkId, db: Option<DB>, writable: bool) -> Self {
        let inner = Inner { path: path.to_owned(), network: network.clone(), writable, db: RwLock::new(db) };
        Self { inner: Arc::new(inner) }
    }

    /// Returns the directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// Writes a batch, whole or not at all.
    ///
    /// # Errors
    /// [`StoreError`]. After one, parts of the batch are never visible without the rest; the next call opens the database again.
    pub fn apply(&self, batch: &Batch) -> Result<(), StoreError> {
        self.apply_all(std::slice::from_ref(batch))
    }

    /// Writes several batches, in their order, as one. Synced if one of them must be.
    ///
    /// # Errors
    /// As [`Store::apply`].
    pub fn apply_all(&self, batches: &[Batch]) -> Result<(), StoreError> {
        if !self.inner.writable {
            return Err(StoreError::ReadOnly);
        }
        self.heal()?;
        let written = self.with_db(|db| {
            let mut write = WriteBatch::default();
            for batch in batches {
                fill(db, &mut write, batch, &self.inner.path)?;
            }
            let mut how = WriteOptions::default();
            how.set_sync(batches.iter().any(|batch| batch.durability == Durability::Synced));
            db.write_opt(write, &how).map_err(|error| StoreError::from_rocksdb(&self.inner.path, &error))
        });
        if let Err(error) = &written {
            tracing::warn!(%error, "a write failed; the database is opened again before the next one");
            *self.inner.db.write().unwrap_or_else(PoisonError::into_inner) = None;
        }
        written
    }

    /// Opens the database again after a failed write.
    pub(crate) fn heal(&self) -> Result<(), StoreError> {
        let mut db = self.inner.db.write().unwrap_or_else(PoisonError::into_inner);
        if db.is_none() {
            *db = Some(open_writable(&self.inner.path, &self.inner.network)?);
        }
        Ok(())
    }

    /// Leaves the store as a failed write leaves it.
    #[cfg(test)]
    pub(crate) fn break_for_test(&self) {
        *self.inner.db.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn with_db<T>(&self, work: impl FnOnce(&DB) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let guard = self.inner.db.read().unwrap_or_else(PoisonError::into_inner);
        match &*guard {
            Some(db) => work(db),
            None => Err(StoreError::Io {
                path: self.inner.path.clone(),
                detail: "closed after a failed write; the next write opens it again".to_owned(),
            }),
        }
    }

    /// Reads everything of the ledger. Signatures are not verified again; checksums are.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] when something cannot be read.
    pub fn load(&self) -> Result<Loaded, StoreError> {
        let (entries, proofs, marks) =
            self.with_db(|db| Ok((self.pairs(db, ENTRIES)?, self.pairs(db, PROOFS)?, self.pairs(db, MARKS)?)))?;
        let proofs = proofs.iter().map(|(key, value)| {
            let proof = codec::decode::<Equivocation>("proof", value, MAX_PROOF_VALUE);
            Ok((self.node_id(key)?, proof.map_err(|error| self.corrupt("a proof", &error))?))
        });
        let marks = marks.into_iter().map(|(key, value)| Ok((self.node_id(&key)?, value.into_vec())));
        Ok(Loaded {
            entries: self.decode_entries(&entries)?,
            proofs: proofs.collect::<Result<_, StoreError>>()?,
            marks: marks.collect::<Result<_, StoreError>>()?,
        })
    }

    /// Decodes entries on all processors: a public key is decompressed for each, which is most of the work.
    fn decode_entries(&self, pairs: &Pairs) -> Result<Vec<Verified<Entry>>, StoreError> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_LOAD_THREADS);
        let share = pairs.len().div_ceil(threads).max(1);
        let decode = |chunk: &[(Box<[u8]>, Box<[u8]>)]| -> Result<Vec<_>, StoreError> {
            chunk.iter().map(|(_, value)| self.decode_entry(value)).collect()
        };
        let parts = std::thread::scope(|scope| {
            let workers: Vec<_> = pairs.chunks(share).map(|chunk| scope.spawn(move || decode(chunk))).collect();
            let lost = |_| Err(self.corrupt("an entry", &"a decoder died"));
            workers.into_iter().map(|worker| worker.join().unwrap_or_else(lost)).collect::<Result<Vec<_>, _>>()
        })?;
        Ok(parts.into_iter().flatten().collect())
    }

    fn decode_entry(&self, value: &[u8]) -> Result<Verified<Entry>, StoreError> {
        codec::decode::<Received<Entry>>("stored entry", value, MAX_ENTRY_VALUE)
            .map_err(|error| self.corrupt("an entry", &error))?
            .trust_own_disk(&self.inner.network)
            .map_err(|error| self.corrupt("an entry", &error))
    }

    fn node_id(&self, key: &[u8]) -> Result<NodeId, StoreError> {
        let bytes = key.try_into().map_err(|error| self.corrupt("a key", &error))?;
        NodeId::from_bytes(bytes).map_err(|error| self.corrupt("a key", &error))
    }

    fn corrupt(&self, what: &str, error: &dyn std::fmt::Display) -> StoreError {
        StoreError::Corrupt { path: self.inner.path.clone(), detail: format!("{what} cannot be read: {error}") }
    }

    fn pairs(&self, db: &DB, name: &str) -> Result<Pairs, StoreError> {
        self.scan_from(db, name, IteratorMode::Start, |_| true)
    }

    fn scan_from(
        &self,
        db: &DB,
        name: &str,
        mode: IteratorMode<'_>,
        wanted: impl Fn(&[u8]) -> bool,
    ) -> Result<Pairs, StoreError> {
        let mut how = ReadOptions::default();
        how.fill_cache(false);
        how.set_readahead_size(1 << 20);
        let fail = |error| StoreError::from_rocksdb(&self.inner.path, &error);
        db.iterator_cf_opt(family(db, name, &self.inner.path)?, how, mode)
            .take_while(|pair| pair.as_ref().map_or(true, |(key, _)| wanted(key)))
            .map(|pair| pair.map_err(fail))
            .collect()
    }

    /// Reads one record of a table.
    ///
    /// # Errors
    /// [`StoreError`] when the disk cannot be read.
    pub fn record(&self, table: &str, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.with_db(|db| {
            let family = family(db, RECORDS, &self.inner.path)?;
            db.get_cf(family, record_key(table, key))
                .map_err(|error| StoreError::from_rocksdb(&self.inner.path, &error))
        })
    }

    /// Reads a whole table, by key.
    ///
    /// # Errors
    /// [`StoreError`] when the disk cannot be read.
    pub fn records(&self, table: &str) -> Result<Vec<(Vec<u8>, Vec<u8>)>, StoreError> {
        let prefix = record_key(table, &[]);
        let start = IteratorMode::From(&prefix, rocksdb::Direction::Forward);
        let pairs = self.with_db(|db| self.scan_from(db, RECORDS, start, |key| key.starts_with(&prefix)))?;
        Ok(pairs.into_iter().map(|(key, value)| (key[prefix.len()..].to_vec(), value.into_vec())).collect())
    }
}

fn open_writable(path: &Path, network: &NetworkId) -> Result<DB, StoreError> {
    let fail = |error| StoreError::from_rocksdb(path, &error);
    let mut names: BTreeSet<String> = options::FAMILIES.iter().map(|name| (*name).to_owned()).collect();
    // A family that this program does not know must be opened too, to find out whose it is.
    if path.join("CURRENT").is_file() {
        names.extend(DB::list_cf(&options::database(), path).map_err(fail)?);
    }
    let families = options::families(names.iter().map(String::as_str));
    let db = DB::open_cf_descriptors(&options::database(), path, families).map_err(fail)?;
    if db.get_cf(family(&db, META, path)?, SCHEMA_KEY).map_err(fail)?.is_none() {
        let meta = family(&db, META, path)?;
        let mut write = WriteBatch::default();
        write.put_cf(meta, SCHEMA_KEY, SCHEMA.to_le_bytes());
        write.put_cf(meta, NETWORK_KEY, network.as_str());
        let mut how = WriteOptions::default();
        how.set_sync(true);
        db.write_opt(write, &how).map_err(fail)?;
    }
    check_meta(&db, path, network)?;
    Ok(db)
}

fn check_meta(db: &DB, path: &Path, network: &NetworkId) -> Result<(), StoreError> {
    let fail = |error| StoreError::from_rocksdb(path, &error);
    let Some(meta) = db.cf_handle(META) else { return Err(StoreError::Missing { path: path.to_owned() }) };
    let schema = db.get_cf(meta, SCHEMA_KEY).map_err(fail)?;
    let found = schema.and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes);
    if found != SCHEMA {
        return Err(StoreError::Schema { path: path.to_owned(), found, supported: SCHEMA });
    }
    let found = db.get_cf(meta, NETWORK_KEY).map_err(fail)?.unwrap_or_default();
    if found != network.as_str().as_bytes() {
        return Err(StoreError::WrongNetwork {
            path: path.to_owned(),
            found: String::from_utf8_lossy(&found).into_owned(),
            expected: network.to_string(),
        });
    }
    Ok(())
}

fn family<'db>(db: &'db DB, name: &str, path: &Path) -> Result<&'db ColumnFamily, StoreError> {
    db.cf_handle(name).ok_or_else(|| StoreError::Corrupt {
        path: path.to_owned(),
        detail: format!("it has no column family '{name}'"),
    })
}

fn entry_key(author: &NodeId, seq: u64) -> [u8; 40] {
    let mut key = [0; 40];
    key[..32].copy_from_slice(author.as_bytes());
    key[32..].copy_from_slice(&seq.to_be_bytes());
    key
}

/// The table's length stands first, so that no table is a prefix of another.
fn record_key(table: &str, key: &[u8]) -> Vec<u8> {
    let table = &table.as_bytes()[..table.len().min(usize::from(u8::MAX))];
    let length = u8::try_from(table.len()).unwrap_or(u8::MAX);
    [&[length], table, key].concat()
}

fn fill(db: &DB, write: &mut WriteBatch, batch: &Batch, path: &Path) -> Result<(), StoreError> {
    let entries = family(db, ENTRIES, path)?;
    for entry in &batch.puts {
        write.put_cf(entries, entry_key(&entry.author(), entry.seq), codec::encode(&entry.to_wire()));
    }
    for (author, seq) in &batch.deletes {
        write.delete_cf(entries, entry_key(author, *seq));
    }
    let proofs = family(db, PROOFS, path)?;
    for (author, proof) in &batch.proofs {
        write.put_cf(proofs, author.as_bytes(), codec::encode(proof));
    }
    for author in &batch.pardons {
        write.delete_cf(proofs, author.as_bytes());
    }
    let marks = family(db, MARKS, path)?;
    for (author, mark) in &batch.marks {
        match mark {
            Some(mark) => write.put_cf(marks, author.as_bytes(), mark),
            None => write.delete_cf(marks, author.as_bytes()),
        }
    }
    let records = family(db, RECORDS, path)?;
    for Record { table, key, value } in &batch.records {
        match value {
            Some(value) => write.put_cf(records, record_key(table, key), value),
            None => write.delete_cf(records, record_key(table, key)),
        }
    }
    Ok(())
}
