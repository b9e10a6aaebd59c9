//! What a node may decide about its network. Every default is written here; nothing is read from the environment.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use chorus_protocol::NetworkId;
use serde::{Deserialize, Serialize};

use crate::addr::Addr;
use crate::error::ConfigError;

/// Addresses that may be given in one list.
pub const MAX_CONFIG_ADDRS: usize = 64;
/// The port that a node listens on when nothing else is said; TCP and QUIC (UDP) share the number.
pub const DEFAULT_PORT: u16 = 7600;

/// How many connections a node takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct ConnLimits {
    /// Connections to one peer. Two nodes that dial each other at the same moment have two.
    pub per_peer: u32,
    /// Connections altogether; three quarters of them may be inbound, so that strangers cannot fill the house.
    pub total: u32,
    /// Handshakes under way in each direction; half of the inbound ones may come from one IP address.
    pub pending: u32,
    /// New inbound connections a second from one IP address (IPv6: from one /64), with bursts of four times that.
    pub incoming_per_second: u32,
    /// Connections that the node seeks by itself, from what it knows; a swarm not larger than this is fully connected.
    pub target: u32,
}

impl Default for ConnLimits {
    fn default() -> Self {
        Self { per_peer: 4, total: 256, pending: 128, incoming_per_second: 20, target: 24 }
    }
}

/// How much one peer may send. A bucket holds two seconds' worth, so short bursts pass. What goes beyond is refused (a direct
/// message) or not passed on (gossip), and is a strike; strikes heal at ten a second; a peer that has used up its strikes is banned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct RateLimits {
    /// Direct messages a second.
    pub direct_messages: u32,
    /// Bytes of direct messages a second.
    pub direct_bytes: u32,
    /// Gossiped messages a second, whoever their authors are.
    pub gossip_messages: u32,
    /// Bytes of gossiped messages a second.
    pub gossip_bytes: u32,
    /// Strikes before the ban.
    pub strikes: u32,
    /// How long a flooding peer stays banned, in seconds.
    pub ban_seconds: u32,
}

impl Default for RateLimits {
    fn default() -> Self {
        Self {
            direct_messages: 4_000,
            direct_bytes: 64 << 20,
            gossip_messages: 1_000,
            gossip_bytes: 16 << 20,
            strikes: 200,
            ban_seconds: 60,
        }
    }
}

/// What a relay gives to nodes that cannot be reached. Only circuits are relayed, never their content: it stays encrypted between
/// the ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct RelayLimits {
    /// Nodes that may be reachable through this one.
    pub reservations: u32,
    /// Circuits open at once.
    pub circuits: u32,
    /// Circuits open at once from one node.
    pub circuits_per_peer: u32,
    /// How long a circuit lives, in seconds.
    pub circuit_seconds: u32,
    /// Bytes that a circuit carries in each direction.
    pub circuit_bytes: u64,
}

impl Default for RelayLimits {
    fn default() -> Self {
        Self { reservations: 128, circuits: 64, circuits_per_peer: 4, circuit_seconds: 600, circuit_bytes: 64 << 20 }
    }
}

/// A node's network, whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// The swarm's name. Nodes of another name are refused, politely.
    pub network: NetworkId,
    /// What this node calls itself in `identify`, such as `chorus/0.1.0`.
    pub agent: String,
    /// Where to listen. Port 0 takes any free port. An address that ends in `/p2p-circuit` is a door at that relay.
    pub listen: Vec<Addr>,
    /// Where others reach this node, when it knows better than they do (a forwarded port, a DNS name).
    pub external: Vec<Addr>,
    /// Peers to begin with; each address ends in `/p2p/ID`.
    pub bootstrap: Vec<Addr>,
    /// Where to keep the addresses of the peers that were connected, so that a restart finds the swarm without the bootstrap
    /// peers; nowhere, if absent.
    pub peer_file: Option<PathBuf>,
    /// Look for peers on the local network with multicast DNS.
    pub mdns: bool,
    /// Be a relay for nodes that cannot be reached. Without [`external`](Self::external), the listen addresses are taken to be
    /// reachable.
    pub relay_server: bool,
    /// Ask connected relays for a door when this node finds that it cannot be reached.
    pub relay_client: bool,
    /// What a relay gives.
    pub relay: RelayLimits,
    /// How many connections.
    pub conn: ConnLimits,
    /// How much from one peer.
    pub rate: RateLimits,
    /// How often the routing table is refreshed with a walk through the DHT.
    pub kad_refresh: Duration,
    /// How often a quiet connection is checked; two failures in a row close it.
    pub ping_interval: Duration,
    /// Events that may wait for the node's loop.
    pub event_queue: usize,
    /// Commands that may wait for the network's loop.
    pub command_queue: usize,
    /// Bytes of direct messages that may be on their way out, waiting ones included.
    pub send_bytes: u32,
}

