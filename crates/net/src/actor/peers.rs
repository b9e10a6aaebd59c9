//! Connected peers: from the handshake over `identify` to the last connection's end.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use chorus_protocol::NodeId;
use libp2p::PeerId;
use libp2p::core::ConnectedPoint;
use libp2p::multiaddr::Protocol;
use libp2p::swarm::ConnectionId;
use libp2p::{identify, ping};

use super::Actor;
use crate::addr::Addr;
use crate::behaviour::book::MAX_ADDRS_PER_PEER;
use crate::behaviour::names::RELAY_HOP;
use crate::error::BanReason;
use crate::event::{NetEvent, PeerInfo};
use crate::identity::{node_of, peer_of};

/// A peer of another network or version is left alone for so long.
const INCOMPATIBLE_REST: Duration = Duration::from_secs(300);
/// It stays connected for so long, so that it learns why it is refused.
const POLITENESS: Duration = Duration::from_millis(500);
/// A peer that the node disconnected from is left alone for so long.
const DISCONNECTED_REST: Duration = Duration::from_secs(60);
/// A relayed connection is closed so long after a direct one came up, so that what is under way on it arrives.
const RELAY_GRACE: Duration = Duration::from_secs(3);
/// Two processes that call themselves by one id for so long are twins; for less, one of them may be the other's past.
const TWIN_PATIENCE: Duration = Duration::from_secs(20);
/// What a peer says at the beginning has been said after this time.
const SETTLED_AFTER: Duration = Duration::from_secs(2);
/// What peers say of themselves is cut to this.
const MAX_AGENT_CHARS: usize = 96;
const MAX_PROTOCOLS: usize = 32;

/// One connection.
#[derive(Debug)]
pub(crate) struct Conn {
    addr: Option<Addr>,
    /// This end's address, as far as it is known: of inbound connections.
    local: Option<IpAddr>,
    relayed: bool,
    outbound: bool,
    /// Opened by hole punching, from both sides at once: nobody else could repeat it.
    punched: bool,
    opened: Instant,
    /// Which process is at the other end, by its own account.
    instance: Option<String>,
}

/// One peer, with at least one connection.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(super) node: NodeId,
    conns: BTreeMap<ConnectionId, Conn>,
    /// Identified as one of us, and the node knows.
    pub(super) up: bool,
    /// Offers to be a relay, and needs none itself.
    pub(super) hop: bool,
    agent: String,
    listen: Vec<Addr>,
    since: Instant,
    rtt: Option<Duration>,
    twin_reported: bool,
    /// Of another network or version. It is given a moment to learn the same of us.
    foreign_since: Option<Instant>,
}

impl Peer {
    fn new(node: NodeId, now: Instant) -> Self {
        Self {
            node,
            conns: BTreeMap::new(),
            up: false,
            hop: false,
            agent: String::new(),
            listen: Vec::new(),
            since: now,
            rtt: None,
            twin_reported: false,
            foreign_since: None,
        }
    }

    /// Where others can dial this peer: this node, which has no better place in the world than they, could.
    pub(super) fn public_addr(&self) -> Option<Addr> {
        let dialled = |conn: &&Conn| conn.outbound && !conn.relayed && !conn.punched;
        self.conns.values().filter(dialled).find_map(|conn| conn.addr.clone())
    }

    /// Where the connections end that lead to this peer and nobody between.
    pub(super) fn direct_addrs(&self) -> Vec<Addr> {
        self.conns.values().filter(|conn| !conn.relayed).filter_map(|conn| conn.addr.clone()).collect()
    }

    /// The connection that was opened to an address last, if there is another direct one.
    pub(super) fn spare(&self, addr: &Addr) -> Option<ConnectionId> {
        let direct = self.conns.iter().filter(|(_, conn)| !conn.relayed);
        let last = direct.clone().filter(|(_, conn)| conn.outbound && conn.addr.as_ref() == Some(addr));
        let last = last.max_by_key(|(_, conn)| conn.opened)?.0;
        (direct.count() > 1).then_some(*last)
    }

