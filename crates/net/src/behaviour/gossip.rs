//! Gossipsub, set up for this house.
//!
//! - Messages are *anonymous* at this layer: their authors sign them one layer up, and two signatures say no more than one. The
//!   peer that passed a message on is known from the connection.
//! - A message's id is the BLAKE3 hash of topic and data, so the same bytes travel once, whoever publishes them.
//! - Nothing is passed on before the node's verdict. A rejected message counts against the peer that brought it; enough of
//!   them, and the peer is heard no longer.
//! - Own messages go to every subscribed peer at once (flood publishing): in a swarm of 20 each node hears the author itself.
//! - Scores know no rate of delivery (P3), because a small swarm is silent for minutes, and no penalty for neighbours on one IP
//!   address (P6), because a swarm on one machine or behind one router is a normal one.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use chorus_protocol::limits::MAX_GOSSIP_BYTES;
use libp2p::gossipsub::{
    self, DataTransform, IdentityTransform, MaxCountSubscriptionFilter, Message, MessageAuthenticity, MessageId,
    PeerScoreParams, PeerScoreThresholds, RawMessage, TopicHash, TopicScoreParams, ValidationMode,
    WhitelistSubscriptionFilter,
};

use super::names::Names;
use crate::error::NetError;

/// The behaviour: only our topics can be subscribed to, by anybody.
pub(crate) type Behaviour = gossipsub::Behaviour<Counted, MaxCountSubscriptionFilter<WhitelistSubscriptionFilter>>;

/// Counts what arrives: every copy of every message, since gossipsub itself keeps silent about those that come again.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counted(pub(crate) Arc<AtomicU64>);

impl DataTransform for Counted {
    fn inbound_transform(&self, raw: RawMessage) -> Result<Message, io::Error> {
        self.0.fetch_add(1, Relaxed);
        IdentityTransform.inbound_transform(raw)
    }

    fn outbound_transform(&self, topic: &TopicHash, data: Vec<u8>) -> Result<Vec<u8>, io::Error> {
        IdentityTransform.outbound_transform(topic, data)
    }
}

/// What gossipsub's envelope adds to a message: topic, tags and lengths.
const ENVELOPE_BYTES: usize = 1024;
const HEARTBEAT: Duration = Duration::from_millis(700);
/// Heartbeats for which a message waits for its verdict, and can be asked for: 7 s.
const HISTORY_HEARTBEATS: usize = 10;
const GOSSIP_HEARTBEATS: usize = 4;
/// For so long a message that comes again is recognised.
const SEEN_FOR: Duration = Duration::from_secs(120);
/// Messages that may wait for one slow peer.
const PEER_QUEUE_MESSAGES: usize = 2048;
/// Larger messages are announced as "already here", so that they cross each link about once.
const ANNOUNCE_FROM_BYTES: usize = 1024;

/// The score at which a peer is no longer listened to at all; the node disconnects it then.
pub(crate) const GRAYLIST_SCORE: f64 = -80.0;
/// One invalid message weighs the square of their number times this: nine within a few seconds reach the graylist.
const INVALID_WEIGHT: f64 = -1.0;

fn message_id(message: &Message) -> MessageId {
    MessageId(hash(&message.topic, &message.data).to_vec())
}

/// The id of a message.
pub(crate) fn hash(topic: &TopicHash, data: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(topic.as_str().as_bytes()).update(&[0]).update(data);
    *hasher.finalize().as_bytes()
}

