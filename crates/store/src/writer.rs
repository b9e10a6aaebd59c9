//! The thread that writes, so that nobody else waits for the disk.
//!
//! ```text
//!  submit(id, batch) ──bounded queue──▶ writer: take all that wait ─▶ one write, one sync ─▶ on_done(Completion) for each
//! ```

use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::batch::{Batch, Durability};
use crate::error::StoreError;
use crate::store::Store;

/// Batches that are written together at most.
const MAX_GROUP: usize = 512;
/// Bytes that are written together; one batch more may slip in.
const MAX_GROUP_BYTES: usize = 4 << 20;
/// How long more is waited for before a write that need not reach the disk at once. Whoever hands in one batch after another then
/// does not wake this thread for each of them, which costs as much as admitting an entry does without its signature.
const GATHER: Duration = Duration::from_millis(1);

/// What became of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The number under which it was handed in.
    pub batch: u64,
    /// Whether it is on disk, as durably as it asked for.
    pub result: Result<(), StoreError>,
}

/// Why a batch was not taken. It comes back unharmed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SubmitError {
    /// The queue is full: the disk does not keep up.
    #[error("the disk does not keep up; try again when some batches are written")]
    Full(Box<Batch>),
    /// The writer is gone.
    #[error("the writer has stopped; restart the node and look for an earlier error in its log")]
    Closed(Box<Batch>),
}

/// The way to the writing thread. When it is dropped, what was handed in is still written.
#[derive(Debug)]
pub struct StoreHandle {
    queue: Option<SyncSender<(u64, Batch)>>,
    thread: Option<JoinHandle<()>>,
}

impl StoreHandle {
    /// Starts the writer. `capacity` batches may wait; `on_done` is called on the writer's thread, once for each batch, in order.
    ///
    /// # Errors
    /// [`StoreError::Io`] when the system gives no thread.
    pub fn spawn(store: Store, capacity: usize, on_done: Box<dyn Fn(Completion) + Send>) -> Result<Self, StoreError> {
        let (queue, waiting) = sync_channel(capacity.max(1));
        let path = store.path().to_owned();
        let thread = std::thread::Builder::new()
            .name("chorus-store".to_owned())
            .spawn(move || run(&store, &waiting, &*on_done))
            .map_err(|error| StoreError::Io { path, detail: error.to_string() })?;
        Ok(Self { queue: Some(queue), thread: Some(thread) })
    }

    /// Hands in a batch without waiting.
    ///
    /// # Errors
    /// [`SubmitError`] gives the batch back.
    pub fn submit(&self, id: u64, batch: Batch) -> Result<(), SubmitError> {
        let Some(queue) = &self.queue else { return Err(SubmitError::Closed(Box::new(batch))) };
        queue.try_send((id, batch)).map_err(|error| match error {
            TrySendError::Full((_, batch)) => SubmitError::Full(Box::new(batch)),
            TrySendError::Disconnected((_, batch)) => SubmitError::Closed(Box::new(batch)),
        })
    }

    /// Writes what was handed in, and stops.
    pub fn shutdown(mut self) {
        self.stop();
    }

    fn stop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the store's writer died");
        }
    }
}

impl Drop for StoreHandle {
    fn drop(&mut self) {
        self.stop();
    }
}

fn run(store: &Store, waiting: &Receiver<(u64, Batch)>, on_done: &dyn Fn(Completion)) {
    while let Ok((id, batch)) = waiting.recv() {
        if batch.durability == Durability::Relaxed {
            std::thread::sleep(GATHER);
        }
        let (mut ids, mut bytes, mut batches) = (vec![id], batch.approximate_bytes(), vec![batch]);
        while batches.len() < MAX_GROUP && bytes < MAX_GROUP_BYTES {
            let Ok((id, batch)) = waiting.try_recv() else { break };
            bytes += batch.approximate_bytes();
            ids.push(id);
            batches.push(batch);
        }
        let result = store.apply_all(&batches);
        for batch in ids {
            on_done(Completion { batch, result: result.clone() });
        }
    }
}
