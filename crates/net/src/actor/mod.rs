//! The actor: it owns the swarm. Handlers are synchronous; the only `.await` of a running actor is in its `select!`.
//!
//! | file | subject |
//! |---|---|
//! | `mod.rs` | the loop, and who handles what |
//! | `peers.rs` | connections, `identify`, bans |
//! | `direct.rs`, `outbox.rs` | direct messages: glue, and the queues behind it |
//! | `gossip.rs` | topics and verdicts |
//! | `doors.rs` | listen addresses, reachability, relays |
//! | `seek.rs` | finding peers, and finding them again |
//! | `provide.rs` | who provides what |
//! | `twins.rs` | another process with the same key |

mod direct;
mod doors;
mod gossip;
mod outbox;
mod peers;
mod provide;
mod seek;
mod twins;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};

use chorus_protocol::NodeId;
use futures::StreamExt;
use libp2p::swarm::{ConnectionId, SwarmEvent};
use libp2p::{PeerId, Swarm, kad};
use tokio::sync::{mpsc, watch};

use self::doors::DoorKeeper;
use self::outbox::Outbox;
use self::peers::Peer;
use self::provide::Providing;
use self::seek::Seeker;
use self::twins::Twins;
use crate::addr::Addr;
use crate::behaviour::names::Names;
use crate::behaviour::{Behaviour, BehaviourEvent};
use crate::config::NetConfig;
use crate::event::NetEvent;
use crate::handle::{Command, Doors};
use crate::limits::Meter;
use crate::peer_file::PeerFile;

/// How often the actor looks after what time alone changes.
const TICK: Duration = Duration::from_millis(250);
/// Ticks between two sweeps of what may be forgotten.
const SWEEP_TICKS: u64 = 40;
/// Peers whose rates are remembered after they left, so that coming back does not fill their buckets.
const MAX_METERS: usize = 4096;
/// Listeners that say nothing for so long have said where they listen.
const SILENCE: Duration = Duration::from_millis(10);
/// For so long peers are given the chance to hear that this node leaves.
const FAREWELL: Duration = Duration::from_millis(300);

/// All state of a running network.
pub(crate) struct Actor {
    cfg: NetConfig,
    names: Names,
    me: NodeId,
    swarm: Swarm<Behaviour>,
    commands: mpsc::Receiver<Command>,
    events: mpsc::Sender<NetEvent>,
    /// Events that did not fit into the channel. While it is long, the swarm is not polled.
    overflow: VecDeque<NetEvent>,
    /// Messages refused because the node is behind, since it was last told.
    shed: u64,
    ticks: u64,
    peers: BTreeMap<PeerId, Peer>,
    meters: BTreeMap<PeerId, Meter>,
    outbox: Outbox,
    /// Walks through the DHT that look for one peer.
    lookups: HashMap<kad::QueryId, PeerId>,
    providing: Providing,
    /// Dials that the node asked for. Bounded by the limit on pending connections.
    asked: BTreeMap<ConnectionId, Addr>,
    /// Peers that were asked to connect anew because their gossip topics never came, and when.
    resets: BTreeMap<PeerId, Instant>,
    seeker: Seeker,
    keeper: DoorKeeper,
    twins: Twins,
    peer_file: Option<PeerFile>,
}

impl Actor {
    pub(crate) fn new(
        cfg: NetConfig,
        names: Names,
        me: NodeId,
        swarm: Swarm<Behaviour>,
        (commands, events): (mpsc::Receiver<Command>, mpsc::Sender<NetEvent>),
        doors: watch::Sender<Doors>,
    ) -> Self {
        let now = Instant::now();
        Self {
            names,
            me,
            swarm,
            commands,
            events,
            overflow: VecDeque::new(),
            shed: 0,
            ticks: 0,
            peers: BTreeMap::new(),
            meters: BTreeMap::new(),
            outbox: Outbox::default(),
            lookups: HashMap::new(),
            providing: Providing::default(),
            asked: BTreeMap::new(),
            resets: BTreeMap::new(),
            seeker: Seeker::new(me, now),
            keeper: DoorKeeper::new(doors),
            twins: Twins::default(),
            peer_file: None,
            cfg,
        }
    }

