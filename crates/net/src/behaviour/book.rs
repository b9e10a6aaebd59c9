//! The address book: where peers were last said to listen, and when it is worth dialling them again. Every dial of every behaviour
//! draws its addresses from here; the node's own dials take those of one transport at a time.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime};

use libp2p::core::transport::PortUse;
use libp2p::core::{ConnectedPoint, Endpoint};
use libp2p::swarm::behaviour::{ConnectionClosed, ConnectionEstablished};
use libp2p::swarm::{
    ConnectionDenied, ConnectionId, DialFailure, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent,
    THandlerOutEvent, ToSwarm, dummy,
};
use libp2p::{Multiaddr, PeerId};

use crate::addr::{Addr, Wire};
use crate::identity::{node_of, peer_of};
use crate::limits::jitter;
use crate::peer_file::{Met, hour_of};

/// Peers that are remembered; the one heard of longest ago gives way.
pub(crate) const MAX_KNOWN_PEERS: usize = 1024;
/// Addresses of one peer; the oldest gives way.
pub(crate) const MAX_ADDRS_PER_PEER: usize = 12;
/// The first wait after a failed dial; it doubles up to the last.
const FIRST_WAIT: Duration = Duration::from_millis(500);
const LAST_WAIT: Duration = Duration::from_secs(30);
/// A peer that failed this often is forgotten, unless it is a bootstrap peer.
const MAX_FAILURES: u32 = 12;

#[derive(Debug)]
struct Known {
    /// From the configuration. A peer that has such addresses is never forgotten, nor are they.
    pinned: Vec<Addr>,
    /// From the peer itself, from other peers, from dials that worked; the oldest first.
    heard: Vec<Addr>,
    heard_at: Instant,
    failures: u32,
    next_try: Instant,
    connected: bool,
    /// The hour in which it was last connected as one of this network.
    met: Option<u64>,
}

impl Known {
    fn addrs(&self) -> impl Iterator<Item = &Addr> {
        self.pinned.iter().chain(&self.heard)
    }

    /// The addresses to dial together, now. Over one transport only: of two dials that both succeed one is thrown away, and what
    /// the other side had already said on it (its gossip topics, for one) is lost. Each failure moves on to the other one.
    /// Relayed addresses are always among them: a peer has those because its own ones lead nowhere from outside, and in its own
    /// house the direct way is the faster one.
    fn group(&self) -> Vec<&Addr> {
        let mut wires: Vec<Wire> = self.addrs().filter(|addr| !addr.is_relayed()).map(Addr::wire).collect();
        wires.sort_unstable();
        wires.dedup();
        let turn = usize::try_from(self.failures).unwrap_or_default() % wires.len().max(1);
        self.addrs().filter(|addr| addr.is_relayed() || wires.get(turn) == Some(&addr.wire())).collect()
    }
}

/// The behaviour.
#[derive(Debug)]
pub(crate) struct Book {
    me: PeerId,
    known: BTreeMap<PeerId, Known>,
}

impl Book {
    pub(crate) const fn new(me: PeerId) -> Self {
        Self { me, known: BTreeMap::new() }
    }

    /// Adds an address, as the newest, behind those that the peer itself said.
    pub(crate) fn add(&mut self, peer: PeerId, addr: &Addr, now: Instant) {
        let Some(known) = self.entry(peer, now) else { return };
        let addr = addr.without_node();
        known.heard_at = now;
        if known.addrs().any(|old| *old == addr) || !addr.is_dialable() {
            return;
        }
        if known.heard.len() >= MAX_ADDRS_PER_PEER {
            known.heard.remove(0);
        }
        known.heard.push(addr);
        known.next_try = now;
    }

    /// Replaces what was heard by what the peer itself says, now that it is connected.
    pub(crate) fn replace(&mut self, peer: PeerId, addrs: impl IntoIterator<Item = Addr>, now: Instant) {
        let Some(known) = self.entry(peer, now) else { return };
        known.heard.clear();
        known.connected = true;
        known.met = Some(hour_of(SystemTime::now()));
        for addr in addrs {
            self.add(peer, &addr, now);
        }
    }

    /// Adds a peer from the configuration, never to be forgotten.
    pub(crate) fn pin(&mut self, peer: PeerId, addr: &Addr, now: Instant) {
        let Some(known) = self.entry(peer, now) else { return };
        let addr = addr.without_node();
        if known.pinned.len() < MAX_ADDRS_PER_PEER && !known.pinned.contains(&addr) {
            known.pinned.push(addr);
        }
    }

