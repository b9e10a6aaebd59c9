//! The bulk plane: ordered, encrypted sessions between two nodes, for what is too large for gossip and direct messages.
//!
//! ```text
//!            BulkHandle ── open, send, close ──▶ ┌─────────┐ ◀── stream: who, which ports, which way ──▶
//!   node                                         │ session │                                              peer
//!            BulkEvent ◀────────(bounded)─────── └─────────┘ ◀═══ frames: QUIC, or the same stream ════▶
//! ```
//!
//! 1. A session begins with a stream on the control connection, which has proven both nodes' keys ([`meet`]).
//! 2. The dialler tries QUIC at the ports that the acceptor named ([`quic`], [`tls`]); if nobody answers there, the session stays
//!    on the stream. Which it is makes no difference but in speed.
//! 3. Messages stand behind their length ([`wire`]). The plane decodes them, and knows nothing of what they mean.
//! 4. Everything is bounded: what waits to leave (a full queue is [`BulkError::Full`]), what waits for the node (then nothing is
//!    read, and the peer's window closes), sessions, handshakes.
//! 5. A peer that is gone is noticed within five seconds.
//!
//! The bytes are specified in `protocol/spec/rollout.md`.

mod event;
mod handle;
mod meet;
mod plane;
mod quic;
mod session;
mod tls;
mod wire;

use std::net::SocketAddr;
use std::sync::Arc;

use chorus_protocol::SecretKey;
use chorus_protocol::limits::MAX_BULK_BYTES;
use tokio::sync::mpsc;

pub use self::event::{BulkError, BulkEvent, CloseReason, SessionId, Way};
pub use self::handle::BulkHandle;
use self::plane::{OVERHEAD_BYTES, Plane};
use self::quic::{MAX_PORTS, Quic};
use self::tls::Identity;
use crate::behaviour::names::Names;
use crate::error::{ConfigError, NetError};
use crate::handle::NetHandle;

/// What a node may decide about its bulk plane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BulkConfig {
    /// Where to listen for QUIC (UDP). Port 0 takes any free port; without an address, sessions run over the control connection
    /// alone, in both directions.
    pub listen: Vec<SocketAddr>,
    /// Sessions altogether, in both directions. One may hold some 8 MiB in the transport, and a message.
    pub max_sessions: usize,
    /// Bytes that may wait to leave on one session.
    pub send_bytes: usize,
    /// Messages and other events that may wait for the node, over all sessions.
    pub event_queue: usize,
}

impl Default for BulkConfig {
    fn default() -> Self {
        Self { listen: Vec::new(), max_sessions: 256, send_bytes: 16 << 20, event_queue: 64 }
    }
}

impl BulkConfig {
    /// Checks what the types cannot.
    ///
    /// # Errors
    /// [`ConfigError`] with the field to change.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let error = |field, why: String| Err(ConfigError { field, why });
        if self.listen.len() > MAX_PORTS {
            return error("bulk.listen", format!("at most {MAX_PORTS} addresses"));
        }
        if self.max_sessions == 0 || self.event_queue == 0 {
            return error("bulk.max-sessions", "neither this nor bulk.event-queue may be 0".to_owned());
        }
        let bounds = MAX_BULK_BYTES + OVERHEAD_BYTES..=tokio::sync::Semaphore::MAX_PERMITS;
        if !bounds.contains(&self.send_bytes) {
            return error("bulk.send-bytes", format!("must hold one message of the largest size ({})", bounds.start()));
        }
        Ok(())
    }
}

/// The bulk plane of one node.
#[derive(Debug)]
pub struct BulkPlane;

impl BulkPlane {
    /// Binds the sockets and starts to accept sessions, beside a network that runs already. The plane runs until
    /// [`BulkHandle::shutdown`], or until all handles, or the receiver of events, are dropped.
    ///
    /// # Errors
    /// [`NetError::Config`], [`NetError::PortInUse`], [`NetError::Listen`], and [`NetError::Setup`] when the network has a bulk
    /// plane already.
    #[allow(clippy::unused_async, reason = "sockets and tasks need a Tokio runtime, and an async fn says so")]
    pub async fn start(
        cfg: BulkConfig,
        key: &SecretKey,
        net: &NetHandle,
    ) -> Result<(BulkHandle, mpsc::Receiver<BulkEvent>), NetError> {
        cfg.validate()?;
        let protocol = Names::new(net.network()).bulk;
        let quic = Quic::bind(&cfg.listen, Identity::new(key, net.network()))?;
        let streams = net
            .streams()
            .accept(protocol.clone())
            .map_err(|error| NetError::Setup { what: format!("this network has a bulk plane already: {error}") })?;
        let (events_tx, events_rx) = mpsc::channel(cfg.event_queue);
        let plane = Arc::new(Plane::new(cfg, net.clone(), quic, events_tx));
        plane.spawn(meet::accept_streams(Arc::clone(&plane), streams));
        for door in &plane.quic.doors {
            plane.spawn(meet::accept_quic(Arc::clone(&plane), door.clone()));
        }
        Ok((BulkHandle::new(plane, protocol), events_rx))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests;