    /// Runs until the last handle is gone, the node stops to listen to events, or it is told to stop.
    pub(crate) async fn run(mut self) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let events = self.events.clone();
        let done = loop {
            let keeps_up = self.overflow.len() < self.cfg.event_queue;
            tokio::select! {
                slot = events.reserve(), if !self.overflow.is_empty() => match (slot, self.overflow.pop_front()) {
                    (Ok(slot), Some(event)) => slot.send(event),
                    _ => break None,
                },
                command = self.commands.recv(), if keeps_up => match command {
                    Some(Command::Shutdown(done)) => break Some(done),
                    Some(command) => self.on_command(command),
                    None => break None,
                },
                event = self.swarm.select_next_some(), if keeps_up => self.on_swarm(event),
                _ = tick.tick() => self.on_tick(Instant::now()),
            }
            self.hand_over();
        };
        if let Some(saving) = self.remember_peers() {
            // A list that could not be written was warned about.
            let _ = saving.await;
        }
        self.farewell().await;
        let ports = self.keeper.listening();
        drop(self);
        doors::freed(&ports, FAREWELL).await;
        if let Some(done) = done {
            // Whoever asked may have stopped waiting.
            let _ = done.send(());
        }
    }

    /// Drives the swarm until every listener has its addresses, or gives up waiting for slow ones. An interface reports its
    /// addresses one after the other, so the last one is known by the silence after it.
    pub(crate) async fn settle(&mut self, patience: Duration) {
        let end = tokio::time::Instant::now() + patience;
        loop {
            let wait = if self.keeper.is_waiting() { end } else { end.min(tokio::time::Instant::now() + SILENCE) };
            match tokio::time::timeout_at(wait, self.swarm.select_next_some()).await {
                Ok(event) => self.on_swarm(event),
                Err(_) => return,
            }
        }
    }

    async fn farewell(&mut self) {
        let peers: Vec<PeerId> = self.swarm.connected_peers().copied().collect();
        for peer in peers {
            // A peer that left by itself in the meantime needs no good-bye.
            let _ = self.swarm.disconnect_peer_id(peer);
        }
        let end = tokio::time::sleep(FAREWELL);
        tokio::pin!(end);
        while self.swarm.connected_peers().next().is_some() {
            tokio::select! {
                _ = self.swarm.select_next_some() => {}
                () = &mut end => return,
            }
        }
    }

    fn emit(&mut self, event: NetEvent) {
        self.overflow.push_back(event);
    }

    /// Passes waiting events on as far as the channel takes them.
    fn hand_over(&mut self) {
        while let Some(event) = self.overflow.pop_front() {
            match self.events.try_send(event) {
                Ok(()) => {}
                Err(mpsc::error::TrySendError::Full(event) | mpsc::error::TrySendError::Closed(event)) => {
                    self.overflow.push_front(event);
                    return;
                }
            }
        }
    }

    /// Whether `messages` more may wait for the node; else they are shed.
    fn has_room(&mut self, messages: usize) -> bool {
        let room = self.overflow.len() + messages <= self.cfg.event_queue / 2;
        if !room {
            self.shed += messages as u64;
        }
        room
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Publish { topic, bytes } => self.publish(topic, bytes),
            Command::Validated { token, verdict } => self.on_verdict(token, verdict),
            Command::Send { to, outgoing } => self.send(to, outgoing),
            Command::Reach { node, reply } => self.reach(&node, reply),
            Command::Provide(key) => self.provide(key),
            Command::Unprovide(key) => self.unprovide(key),
            Command::FindProviders(key) => self.find_providers(key),
            Command::Dial(addr) => self.dial_for_node(addr),
            Command::Disconnect { node, reason } => self.disconnect(node, reason),
            Command::Ban { node, ban } => self.ban_for_node(node, ban),
            Command::Unban(node) => self.unban(&node),
            Command::Listen { addr, reply } => {
                let listening = self.listen(&addr);
                // Whoever asked may have stopped waiting; the listener stays.
                let _ = reply.send(listening);
            }
            Command::Unlisten(addr) => self.unlisten(&addr),
            Command::Peers(reply) => {
                let peers = self.list_peers(Instant::now());
                // Whoever asked may have stopped waiting.
                let _ = reply.send(peers);
            }
            Command::Shutdown(_) => {}
        }
    }

    fn on_swarm(&mut self, event: SwarmEvent<BehaviourEvent>) {
        match event {
            SwarmEvent::Behaviour(event) => self.on_behaviour(event),
            SwarmEvent::ConnectionEstablished { peer_id, connection_id, endpoint, .. } => {
                self.asked.remove(&connection_id);
                self.on_connected(peer_id, connection_id, &endpoint);
            }
            SwarmEvent::ConnectionClosed { peer_id, connection_id, num_established, .. } => {
                self.on_disconnected(peer_id, connection_id, num_established);
            }
            SwarmEvent::OutgoingConnectionError { connection_id, peer_id, error } => {
                self.on_dial_error(connection_id, peer_id, &error);
            }
            SwarmEvent::IncomingConnectionError { error, send_back_addr, .. } => {
                self.on_knock_error(&error, &send_back_addr);
            }
            SwarmEvent::NewListenAddr { listener_id, address } => self.on_listening(listener_id, address),
            SwarmEvent::ExpiredListenAddr { listener_id, address } => self.on_listen_expired(listener_id, &address),
            SwarmEvent::ListenerClosed { listener_id, reason, .. } => self.on_listener_closed(listener_id, &reason),
            SwarmEvent::ListenerError { error, .. } => tracing::warn!(%error, "a listener reports an error"),
            SwarmEvent::ExternalAddrConfirmed { address } => self.on_external(address),
            SwarmEvent::ExternalAddrExpired { address } => self.on_external_expired(&address),
            _ => {}
        }
    }

    fn on_behaviour(&mut self, event: BehaviourEvent) {
        match event {
            BehaviourEvent::Direct(event) => self.on_direct(event),
            BehaviourEvent::Gossip(event) => self.on_gossip(event),
            BehaviourEvent::Identify(event) => self.on_identify(event),
            BehaviourEvent::Ping(event) => self.on_ping(&event),
            BehaviourEvent::Kad(event) => self.on_kad(event),
            BehaviourEvent::Mdns(event) => self.on_mdns(event),
            BehaviourEvent::Autonat(event) => self.on_autonat(event),
            BehaviourEvent::RelayClient(event) => tracing::debug!(?event, "relay client"),
            BehaviourEvent::RelayServer(event) => tracing::debug!(?event, "relay"),
            BehaviourEvent::Dcutr(event) => self.on_punched(&event),
            BehaviourEvent::Streams(()) => {}
            BehaviourEvent::Gate(never) | BehaviourEvent::Limits(never) | BehaviourEvent::Book(never) => match never {},
        }
    }

    fn on_tick(&mut self, now: Instant) {
        self.ticks += 1;
        self.expire_sends(now);
        self.seek(now);
        self.keep_doors(now);
        self.look_after_peers(now);
        self.judge_twins(now);
        if self.shed > 0 && self.overflow.len() < self.cfg.event_queue / 2 {
            let messages = std::mem::take(&mut self.shed);
            self.emit(NetEvent::Shed { messages });
        }
        if self.ticks.is_multiple_of(SWEEP_TICKS) {
            self.sweep(now);
        }
    }

    fn sweep(&mut self, now: Instant) {
        self.swarm.behaviour_mut().gate.sweep(now);
        drop(self.remember_peers());
        self.forget_resets(now);
        self.forget_providers(now);
        let peers = &self.peers;
        self.meters.retain(|peer, meter| peers.contains_key(peer) || !meter.is_idle(now));
        if self.meters.len() > MAX_METERS {
            self.meters.retain(|peer, _| peers.contains_key(peer));
        }
    }
}
