//! The bounded queue in front of an engine.
//!
//! A request first takes a [`Ticket`] (refused when `max_queued` wait already), then waits for a
//! slot. Both are given back by dropping them, so a caller that goes away frees its place.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::EngineError;

/// Counts who runs and who waits.
#[derive(Debug, Clone)]
pub(crate) struct Admission {
    slots: Arc<Semaphore>,
    waiting: Arc<AtomicUsize>,
    max_running: usize,
    max_queued: usize,
}

impl Admission {
    pub(crate) fn new(max_running: usize, max_queued: usize) -> Self {
        let max_running = max_running.clamp(1, Semaphore::MAX_PERMITS);
        Self { slots: Arc::new(Semaphore::new(max_running)), waiting: Arc::default(), max_running, max_queued }
    }

    pub(crate) fn running(&self) -> usize {
        self.max_running - self.slots.available_permits()
    }

    pub(crate) fn queued(&self) -> usize {
        // A request that will find a free slot at once holds a ticket for a moment; it is not queued.
        self.waiting.load(Ordering::Relaxed).saturating_sub(self.slots.available_permits())
    }

    pub(crate) fn max_running(&self) -> usize {
        self.max_running
    }

    pub(crate) fn max_queued(&self) -> usize {
        self.max_queued
    }

    /// Takes a place in the queue.
    pub(crate) fn enter(&self) -> Result<Ticket, EngineError> {
        let free = self.slots.available_permits();
        let before = self.waiting.fetch_add(1, Ordering::SeqCst);
        let ticket = Ticket { admission: self.clone() };
        // As many as there are free slots hold a ticket for a moment only.
        if before >= self.max_queued + free {
            return Err(EngineError::Overloaded { queued: before - free, limit: self.max_queued });
        }
        Ok(ticket)
    }
}

/// A place in the queue.
#[derive(Debug)]
pub(crate) struct Ticket {
    admission: Admission,
}

impl Ticket {
    /// Waits for a slot, first come, first served.
    pub(crate) async fn slot(self, cancel: &CancellationToken) -> Result<OwnedSemaphorePermit, EngineError> {
        let slots = Arc::clone(&self.admission.slots);
        tokio::select! {
            biased;
            () = cancel.cancelled() => Err(EngineError::Cancelled),
            permit = slots.acquire_owned() => {
                Ok(permit.expect("the semaphore is never closed"))
            }
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.admission.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[tokio::test]
    async fn one_runs_two_wait_the_fourth_is_refused() {
        let admission = Admission::new(1, 2);
        let cancel = CancellationToken::new();
        let running = admission.enter().unwrap().slot(&cancel).await.unwrap();
        let _second = admission.enter().unwrap();
        let third = admission.enter().unwrap();
        assert_eq!((admission.running(), admission.queued()), (1, 2));
        assert_eq!(admission.enter().unwrap_err(), EngineError::Overloaded { queued: 2, limit: 2 });
        assert_eq!(admission.queued(), 2, "a refused request leaves no trace");
        drop(running);
        let third = third.slot(&cancel).await.unwrap();
        drop(third);
        assert_eq!(admission.running(), 0);
    }

    #[tokio::test]
    async fn cancelling_while_waiting_gives_the_place_back() {
        let admission = Admission::new(1, 1);
        let cancel = CancellationToken::new();
        let _running = admission.enter().unwrap().slot(&cancel).await.unwrap();
        let waiting = admission.enter().unwrap();
        cancel.cancel();
        assert_eq!(waiting.slot(&cancel).await.unwrap_err(), EngineError::Cancelled);
        assert_eq!(admission.queued(), 0);
    }
}
