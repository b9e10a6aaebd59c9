//! What the bulk plane tells its node, and why it refuses.

use std::fmt;

use chorus_protocol::NodeId;
use chorus_protocol::limits::MAX_BULK_BYTES;
use chorus_protocol::rollout::Bulk;

/// Names one session, within this process only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub(crate) u64);

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "session {}", self.0)
    }
}

/// What carries a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// A QUIC connection of its own.
    Quic,
    /// A stream on the connection that gossip and direct messages use.
    Stream,
}

/// Something happened on the bulk plane. A session's events come in order: `Opened` first, unless it never opened; `Closed` last.
#[derive(Debug)]
pub enum BulkEvent {
    /// A session is open in both directions.
    Opened {
        /// The session.
        session: SessionId,
        /// The node at the other end, which proved its key.
        node: NodeId,
        /// What carries it.
        way: Way,
        /// Whether the other node opened it.
        inbound: bool,
    },
    /// A message arrived.
    Message {
        /// The session.
        session: SessionId,
        /// The node at the other end.
        node: NodeId,
        /// The message: well-formed, but nothing in it has been checked.
        message: Bulk,
    },
    /// A message was handed to the transport, which means that there is room for more, not that it arrived.
    Sent {
        /// The session.
        session: SessionId,
        /// As given to [`BulkHandle::send`](super::BulkHandle::send).
        token: u64,
    },
    /// The session is over, or did not come about. What was not `Sent` yet is lost.
    Closed {
        /// The session.
        session: SessionId,
        /// The node at the other end.
        node: NodeId,
        /// Why.
        reason: CloseReason,
    },
}

/// Why a session ended, or did not come about.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CloseReason {
    /// This node closed it.
    #[error("closed by this node")]
    Asked,
    /// The bulk plane of this node stops.
    #[error("the bulk plane of this node stopped")]
    Stopped,
    /// The peer closed it, in good order.
    #[error("closed by the peer")]
    Remote,
    /// There is no way to the peer.
    #[error("no connection to the peer: {why}")]
    Unreachable {
        /// What was tried last.
        why: &'static str,
    },
    /// The peer does not speak the bulk plane's protocol, or does not yet.
    #[error("the peer has no bulk plane of this network and version")]
    Unsupported,
    /// The peer has as many sessions as it wants.
    #[error("the peer has too many sessions")]
    Busy,
    /// Nothing came from the peer for some seconds.
    #[error("the peer fell silent")]
    Silent,
    /// The connection broke.
    #[error("the connection broke: {what}")]
    Lost {
        /// What the transport said.
        what: String,
    },
    /// The peer sent what no message is.
    #[error("the peer broke the protocol: {what}")]
    Protocol {
        /// What was wrong.
        what: String,
    },
    /// The peer says the same of this node.
    #[error("the peer says that this node broke the protocol: {what}")]
    Accused {
        /// What the peer said was wrong, shortened.
        what: String,
    },
}

impl CloseReason {
    /// Whether a new session with the same node may do better, after a while.
    #[must_use]
    pub const fn is_retryable(&self) -> bool {
        !matches!(self, Self::Asked | Self::Stopped | Self::Protocol { .. } | Self::Accused { .. })
    }

    /// Whether the peer is to blame.
    #[must_use]
    pub const fn merits_ban(&self) -> bool {
        matches!(self, Self::Protocol { .. })
    }
}

/// Why the bulk plane did not take a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BulkError {
    /// As much waits for the session's peer as may wait; send it again after a [`BulkEvent::Sent`].
    #[error("too much waits for the peer; send it again when something has left")]
    Full,
    /// There is no such session any more.
    #[error("the session is closed; open another one")]
    Gone,
    /// The bulk plane has stopped.
    #[error("the bulk plane has stopped")]
    Stopped,
    /// The message is larger than any may be.
    #[error("a message of {len} bytes is too large (at most {MAX_BULK_BYTES}): send it in parts")]
    TooLarge {
        /// Its size in bytes.
        len: usize,
    },
    /// There are as many sessions as may be.
    #[error("there are {max} sessions already; close one first")]
    TooMany {
        /// The limit, as configured.
        max: usize,
    },
}

impl BulkError {
    /// Whether the same call may succeed later.
    #[must_use]
    pub const fn is_retryable(self) -> bool {
        matches!(self, Self::Full | Self::TooMany { .. })
    }
}
