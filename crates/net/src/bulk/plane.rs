//! The plane itself: which sessions there are, what waits on them, and the tasks that run them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use chorus_protocol::NodeId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::BulkConfig;
use super::event::{BulkError, BulkEvent, CloseReason, SessionId};
use super::quic::{Nonce, Quic};
use super::wire::QuicWire;
use crate::handle::NetHandle;

/// Sessions that one node may have opened here.
const MAX_INBOUND_PER_NODE: usize = 4;
/// Messages that may wait on one session, however small they are.
const MAX_QUEUED: usize = 4096;
/// What a small message costs besides its bytes.
pub(super) const OVERHEAD_BYTES: usize = 128;
/// Sessions are given so long to end in good order.
pub(super) const FAREWELL: Duration = Duration::from_secs(2);

/// A message that waits to leave, and its share of the bytes that may wait.
#[derive(Debug)]
pub(super) struct Outgoing {
    /// Its bytes, in one part or two.
    pub(super) parts: Vec<Bytes>,
    pub(super) token: Option<u64>,
    /// Held until the message is dropped.
    _share: Option<OwnedSemaphorePermit>,
}

impl Outgoing {
    /// No message, only a sign of life.
    pub(super) const fn sign() -> Self {
        Self { parts: Vec::new(), token: None, _share: None }
    }

    /// How many bytes it has.
    pub(super) fn len(&self) -> usize {
        self.parts.iter().map(Bytes::len).sum()
    }
}

/// How a node reaches one session.
#[derive(Clone, Debug)]
struct Entry {
    node: NodeId,
    inbound: bool,
    queue: mpsc::Sender<Outgoing>,
    room: Arc<Semaphore>,
    closing: CancellationToken,
}

/// What a session's task holds.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) id: SessionId,
    pub(super) node: NodeId,
    pub(super) inbound: bool,
    pub(super) queue: mpsc::Receiver<Outgoing>,
    pub(super) closing: CancellationToken,
}

/// A session that waits for its QUIC connection.
#[derive(Debug)]
struct Expected {
    node: NodeId,
    wire: oneshot::Sender<QuicWire>,
}

#[derive(Debug, Default)]
struct Table {
    last: u64,
    sessions: BTreeMap<SessionId, Entry>,
    expected: BTreeMap<Nonce, Expected>,
}

/// Everything that handles and tasks share.
#[derive(Debug)]
pub(super) struct Plane {
    pub(super) cfg: BulkConfig,
    pub(super) net: NetHandle,
    pub(super) quic: Quic,
    table: Mutex<Table>,
    events: mpsc::Sender<BulkEvent>,
    /// Sessions end in good order.
    closing: CancellationToken,
    /// Everything ends.
    pub(super) stop: CancellationToken,
    tasks: TaskTracker,
}

