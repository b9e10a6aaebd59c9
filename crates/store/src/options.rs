//! How RocksDB is set up: small, because a node without a model must stay under 60 MB resident.

use rocksdb::{BlockBasedOptions, Cache, ColumnFamilyDescriptor, DBCompressionType, DBRecoveryMode, LogLevel, Options};

/// Blocks that are kept uncompressed in memory, of all families together. The ledger lives in memory: reads are rare.
const BLOCK_CACHE_BYTES: usize = 2 << 20;
/// A family's memory before it is written out as a sorted file.
const WRITE_BUFFER_BYTES: usize = 1 << 20;
/// The same for all families together.
const TOTAL_WRITE_BUFFER_BYTES: usize = 4 << 20;
/// The log that must be replayed at the start.
const MAX_LOG_BYTES: u64 = 16 << 20;
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
pub(crate) fn database() -> Options {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    // A record cut off by a crash at the end of the log is normal and was never acknowledged. Damage before the end is not, and
    // must not be taken for the end.
    options.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
    options.set_db_write_buffer_size(TOTAL_WRITE_BUFFER_BYTES);
    options.set_max_total_wal_size(MAX_LOG_BYTES);
    options.set_max_open_files(MAX_OPEN_FILES);
    options.set_max_background_jobs(2);
    options.set_log_level(LogLevel::Warn);
    options.set_keep_log_file_num(2);
    options.set_skip_stats_update_on_db_open(true);
    options
}

/// Returns the families, which share one cache.
pub(crate) fn families<'a>(names: impl IntoIterator<Item = &'a str>) -> Vec<ColumnFamilyDescriptor> {
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
        ColumnFamilyDescriptor::new(name, options)
    };
    names.into_iter().map(family).collect()
}
