//! Seeking: how a node finds its peers, and finds them again.
//!
//! While there is no peer, every bootstrap peer and some that were met or heard of are dialled in rounds, at most ten seconds apart, for
//! ever. While there are fewer than `conn.target`, a few known peers are dialled at each tick, each with its own back-off.
//! Bootstrap peers are dialled in any case, so that two halves of a swarm that were cut apart grow together again.

use std::num::NonZeroU8;
use std::time::{Duration, Instant, SystemTime};

use chorus_protocol::NodeId;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{ConnectionId, DialError, ListenError};
use libp2p::{Multiaddr, PeerId, kad, mdns};
use tokio::task::JoinHandle;

use super::Actor;
use crate::addr::Addr;
use crate::event::NetEvent;
use crate::identity::peer_of;
use crate::limits::jitter;
use crate::peer_file::PeerFile;

/// The wait after the first round without success; it doubles up to the last, and is spread by a quarter in both directions.
const FIRST_WAIT: Duration = Duration::from_millis(500);
const LAST_WAIT: Duration = Duration::from_secs(8);
/// Peers dialled in one round while there is none, besides the bootstrap peers.
const ROUND_PEERS: usize = 16;
/// Peers dialled at one tick while there are too few.
const TICK_PEERS: usize = 4;
/// Addresses of one peer that are tried at once.
const DIALS_AT_ONCE: NonZeroU8 = NonZeroU8::new(8).expect("8 is not zero");
/// Rounds before the node is told that it is alone: the first ones are the normal case at a start.
const QUIET_ROUNDS: u32 = 2;
/// Own addresses in the bootstrap list are looked at this long after the start, when the listeners' addresses are known.
const SELF_CHECK_AFTER: Duration = Duration::from_secs(2);

/// When to dial next.
#[derive(Debug)]
pub(crate) struct Seeker {
    me: NodeId,
    alone_since: Option<Instant>,
    round: u32,
    next_round: Instant,
    /// Addresses of the configuration that end at this node's own id.
    self_named: Vec<Addr>,
    started: Instant,
}

impl Seeker {
    pub(crate) const fn new(me: NodeId, now: Instant) -> Self {
        Self { me, alone_since: Some(now), round: 0, next_round: now, self_named: Vec::new(), started: now }
    }

    fn wait(&self) -> Duration {
        let wait = FIRST_WAIT.saturating_mul(1 << self.round.min(8)).min(LAST_WAIT);
        jitter(wait, &[&self.me.as_bytes()[..], &self.round.to_le_bytes()].concat())
    }

    /// Begins a round if one is due; returns since when the node is alone, and how long it will wait after this round.
    fn begin_round(&mut self, now: Instant) -> Option<(Instant, Duration)> {
        let since = self.alone_since?;
        if now < self.next_round {
            return None;
        }
        let wait = self.wait();
        self.round = self.round.saturating_add(1);
        self.next_round = now + wait;
        Some((since, wait))
    }

    fn on_alone(&mut self, now: Instant) {
        self.alone_since = Some(now);
        self.round = 0;
        self.next_round = now;
    }
}

impl Actor {
    /// Takes the bootstrap list over. An address given twice is known once; one that names this node is set aside.
    pub(crate) fn take_bootstrap(&mut self) {
        let now = Instant::now();
        for addr in &self.cfg.bootstrap {
            match addr.node() {
                Some(node) if node == self.me => self.seeker.self_named.push(addr.clone()),
                Some(node) => self.swarm.behaviour_mut().book.pin(peer_of(&node), addr, now),
                None => {}
            }
        }
    }

    /// Takes the peers of the last run over.
    pub(crate) fn recall_peers(&mut self) {
        let Some(path) = self.cfg.peer_file.clone() else { return };
        let (file, met) = PeerFile::open(path, SystemTime::now());
        self.swarm.behaviour_mut().book.restore(met, Instant::now());
        self.peer_file = Some(file);
    }

    /// Writes down the peers of this run, if they changed, beside the loop.
    pub(super) fn remember_peers(&mut self) -> Option<JoinHandle<()>> {
        let now = SystemTime::now();
        let met = self.swarm.behaviour().book.met(now);
        self.peer_file.as_mut()?.update(met, now).map(tokio::task::spawn_blocking)
    }