    /// Takes over what a former run knew.
    pub(crate) fn restore(&mut self, met: Vec<Met>, now: Instant) {
        for Met { node, hour, addrs } in met {
            let peer = peer_of(&node);
            for addr in addrs {
                self.add(peer, &addr, now);
            }
            if let Some(known) = self.known.get_mut(&peer) {
                known.met = Some(hour);
            }
        }
    }

    /// Returns the peers that are or were connected, for the next run.
    pub(crate) fn met(&self, now: SystemTime) -> Vec<Met> {
        let met = |(peer, known): (&PeerId, &Known)| {
            let hour = known.met.map(|met| if known.connected { hour_of(now) } else { met })?;
            Some(Met { node: node_of(peer)?, hour, addrs: known.addrs().take(MAX_ADDRS_PER_PEER).cloned().collect() })
        };
        self.known.iter().filter_map(met).filter(|met| !met.addrs.is_empty()).collect()
    }

    /// Leaves a peer alone for a while.
    pub(crate) fn rest(&mut self, peer: &PeerId, wait: Duration, now: Instant) {
        if let Some(known) = self.known.get_mut(peer) {
            known.next_try = now + wait;
        }
    }

    /// Returns the addresses to dial a peer at, now.
    pub(crate) fn to_dial(&self, peer: &PeerId) -> Vec<Multiaddr> {
        let group = self.known.get(peer).map(Known::group).unwrap_or_default();
        group.into_iter().map(|addr| addr.multiaddr().clone()).collect()
    }

    pub(crate) fn addrs(&self, peer: &PeerId) -> impl Iterator<Item = &Addr> {
        self.known.get(peer).into_iter().flat_map(Known::addrs)
    }

    /// Returns whom to dial when there is no peer at all: everybody in the configuration, and `count` others, those that failed the
    /// least and were heard of last.
    pub(crate) fn candidates(&self, count: usize) -> Vec<PeerId> {
        let (pinned, mut others): (Vec<_>, Vec<_>) = self.known.iter().partition(|(_, known)| !known.pinned.is_empty());
        others.retain(|(_, known)| !known.heard.is_empty());
        others.sort_unstable_by_key(|(_, known)| (known.failures, Reverse((known.met, known.heard_at))));
        pinned.into_iter().chain(others.into_iter().take(count)).map(|(peer, _)| *peer).collect()
    }

    /// Returns up to `count` unconnected peers that may be dialled now, those with the fewest failures first; with `pinned_only`
    /// only those of the configuration.
    pub(crate) fn due(
        &self,
        count: usize,
        now: Instant,
        pinned_only: bool,
        connected: impl Fn(&PeerId) -> bool,
    ) -> Vec<PeerId> {
        let of_use = |known: &Known| !known.pinned.is_empty() || (!pinned_only && !known.heard.is_empty());
        let mut due: Vec<_> = self
            .known
            .iter()
            .filter(|(peer, known)| known.next_try <= now && of_use(known) && !connected(peer))
            .map(|(peer, known)| (known.failures, known.next_try, *peer))
            .collect();
        due.sort_unstable();
        due.into_iter().take(count).map(|(_, _, peer)| peer).collect()
    }

    fn entry(&mut self, peer: PeerId, now: Instant) -> Option<&mut Known> {
        if peer == self.me {
            return None;
        }
        if self.known.len() >= MAX_KNOWN_PEERS && !self.known.contains_key(&peer) {
            let oldest = self
                .known
                .iter()
                .filter(|(_, k)| k.pinned.is_empty())
                .min_by_key(|(_, k)| k.heard_at)
                .map(|(peer, _)| *peer);
            oldest.and_then(|peer| self.known.remove(&peer));
        }
        let fresh = || Known {
            pinned: Vec::new(),
            heard: Vec::new(),
            heard_at: now,
            failures: 0,
            next_try: now,
            connected: false,
            met: None,
        };
        Some(self.known.entry(peer).or_insert_with(fresh))
    }

    fn on_failure(&mut self, peer: &PeerId, now: Instant) {
        // Without any peer, the fault is likely this node's own: nobody is forgotten for that.
        let alone = !self.known.values().any(|known| known.connected);
        // A dial that a connected peer asked for, to learn whether others reach it, says nothing about the way that works.
        let Some(known) = self.known.get_mut(peer).filter(|known| !known.connected) else { return };
        known.failures = known.failures.saturating_add(1);
        if known.failures > MAX_FAILURES && known.pinned.is_empty() && !alone {
            self.known.remove(peer);
            return;
        }
        let wait = FIRST_WAIT.saturating_mul(1 << known.failures.min(10)).min(LAST_WAIT);
        let seed = [&self.me.to_bytes()[..], &peer.to_bytes(), &known.failures.to_le_bytes()].concat();
        known.next_try = now + jitter(wait, &seed);
    }