    /// Notes that a connection came about by hole punching.
    pub(super) fn on_punched(&mut self, id: ConnectionId) {
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.punched = true;
        }
    }

    /// Connected and identified long enough that all first messages have passed.
    pub(super) fn is_settled(&self, now: Instant) -> bool {
        self.up && now.saturating_duration_since(self.since) >= SETTLED_AFTER
    }

    fn has_direct(&self, now: Instant) -> bool {
        self.conns.values().any(|conn| !conn.relayed && now.saturating_duration_since(conn.opened) >= RELAY_GRACE)
    }

    /// Two processes at once, and not just for a moment.
    fn twins(&self, now: Instant) -> Option<Option<Addr>> {
        let old = |conn: &&Conn| now.saturating_duration_since(conn.opened) >= TWIN_PATIENCE;
        let mut seen = self.conns.values().filter(old).filter_map(|conn| Some((conn.instance.as_ref()?, &conn.addr)));
        let (first, _) = seen.next()?;
        seen.find(|(other, _)| *other != first).map(|(_, addr)| addr.clone())
    }
}

/// The address of a connection's other end, ending nowhere. A peer that came through a relay is given the way back through it.
fn addr_of(endpoint: &ConnectedPoint, peer: PeerId) -> Option<Addr> {
    let addr = match endpoint {
        ConnectedPoint::Dialer { address, .. } => address.clone(),
        ConnectedPoint::Listener { local_addr, .. } if endpoint.is_relayed() => {
            local_addr.clone().with(Protocol::P2p(peer))
        }
        ConnectedPoint::Listener { send_back_addr, .. } => send_back_addr.clone(),
    };
    Addr::from_multiaddr(addr).ok().map(|addr| addr.without_node())
}

fn local_of(endpoint: &ConnectedPoint) -> Option<IpAddr> {
    match endpoint {
        // A QUIC listener on all addresses does not say which one was used.
        ConnectedPoint::Listener { local_addr, .. } => {
            Addr::from_multiaddr(local_addr.clone()).ok()?.ip().filter(|ip| !ip.is_unspecified())
        }
        ConnectedPoint::Dialer { .. } => None,
    }
}

impl Conn {
    /// Whether this connection cannot outlive the local address `lost`. (QUIC could move to another address; tried, it did not,
    /// and idled until its timeout.) Where an outbound connection begins is not known; without any other address (`only`), it
    /// began there.
    fn dies_with(&self, lost: IpAddr, only: bool) -> bool {
        let far = self.addr.as_ref().and_then(Addr::ip).filter(|ip| !ip.is_loopback());
        far.is_some_and(|far| far.is_ipv4() == lost.is_ipv4()) && self.local.map_or(only, |local| local == lost)
    }
}

impl Actor {
    /// Closes what a vanished address took with it, without waiting until `ping` finds out.
    pub(super) fn on_local_address_lost(&mut self, lost: IpAddr, only: bool) {
        let conns = self.peers.values().flat_map(|known| &known.conns);
        let dead: Vec<ConnectionId> = conns.filter(|(_, conn)| conn.dies_with(lost, only)).map(|(id, _)| *id).collect();
        for id in dead {
            self.swarm.close_connection(id);
        }
    }

    pub(super) fn on_connected(&mut self, peer: PeerId, id: ConnectionId, endpoint: &ConnectedPoint) {
        let now = Instant::now();
        let Some(node) = node_of(&peer) else {
            self.swarm.close_connection(id);
            return;
        };
        let conn = Conn {
            addr: addr_of(endpoint, peer),
            local: local_of(endpoint),
            relayed: endpoint.is_relayed(),
            outbound: endpoint.is_dialer(),
            punched: false,
            opened: now,
            instance: None,
        };
        tracing::debug!(peer = %node.fmt_short(), addr = ?conn.addr, outbound = conn.outbound, "connected");
        self.peers.entry(peer).or_insert_with(|| Peer::new(node, now)).conns.insert(id, conn);
        self.pump(peer);
    }

    pub(super) fn on_disconnected(&mut self, peer: PeerId, id: ConnectionId, remaining: u32) {
        let Some(known) = self.peers.get_mut(&peer) else { return };
        known.conns.remove(&id);
        if remaining > 0 && !known.conns.is_empty() {
            return;
        }
        let (node, up) = (known.node, known.up);
        self.peers.remove(&peer);
        tracing::debug!(peer = %node.fmt_short(), "disconnected");
        if up {
            self.emit(NetEvent::PeerDown { node });
            self.on_peer_gone(Instant::now());
        }
    }

    pub(super) fn on_ping(&mut self, event: &ping::Event) {
        match &event.result {
            Ok(rtt) => {
                if let Some(peer) = self.peers.get_mut(&event.peer) {
                    peer.rtt = Some(*rtt);
                }
            }
            Err(ping::Failure::Unsupported) => {}
            // The protocol keeps the first failure to itself, so this is the second in a row.
            Err(error) => {
                tracing::debug!(peer = %event.peer, %error, "closing a connection that does not answer");
                self.swarm.close_connection(event.connection);
            }
        }
    }

