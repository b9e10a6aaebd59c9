//! Direct messages: out through the outbox, in through the peer's meter.

use std::time::Instant;

use chorus_protocol::NodeId;
use libp2p::request_response::{Event, Message, OutboundFailure, OutboundRequestId, ResponseChannel};
use libp2p::swarm::DialError;
use libp2p::{PeerId, kad};

use super::Actor;
use super::outbox::{Caller, Way};
use super::peers::Peer;
use crate::addr::Addr;
use crate::behaviour::direct::{Ack, Batch, Frame};
use crate::error::{BanReason, SendError};
use crate::event::NetEvent;
use crate::handle::Outgoing;
use crate::identity::{node_of, peer_of};
use crate::limits::{Admission, MALFORMED_STRIKES, Meter};

/// Walks through the DHT for single peers that may run at once.
const MAX_LOOKUPS: usize = 32;

impl Actor {
    /// Puts a message in its peer's line, and sees to a connection.
    pub(super) fn send(&mut self, to: NodeId, outgoing: Outgoing) {
        let (peer, now, token) = (peer_of(&to), Instant::now(), outgoing.token);
        if to == self.me || self.swarm.behaviour().gate.is_banned(&peer, now) {
            self.emit(NetEvent::SendFailed { token, to, error: SendError::Refused });
            return;
        }
        if self.outbox.push(peer, outgoing, now).is_err() {
            self.emit(NetEvent::SendFailed { token, to, error: SendError::Overloaded });
        }
        self.see_to(peer);
    }

    /// Sees to a connection for somebody who wants to know where it ends. Without one, the caller is dropped.
    pub(super) fn reach(&mut self, node: &NodeId, caller: Caller) {
        let (peer, now) = (peer_of(node), Instant::now());
        if *node != self.me && !self.swarm.behaviour().gate.is_banned(&peer, now) {
            self.outbox.call(peer, caller, now);
            self.see_to(peer);
        }
    }

    /// Uses the connection for what waits for it, or makes one.
    fn see_to(&mut self, peer: PeerId) {
        if self.swarm.is_connected(&peer) {
            self.pump(peer);
        } else if self.outbox.way(&peer) == Some(Way::Idle) {
            self.connect_for(peer, Way::Dialling);
        }
    }

    /// Lets leave what may leave, and tells callers that there is a connection.
    pub(super) fn pump(&mut self, peer: PeerId) {
        for caller in self.outbox.take_callers(&peer) {
            // Whoever asked may have stopped waiting.
            let _ = caller.send(self.peers.get(&peer).map(Peer::direct_addrs).unwrap_or_default());
        }
        while let Some((batch, sent)) = self.outbox.next_batch(&peer) {
            let id = self.swarm.behaviour_mut().direct.send_request(&peer, Frame::Batch(batch));
            self.outbox.on_sent(id, peer, sent);
        }
    }

    fn connect_for(&mut self, peer: PeerId, way: Way) {
        self.outbox.set_way(&peer, way);
        match self.dial_peer(peer) {
            Ok(_) | Err(DialError::DialPeerConditionFalse(_)) => {}
            Err(_) => self.on_no_way(peer),
        }
    }

    /// A dial failed for which messages may wait: the DHT is asked once, then they are given up.
    pub(super) fn on_no_way(&mut self, peer: PeerId) {
        if self.swarm.is_connected(&peer) {
            self.pump(peer);
            return;
        }
        match self.outbox.way(&peer) {
            Some(Way::Dialling) if self.peers.is_empty() || self.lookups.len() >= MAX_LOOKUPS => self.give_up(peer),
            Some(Way::Dialling) => {
                self.outbox.set_way(&peer, Way::Asking);
                let query = self.swarm.behaviour_mut().kad.get_closest_peers(peer);
                self.lookups.insert(query, peer);
            }
            Some(Way::LastTry) => self.give_up(peer),
            Some(Way::Idle | Way::Asking) | None => {}
        }
    }