    /// Somebody else answers at an address: two houses use the same private ones, or a lease passed on. A dial ends with the
    /// first answer, so such an address would keep the good ones from being tried.
    fn on_stranger(&mut self, peer: &PeerId, address: &Multiaddr) {
        if let (Some(known), Ok(addr)) = (self.known.get_mut(peer), Addr::from_multiaddr(address.clone())) {
            let addr = addr.without_node();
            known.heard.retain(|heard| *heard != addr);
        }
    }

    fn on_success(&mut self, peer: PeerId, endpoint: &ConnectedPoint, now: Instant) {
        if let ConnectedPoint::Dialer { address, .. } = endpoint
            && let Ok(addr) = Addr::from_multiaddr(address.clone())
        {
            self.add(peer, &addr, now);
        }
        if let Some(known) = self.known.get_mut(&peer) {
            known.failures = 0;
            known.next_try = now;
            known.connected = true;
        }
    }

    fn on_gone(&mut self, peer: &PeerId) {
        if let Some(known) = self.known.get_mut(peer) {
            known.connected = false;
            known.met = known.met.map(|_| hour_of(SystemTime::now()));
        }
    }
}

impl NetworkBehaviour for Book {
    type ConnectionHandler = dummy::ConnectionHandler;
    type ToSwarm = Infallible;

