//! Doors: where this node listens, whether others get in, and the relays that let them in when they do not.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::time::{Duration, Instant};

use libp2p::autonat::v1::{Event as Autonat, InboundProbeEvent, NatStatus};
use libp2p::core::transport::{ListenerId, TransportError};
use libp2p::{Multiaddr, PeerId, dcutr, kad};
use tokio::sync::watch;

use super::Actor;
use crate::addr::{Addr, Wire};
use crate::error::NetError;
use crate::event::{NetEvent, Reachability};
use crate::handle::Doors;

/// Relays that an unreachable node keeps a door at.
const RELAYS: usize = 2;
/// A door that closed is opened again after this time.
const REOPEN_AFTER: Duration = Duration::from_secs(3);

/// A listener that the node wants to have.
#[derive(Debug)]
struct Door {
    addr: Addr,
    /// The relay, when the node chose it by itself.
    relay: Option<PeerId>,
    open: Option<ListenerId>,
    retry_at: Instant,
}

/// What is open, and what ought to be.
#[derive(Debug)]
pub(crate) struct DoorKeeper {
    wanted: Vec<Door>,
    listening: HashMap<ListenerId, Vec<Addr>>,
    external: Vec<Addr>,
    /// Others tried to reach this node, and failed.
    private: bool,
    /// They cannot do so through a relay either.
    hidden: bool,
    told: watch::Sender<Doors>,
}

impl DoorKeeper {
    pub(crate) fn new(told: watch::Sender<Doors>) -> Self {
        Self {
            wanted: Vec::new(),
            listening: HashMap::new(),
            external: Vec::new(),
            private: false,
            hidden: false,
            told,
        }
    }

    /// Whether some direct listener has no address yet.
    pub(crate) fn is_waiting(&self) -> bool {
        let open = |door: &Door| door.open.is_some_and(|id| self.listening.contains_key(&id));
        self.wanted.iter().any(|door| !door.addr.is_relayed() && !open(door))
    }

    /// Whether an address is this node's own, as far as it knows.
    pub(crate) fn is_ours(&self, addr: &Addr) -> bool {
        let addr = addr.without_node();
        self.external.contains(&addr) || self.listening.values().flatten().any(|own| *own == addr)
    }

    /// Where this node listens.
    pub(crate) fn listening(&self) -> Vec<Addr> {
        let mut listening: Vec<Addr> = self.listening.values().flatten().cloned().collect();
        listening.sort();
        listening.dedup();
        listening
    }

    fn tell(&self) {
        self.told.send_replace(Doors { external: self.external.clone(), listening: self.listening() });
    }
}

/// A socket on all IPv6 addresses would also claim the port of all IPv4 ones, which this node may have bound itself: a part
/// stands for the whole.
fn to_probe(socket: SocketAddr) -> SocketAddr {
    match socket.ip() {
        IpAddr::V6(ip) if ip.is_unspecified() => SocketAddr::from((Ipv6Addr::LOCALHOST, socket.port())),
        _ => socket,
    }
}

/// libp2p shares TCP ports among sockets of one user (`SO_REUSEPORT`), so a second node on the same port would silently get half
/// of the first one's connections. A socket without that option finds out. For UDP, it gets at the system's error, which the
/// transport wraps beyond recognition.
fn probe(addr: &Addr) -> io::Result<()> {
    match addr.socket() {
        Some((_, socket)) if socket.port() == 0 => Ok(()),
        Some((Wire::Tcp, socket)) => TcpListener::bind(to_probe(socket)).map(drop),
        Some((Wire::Quic, socket)) => UdpSocket::bind(to_probe(socket)).map(drop),
        None => Ok(()),
    }
}