    pub(super) fn on_identify(&mut self, event: identify::Event) {
        match event {
            identify::Event::Received { connection_id, peer_id, info } => {
                self.on_identified(connection_id, peer_id, info)
            }
            identify::Event::Error { peer_id, error, .. } => {
                tracing::debug!(peer = %peer_id, %error, "identify failed")
            }
            identify::Event::Sent { .. } | identify::Event::Pushed { .. } => {}
        }
    }

    fn on_identified(&mut self, id: ConnectionId, peer: PeerId, info: identify::Info) {
        let now = Instant::now();
        let Some(known) = self.peers.get_mut(&peer) else { return };
        let node = known.node;
        if let Some(theirs) = self.names.foreign(&info.protocol_version) {
            if known.foreign_since.is_none() {
                known.foreign_since = Some(now);
                self.emit(NetEvent::Incompatible { node, theirs });
            }
            return;
        }
        let Some(conn) = known.conns.get_mut(&id) else { return };
        let agent: String = info.agent_version.chars().filter(|c| !c.is_control()).take(MAX_AGENT_CHARS).collect();
        let (agent, instance) = agent.split_once('#').unwrap_or((&agent, ""));
        conn.instance = (!instance.is_empty()).then(|| instance.to_owned());
        let near = conn.addr.as_ref().is_none_or(Addr::is_loopback);
        known.listen = listen_addrs(node, &info, near);
        agent.clone_into(&mut known.agent);
        known.hop = info.protocols.iter().any(|protocol| protocol.as_ref() == RELAY_HOP)
            && !known.listen.iter().any(Addr::is_relayed);
        self.note_addresses(peer, info.protocols.contains(&self.names.kad), now);
        self.announce(peer, id, &info);
    }

    /// Tells the book and the DHT where an identified peer listens. Of a peer with doors at relays the DHT hears those alone: its
    /// own addresses lead nowhere from outside its house, or to somebody else, and its neighbours know them anyway.
    fn note_addresses(&mut self, peer: PeerId, in_dht: bool, now: Instant) {
        let Some(known) = self.peers.get(&peer) else { return };
        let listen = known.listen.clone();
        let relayed = listen.iter().any(Addr::is_relayed);
        let told = |addr: &Addr| listen.contains(addr) && addr.is_relayed() == relayed;
        let behaviour = self.swarm.behaviour_mut();
        let stale: Vec<_> = behaviour.book.addrs(&peer).filter(|addr| !told(addr)).cloned().collect();
        for addr in stale {
            behaviour.kad.remove_address(&peer, addr.multiaddr());
        }
        if in_dht {
            for addr in listen.iter().filter(|addr| told(addr)) {
                behaviour.kad.add_address(&peer, addr.multiaddr().clone());
            }
        }
        behaviour.book.replace(peer, listen, now);
    }

    /// Tells the node of a peer that has just been identified.
    fn announce(&mut self, peer: PeerId, id: ConnectionId, info: &identify::Info) {
        let Some(known) = self.peers.get_mut(&peer).filter(|known| !known.up) else { return };
        let conn_addr = known.conns.get(&id).and_then(|conn| conn.addr.clone());
        let Some(addr) = conn_addr.or_else(|| known.listen.first().cloned()) else { return };
        known.up = true;
        let (node, agent) = (known.node, known.agent.clone());
        let protocols = info.protocols.iter().take(MAX_PROTOCOLS).map(ToString::to_string).collect();
        self.emit(NetEvent::PeerUp { node, addr, agent, protocols });
        self.on_peer_up();
    }

    /// Bans a peer for misbehaviour, and tells the node.
    pub(super) fn ban(&mut self, peer: PeerId, reason: BanReason) {
        self.ban_for(peer, reason, Duration::from_secs(u64::from(self.cfg.rate.ban_seconds)));
    }

    pub(super) fn ban_for_node(&mut self, node: NodeId, ban: Duration) {
        self.ban_for(peer_of(&node), BanReason::Asked, ban);
    }

    fn ban_for(&mut self, peer: PeerId, reason: BanReason, ban: Duration) {
        let now = Instant::now();
        let Some(node) = node_of(&peer) else { return };
        if self.swarm.behaviour().gate.is_banned(&peer, now) && reason != BanReason::Asked {
            return;
        }
        tracing::warn!(peer = %node.fmt_short(), %reason, seconds = ban.as_secs(), "banned");
        let behaviour = self.swarm.behaviour_mut();
        behaviour.gate.ban(peer, ban, now);
        behaviour.kad.remove_peer(&peer);
        behaviour.book.rest(&peer, ban, now);
        // A peer that left already needs not be thrown out.
        let _ = self.swarm.disconnect_peer_id(peer);
        self.emit(NetEvent::Banned { node, reason, ban });
    }

