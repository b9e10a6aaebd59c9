//! Between the node and the disk: batches go to the store's writer thread, completions come back as inputs.

use std::path::{Path, PathBuf};

use chorus_core::{Input, PersistBatch, Restored, StoreInput};
use chorus_protocol::entry::Entry;
use chorus_protocol::{NetworkId, TaskId, Verified};
use chorus_store::{Batch, Completion, Durability, Loaded, Record, Store, StoreError, StoreHandle, SubmitError};
use tokio::sync::mpsc;
use tokio::task::JoinError;

use crate::config::Config;
use crate::error::CommandError;

/// Batches that may wait for the disk.
const WRITE_QUEUE: usize = 1_024;

/// The table of tasks that must outlive the process.
const TASKS: &str = "tasks";

/// The ledger's directory inside the data directory.
fn ledger_dir(data_dir: &Path) -> PathBuf {
    data_dir.join("ledger")
}

/// The node's disk.
pub(crate) struct Disk {
    writer: StoreHandle,
}

impl Disk {
    /// Opens the disk, reads what is on it, and starts its writer.
    pub(crate) fn open(
        data_dir: &Path,
        network: &NetworkId,
        inputs: mpsc::Sender<Input>,
    ) -> Result<(Self, Restored, TaskRecords), StoreError> {
        let store = Store::open(&ledger_dir(data_dir), network)?;
        let (restored, records) = (restored(store.load()?), TaskRecords { store: store.clone() });
        let on_done = move |Completion { batch, result }: Completion| {
            let input = match result {
                Ok(()) => StoreInput::Persisted { batch },
                Err(error) => StoreInput::Failed { batch, reason: error.to_string() },
            };
            // The writer has a thread of its own, so it may wait for the driver. A driver that is gone needs no answer.
            let _ = inputs.blocking_send(Input::Store(input));
        };
        let writer = StoreHandle::spawn(store, WRITE_QUEUE, Box::new(on_done))?;
        Ok((Self { writer }, restored, records))
    }

    /// Hands a batch to the writer, or gives it back when the queue is full.
    pub(crate) fn submit(&self, batch: PersistBatch) -> Result<(), Box<PersistBatch>> {
        let number = batch.batch;
        let write = Batch {
            puts: batch.puts,
            deletes: batch.deletes,
            proofs: batch.proofs,
            pardons: batch.pardons,
            marks: batch.marks,
            records: Vec::new(),
            durability: if batch.durable { Durability::Synced } else { Durability::Relaxed },
        };
        self.writer.submit(number, write).map_err(|refused| {
            let (SubmitError::Full(write) | SubmitError::Closed(write)) = refused else {
                return Box::new(PersistBatch { batch: number, ..PersistBatch::default() });
            };
            Box::new(PersistBatch {
                batch: number,
                puts: write.puts,
                deletes: write.deletes,
                proofs: write.proofs,
                pardons: write.pardons,
                marks: write.marks,
                durable: write.durability == Durability::Synced,
            })
        })
    }

    /// Writes what was handed in, and closes.
    pub(crate) fn close(self) {
        self.writer.shutdown();
    }
}

/// What is on disk of tasks that must outlive the process; the API knows what the records say.
#[derive(Clone)]
pub(crate) struct TaskRecords {
    store: Store,
}

impl TaskRecords {
    /// Writes a record in place of an earlier one, or deletes it. Returns when the disk has it.
    pub(crate) async fn keep(&self, task: TaskId, record: Option<Vec<u8>>) -> Result<(), StoreError> {
        let record = Record { table: TASKS, key: task.as_bytes().to_vec(), value: record };
        let batch = Batch { records: vec![record], durability: Durability::Synced, ..Batch::default() };
        self.off_the_runtime(move |store| store.apply(&batch)).await
    }

    /// Reads all of them.
    pub(crate) async fn kept(&self) -> Result<Vec<(TaskId, Vec<u8>)>, StoreError> {
        let pairs = self.off_the_runtime(|store| store.records(TASKS)).await?;
        let known = |(key, record): (Vec<u8>, Vec<u8>)| Some((TaskId::from_bytes(key.try_into().ok()?), record));
        Ok(pairs.into_iter().filter_map(known).collect())
    }

    /// Waits for the disk on a thread that may wait.
    async fn off_the_runtime<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (store, path) = (self.store.clone(), self.store.path().to_owned());
        let died = |error: JoinError| StoreError::Io { path, detail: error.to_string() };
        tokio::task::spawn_blocking(move || work(&store)).await.map_err(died)?
    }
}

fn restored(loaded: Loaded) -> Restored {
    Restored {
        entries: loaded.entries,
        proofs: loaded.proofs.into_iter().map(|(_, proof)| proof).collect(),
        marks: loaded.marks,
    }
}

/// Reads the entries of a node that does not run.
pub(crate) fn read_stopped(config: &Config) -> Result<Vec<Verified<Entry>>, CommandError> {
    let store =
        Store::open_read_only(&ledger_dir(&config.data_dir), &config.network_id()?).map_err(CommandError::machine)?;
    Ok(store.load().map_err(CommandError::machine)?.entries)
}
