//! How RocksDB is set up. The ledger's database is small, because a node without a model must stay under 60 MB resident. One for large
//! values that are soon deleted, as a training room's frames are, has memory for most of them to be deleted before they are written a
//! second time; what outlives that goes to files of its own, which are not rewritten when keys are sorted.

use rocksdb::{BlockBasedOptions, Cache, ColumnFamilyDescriptor, DBCompressionType, DBRecoveryMode, LogLevel, Options};

/// What a database holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Values {
    /// Entries, and records of a few kilobytes.
    Small,
    /// Records of up to some megabytes that are deleted soon.
    Large,
}

/// Blocks that are kept uncompressed in memory, of all families together. The ledger lives in memory: reads are rare.
const BLOCK_CACHE_BYTES: usize = 2 << 20;
/// A family's memory before it is written out as a sorted file.
const WRITE_BUFFER_BYTES: usize = 1 << 20;
/// The same for all families together.
const TOTAL_WRITE_BUFFER_BYTES: usize = 4 << 20;
/// The log that must be replayed at the start.
const MAX_LOG_BYTES: u64 = 16 << 20;
/// The three above for [`Values::Large`].
const LARGE_WRITE_BUFFER_BYTES: usize = 64 << 20;
const LARGE_TOTAL_WRITE_BUFFER_BYTES: usize = 128 << 20;
const LARGE_MAX_LOG_BYTES: u64 = 256 << 20;
/// Logs that are kept to be written over: the disk takes a synced write half as fast again where the file need not grow.
const LARGE_LOGS: usize = 4;
/// A value from which on it goes to a file of its own kind, and how large such a file gets.
const BLOB_BYTES: u64 = 16 << 10;
const BLOB_FILE_BYTES: u64 = 64 << 20;
/// Files held open.
const MAX_OPEN_FILES: i32 = 128;

pub(crate) const META: &str = "meta";
pub(crate) const ENTRIES: &str = "entries";
pub(crate) const PROOFS: &str = "proofs";
pub(crate) const MARKS: &str = "marks";
pub(crate) const RECORDS: &str = "records";
/// Every family but RocksDB's own `default`, which stays empty.
pub(crate) const FAMILIES: [&str; 5] = [META, ENTRIES, PROOFS, MARKS, RECORDS];

/// Returns the options of the database as a whole.
pub(crate) fn database(values: Values) -> Options {
    let (buffers, log) = match values {
        Values::Small => (TOTAL_WRITE_BUFFER_BYTES, MAX_LOG_BYTES),
        Values::Large => (LARGE_TOTAL_WRITE_BUFFER_BYTES, LARGE_MAX_LOG_BYTES),
    };
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    match values {
        // A record cut off by a crash at the end of the log is normal and was never acknowledged. Damage before the end is not, and
        // must not be taken for the end.
        Values::Small => options.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords),
        // A log that is written over ends where the older one's records begin. Should the disk have altered a record before the end, the
        // log ends there: frames that are lost with it are sampled again.
        Values::Large => {
            options.set_recycle_log_file_num(LARGE_LOGS);
            options.set_wal_recovery_mode(DBRecoveryMode::PointInTime);
        }
    }
    options.set_db_write_buffer_size(buffers);
    options.set_max_total_wal_size(log);
    options.set_max_open_files(MAX_OPEN_FILES);
    options.set_max_background_jobs(2);
    options.set_log_level(LogLevel::Warn);
    options.set_keep_log_file_num(2);
    options.set_skip_stats_update_on_db_open(true);
    options
}

/// Returns the families, which share one cache.
pub(crate) fn families<'a>(names: impl IntoIterator<Item = &'a str>, values: Values) -> Vec<ColumnFamilyDescriptor> {
    let cache = Cache::new_lru_cache(BLOCK_CACHE_BYTES);
    let family = |name: &str| {
        let mut blocks = BlockBasedOptions::default();
        blocks.set_block_cache(&cache);
        blocks.set_block_size(16 << 10);
        let mut options = Options::default();
        options.set_block_based_table_factory(&blocks);
        options.set_write_buffer_size(WRITE_BUFFER_BYTES);
        options.set_max_write_buffer_number(2);
        options.set_compression_type(DBCompressionType::Lz4);
        if name == RECORDS && values == Values::Large {
            options.set_write_buffer_size(LARGE_WRITE_BUFFER_BYTES);
            options.set_enable_blob_files(true);
            options.set_min_blob_size(BLOB_BYTES);
            options.set_blob_file_size(BLOB_FILE_BYTES);
            options.set_enable_blob_gc(true);
        }
        ColumnFamilyDescriptor::new(name, options)
    };
    names.into_iter().map(family).collect()
}
