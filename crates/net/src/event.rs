//! What the network tells its node.

use std::time::{Duration, Instant};

use chorus_protocol::{Hash, NodeId};

use crate::addr::Addr;
use crate::error::{BanReason, PublishError, SendError};

/// A channel that every node of the network hears.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Topic {
    /// Entries of the ledger.
    Ledger,
    /// Announcements of jobs.
    Beacon,
}

impl Topic {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Ledger, Self::Beacon];

    /// Returns the name that is part of the topic string `chorus/<network>/<name>/<version>`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ledger => "ledger",
            Self::Beacon => "beacon",
        }
    }
}

/// Names one gossiped message until its verdict. A message without a verdict is passed to nobody and forgotten after some seconds.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct GossipToken {
    pub(crate) id: [u8; 32],
    pub(crate) from: NodeId,
}

impl std::fmt::Debug for GossipToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GossipToken({:02x}{:02x}{:02x}{:02x})", self.id[0], self.id[1], self.id[2], self.id[3])
    }
}

/// What the node found of a gossiped message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is good: pass it on.
    Accept,
    /// It is bad, and whoever passed it on should have known: do not pass it on, and remember that of the peer.
    Reject,
    /// It is of no use here (old, unknown): do not pass it on, but blame nobody.
    Ignore,
}

/// Whether others can open a connection to this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reachability {
    /// Others reached it.
    Public,
    /// Others tried and failed: the node needs a relay.
    Private,
}

/// Something happened.
#[derive(Debug)]
#[non_exhaustive]
pub enum NetEvent {
    /// A gossiped message arrived. Answer with [`NetHandle::validated`](crate::NetHandle::validated).
    Gossip {
        /// Where.
        topic: Topic,
        /// The peer that passed it on; seldom its author.
        from: NodeId,
        /// The message.
        bytes: Vec<u8>,
        /// Its name, for the verdict.
        token: GossipToken,
    },
    /// A direct message arrived. The peer proved its id on this connection. It may precede the peer's [`NetEvent::PeerUp`].
    Message {
        /// The sender.
        from: NodeId,
        /// The message.
        bytes: Vec<u8>,
    },
    /// The peer has the message of that token.
    Delivered {
        /// As given to `send`.
        token: u64,
    },
    /// The message of that token was not acknowledged.
    SendFailed {
        /// As given to `send`.
        token: u64,
        /// The peer.
        to: NodeId,
        /// Why, and whether to try again.
        error: SendError,
    },
    /// A message was published while nobody listened. The ledger's pull heals that; a beacon is to be repeated.
    PublishFailed {
        /// Where.
        topic: Topic,
        /// Why.
        error: PublishError,
    },
    /// A peer of this network and version is connected.
    PeerUp {
        /// The peer.
        node: NodeId,
        /// The address it is connected from or at.
        addr: Addr,
        /// What it calls itself.
        agent: String,
        /// The protocols it speaks.
        protocols: Vec<String>,
    },
    /// The last connection to a peer is gone.
    PeerDown {
        /// The peer.
        node: NodeId,
    },
    /// This node can now be dialled at the address.
    Listening(Addr),
    /// This node no longer listens at the address.
    ListenLost {
        /// The address.
        addr: Addr,
        /// Why.
        reason: String,
    },
    /// Others reach this node at the address.
    ExternalAddr(Addr),
    /// It became clear whether others can reach this node.
    Reachability(Reachability),
    /// A peer of another network, or of another version of the wire, was refused.
    Incompatible {
        /// The peer.
        node: NodeId,
        /// What it says it speaks.
        theirs: String,
    },
    /// This node has no peer; it goes on trying.
    Isolated {
        /// Since when.
        since: Instant,
        /// Rounds of dialling so far.
        attempt: u32,
        /// Until the next round.
        next_try: Duration,
    },
    /// A dial that the node asked for failed.
    DialFailed {
        /// The address.
        addr: Addr,
        /// What happened at each place that was tried.
        reason: String,
    },
    /// A peer was banned.
    Banned {
        /// The peer.
        node: NodeId,
        /// Why.
        reason: BanReason,
        /// For how long.
        ban: Duration,
    },
    /// Another process uses the same key: this node's own, or that of a peer which is here twice.
    DuplicateKey {
        /// Whose key.
        node: NodeId,
        /// Where the other one was met.
        addr: Option<Addr>,
    },
    /// Who provides what a key names, as the DHT says: no more than a hint. More may come in further events; no nodes at all means
    /// that nobody was found.
    Providers {
        /// As given to [`NetHandle::find_providers`](crate::NetHandle::find_providers).
        key: Hash,
        /// The nodes, this one not among them.
        nodes: Vec<NodeId>,
    },
    /// Messages were refused because the node's loop is behind.
    Shed {
        /// How many since the last such event.
        messages: u64,
    },
}

/// A connected peer.
#[derive(Clone, Debug)]
pub struct PeerInfo {
    /// The peer.
    pub node: NodeId,
    /// The addresses of its connections.
    pub addrs: Vec<Addr>,
    /// The addresses it says it listens on.
    pub listen: Vec<Addr>,
    /// What it calls itself; empty until it has said so.
    pub agent: String,
    /// Whether this node opened the (first) connection.
    pub outbound: bool,
    /// Whether every connection goes through a relay.
    pub relayed: bool,
    /// How long it has been connected.
    pub connected_for: Duration,
    /// The last measured round trip.
    pub rtt: Option<Duration>,
    /// Whether gossip flows on this connection without being asked for.
    pub in_mesh: bool,
    /// Gossipsub's score: below zero, the peer has misbehaved.
    pub score: Option<f64>,
}
