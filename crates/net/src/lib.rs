//! Sockets: libp2p behind a handle. None of libp2p's types leaves this crate.
//!
//! ```text
//!            NetHandle ──Command (bounded)──▶ ┌────────┐ ◀──────▶ Swarm: TCP, QUIC, relayed; noise, yamux
//!   node                                      │ Actor  │              gossip · direct · kad · identify · ping
//!            NetEvent ◀──────(bounded)─────── └────────┘              mdns · autonat · relay · dcutr · gate · book
//! ```
//!
//! 1. [`Net::start`] binds the listen addresses (a port in use is a typed error) and spawns the actor, which owns the swarm.
//! 2. The actor dials the bootstrap peers and those of its last run, learns of others from them (kad), from the local network
//!    (mDNS) and from gossip's neighbours, and keeps up to `conn.target` connections by itself. With no peer at all it tries
//!    again, with back-off and jitter, at least every ten seconds, for ever.
//! 3. `identify` tells each side the other's network and wire version. A peer of another one is refused, and reported.
//! 4. [`NetHandle::publish`] gossips a message to all; nothing is passed on before [`NetHandle::validated`] says so.
//!    [`NetHandle::send`] carries a message to one node, over whatever way there is, and reports its fate once.
//! 5. Every queue is bounded. Events that wait for the node stop the swarm from being polled, so back-pressure reaches the
//!    sockets; long before that, gossip and direct messages are refused, with an acknowledgement that says why.
//! 6. Each peer has rates for messages and bytes. Over them its messages are refused; if that goes on, it is banned for a while.
//!
//! What is too large for that goes over the [bulk plane](BulkPlane): one QUIC connection, or one stream on the connection that is
//! there anyway, for each session between two nodes.
//!
//! Specifications: RFC 9000 (QUIC), RFC 7250 (raw public keys); libp2p `gossipsub` 1.1 and 1.2, `kad-dht`, `identify`, `ping`, `autonat` 1, `relay` (circuit v2), `dcutr`;
//! RFC 6762 (mDNS).

mod actor;
mod addr;
mod behaviour;
mod bulk;
mod config;
mod error;
mod event;
mod handle;
mod identity;
mod limits;
mod peer_file;
mod start;
mod ticket;

pub use addr::{Addr, AddrError, MAX_ADDR_CHARS};
pub use bulk::{BulkConfig, BulkError, BulkEvent, BulkHandle, BulkPlane, CloseReason, SessionId, Way};
pub use config::{ConnLimits, DEFAULT_PORT, MAX_CONFIG_ADDRS, NetConfig, RateLimits, RelayLimits};
pub use error::{BanReason, ConfigError, NetError, PublishError, SendError};
pub use event::{GossipToken, NetEvent, PeerInfo, Reachability, Topic, Verdict};
pub use handle::NetHandle;
pub use start::Net;
pub use ticket::{MAX_TICKET_ADDRS, MAX_TICKET_CHARS, Ticket, TicketError};
