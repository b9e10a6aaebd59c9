//! The address book: where peers were last said to listen, and when it is worth dialling them again. Every dial of every behaviour
//! draws its addresses from here; the node's own dials take those of one transport at a time.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use libp2p::core::transport::PortUse;
use libp2p::core::{ConnectedPoint, Endpoint};
use libp2p::swarm::behaviour::ConnectionEstablished;
use libp2p::swarm::{
    ConnectionDenied, ConnectionId, DialFailure, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent,
    THandlerOutEvent, ToSwarm, dummy,
};
use libp2p::{Multiaddr, PeerId};

use crate::addr::{Addr, Wire};
use crate::limits::jitter;

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
}

impl Known {
    fn addrs(&self) -> impl Iterator<Item = &Addr> {
        self.pinned.iter().chain(&self.heard)
    }

    /// The addresses to dial together, now. Over one transport only: of two dials that both succeed one is thrown away, and what
    /// the other side had already said on it (its gossip topics, for one) is lost. Each failure moves on to the next group.
    fn group(&self) -> Vec<&Addr> {
        let kind = |addr: &Addr| match addr.socket() {
            _ if addr.is_relayed() => 2,
            Some((Wire::Quic, _)) => 1,
            Some((Wire::Tcp, _)) | None => 0,
        };
        let mut kinds: Vec<u8> = self.addrs().map(kind).collect();
        kinds.sort_unstable();
        kinds.dedup();
        let turn = usize::try_from(self.failures).unwrap_or_default() % kinds.len().max(1);
        self.addrs().filter(|addr| kinds.get(turn).is_some_and(|wanted| kind(addr) == *wanted)).collect()
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

    /// Replaces what was heard by what the peer itself says.
    pub(crate) fn replace(&mut self, peer: PeerId, addrs: impl IntoIterator<Item = Addr>, now: Instant) {
        let Some(known) = self.entry(peer, now) else { return };
        known.heard.clear();
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

    /// Returns whom to dial when there is no peer at all: everybody in the configuration, and the `count` others heard of last.
    pub(crate) fn candidates(&self, count: usize) -> Vec<PeerId> {
        let (pinned, mut others): (Vec<_>, Vec<_>) = self.known.iter().partition(|(_, known)| !known.pinned.is_empty());
        others.retain(|(_, known)| !known.heard.is_empty());
        others.sort_unstable_by_key(|(_, known)| std::cmp::Reverse(known.heard_at));
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
        let fresh = || Known { pinned: Vec::new(), heard: Vec::new(), heard_at: now, failures: 0, next_try: now };
        Some(self.known.entry(peer).or_insert_with(fresh))
    }

    fn on_failure(&mut self, peer: &PeerId, now: Instant) {
        let Some(known) = self.known.get_mut(peer) else { return };
        known.failures = known.failures.saturating_add(1);
        if known.failures > MAX_FAILURES && known.pinned.is_empty() {
            self.known.remove(peer);
            return;
        }
        let wait = FIRST_WAIT.saturating_mul(1 << known.failures.min(10)).min(LAST_WAIT);
        let seed = [&self.me.to_bytes()[..], &peer.to_bytes(), &known.failures.to_le_bytes()].concat();
        known.next_try = now + jitter(wait, &seed);
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
        use libp2p::swarm::DialError::{Denied, DialPeerConditionFalse};
        match event {
            FromSwarm::DialFailure(DialFailure { peer_id: Some(peer), error, .. })
                if !matches!(error, DialPeerConditionFalse(_) | Denied { .. }) =>
            {
                self.on_failure(&peer, Instant::now());
            }
            FromSwarm::ConnectionEstablished(ConnectionEstablished { peer_id, endpoint, .. }) => {
                self.on_success(peer_id, endpoint, Instant::now());
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
