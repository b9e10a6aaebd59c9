//! The thread that waits for the disk, so that whoever stages values does not.
//!
//! ```text
//!  stage(next) … ─▶ commit(ticket, staged) ──one at a time──▶ thread: the disk has them ─▶ on_done(ticket, result)
//! ```

use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use super::{Blobs, Staged};
use crate::error::StoreError;

/// Commits in the order in which it is asked. When it is dropped, what it was asked is still done.
#[derive(Debug)]
pub struct Committer<T> {
    queue: Option<SyncSender<(T, Staged)>>,
    thread: Option<JoinHandle<()>>,
}

impl<T: Send + 'static> Committer<T> {
    /// Starts the thread, on which `on_done` is called with each ticket.
    ///
    /// # Errors
    /// [`StoreError::Io`] when the system gives no thread.
    pub fn spawn(
        blobs: Blobs,
        mut on_done: impl FnMut(T, Result<(), StoreError>) + Send + 'static,
    ) -> Result<Self, StoreError> {
        // Nothing waits in the channel: values are staged while others are committed, and no more than that.
        let (queue, waiting) = sync_channel::<(T, Staged)>(0);
        let path = blobs.inner.directory.clone();
        let work = move || {
            while let Ok((ticket, staged)) = waiting.recv() {
                let committed = blobs.commit(staged);
                on_done(ticket, committed);
            }
        };
        let thread = std::thread::Builder::new().name("chorus-commit".to_owned()).spawn(work);
        let thread = thread.map_err(|error| StoreError::Io { path, detail: error.to_string() })?;
        Ok(Self { queue: Some(queue), thread: Some(thread) })
    }

    /// Asks for a commit, and waits until the thread is done with the one before.
    pub fn commit(&self, ticket: T, staged: Staged) {
        if let Some(queue) = &self.queue
            && queue.send((ticket, staged)).is_err()
        {
            tracing::error!(
                "the thread that waits for the disk is gone; restart the node and look for an earlier error in its log"
            );
        }
    }
}

impl<T> Drop for Committer<T> {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that waits for the disk died");
        }
    }
}