impl NetConfig {
    /// Makes a configuration with every default: listening on TCP and QUIC on all IPv4 addresses, no peers, no relay.
    #[must_use]
    pub fn new(network: NetworkId) -> Self {
        let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, DEFAULT_PORT));
        Self {
            network,
            agent: concat!("chorus/", env!("CARGO_PKG_VERSION")).to_owned(),
            listen: vec![Addr::tcp(any), Addr::quic(any)],
            external: Vec::new(),
            bootstrap: Vec::new(),
            peer_file: None,
            mdns: true,
            relay_server: false,
            relay_client: true,
            relay: RelayLimits::default(),
            conn: ConnLimits::default(),
            rate: RateLimits::default(),
            kad_refresh: Duration::from_secs(60),
            ping_interval: Duration::from_secs(5),
            event_queue: 4096,
            command_queue: 4096,
            send_bytes: 64 << 20,
        }
    }

    /// Checks what the types cannot.
    ///
    /// # Errors
    /// [`ConfigError`] with the field to change.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let lists = [("listen", &self.listen), ("external", &self.external), ("bootstrap", &self.bootstrap)];
        for (field, list) in lists {
            if list.len() > MAX_CONFIG_ADDRS {
                return Err(ConfigError { field, why: format!("at most {MAX_CONFIG_ADDRS} addresses") });
            }
        }
        if let Some(addr) = self.bootstrap.iter().find(|addr| addr.node().is_none()) {
            let why = format!("{addr} must end in /p2p/ID, so that nobody else can answer there");
            return Err(ConfigError { field: "bootstrap", why });
        }
        if let Some(addr) = self.external.iter().find(|addr| !addr.is_dialable()) {
            return Err(ConfigError {
                field: "external",
                why: format!("{addr} is not an address that others can dial"),
            });
        }
        if self.agent.is_empty() || self.agent.len() > 64 || !self.agent.is_ascii() {
            return Err(ConfigError { field: "agent", why: "1 to 64 ASCII characters".to_owned() });
        }
        let positive = [
            ("conn.per-peer", self.conn.per_peer as usize),
            ("conn.total", self.conn.total as usize),
            ("conn.pending", self.conn.pending as usize),
            ("conn.incoming-per-second", self.conn.incoming_per_second as usize),
            ("rate.direct-messages", self.rate.direct_messages as usize),
            ("rate.gossip-messages", self.rate.gossip_messages as usize),
            ("event-queue", self.event_queue),
            ("command-queue", self.command_queue),
        ];
        if let Some((field, _)) = positive.into_iter().find(|&(_, value)| value == 0) {
            return Err(ConfigError { field, why: "must not be 0".to_owned() });
        }
        if (self.send_bytes as usize) < chorus_protocol::limits::MAX_DIRECT_BYTES {
            return Err(ConfigError {
                field: "send-bytes",
                why: "must hold one message of the largest size".to_owned(),
            });
        }
        if self.ping_interval.is_zero() || self.kad_refresh.is_zero() {
            return Err(ConfigError { field: "ping-interval", why: "intervals must not be 0".to_owned() });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn the_defaults_are_valid_and_a_bad_field_is_named() {
        let good = NetConfig::new("test".parse().unwrap());
        assert_eq!(good.validate(), Ok(()));
        let bad = |change: fn(&mut NetConfig)| {
            let mut cfg = good.clone();
            change(&mut cfg);
            cfg.validate().unwrap_err().field
        };
        assert_eq!(bad(|c| c.bootstrap = vec!["/ip4/127.0.0.1/tcp/1".parse().unwrap()]), "bootstrap");
        assert_eq!(bad(|c| c.external = vec!["/ip4/0.0.0.0/tcp/1".parse().unwrap()]), "external");
        assert_eq!(bad(|c| c.conn.total = 0), "conn.total");
        assert_eq!(bad(|c| c.agent.clear()), "agent");
        assert_eq!(bad(|c| c.send_bytes = 1), "send-bytes");
        assert_eq!(bad(|c| c.listen = vec![c.listen[0].clone(); 65]), "listen");
    }
}
