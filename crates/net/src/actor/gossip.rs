//! Gossip: what comes in waits for the node's verdict, what goes out goes to everybody.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use chorus_protocol::limits::MAX_GOSSIP_BYTES;
use libp2p::PeerId;
use libp2p::gossipsub::{self, Event, Message, MessageAcceptance, MessageId};

use super::Actor;
use super::peers::Peer;
use crate::behaviour::gossip::GRAYLIST_SCORE;
use crate::error::{BanReason, PublishError};
use crate::event::{GossipToken, NetEvent, Topic, Verdict};
use crate::identity::peer_of;
use crate::limits::Admission;

/// A peer is asked to connect anew at most this often.
const RESET_EVERY: Duration = Duration::from_secs(60);

impl Actor {
    pub(super) fn publish(&mut self, topic: Topic, bytes: Vec<u8>) {
        let hash = self.names.hash(topic);
        let error = match self.swarm.behaviour_mut().gossip.publish(hash, bytes) {
            Ok(_) | Err(gossipsub::PublishError::Duplicate) => return,
            Err(gossipsub::PublishError::NoPeersSubscribedToTopic) => PublishError::NoPeers,
            Err(gossipsub::PublishError::AllQueuesFull(_)) => PublishError::Overloaded,
            Err(error) => {
                tracing::warn!(%error, ?topic, "gossip refused a message");
                PublishError::Refused
            }
        };
        self.emit(NetEvent::PublishFailed { topic, error });
    }

    pub(super) fn on_gossip(&mut self, event: Event) {
        match event {
            Event::Message { propagation_source, message_id, message } => {
                self.on_gossip_message(propagation_source, &message_id, message);
            }
            Event::SlowPeer { peer_id, failed_messages } => {
                tracing::debug!(peer = %peer_id, ?failed_messages, "a peer takes gossip too slowly");
            }
            Event::Subscribed { .. } | Event::Unsubscribed { .. } | Event::GossipsubNotSupported { .. } => {}
        }
    }

    fn on_gossip_message(&mut self, source: PeerId, id: &MessageId, message: Message) {
        let now = Instant::now();
        let (Some(topic), Some(from)) = (self.names.topic(&message.topic), self.audible(&source, now)) else {
            return self.judge(id, &source, Verdict::Ignore);
        };
        let Ok(id_bytes) = <[u8; 32]>::try_from(id.0.as_slice()) else { return };
        if message.data.is_empty() || message.data.len() > MAX_GOSSIP_BYTES {
            return self.judge(id, &source, Verdict::Reject);
        }
        match self.meter(source, now).gossip(message.data.len(), now) {
            Admission::Granted if self.has_room(1) => {
                let token = GossipToken { id: id_bytes, from };
                self.emit(NetEvent::Gossip { topic, from, bytes: message.data, token });
            }
            Admission::Granted | Admission::Refused => self.judge(id, &source, Verdict::Ignore),
            Admission::Flood => {
                self.judge(id, &source, Verdict::Ignore);
                self.ban(source, BanReason::Flood);
            }
        }
    }

    pub(super) fn on_verdict(&mut self, token: GossipToken, verdict: Verdict) {
        self.judge(&MessageId(token.id.to_vec()), &peer_of(&token.from), verdict);
    }

    /// Every node of this network hears all topics. A peer that has not said so after a while said it on a connection that was
    /// thrown away, and would never say it again: the connection is made anew, so that gossip reaches it. Once in a while only,
    /// since a peer may also just not want to.
    pub(super) fn mend_subscriptions(&mut self, now: Instant) {
        let gossip = &self.swarm.behaviour().gossip;
        let heard: BTreeSet<PeerId> =
            gossip.all_peers().filter(|(_, topics)| topics.len() == Topic::ALL.len()).map(|(peer, _)| *peer).collect();
        let silent = |peer: &PeerId, known: &Peer| {
            known.is_settled(now) && !heard.contains(peer) && !self.resets.contains_key(peer)
        };
        let broken: Vec<PeerId> =
            self.peers.iter().filter(|(peer, known)| silent(peer, known)).map(|(peer, _)| *peer).collect();
        for peer in broken {
            tracing::debug!(%peer, "no gossip topics were heard; connecting anew");
            self.resets.insert(peer, now);
            // A peer that left by itself comes back by itself.
            let _ = self.swarm.disconnect_peer_id(peer);
        }
    }

    pub(super) fn forget_resets(&mut self, now: Instant) {
        self.resets.retain(|_, at| now.saturating_duration_since(*at) < RESET_EVERY);
    }

    fn judge(&mut self, id: &MessageId, source: &PeerId, verdict: Verdict) {
        let acceptance = match verdict {
            Verdict::Accept => MessageAcceptance::Accept,
            Verdict::Reject => MessageAcceptance::Reject,
            Verdict::Ignore => MessageAcceptance::Ignore,
        };
        let gossip = &mut self.swarm.behaviour_mut().gossip;
        // A verdict that comes too late finds nothing: the message was not passed on, and others have it.
        let _ = gossip.report_message_validation_result(id, source, acceptance);
        if verdict == Verdict::Reject && gossip.peer_score(source).is_some_and(|score| score <= GRAYLIST_SCORE) {
            self.ban(*source, BanReason::InvalidGossip);
        }
    }
}
