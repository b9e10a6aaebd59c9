//! Tickets: one printable string that lets somebody else join.
//!
//! ```text
//! chorus1 ‖ base58( network-length ‖ network ‖ node id (32) ‖ count ‖ { length (2, big-endian) ‖ multiaddr }… ‖ checksum (4) )
//! ```
//!
//! The checksum is the first four bytes of the BLAKE3 hash of what stands before it: a ticket that lost a character in a chat says
//! so, instead of dialling nobody.

use std::fmt;
use std::str::FromStr;

use chorus_protocol::{NetworkId, NodeId};

use crate::addr::Addr;

/// Addresses in one ticket.
pub const MAX_TICKET_ADDRS: usize = 8;
/// Characters of a ticket.
pub const MAX_TICKET_CHARS: usize = 4096;
const PREFIX: &str = "chorus1";
const CHECKSUM_BYTES: usize = 4;

/// Text that is no ticket.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this is not a ticket: {why}. A ticket begins with '{PREFIX}'; copy it whole, from `chorus status` of a running node"
)]
pub struct TicketError {
    /// What is wrong.
    pub why: &'static str,
}

/// How to reach a node: its network, its id, and where it listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ticket {
    network: NetworkId,
    node: NodeId,
    addrs: Vec<Addr>,
}

impl Ticket {
    /// Makes a ticket; addresses beyond [`MAX_TICKET_ADDRS`] are left out.
    #[must_use]
    pub fn new(network: NetworkId, node: NodeId, addrs: impl IntoIterator<Item = Addr>) -> Self {
        let addrs = addrs.into_iter().take(MAX_TICKET_ADDRS).map(|addr| addr.without_node()).collect();
        Self { network, node, addrs }
    }

    /// Returns the network's name.
    #[must_use]
    pub const fn network(&self) -> &NetworkId {
        &self.network
    }

    /// Returns the node to join through.
    #[must_use]
    pub const fn node(&self) -> NodeId {
        self.node
    }

    /// Returns its addresses, each ending in its id: what a bootstrap list takes.
    #[must_use]
    pub fn bootstrap(&self) -> Vec<Addr> {
        self.addrs.iter().map(|addr| addr.with_node(self.node)).collect()
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(256);
        let network = self.network.as_str().as_bytes();
        bytes.push(u8::try_from(network.len()).expect("a network's name has at most 32 bytes"));
        bytes.extend_from_slice(network);
        bytes.extend_from_slice(self.node.as_bytes());
        bytes.push(u8::try_from(self.addrs.len()).expect("a ticket has at most eight addresses"));
        for addr in &self.addrs {
            let addr = addr.to_bytes();
            bytes.extend_from_slice(&u16::try_from(addr.len()).expect("an address is short").to_be_bytes());
            bytes.extend_from_slice(&addr);
        }
        let sum = blake3::hash(&bytes);
        bytes.extend_from_slice(&sum.as_bytes()[..CHECKSUM_BYTES]);
        bytes
    }
}

/// Takes the next `len` bytes.
fn take<'a>(rest: &mut &'a [u8], len: usize) -> Result<&'a [u8], TicketError> {
    let (head, tail) = rest.split_at_checked(len).ok_or(TicketError { why: "it ends too early" })?;
    *rest = tail;
    Ok(head)
}

fn byte(rest: &mut &[u8]) -> Result<usize, TicketError> {
    Ok(usize::from(take(rest, 1)?[0]))
}

fn decode(bytes: &[u8]) -> Result<Ticket, TicketError> {
    let wrong = |why| TicketError { why };
    let body = bytes.len().checked_sub(CHECKSUM_BYTES).ok_or(wrong("it is too short"))?;
    let (mut rest, sum) = bytes.split_at(body);
    if blake3::hash(rest).as_bytes()[..CHECKSUM_BYTES] != *sum {
        return Err(wrong("its checksum does not fit, so a character is missing or wrong"));
    }
    let len = byte(&mut rest)?;
    let network = std::str::from_utf8(take(&mut rest, len)?).map_err(|_| wrong("its network's name is no text"))?;
    let network = network.parse().map_err(|_| wrong("its network's name is not valid"))?;
    let id: &[u8; 32] = take(&mut rest, 32)?.try_into().map_err(|_| wrong("it ends too early"))?;
    let node = NodeId::from_bytes(id).map_err(|_| wrong("its node id is no key"))?;
    let count = byte(&mut rest)?;
    if count > MAX_TICKET_ADDRS {
        return Err(wrong("it has too many addresses"));
    }
    let mut addrs = Vec::with_capacity(count);
    for _ in 0..count {
        let len = byte(&mut rest)? << 8 | byte(&mut rest)?;
        addrs.push(Addr::from_bytes(take(&mut rest, len)?).map_err(|_| wrong("one of its addresses is not valid"))?);
    }
    if !rest.is_empty() {
        return Err(wrong("there is something after its end"));
    }
    Ok(Ticket::new(network, node, addrs))
}

impl FromStr for Ticket {
    type Err = TicketError;

    fn from_str(text: &str) -> Result<Self, TicketError> {
        let text = text.trim();
        if text.len() > MAX_TICKET_CHARS {
            return Err(TicketError { why: "it is too long" });
        }
        let body = text.strip_prefix(PREFIX).ok_or(TicketError { why: "it begins with something else" })?;
        let bytes =
            bs58::decode(body).into_vec().map_err(|_| TicketError { why: "it contains a foreign character" })?;
        decode(&bytes)
    }
}

impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", bs58::encode(self.encode()).into_string())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use chorus_protocol::SecretKey;

    use super::*;

    fn ticket() -> Ticket {
        let node = SecretKey::from_bytes(&[3; 32]).node_id();
        let addrs = ["/ip4/192.0.2.7/tcp/7600", "/ip6/2001:db8::7/udp/7600/quic-v1", "/dns4/swarm.example/tcp/7600"];
        Ticket::new("home".parse().unwrap(), node, addrs.map(|addr| addr.parse().unwrap()))
    }

    #[test]
    fn survives_being_printed() {
        let ticket = ticket();
        let text = ticket.to_string();
        assert!(text.starts_with("chorus1") && text.is_ascii());
        assert_eq!(text.parse::<Ticket>().unwrap(), ticket);
        assert_eq!(format!("  {text}\n").parse::<Ticket>().unwrap(), ticket);
        assert!(ticket.bootstrap().iter().all(|addr| addr.node() == Some(ticket.node())));
    }

    #[test]
    fn any_changed_character_is_noticed() {
        let text = ticket().to_string();
        for at in 0..text.len() {
            let mut bytes = text.clone().into_bytes();
            bytes[at] = if bytes[at] == b'2' { b'3' } else { b'2' };
            assert!(String::from_utf8(bytes).unwrap().parse::<Ticket>().is_err(), "character {at}");
            assert!(text[..at].parse::<Ticket>().is_err(), "cut at {at}");
        }
    }

    #[test]
    fn bounds_hold() {
        let many =
            Ticket::new("n".parse().unwrap(), ticket().node(), vec!["/ip4/192.0.2.7/tcp/1".parse().unwrap(); 99]);
        assert_eq!(many.bootstrap().len(), MAX_TICKET_ADDRS);
        assert!(many.to_string().len() < MAX_TICKET_CHARS);
        assert!(format!("chorus1{}", "1".repeat(MAX_TICKET_CHARS)).parse::<Ticket>().is_err());
        assert!("chorus1".parse::<Ticket>().is_err());
    }
}
