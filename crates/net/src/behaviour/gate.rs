//! The gate: who may connect at all. It holds the bans, and how often one address may knock.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::IpAddr;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use libp2p::core::Endpoint;
use libp2p::core::transport::PortUse;
use libp2p::multiaddr::Protocol;
use libp2p::swarm::{
    ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent, THandlerOutEvent, ToSwarm,
    dummy,
};
use libp2p::{Multiaddr, PeerId};

use crate::config::ConnLimits;
use crate::limits::Bucket;

/// Peers that are banned at once. Beyond it the ban that ends first gives way.
const MAX_BANS: usize = 4096;
/// Addresses whose knocking is remembered. Beyond it everybody new shares one bucket, so memory is bounded and a crowd is slowed.
const MAX_KNOCKERS: usize = 4096;
/// One address may have this share of all inbound handshakes under way.
const PENDING_SHARE: usize = 2;
/// An address may knock this many seconds' worth at once.
const BURST_SECONDS: f64 = 4.0;

/// Why the gate stayed shut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Shut {
    #[error("the peer is banned for now")]
    Banned,
    #[error("too many connections from one address")]
    TooOften,
    #[error("too many unfinished handshakes from one address")]
    TooMany,
}

/// The behaviour.
#[derive(Debug)]
pub(crate) struct Gate {
    bans: BTreeMap<PeerId, Instant>,
    knocks: BTreeMap<Option<IpAddr>, Bucket>,
    /// Inbound handshakes under way. Bounded by the limit on pending connections.
    pending: BTreeMap<ConnectionId, Option<IpAddr>>,
    per_second: f64,
    max_pending: usize,
}

impl Gate {
    pub(crate) fn new(limits: &ConnLimits) -> Self {
        Self {
            bans: BTreeMap::new(),
            knocks: BTreeMap::new(),
            pending: BTreeMap::new(),
            per_second: f64::from(limits.incoming_per_second),
            max_pending: (limits.pending as usize / PENDING_SHARE).max(1),
        }
    }

    /// Bans a peer for a while; a running ban is only prolonged.
    pub(crate) fn ban(&mut self, peer: PeerId, ban: Duration, now: Instant) {
        let until = now + ban;
        if self.bans.len() >= MAX_BANS && !self.bans.contains_key(&peer) {
            let first = self.bans.iter().min_by_key(|(_, until)| **until).map(|(peer, _)| *peer);
            first.and_then(|peer| self.bans.remove(&peer));
        }
        let entry = self.bans.entry(peer).or_insert(until);
        *entry = until.max(*entry);
    }

    /// Ends a ban before its time.
    pub(crate) fn pardon(&mut self, peer: &PeerId) {
        self.bans.remove(peer);
    }

    pub(crate) fn is_banned(&self, peer: &PeerId, now: Instant) -> bool {
        self.bans.get(peer).is_some_and(|until| *until > now)
    }

    /// Forgets what no longer matters.
    pub(crate) fn sweep(&mut self, now: Instant) {
        self.bans.retain(|_, until| *until > now);
        self.knocks.retain(|_, bucket| !bucket.is_full(now));
    }

    fn knock(&mut self, id: ConnectionId, from: &Multiaddr, now: Instant) -> Result<(), Shut> {
        let mut source = network_of(from);
        if self.pending.values().filter(|pending| **pending == source).count() >= self.max_pending {
            return Err(Shut::TooMany);
        }
        self.pending.insert(id, source);
        if self.knocks.len() >= MAX_KNOCKERS && !self.knocks.contains_key(&source) {
            source = None;
        }
        let rate = self.per_second;
        let bucket = self.knocks.entry(source).or_insert_with(|| Bucket::new(rate * BURST_SECONDS, rate, now));
        if bucket.take(1.0, now) { Ok(()) } else { Err(Shut::TooOften) }
    }

    fn pass(&self, peer: &PeerId) -> Result<dummy::ConnectionHandler, ConnectionDenied> {
        if self.is_banned(peer, Instant::now()) {
            return Err(ConnectionDenied::new(Shut::Banned));
        }
        Ok(dummy::ConnectionHandler)
    }
}

/// The host or, for IPv6, the /64 that an address lies in. Relayed connections have none and share one bucket.
fn network_of(addr: &Multiaddr) -> Option<IpAddr> {
    if addr.iter().any(|part| part == Protocol::P2pCircuit) {
        return None;
    }
    match addr.iter().next()? {
        Protocol::Ip4(ip) => Some(ip.into()),
        Protocol::Ip6(ip) => Some(std::net::Ipv6Addr::from_bits(ip.to_bits() & !u128::from(u64::MAX)).into()),
        _ => None,
    }
}

