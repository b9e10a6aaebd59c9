//! What can go wrong, as data. Each error says what to do next.

use chorus_protocol::limits::{MAX_DIRECT_BYTES, MAX_GOSSIP_BYTES};

use crate::addr::Addr;
use crate::event::Topic;

/// A configuration that cannot work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("network setting '{field}': {why}")]
pub struct ConfigError {
    /// The field to change.
    pub field: &'static str,
    /// What it must be.
    pub why: String,
}

/// Why the network did not start, or did not take a command.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetError {
    /// A setting is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Somebody else listens there.
    #[error(
        "{addr} is in use by another program, or by another node: choose a free port with `--listen`, or shift all ports with `--instance N`"
    )]
    PortInUse {
        /// The address that was asked for.
        addr: Addr,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {addr}: {source}; check `--listen`")]
    Listen {
        /// The address that was asked for.
        addr: Addr,
        /// What the system said.
        source: std::io::Error,
    },
    /// A protocol could not be set up.
    #[error("the network could not be set up: {what}")]
    Setup {
        /// Which part, and why.
        what: String,
    },
    /// More is waiting than may wait; try again later.
    #[error("the network is busy: too much is waiting to be sent; try again later")]
    Overloaded,
    /// A gossiped message is larger than gossip carries.
    #[error(
        "a message of {len} bytes is too large to gossip on {topic:?} (at most {MAX_GOSSIP_BYTES}): send it by hash"
    )]
    GossipTooLarge {
        /// Where it was to go.
        topic: Topic,
        /// Its size in bytes.
        len: usize,
    },
    /// A direct message is larger than one may be.
    #[error("a message of {len} bytes is too large to send (at most {MAX_DIRECT_BYTES}): send it in parts")]
    DirectTooLarge {
        /// Its size in bytes.
        len: usize,
    },
    /// An empty message carries nothing.
    #[error("an empty message cannot be sent")]
    Empty,
    /// The network has stopped.
    #[error("the network has stopped")]
    Stopped,
}

impl NetError {
    /// Whether the same call may succeed later.
    #[must_use]
    pub const fn is_retryable(&self) -> bool {
        matches!(self, Self::Overloaded)
    }
}

/// Why a direct message was not acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// No way to the peer was found: no address answered, and the DHT knew no better one.
    #[error("the peer cannot be reached at any known address")]
    Unreachable,
    /// The peer did not acknowledge in time. It may or may not have the message.
    #[error("the peer did not acknowledge in time")]
    Timeout,
    /// The connection broke first. The peer may or may not have the message.
    #[error("the connection broke before the peer acknowledged")]
    Lost,
    /// The peer has more waiting than it can take, or this node has for that peer.
    #[error("too much is waiting for the peer")]
    Overloaded,
    /// This node sends more to the peer than the peer allows.
    #[error("the peer's rate limit is reached; send less")]
    RateLimited,
    /// The peer does not speak the protocol (another network or wire version).
    #[error("the peer does not speak this network's protocol")]
    Unsupported,
    /// The peer is banned here, or it is this node itself.
    #[error("the peer is refused by this node")]
    Refused,
}

impl SendError {
    /// Whether sending the same bytes again may succeed.
    #[must_use]
    pub const fn is_retryable(self) -> bool {
        matches!(self, Self::Unreachable | Self::Timeout | Self::Lost | Self::Overloaded | Self::RateLimited)
    }

    /// Whether the peer may have the message all the same.
    #[must_use]
    pub const fn may_have_arrived(self) -> bool {
        matches!(self, Self::Timeout | Self::Lost)
    }
}

/// Why a gossiped message reached nobody directly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PublishError {
    /// No connected peer listens to the topic: the node is alone, or just joined.
    #[error("no peer listens to the topic yet")]
    NoPeers,
    /// All peers' queues are full.
    #[error("all peers are slower than this node publishes")]
    Overloaded,
    /// The message was refused by the protocol below.
    #[error("the message could not be encoded")]
    Refused,
}

/// Why a peer was banned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum BanReason {
    /// It sent more than it may, for longer than it may.
    #[error("it floods this node")]
    Flood,
    /// It sent frames that nobody who speaks the protocol would send.
    #[error("it sends malformed frames")]
    Malformed,
    /// It gossips what this node found invalid.
    #[error("it gossips invalid messages")]
    InvalidGossip,
    /// This node asked for it.
    #[error("asked for by this node")]
    Asked,
}
