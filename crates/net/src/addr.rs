//! Addresses. An [`Addr`] is a multiaddr that this house can listen on or dial; libp2p's own type stays behind it.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use chorus_protocol::NodeId;
use libp2p::Multiaddr;
use libp2p::multiaddr::Protocol;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::identity::{node_of, peer_of};

/// Bytes of an address as text. A relayed QUIC address over DNS with two peer ids has about 200.
pub const MAX_ADDR_CHARS: usize = 320;

/// Text that is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{text}' is not an address: {why}. Write one like /ip4/192.0.2.1/tcp/7600/p2p/12D3KooW… or /dns4/host/udp/7600/quic-v1/p2p/12D3KooW…"
)]
pub struct AddrError {
    /// What was given, shortened.
    pub text: String,
    /// What is wrong with it.
    pub why: &'static str,
}

/// What carries the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Wire {
    Tcp,
    Quic,
}

/// Where a node listens, or can be reached: a multiaddr over TCP or QUIC (v1), with or without the node's id, direct or through a
/// relay. A value of this type always parses.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Addr(Multiaddr);

impl Addr {
    /// Makes the TCP address of a socket.
    #[must_use]
    pub fn tcp(socket: SocketAddr) -> Self {
        Self(Multiaddr::from(socket.ip()).with(Protocol::Tcp(socket.port())))
    }

    /// Makes the QUIC address of a socket.
    #[must_use]
    pub fn quic(socket: SocketAddr) -> Self {
        Self(Multiaddr::from(socket.ip()).with(Protocol::Udp(socket.port())).with(Protocol::QuicV1))
    }

    /// Returns the node that the address ends at, if it names one.
    #[must_use]
    pub fn node(&self) -> Option<NodeId> {
        match self.0.iter().last() {
            Some(Protocol::P2p(peer)) => node_of(&peer),
            _ => None,
        }
    }

    /// Returns the address ending at `node`, whatever it named before.
    #[must_use]
    pub fn with_node(&self, node: NodeId) -> Self {
        Self(self.without_node().0.with(Protocol::P2p(peer_of(&node))))
    }

    /// Returns the address without the id it ends at.
    #[must_use]
    pub fn without_node(&self) -> Self {
        let mut addr = self.0.clone();
        if matches!(addr.iter().last(), Some(Protocol::P2p(_))) {
            addr.pop();
        }
        Self(addr)
    }

    /// Returns the address of the node's door at a relay: this address must be the relay's and end at its id.
    #[must_use]
    pub fn circuit(&self) -> Self {
        Self(self.0.clone().with(Protocol::P2pCircuit))
    }

    /// Returns whether the way leads through a relay.
    #[must_use]
    pub fn is_relayed(&self) -> bool {
        self.0.iter().any(|part| part == Protocol::P2pCircuit)
    }

    /// Returns whether the first hop stays on this machine.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        self.ip().is_some_and(|ip| ip.is_loopback())
    }

    /// Returns the IP address of the first hop, if it is written as one.
    #[must_use]
    pub fn ip(&self) -> Option<IpAddr> {
        match self.0.iter().next() {
            Some(Protocol::Ip4(ip)) => Some(ip.into()),
            Some(Protocol::Ip6(ip)) => Some(ip.into()),
            _ => None,
        }
    }

    /// Returns the socket to bind, unless the address is relayed or begins with a name.
    pub(crate) fn socket(&self) -> Option<(Wire, SocketAddr)> {
        if self.is_relayed() {
            return None;
        }
        let ip = self.ip()?;
        self.0.iter().find_map(|part| match part {
            Protocol::Tcp(port) => Some((Wire::Tcp, SocketAddr::new(ip, port))),
            Protocol::Udp(port) => Some((Wire::Quic, SocketAddr::new(ip, port))),
            _ => None,
        })
    }

    /// Returns what carries the first hop.
    pub(crate) fn wire(&self) -> Wire {
        if self.0.iter().any(|part| part == Protocol::QuicV1) { Wire::Quic } else { Wire::Tcp }
    }

    /// Returns whether a remote could be dialled there at all: a specified IP and a port.
    pub(crate) fn is_dialable(&self) -> bool {
        let port = self.0.iter().any(|part| matches!(part, Protocol::Tcp(p) | Protocol::Udp(p) if p != 0));
        port && self.ip().is_none_or(|ip| !ip.is_unspecified() && !ip.is_multicast())
    }

    pub(crate) const fn multiaddr(&self) -> &Multiaddr {
        &self.0
    }

    /// Takes over a multiaddr, if it is of a kind that this house uses.
    pub(crate) fn from_multiaddr(addr: Multiaddr) -> Result<Self, AddrError> {
        match flaw(&addr) {
            None => Ok(Self(addr)),
            Some(why) => Err(AddrError { text: shorten(&addr.to_string()), why }),
        }
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        self.0.to_vec()
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self, AddrError> {
        let error = |why| AddrError { text: format!("{} bytes", bytes.len()), why };
        if bytes.len() > MAX_ADDR_CHARS {
            return Err(error("it is too long"));
        }
        let addr = Multiaddr::try_from(bytes.to_vec()).map_err(|_| error("the bytes are no multiaddr"))?;
        Self::from_multiaddr(addr)
    }
}