/// Waits until the ports of a stopped network are free again: its sockets are closed by tasks that end a little later.
pub(crate) async fn freed(addrs: &[Addr], patience: Duration) {
    let end = Instant::now() + patience;
    while Instant::now() < end && addrs.iter().any(|addr| probe(addr).is_err()) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn listen_error(addr: &Addr, source: io::Error) -> NetError {
    match source.kind() {
        io::ErrorKind::AddrInUse => NetError::PortInUse { addr: addr.clone() },
        _ => NetError::Listen { addr: addr.clone(), source },
    }
}

impl Actor {
    /// Opens a door, for good: should it close by itself, it is opened again.
    pub(crate) fn listen(&mut self, addr: &Addr) -> Result<(), NetError> {
        let any_port = addr.socket().is_some_and(|(_, socket)| socket.port() == 0);
        if !any_port && self.keeper.wanted.iter().any(|door| door.addr == *addr && door.open.is_some()) {
            return Err(NetError::PortInUse { addr: addr.clone() });
        }
        let id = self.open(addr)?;
        self.keeper.wanted.push(Door { addr: addr.clone(), relay: None, open: Some(id), retry_at: Instant::now() });
        Ok(())
    }

    fn open(&mut self, addr: &Addr) -> Result<ListenerId, NetError> {
        probe(addr).map_err(|error| listen_error(addr, error))?;
        self.swarm.listen_on(addr.multiaddr().clone()).map_err(|error| match error {
            TransportError::Other(error) => listen_error(addr, error),
            TransportError::MultiaddrNotSupported(_) => listen_error(
                addr,
                io::Error::new(io::ErrorKind::Unsupported, "no transport listens on such an address"),
            ),
        })
    }

    pub(super) fn unlisten(&mut self, addr: &Addr) {
        let Some(at) = self.keeper.wanted.iter().position(|door| door.addr == *addr) else { return };
        let door = self.keeper.wanted.remove(at);
        if let Some(id) = door.open {
            self.swarm.remove_listener(id);
        }
    }

    /// Declares an address to be reachable from outside.
    pub(crate) fn add_external(&mut self, addr: &Addr) {
        let address = addr.without_node().multiaddr().clone();
        self.swarm.add_external_address(address.clone());
        // The swarm tells its behaviours, but not its owner.
        self.on_external(address);
    }

    pub(super) fn on_listening(&mut self, id: ListenerId, address: Multiaddr) {
        let Ok(addr) = Addr::from_multiaddr(address) else { return };
        let addr = addr.without_node();
        self.keeper.listening.entry(id).or_default().push(addr.clone());
        // Loopback is where others are only if it was asked for by name: then all of them are on this machine.
        let far = !addr.is_loopback() || self.cfg.listen.iter().any(Addr::is_loopback);
        if self.cfg.relay_server && self.cfg.external.is_empty() && !addr.is_relayed() && far {
            self.add_external(&addr);
        }
        self.keeper.tell();
        self.choose_dht_mode();
        self.on_door_open(Instant::now());
        self.emit(NetEvent::Listening(addr));
    }

    pub(super) fn on_listen_expired(&mut self, id: ListenerId, address: &Multiaddr) {
        let Ok(addr) = Addr::from_multiaddr(address.clone()) else { return };
        let addr = addr.without_node();
        if let Some(open) = self.keeper.listening.get_mut(&id) {
            open.retain(|own| *own != addr);
        }
        if let Some(lost) = addr.ip().filter(|ip| !ip.is_loopback()) {
            let others = self.keeper.listening();
            let same_family = |ip: IpAddr| !ip.is_loopback() && ip.is_ipv4() == lost.is_ipv4();
            if !others.iter().any(|other| other.ip() == Some(lost)) {
                let only = !others.iter().filter_map(Addr::ip).any(same_family);
                self.on_local_address_lost(lost, only);
            }
        }
        self.keeper.tell();
        self.emit(NetEvent::ListenLost { addr, reason: "the network interface lost this address".to_owned() });
    }

    pub(super) fn on_listener_closed(&mut self, id: ListenerId, reason: &io::Result<()>) {
        let reason = reason.as_ref().map_or_else(ToString::to_string, |()| "closed".to_owned());
        if let Some(door) = self.keeper.wanted.iter_mut().find(|door| door.open == Some(id)) {
            door.open = None;
            door.retry_at = Instant::now() + REOPEN_AFTER;
        }
        let lost = self.keeper.listening.remove(&id).unwrap_or_default();
        self.keeper.tell();
        self.choose_dht_mode();
        for addr in lost {
            self.emit(NetEvent::ListenLost { addr, reason: reason.clone() });
        }
    }

    pub(super) fn on_external(&mut self, address: Multiaddr) {
        let Ok(addr) = Addr::from_multiaddr(address) else { return };
        let addr = addr.without_node();
        if !self.keeper.external.contains(&addr) {
            self.keeper.external.push(addr.clone());
            self.keeper.tell();
            self.emit(NetEvent::ExternalAddr(addr));
        }
    }

    pub(super) fn on_external_expired(&mut self, address: &Multiaddr) {
        self.keeper.external.retain(|addr| addr.multiaddr() != address);
        self.keeper.tell();
    }

    pub(super) fn on_autonat(&mut self, event: Autonat) {
        match event {
            Autonat::StatusChanged { new: NatStatus::Public(_), .. } => self.on_reachability(Reachability::Public),
            Autonat::StatusChanged { new: NatStatus::Private, .. } => self.on_reachability(Reachability::Private),
            Autonat::InboundProbe(InboundProbeEvent::Response { peer, address, .. }) => self.on_proved(peer, address),
            _ => {}
        }
    }

    fn on_reachability(&mut self, reachability: Reachability) {
        self.keeper.private = reachability == Reachability::Private;
        self.choose_dht_mode();
        self.emit(NetEvent::Reachability(reachability));
    }

    /// A connection that was opened only to prove to a peer that it can be reached has done so. Were it kept, the next proofs
    /// would fail at the limit of connections to one peer, and tell the peer that it cannot.
    fn on_proved(&mut self, peer: PeerId, address: Multiaddr) {
        let Ok(addr) = Addr::from_multiaddr(address) else { return };
        if let Some(id) = self.peers.get(&peer).and_then(|known| known.spare(&addr.without_node())) {
            self.swarm.close_connection(id);
        }
    }

    /// A node that nobody can reach, not even through a relay, answers no questions in the DHT; with a door at a relay it does,
    /// because it is by the DHT that others learn of that door.
    fn choose_dht_mode(&mut self) {
        let doors = self.keeper.listening.values().flatten();
        let hidden = self.keeper.private && !doors.into_iter().any(Addr::is_relayed);
        if self.keeper.hidden != hidden {
            self.keeper.hidden = hidden;
            let mode = if hidden { kad::Mode::Client } else { kad::Mode::Server };
            self.swarm.behaviour_mut().kad.set_mode(Some(mode));
        }
    }

    pub(super) fn on_punched(&mut self, event: &dcutr::Event) {
        tracing::debug!(peer = %event.remote_peer_id, result = ?event.result, "hole punching");
        if let (Ok(id), Some(known)) = (&event.result, self.peers.get_mut(&event.remote_peer_id)) {
            known.on_punched(*id);
        }
    }

    pub(super) fn keep_doors(&mut self, now: Instant) {
        self.reopen_doors(now);
        let wants_relays = self.keeper.private && self.cfg.relay_client;
        let relays = |peer: &PeerId| wants_relays && self.peers.get(peer).is_some_and(|known| known.hop);
        let unneeded = |door: &&Door| door.relay.is_some_and(|peer| !relays(&peer));
        let unneeded: Vec<Addr> = self.keeper.wanted.iter().filter(unneeded).map(|door| door.addr.clone()).collect();
        for addr in unneeded {
            self.unlisten(&addr);
        }
        if wants_relays {
            self.reserve();
        }
    }

    fn reopen_doors(&mut self, now: Instant) {
        // A door at a relay of the node's own choice is not worth waiting for: another relay may be.
        self.keeper.wanted.retain(|door| door.relay.is_none() || door.open.is_some());
        let closed = |door: &Door| door.open.is_none() && door.retry_at <= now;
        let again: Vec<Addr> =
            self.keeper.wanted.iter().filter(|door| closed(door)).map(|door| door.addr.clone()).collect();
        for addr in again {
            let opened = self.open(&addr);
            let Some(door) = self.keeper.wanted.iter_mut().find(|door| door.addr == addr) else { continue };
            door.retry_at = now + REOPEN_AFTER;
            match opened {
                Ok(id) => door.open = Some(id),
                Err(error) => tracing::debug!(%addr, %error, "cannot listen again yet"),
            }
        }
    }

    fn reserve(&mut self) {
        let taken = |peer: &PeerId| self.keeper.wanted.iter().any(|door| door.relay == Some(*peer));
        let missing = RELAYS.saturating_sub(self.keeper.wanted.iter().filter(|door| door.relay.is_some()).count());
        let relays: Vec<(PeerId, Addr)> = self
            .peers
            .iter()
            .filter(|(peer, known)| known.up && known.hop && !taken(peer))
            .filter_map(|(peer, known)| Some((*peer, known.public_addr()?.with_node(known.node).circuit())))
            .take(missing)
            .collect();
        for (peer, addr) in relays {
            match self.open(&addr) {
                Ok(id) => {
                    let door = Door { addr, relay: Some(peer), open: Some(id), retry_at: Instant::now() };
                    self.keeper.wanted.push(door);
                }
                Err(error) => tracing::debug!(%addr, %error, "no door at this relay"),
            }
        }
    }
}