impl Plane {
    pub(super) fn new(cfg: BulkConfig, net: NetHandle, quic: Quic, events: mpsc::Sender<BulkEvent>) -> Self {
        Self {
            cfg,
            net,
            quic,
            table: Mutex::default(),
            events,
            closing: CancellationToken::new(),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Nothing panics while it holds the lock, and the table is whole between any two statements.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a task until it is done or everything stops.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = task => {}
            }
        });
    }

    /// Makes room for a session with a node.
    pub(super) fn admit(&self, node: NodeId, inbound: bool) -> Result<Session, BulkError> {
        if self.closing.is_cancelled() || self.stop.is_cancelled() {
            return Err(BulkError::Stopped);
        }
        let mut table = self.table();
        let max = self.cfg.max_sessions;
        let theirs = table.sessions.values().filter(|entry| entry.inbound && entry.node == node);
        if table.sessions.len() >= max || (inbound && theirs.count() >= MAX_INBOUND_PER_NODE) {
            return Err(BulkError::TooMany { max });
        }
        table.last += 1;
        let id = SessionId(table.last);
        let (sender, queue) = mpsc::channel(MAX_QUEUED);
        let room = Arc::new(Semaphore::new(self.cfg.send_bytes));
        let closing = self.closing.child_token();
        table.sessions.insert(id, Entry { node, inbound, queue: sender, room, closing: closing.clone() });
        Ok(Session { id, node, inbound, queue, closing })
    }

    /// Queues a message of `len` bytes, which `encode` makes once there is room for it.
    pub(super) fn queue(
        &self,
        session: SessionId,
        len: usize,
        token: Option<u64>,
        encode: impl FnOnce() -> Vec<Bytes>,
    ) -> Result<(), BulkError> {
        if self.stop.is_cancelled() {
            return Err(BulkError::Stopped);
        }
        let entry = self.table().sessions.get(&session).cloned().ok_or(BulkError::Gone)?;
        if entry.closing.is_cancelled() {
            return Err(BulkError::Gone);
        }
        let cost = u32::try_from(len + OVERHEAD_BYTES).map_err(|_| BulkError::TooLarge { len })?;
        let share = entry.room.try_acquire_many_owned(cost).map_err(|_| BulkError::Full)?;
        let slot = entry.queue.try_reserve().map_err(|error| match error {
            mpsc::error::TrySendError::Full(()) => BulkError::Full,
            mpsc::error::TrySendError::Closed(()) => BulkError::Gone,
        })?;
        slot.send(Outgoing { parts: encode(), token, _share: Some(share) });
        Ok(())
    }

    /// Lets a session end in good order.
    pub(super) fn close(&self, session: SessionId) {
        if let Some(entry) = self.table().sessions.get(&session) {
            entry.closing.cancel();
        }
    }

    /// Forgets a session that never opened, and that nobody knows of.
    pub(super) fn forget(&self, session: SessionId) {
        self.table().sessions.remove(&session);
    }

    /// Forgets a session and tells the node why it ended. What this node asked for itself is the reason, whatever came of it.
    pub(super) async fn end(&self, session: &Session, reason: CloseReason) {
        let reason = match reason {
            _ if self.closing.is_cancelled() => CloseReason::Stopped,
            _ if session.closing.is_cancelled() => CloseReason::Asked,
            reason => reason,
        };
        tracing::debug!(session = %session.id, peer = %session.node.fmt_short(), %reason, "a bulk session ended");
        self.forget(session.id);
        self.emit(BulkEvent::Closed { session: session.id, node: session.node, reason }).await;
    }

    /// Passes an event on, as soon as there is room for it. A node that hears nothing more has stopped.
    pub(super) async fn emit(&self, event: BulkEvent) {
        if self.events.send(event).await.is_err() {
            self.stop.cancel();
        }
    }

    /// Waits for the QUIC connection of a session; forgets about it when the guard is dropped.
    pub(super) fn expect(self: &Arc<Self>, node: NodeId, nonce: Nonce) -> Option<Expecting> {
        let (wire, connected) = oneshot::channel();
        let mut table = self.table();
        if table.expected.contains_key(&nonce) {
            return None;
        }
        table.expected.insert(nonce, Expected { node, wire });
        Some(Expecting { plane: Arc::clone(self), nonce, connected })
    }

    /// Returns who waits for the connection that `node` made for the session with that number. Once only.
    pub(super) fn claim(&self, node: NodeId, nonce: &Nonce) -> Option<oneshot::Sender<QuicWire>> {
        let mut table = self.table();
        if table.expected.get(nonce)?.node != node {
            return None;
        }
        table.expected.remove(nonce).map(|expected| expected.wire)
    }

    /// Ends every session in good order if that is quick, then everything else.
    pub(super) async fn shutdown(&self) {
        self.closing.cancel();
        self.tasks.close();
        let ended = async {
            while !self.table().sessions.is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::select! {
            () = ended => {}
            () = tokio::time::sleep(FAREWELL) => {}
            () = self.stop.cancelled() => {}
        }
        self.stop.cancel();
        self.tasks.wait().await;
        self.quic.close(FAREWELL / 4).await;
    }
}

/// Somebody waits for the QUIC connection of a session.
#[derive(Debug)]
pub(super) struct Expecting {
    plane: Arc<Plane>,
    nonce: Nonce,
    pub(super) connected: oneshot::Receiver<QuicWire>,
}

impl Drop for Expecting {
    fn drop(&mut self) {
        self.plane.table().expected.remove(&self.nonce);
    }
}
