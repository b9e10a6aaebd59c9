//! The handle: what a node asks of its bulk plane. Everything but [`BulkHandle::shutdown`] returns at once.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use chorus_protocol::rollout::Bulk;
use chorus_protocol::{NodeId, codec};
use libp2p::StreamProtocol;
use tokio_util::sync::DropGuard;

use super::event::{BulkError, SessionId};
use super::meet;
use super::plane::Plane;

/// A running bulk plane. Clones share it; when the last one is dropped, it stops.
#[derive(Clone, Debug)]
pub struct BulkHandle {
    pub(super) plane: Arc<Plane>,
    protocol: StreamProtocol,
    /// Stops the plane with the last handle.
    _alive: Arc<DropGuard>,
}

impl BulkHandle {
    pub(super) fn new(plane: Arc<Plane>, protocol: StreamProtocol) -> Self {
        let alive = Arc::new(plane.stop.clone().drop_guard());
        Self { plane, protocol, _alive: alive }
    }

    /// Opens a session with a node, connecting to it first if need be. `Opened` or `Closed` follows, exactly once; messages that
    /// are sent before that leave after it.
    ///
    /// # Errors
    /// [`BulkError::TooMany`], [`BulkError::Stopped`].
    pub fn open(&self, to: NodeId) -> Result<SessionId, BulkError> {
        let session = self.plane.admit(to, false)?;
        let id = session.id;
        self.plane.spawn(meet::dial(Arc::clone(&self.plane), session, self.protocol.clone()));
        Ok(id)
    }

    /// Queues a message. Messages of one session arrive in the order of the calls. With a token,
    /// [`BulkEvent::Sent`](super::BulkEvent::Sent) follows once the transport has it, unless the session ends before.
    ///
    /// # Errors
    /// [`BulkError::Full`], [`BulkError::Gone`], [`BulkError::TooLarge`], [`BulkError::Stopped`].
    pub fn send(&self, session: SessionId, message: &Bulk, token: Option<u64>) -> Result<(), BulkError> {
        let len = codec::encoded_len(message);
        if len > Bulk::MAX_BYTES {
            return Err(BulkError::TooLarge { len });
        }
        self.plane.queue(session, len, token, || {
            let (head, rollouts) = message.to_parts();
            [Bytes::from(head), Bytes::from_owner(rollouts)].into_iter().filter(|part| !part.is_empty()).collect()
        })
    }

    /// Closes a session once what was queued on it has left, or two seconds later. `Closed` follows.
    pub fn close(&self, session: SessionId) {
        self.plane.close(session);
    }

    /// Returns where this node listens for QUIC.
    #[must_use]
    pub fn listening(&self) -> Vec<SocketAddr> {
        self.plane.quic.listening()
    }

    /// Closes all sessions in good order, as far as that takes no more than some seconds, and stops.
    pub async fn shutdown(self) {
        self.plane.shutdown().await;
    }
}