/// Says what is wrong with a multiaddr, or nothing.
fn flaw(addr: &Multiaddr) -> Option<&'static str> {
    let mut parts = addr.iter();
    match parts.next() {
        Some(Protocol::Ip4(_) | Protocol::Ip6(_) | Protocol::Dns(_) | Protocol::Dns4(_) | Protocol::Dns6(_)) => {}
        _ => return Some("it must begin with /ip4, /ip6, /dns, /dns4 or /dns6"),
    }
    let mut rest = match parts.next() {
        Some(Protocol::Tcp(_)) => parts,
        Some(Protocol::Udp(_)) => match parts.next() {
            Some(Protocol::QuicV1) => parts,
            _ => return Some("after /udp/PORT there must be /quic-v1"),
        },
        _ => return Some("there must be /tcp/PORT or /udp/PORT/quic-v1"),
    };
    let mut circuits = 0;
    let mut ended = false;
    for part in rest.by_ref() {
        match part {
            Protocol::P2p(peer) if !ended && node_of(&peer).is_some() => ended = true,
            Protocol::P2p(_) => return Some("the id after /p2p/ is not that of an Ed25519 key"),
            Protocol::P2pCircuit if ended && circuits == 0 => {
                circuits = 1;
                ended = false;
            }
            Protocol::P2pCircuit => return Some("/p2p-circuit must follow one relay's /p2p/ID"),
            _ => return Some("after the port only /p2p/ID and /p2p-circuit may follow"),
        }
    }
    None
}

fn shorten(text: &str) -> String {
    text.chars().take(120).collect()
}

impl FromStr for Addr {
    type Err = AddrError;

    fn from_str(text: &str) -> Result<Self, AddrError> {
        let error = |why| AddrError { text: shorten(text), why };
        if text.len() > MAX_ADDR_CHARS {
            return Err(error("it is too long"));
        }
        let addr: Multiaddr = text.parse().map_err(|_| error("it does not parse as a multiaddr"))?;
        flaw(&addr).map_or(Ok(Self(addr)), |why| Err(error(why)))
    }
}

impl fmt::Display for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl Serialize for Addr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Addr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use chorus_protocol::SecretKey;

    use super::*;

    #[test]
    fn accepts_what_a_node_can_use() {
        let node = SecretKey::from_bytes(&[7; 32]).node_id();
        let plain: Addr = "/ip4/192.0.2.1/tcp/7600".parse().unwrap();
        assert_eq!(plain.node(), None);
        assert!(plain.is_dialable());
        let named = plain.with_node(node);
        assert_eq!(named.node(), Some(node));
        assert_eq!(named.without_node(), plain);
        assert_eq!(named.to_string().parse::<Addr>().unwrap(), named);
        assert_eq!(Addr::from_bytes(&named.to_bytes()).unwrap(), named);
        let door = named.circuit();
        assert!(door.is_relayed() && !named.is_relayed());
        assert_eq!(door.with_node(node).node(), Some(node));
        assert!("/dns4/example.org/udp/7600/quic-v1".parse::<Addr>().is_ok());
        assert_eq!(Addr::quic("[::1]:9".parse().unwrap()).to_string(), "/ip6/::1/udp/9/quic-v1");
    }

    #[test]
    fn refuses_the_rest_with_a_reason() {
        for (text, why) in [
            ("", "begin with"),
            ("192.0.2.1:7600", "does not parse"),
            ("/ip4/192.0.2.1", "/tcp/PORT"),
            ("/ip4/192.0.2.1/udp/7600", "/quic-v1"),
            ("/ip4/192.0.2.1/tcp/7600/ws", "only /p2p/ID"),
            ("/ip4/192.0.2.1/tcp/7600/p2p-circuit", "one relay's"),
            ("/unix/tmp", "begin with"),
        ] {
            let error = text.parse::<Addr>().unwrap_err();
            assert!(error.why.contains(why), "{text}: {error}");
        }
        let long = format!("/dns4/{}/tcp/1", "a".repeat(400));
        assert_eq!(long.parse::<Addr>().unwrap_err().why, "it is too long");
        assert!(Addr::from_bytes(&[0xff; 64]).is_err());
    }

    #[test]
    fn knows_what_cannot_be_dialled() {
        assert!(!"/ip4/0.0.0.0/tcp/7600".parse::<Addr>().unwrap().is_dialable());
        assert!(!"/ip4/192.0.2.1/tcp/0".parse::<Addr>().unwrap().is_dialable());
    }
}