impl NetworkBehaviour for Gate {
    type ConnectionHandler = dummy::ConnectionHandler;
    type ToSwarm = Infallible;

    fn handle_pending_inbound_connection(
        &mut self,
        id: ConnectionId,
        _: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        self.knock(id, remote, Instant::now()).map_err(ConnectionDenied::new)
    }

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        _: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.pending.remove(&id);
        self.pass(&peer)
    }

    fn handle_pending_outbound_connection(
        &mut self,
        _: ConnectionId,
        peer: Option<PeerId>,
        _: &[Multiaddr],
        _: Endpoint,
    ) -> Result<Vec<Multiaddr>, ConnectionDenied> {
        match peer {
            Some(peer) => self.pass(&peer).map(|_| Vec::new()),
            None => Ok(Vec::new()),
        }
    }

    fn handle_established_outbound_connection(
        &mut self,
        _: ConnectionId,
        peer: PeerId,
        _: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.pass(&peer)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        if let FromSwarm::ListenFailure(failure) = event {
            self.pending.remove(&failure.connection_id);
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

    fn gate(incoming_per_second: u32) -> Gate {
        Gate::new(&ConnLimits { incoming_per_second, pending: 10_000, ..ConnLimits::default() })
    }

    fn knock(gate: &mut Gate, from: &str, now: Instant) -> Result<(), Shut> {
        let id = ConnectionId::new_unchecked(gate.pending.len());
        gate.knock(id, &from.parse().unwrap(), now)
    }

    #[test]
    fn unfinished_handshakes_of_one_address_leave_room_for_others() {
        let mut gate = Gate::new(&ConnLimits { incoming_per_second: 1000, pending: 8, ..ConnLimits::default() });
        let now = Instant::now();
        let passed = (0..100).filter(|_| knock(&mut gate, "/ip4/192.0.2.1/tcp/9", now).is_ok()).count();
        assert_eq!(passed, 4);
        assert_eq!(knock(&mut gate, "/ip4/192.0.2.2/tcp/9", now), Ok(()));
    }

    #[test]
    fn one_address_knocks_in_vain_while_others_pass() {
        let mut gate = gate(5);
        let now = Instant::now();
        let passed = (0..100).filter(|_| knock(&mut gate, "/ip4/192.0.2.1/tcp/9", now).is_ok()).count();
        assert_eq!(passed, 20);
        assert_eq!(knock(&mut gate, "/ip4/192.0.2.2/tcp/9", now), Ok(()));
        gate.sweep(now + Duration::from_secs(10));
        assert!(gate.knocks.is_empty(), "a healed bucket is forgotten");
    }

    #[test]
    fn neighbours_in_one_ipv6_network_share_a_bucket_and_memory_is_bounded() {
        let mut gate = gate(1);
        let now = Instant::now();
        for host in 0..10 {
            assert_eq!(knock(&mut gate, &format!("/ip6/2001:db8::{host:x}/tcp/9"), now).is_ok(), host < 4);
        }
        for a in 0..=255 {
            for b in 0..20 {
                let _ = knock(&mut gate, &format!("/ip4/10.0.{b}.{a}/tcp/9"), now);
            }
        }
        assert!(gate.knocks.len() <= MAX_KNOCKERS + 1);
    }

    #[test]
    fn bans_end_and_are_bounded() {
        let mut gate = gate(5);
        let now = Instant::now();
        let peer = PeerId::random();
        gate.ban(peer, Duration::from_secs(10), now);
        gate.ban(peer, Duration::from_secs(1), now);
        assert!(gate.is_banned(&peer, now + Duration::from_secs(9)));
        assert!(!gate.is_banned(&peer, now + Duration::from_secs(10)));
        gate.ban(peer, Duration::from_secs(10), now);
        gate.pardon(&peer);
        assert!(!gate.is_banned(&peer, now));
        gate.ban(peer, Duration::from_secs(10), now);
        for _ in 0..MAX_BANS + 10 {
            gate.ban(PeerId::random(), Duration::from_secs(60), now);
        }
        assert_eq!(gate.bans.len(), MAX_BANS);
        assert!(!gate.bans.contains_key(&peer), "the ban that ends first gives way");
    }
}