    fn handle_established_inbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(dummy::ConnectionHandler)
    }

    fn handle_pending_outbound_connection(
        &mut self,
        _: ConnectionId,
        peer: Option<PeerId>,
        _: &[Multiaddr],
        _: Endpoint,
    ) -> Result<Vec<Multiaddr>, ConnectionDenied> {
        let addrs = peer.iter().flat_map(|peer| self.addrs(peer));
        Ok(addrs.map(|addr| addr.multiaddr().clone()).collect())
    }

    fn handle_established_outbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(dummy::ConnectionHandler)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        use libp2p::swarm::DialError::{Denied, DialPeerConditionFalse, WrongPeerId};
        match event {
            FromSwarm::DialFailure(DialFailure { peer_id: Some(peer), error, .. })
                if !matches!(error, DialPeerConditionFalse(_) | Denied { .. }) =>
            {
                if let WrongPeerId { address, .. } = error {
                    self.on_stranger(&peer, address);
                }
                self.on_failure(&peer, Instant::now());
            }
            FromSwarm::ConnectionEstablished(ConnectionEstablished { peer_id, endpoint, .. }) => {
                self.on_success(peer_id, endpoint, Instant::now());
            }
            FromSwarm::ConnectionClosed(ConnectionClosed { peer_id, remaining_established: 0, .. }) => {
                self.on_gone(&peer_id);
            }
            _ => {}
        }
    }

    fn on_connection_handler_event(&mut self, _: PeerId, _: ConnectionId, event: THandlerOutEvent<Self>) {
        match event {}
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use chorus_protocol::SecretKey;

    use super::*;

    fn knows(book: &Book, peer: &PeerId) -> bool {
        book.addrs(peer).next().is_some()
    }

    fn addr(port: u16) -> Addr {
        Addr::tcp(([127, 0, 0, 1], port).into())
    }

    #[test]
    fn a_peer_that_moved_is_known_at_its_new_place_only() {
        let (me, peer, now) = (PeerId::random(), PeerId::random(), Instant::now());
        let mut book = Book::new(me);
        book.add(peer, &addr(1), now);
        book.replace(peer, [addr(2), addr(3)], now);
        assert!(book.addrs(&peer).eq(&[addr(2), addr(3)]));
        book.pin(peer, &addr(9), now);
        book.replace(peer, [addr(4)], now);
        assert!(book.addrs(&peer).eq(&[addr(9), addr(4)]), "what the configuration says stays");
        book.on_stranger(&peer, addr(4).multiaddr());
        assert!(book.addrs(&peer).eq(&[addr(9)]), "somebody else answers there");
        book.add(me, &addr(5), now);
        assert!(!knows(&book, &me), "a node does not dial itself");
    }

    #[test]
    fn one_transport_is_dialled_at_a_time_and_each_failure_moves_on() {
        let (peer, now) = (PeerId::random(), Instant::now());
        let mut book = Book::new(PeerId::random());
        let quic = Addr::quic(([127, 0, 0, 1], 1).into());
        for addr in [quic.clone(), addr(1), addr(2)] {
            book.add(peer, &addr, now);
        }
        let mut turns = Vec::new();
        for _ in 0..3 {
            turns.push(book.to_dial(&peer));
            book.on_failure(&peer, now);
        }
        let tcp = [addr(1), addr(2)].map(|addr| addr.multiaddr().clone()).to_vec();
        assert_eq!(turns, [tcp.clone(), vec![quic.multiaddr().clone()], tcp]);
    }

    #[test]
    fn failures_space_out_the_dials_and_end_in_oblivion() {
        let (peer, start) = (PeerId::random(), Instant::now());
        let mut book = Book::new(PeerId::random());
        book.add(peer, &addr(1), start);
        for _ in 0..100 {
            book.on_failure(&peer, start);
        }
        assert!(knows(&book, &peer), "a node without any peer forgets nobody");
        let mut book = Book::new(PeerId::random());
        book.add(peer, &addr(1), start);
        let friend = PeerId::random();
        book.replace(friend, [addr(2)], start);
        for _ in 0..100 {
            book.on_failure(&friend, start);
        }
        assert!(knows(&book, &friend), "a dial that a connected peer asks for counts for nothing");
        let (mut now, mut dials) = (start, 0);
        while knows(&book, &peer) {
            if book.due(8, now, false, |_| false).contains(&peer) {
                dials += 1;
                book.on_failure(&peer, now);
            }
            now += Duration::from_millis(100);
        }
        assert_eq!(dials, MAX_FAILURES + 1);
        assert!(now - start > Duration::from_secs(120));

        book.pin(peer, &addr(1), now);
        for _ in 0..100 {
            book.on_failure(&peer, now);
        }
        assert_eq!(book.due(8, now + LAST_WAIT * 2, true, |_| false), [peer], "a bootstrap peer is tried for ever");
    }

    #[test]
    fn a_peer_behind_a_relay_is_dialled_through_it_at_once() {
        let (peer, relay, now) =
            (PeerId::random(), peer_of(&SecretKey::from_bytes(&[9; 32]).node_id()), Instant::now());
        let mut book = Book::new(PeerId::random());
        let door: Addr = format!("/ip4/192.0.2.1/udp/7600/quic-v1/p2p/{relay}/p2p-circuit").parse().unwrap();
        for addr in [addr(1), door.clone(), Addr::quic(([127, 0, 0, 1], 1).into())] {
            book.add(peer, &addr, now);
        }
        for _ in 0..4 {
            assert!(book.to_dial(&peer).contains(door.multiaddr()) && book.to_dial(&peer).len() == 2);
            book.on_failure(&peer, now);
        }
        book.replace(peer, [door], now);
        assert_eq!(book.to_dial(&peer).len(), 1);
    }

    #[test]
    fn only_peers_of_this_network_are_remembered_for_the_next_run() {
        let (now, wall) = (Instant::now(), SystemTime::now());
        let [met, heard] = [1, 2].map(|seed| peer_of(&SecretKey::from_bytes(&[seed; 32]).node_id()));
        let mut book = Book::new(PeerId::random());
        book.add(heard, &addr(1), now);
        book.replace(met, [addr(2)], now);
        book.on_gone(&met);
        book.on_gone(&heard);
        let kept = book.met(wall);
        assert!(matches!(&kept[..], [one] if one.node == node_of(&met).unwrap() && one.addrs == [addr(2)]), "{kept:?}");
        let mut next = Book::new(PeerId::random());
        next.add(heard, &addr(1), now);
        next.restore(kept, now);
        assert_eq!(next.candidates(1), [met], "who was met goes before who was only heard of");
    }

    #[test]
    fn memory_is_bounded_and_bootstrap_peers_stay() {
        let now = Instant::now();
        let mut book = Book::new(PeerId::random());
        let first = PeerId::random();
        book.pin(first, &addr(1), now);
        for port in 1..3000 {
            book.add(PeerId::random(), &addr(port), now);
            book.add(first, &addr(port), now);
        }
        assert_eq!(book.known.len(), MAX_KNOWN_PEERS);
        assert_eq!(book.addrs(&first).count(), MAX_ADDRS_PER_PEER + 1);
        assert_eq!(book.addrs(&first).next(), Some(&addr(1)));
    }
}