    pub(super) fn seek(&mut self, now: Instant) {
        if let Some((since, next_try)) = self.seeker.begin_round(now) {
            let round = self.seeker.round;
            let peers = self.swarm.behaviour().book.candidates(ROUND_PEERS);
            if round > QUIET_ROUNDS {
                tracing::info!(attempt = round, known = peers.len(), "no peers; trying again");
                self.emit(NetEvent::Isolated { since, attempt: round, next_try });
            }
            self.dial_all(peers);
        } else if self.seeker.alone_since.is_none() {
            let wanted = self.up() < self.cfg.conn.target as usize;
            let swarm = &self.swarm;
            let due = swarm.behaviour().book.due(TICK_PEERS, now, !wanted, |peer| swarm.is_connected(peer));
            self.dial_all(due);
        }
        self.check_self_named(now);
    }

    fn dial_all(&mut self, peers: Vec<PeerId>) {
        for peer in peers {
            // A dial that cannot begin was counted by the book as a failure, or is under way already.
            let _ = self.dial_peer(peer);
        }
    }

    /// Dials one group of a peer's addresses, all of them at once.
    pub(super) fn dial_peer(&mut self, peer: PeerId) -> Result<ConnectionId, DialError> {
        let addrs = self.swarm.behaviour().book.to_dial(&peer);
        let opts = DialOpts::peer_id(peer)
            .condition(PeerCondition::DisconnectedAndNotDialing)
            .addresses(addrs)
            .override_dial_concurrency_factor(DIALS_AT_ONCE)
            .allocate_new_port()
            .build();
        let id = opts.connection_id();
        self.swarm.dial(opts).map(|()| id)
    }

    pub(super) fn on_peer_up(&mut self) {
        if self.seeker.alone_since.take().is_some() {
            // The first peer knows others. Without one in the routing table there is nothing to walk through yet.
            let _ = self.swarm.behaviour_mut().kad.bootstrap();
        }
    }

    /// A new address may lead where the old one did not: a node without peers tries again at once.
    pub(super) fn on_door_open(&mut self, now: Instant) {
        if self.seeker.alone_since.is_some() {
            self.seeker.next_round = now;
        }
    }

    pub(super) fn on_peer_gone(&mut self, now: Instant) {
        if self.up() == 0 {
            self.seeker.on_alone(now);
        }
    }

    /// An address of the configuration that names this node is either its own, or a twin's: one dial tells.
    fn check_self_named(&mut self, now: Instant) {
        if self.seeker.self_named.is_empty() || now.saturating_duration_since(self.seeker.started) < SELF_CHECK_AFTER {
            return;
        }
        for addr in std::mem::take(&mut self.seeker.self_named) {
            self.dial_self(&addr);
        }
    }

    fn dial_self(&mut self, addr: &Addr) {
        if !self.keeper.is_ours(addr) {
            let opts = DialOpts::unknown_peer_id()
                .address(addr.without_node().multiaddr().clone())
                .allocate_new_port()
                .build();
            // Nobody there is what one hopes for.
            let _ = self.swarm.dial(opts);
        }
    }

    pub(super) fn dial_for_node(&mut self, addr: Addr) {
        let opts = match addr.node() {
            Some(node) if node == self.me => return self.dial_self(&addr),
            Some(node) => {
                self.swarm.behaviour_mut().book.add(peer_of(&node), &addr, Instant::now());
                DialOpts::peer_id(peer_of(&node))
                    .condition(PeerCondition::Disconnected)
                    .addresses(vec![addr.multiaddr().clone()])
                    .allocate_new_port()
                    .build()
            }
            None => DialOpts::unknown_peer_id().address(addr.multiaddr().clone()).allocate_new_port().build(),
        };
        let id = opts.connection_id();
        match self.swarm.dial(opts) {
            Ok(()) => {
                self.asked.insert(id, addr);
            }
            Err(DialError::DialPeerConditionFalse(_)) => {}
            Err(DialError::NoAddresses) if self.keeper.is_ours(&addr) => {}
            Err(error) => {
                let reason = reason_of(&error);
                self.emit(NetEvent::DialFailed { addr, reason });
            }
        }
    }

    pub(super) fn on_dial_error(&mut self, id: ConnectionId, peer: Option<PeerId>, error: &DialError) {
        let now = Instant::now();
        tracing::debug!(?peer, error = %reason_of(error), "a dial failed");
        if let DialError::LocalPeerId { address } = error {
            self.asked.remove(&id);
            self.twins.on_outbound(Addr::from_multiaddr(address.clone()).ok().map(|addr| addr.without_node()), now);
            return;
        }
        if let DialError::WrongPeerId { obtained, .. } = error
            && *obtained == peer_of(&self.me)
        {
            // Another node's address in its own house is this node's in this one: the other end of this dial is seen as well.
            self.twins.on_outbound(None, now);
        }
        if let Some(addr) = self.asked.remove(&id) {
            self.emit(NetEvent::DialFailed { addr, reason: reason_of(error) });
        }
        if let Some(peer) = peer {
            self.on_no_way(peer);
        }
    }