    /// A walk through the DHT ended, with or without the peer's addresses.
    pub(super) fn on_lookup(&mut self, query: kad::QueryId, found: &[kad::PeerInfo]) {
        let Some(peer) = self.lookups.remove(&query) else { return };
        let now = Instant::now();
        for info in found.iter().filter(|info| info.peer_id == peer) {
            for addr in info.addrs.iter().filter_map(|addr| Addr::from_multiaddr(addr.clone()).ok()) {
                self.swarm.behaviour_mut().book.add(peer, &addr, now);
            }
        }
        if self.swarm.is_connected(&peer) {
            self.pump(peer);
        } else if self.outbox.way(&peer).is_some() {
            self.connect_for(peer, Way::LastTry);
        }
    }

    pub(super) fn expire_sends(&mut self, now: Instant) {
        let swarm = &self.swarm;
        for peer in self.outbox.overdue(now, |peer| swarm.is_connected(peer)) {
            self.give_up(peer);
        }
    }

    fn give_up(&mut self, peer: PeerId) {
        let waiting = self.outbox.give_up(&peer);
        let Some(to) = node_of(&peer) else { return };
        for Outgoing { token, .. } in waiting {
            self.emit(NetEvent::SendFailed { token, to, error: SendError::Unreachable });
        }
    }

    pub(super) fn on_direct(&mut self, event: Event<Frame, Ack>) {
        match event {
            Event::Message { peer, message: Message::Request { request, channel, .. }, .. } => match request {
                Frame::Batch(batch) => self.on_batch(peer, batch, channel),
                // The channel is dropped, so the peer gets no acknowledgement.
                Frame::Malformed(what) => self.on_malformed(peer, &what),
            },
            Event::Message { message: Message::Response { request_id, response }, .. } => {
                let error = match response {
                    Ack::Accepted => None,
                    Ack::Overloaded => Some(SendError::Overloaded),
                    Ack::RateLimited => Some(SendError::RateLimited),
                };
                self.on_settled(request_id, error);
            }
            Event::OutboundFailure { request_id, error, .. } => {
                let error = match error {
                    OutboundFailure::DialFailure => SendError::Unreachable,
                    OutboundFailure::Timeout => SendError::Timeout,
                    OutboundFailure::UnsupportedProtocols => SendError::Unsupported,
                    OutboundFailure::ConnectionClosed | OutboundFailure::Io(_) => SendError::Lost,
                };
                self.on_settled(request_id, Some(error));
            }
            Event::InboundFailure { .. } | Event::ResponseSent { .. } => {}
        }
    }

    fn on_settled(&mut self, id: OutboundRequestId, error: Option<SendError>) {
        let Some((peer, sent)) = self.outbox.settle(id) else { return };
        let Some(to) = node_of(&peer) else { return };
        for (token, _permit) in sent {
            self.emit(match error {
                None => NetEvent::Delivered { token },
                Some(error) => NetEvent::SendFailed { token, to, error },
            });
        }
        self.see_to(peer);
    }

    fn on_malformed(&mut self, peer: PeerId, what: &str) {
        let now = Instant::now();
        tracing::debug!(%peer, what, "a malformed direct message");
        if self.audible(&peer, now).is_none() {
            return;
        }
        if self.meter(peer, now).strike(MALFORMED_STRIKES, now) == Admission::Flood {
            self.ban(peer, BanReason::Malformed);
        }
    }

    fn on_batch(&mut self, peer: PeerId, batch: Batch, channel: ResponseChannel<Ack>) {
        let now = Instant::now();
        let Some(from) = self.audible(&peer, now) else { return };
        let bytes = batch.iter().map(Vec::len).sum();
        let ack = if self.has_room(batch.len()) {
            match self.meter(peer, now).direct(batch.len(), bytes, now) {
                Admission::Granted => Ack::Accepted,
                Admission::Refused => Ack::RateLimited,
                Admission::Flood => return self.ban(peer, BanReason::Flood),
            }
        } else {
            Ack::Overloaded
        };
        if ack == Ack::Accepted {
            for bytes in batch {
                self.emit(NetEvent::Message { from, bytes });
            }
        }
        // The connection may be gone: then the peer sends again.
        let _ = self.swarm.behaviour_mut().direct.send_response(channel, ack);
    }

    pub(super) fn meter(&mut self, peer: PeerId, now: Instant) -> &mut Meter {
        let limits = &self.cfg.rate;
        self.meters.entry(peer).or_insert_with(|| Meter::new(limits, now))
    }
}