fn config() -> Result<gossipsub::Config, gossipsub::ConfigBuilderError> {
    gossipsub::ConfigBuilder::default()
        .heartbeat_initial_delay(Duration::from_millis(100))
        .heartbeat_interval(HEARTBEAT)
        .mesh_n(6)
        .mesh_n_low(4)
        .mesh_n_high(12)
        .mesh_outbound_min(2)
        .gossip_lazy(6)
        .history_length(HISTORY_HEARTBEATS)
        .history_gossip(GOSSIP_HEARTBEATS)
        .duplicate_cache_time(SEEN_FOR)
        .published_message_ids_cache_time(SEEN_FOR)
        .max_transmit_size(MAX_GOSSIP_BYTES + ENVELOPE_BYTES)
        .max_messages_per_rpc(Some(64))
        .max_ihave_length(2000)
        .prune_backoff(Duration::from_secs(10))
        .unsubscribe_backoff(2)
        .graft_flood_threshold(Duration::from_secs(2))
        .flood_publish(true)
        .idontwant_message_size_threshold(ANNOUNCE_FROM_BYTES)
        .connection_handler_queue_len(PEER_QUEUE_MESSAGES)
        .forward_queue_duration(Duration::from_secs(3))
        .validation_mode(ValidationMode::Anonymous)
        .validate_messages()
        .message_id_fn(message_id)
        .build()
}

fn scores(names: &Names) -> (PeerScoreParams, PeerScoreThresholds) {
    let topic = TopicScoreParams {
        topic_weight: 1.0,
        time_in_mesh_weight: 0.01,
        time_in_mesh_quantum: Duration::from_secs(1),
        time_in_mesh_cap: 300.0,
        first_message_deliveries_weight: 0.1,
        first_message_deliveries_decay: 0.9,
        first_message_deliveries_cap: 50.0,
        mesh_message_deliveries_weight: 0.0,
        mesh_failure_penalty_weight: 0.0,
        invalid_message_deliveries_weight: INVALID_WEIGHT,
        invalid_message_deliveries_decay: 0.99,
        ..TopicScoreParams::default()
    };
    let params = PeerScoreParams {
        topics: names.topics().map(|name| (name.hash(), topic.clone())).collect(),
        topic_score_cap: 10.0,
        ip_colocation_factor_weight: 0.0,
        behaviour_penalty_weight: -1.0,
        behaviour_penalty_threshold: 6.0,
        behaviour_penalty_decay: 0.9,
        retain_score: Duration::from_secs(600),
        ..PeerScoreParams::default()
    };
    let thresholds = PeerScoreThresholds {
        gossip_threshold: -20.0,
        publish_threshold: -40.0,
        graylist_threshold: GRAYLIST_SCORE,
        accept_px_threshold: 10.0,
        opportunistic_graft_threshold: 1.0,
    };
    (params, thresholds)
}

/// Sets gossipsub up and subscribes to all topics.
pub(crate) fn behaviour(names: &Names, arrived: Counted) -> Result<Behaviour, NetError> {
    let setup = |what: String| NetError::Setup { what: format!("gossipsub: {what}") };
    let filter = MaxCountSubscriptionFilter {
        filter: WhitelistSubscriptionFilter(names.topics().map(|topic| topic.hash()).collect()),
        max_subscribed_topics: 8,
        max_subscriptions_per_request: 16,
    };
    let config = config().map_err(|error| setup(error.to_string()))?;
    let mut gossip =
        Behaviour::new_with_subscription_filter_and_transform(MessageAuthenticity::Anonymous, config, filter, arrived)
            .map_err(|error| setup(error.to_owned()))?;
    let (params, thresholds) = scores(names);
    gossip.with_peer_score(params, thresholds).map_err(setup)?;
    for topic in names.topics() {
        gossip.subscribe(topic).map_err(|error| setup(error.to_string()))?;
    }
    Ok(gossip)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::event::Topic;

    #[test]
    fn the_settings_are_valid_and_the_id_depends_on_topic_and_data() {
        let names = Names::new(&"test".parse().unwrap());
        assert!(behaviour(&names, Counted::default()).is_ok());
        let [ledger, beacon] = Topic::ALL.map(|topic| names.hash(topic));
        assert_eq!(hash(&ledger, b"x"), hash(&ledger, b"x"));
        assert_ne!(hash(&ledger, b"x"), hash(&beacon, b"x"));
        assert_ne!(hash(&ledger, b"x"), hash(&ledger, b"y"));
    }
}