    /// The node behind a peer that may be heard. What a banned peer sent before its connection closed may still be underway in
    /// here; nobody hears it.
    pub(super) fn audible(&self, peer: &PeerId, now: Instant) -> Option<NodeId> {
        let known = self.peers.get(peer)?;
        (!self.swarm.behaviour().gate.is_banned(peer, now)).then_some(known.node)
    }

    /// Ends a ban before its time.
    pub(super) fn unban(&mut self, node: &NodeId) {
        let peer = peer_of(node);
        let behaviour = self.swarm.behaviour_mut();
        behaviour.gate.pardon(&peer);
        behaviour.book.rest(&peer, Duration::ZERO, Instant::now());
    }

    pub(super) fn disconnect(&mut self, node: NodeId, reason: &'static str) {
        let peer = peer_of(&node);
        tracing::info!(peer = %node.fmt_short(), reason, "disconnecting");
        self.swarm.behaviour_mut().book.rest(&peer, DISCONNECTED_REST, Instant::now());
        // A peer that left already needs not be disconnected.
        let _ = self.swarm.disconnect_peer_id(peer);
    }

    /// Closes relayed connections that direct ones have replaced, and finds peers that are here twice.
    pub(super) fn look_after_peers(&mut self, now: Instant) {
        self.part_from_foreigners(now);
        let mut superseded = Vec::new();
        let mut twins = Vec::new();
        for known in self.peers.values_mut() {
            if known.has_direct(now) {
                superseded.extend(known.conns.iter().filter(|(_, conn)| conn.relayed).map(|(id, _)| *id));
            }
            if !known.twin_reported
                && let Some(addr) = known.twins(now)
            {
                known.twin_reported = true;
                twins.push(NetEvent::DuplicateKey { node: known.node, addr });
            }
        }
        self.mend_subscriptions(now);
        for id in superseded {
            self.swarm.close_connection(id);
        }
        for event in twins {
            self.emit(event);
        }
    }

    fn part_from_foreigners(&mut self, now: Instant) {
        let over =
            |known: &Peer| known.foreign_since.is_some_and(|since| now.saturating_duration_since(since) >= POLITENESS);
        let foreigners: Vec<PeerId> =
            self.peers.iter().filter(|(_, known)| over(known)).map(|(peer, _)| *peer).collect();
        for peer in foreigners {
            self.swarm.behaviour_mut().gate.ban(peer, INCOMPATIBLE_REST, now);
            // Already closed is as good.
            let _ = self.swarm.disconnect_peer_id(peer);
        }
    }

    /// How many peers of this network are connected.
    pub(super) fn up(&self) -> usize {
        self.peers.values().filter(|peer| peer.up).count()
    }

    pub(super) fn list_peers(&self, now: Instant) -> Vec<PeerInfo> {
        let gossip = &self.swarm.behaviour().gossip;
        let mesh: Vec<&PeerId> = gossip.all_mesh_peers().collect();
        let info = |(peer, known): (&PeerId, &Peer)| PeerInfo {
            node: known.node,
            addrs: known.conns.values().filter_map(|conn| conn.addr.clone()).collect(),
            listen: known.listen.clone(),
            agent: known.agent.clone(),
            outbound: known.conns.values().next().is_some_and(|conn| conn.outbound),
            relayed: known.conns.values().all(|conn| conn.relayed),
            connected_for: now.saturating_duration_since(known.since),
            rtt: known.rtt,
            in_mesh: mesh.contains(&peer),
            score: gossip.peer_score(peer),
        };
        self.peers.iter().filter(|(_, known)| known.up).map(info).collect()
    }
}

/// Takes from `identify` the addresses that are of use here: dialable, of this peer, and loopback only when the peer is on this
/// machine (`near`).
fn listen_addrs(node: NodeId, info: &identify::Info, near: bool) -> Vec<Addr> {
    info.listen_addrs
        .iter()
        .filter_map(|addr| Addr::from_multiaddr(addr.clone()).ok())
        .filter(|addr| addr.is_dialable() && (near || !addr.is_loopback()))
        .filter(|addr| addr.node().is_none_or(|named| named == node))
        .map(|addr| addr.without_node())
        .take(MAX_ADDRS_PER_PEER)
        .collect()
}