    pub(super) fn on_knock_error(&mut self, error: &ListenError, from: &Multiaddr) {
        let now = Instant::now();
        tracing::debug!(%error, %from, "an inbound connection failed");
        match error {
            ListenError::LocalPeerId { .. } => self.twins.on_inbound(Addr::from_multiaddr(from.clone()).ok(), now),
            ListenError::Transport(_) | ListenError::Aborted => self.twins.on_broken_inbound(now),
            ListenError::WrongPeerId { .. } | ListenError::Denied { .. } => {}
        }
    }

    pub(super) fn judge_twins(&mut self, now: Instant) {
        let keeper = &self.keeper;
        if let Some(addr) = self.twins.judge(now, |addr| keeper.is_ours(addr)) {
            self.emit(NetEvent::DuplicateKey { node: self.me, addr });
        }
    }

    pub(super) fn on_kad(&mut self, event: kad::Event) {
        match event {
            kad::Event::RoutingUpdated { peer, addresses, .. } => {
                let now = Instant::now();
                for addr in addresses.iter().filter_map(|addr| Addr::from_multiaddr(addr.clone()).ok()) {
                    self.swarm.behaviour_mut().book.add(peer, &addr, now);
                }
            }
            kad::Event::OutboundQueryProgressed {
                id, result: kad::QueryResult::GetClosestPeers(result), step, ..
            } if step.last => {
                let found = match result {
                    Ok(found) => found.peers,
                    Err(kad::GetClosestPeersError::Timeout { peers, .. }) => peers,
                };
                self.on_lookup(id, &found);
            }
            kad::Event::OutboundQueryProgressed {
                id, result: kad::QueryResult::GetProviders(result), step, ..
            } => {
                self.on_providers(id, result, step.last);
            }
            kad::Event::InboundRequest { request: kad::InboundRequest::AddProvider { record: Some(record) } } => {
                self.on_provided(record, Instant::now());
            }
            _ => {}
        }
    }

    pub(super) fn on_mdns(&mut self, event: mdns::Event) {
        let mdns::Event::Discovered(found) = event else { return };
        let now = Instant::now();
        for (peer, address) in found {
            let Ok(addr) = Addr::from_multiaddr(address) else { continue };
            self.swarm.behaviour_mut().book.add(peer, &addr, now);
            if self.up() < self.cfg.conn.target as usize {
                self.dial_all(vec![peer]);
            }
        }
    }
}

/// Says what happened at each address, in one line.
fn reason_of(error: &DialError) -> String {
    match error {
        DialError::Transport(tried) => {
            let each: Vec<String> = tried.iter().map(|(addr, error)| format!("{addr}: {}", root_of(error))).collect();
            each.join("; ")
        }
        DialError::WrongPeerId { address, .. } => format!("{address}: another node answers there"),
        DialError::NoAddresses => "no address is known".to_owned(),
        DialError::Denied { cause } => format!("refused by this node: {}", root_of(cause)),
        other => other.to_string(),
    }
}

/// The innermost cause: the outer ones only say which layer passed it on.
fn root_of(error: &dyn std::error::Error) -> String {
    let mut root: &dyn std::error::Error = error;
    while let Some(inner) = root.source() {
        root = inner;
    }
    root.to_string()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use chorus_protocol::SecretKey;

    use super::*;

    #[test]
    fn a_lone_node_tries_at_least_every_ten_seconds_for_ever() {
        let start = Instant::now();
        for seed in 0..20 {
            let mut seeker = Seeker::new(SecretKey::from_bytes(&[seed; 32]).node_id(), start);
            let (mut now, mut last, mut rounds) = (start, start, 0);
            while now < start + Duration::from_secs(600) {
                if seeker.begin_round(now).is_some() {
                    assert!(now - last <= Duration::from_secs(10), "{:?} between two rounds", now - last);
                    last = now;
                    rounds += 1;
                }
                now += Duration::from_millis(50);
            }
            assert!((60..=110).contains(&rounds), "{rounds} rounds in ten minutes");
            seeker.alone_since = None;
            assert!(seeker.begin_round(now).is_none());
            seeker.on_alone(now);
            assert!(seeker.begin_round(now).is_some(), "the first round begins at once");
        }
    }
}
