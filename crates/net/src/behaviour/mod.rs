//! The protocols that share the node's connections. Only this crate sees them.

pub(crate) mod book;
pub(crate) mod direct;
pub(crate) mod gate;
pub(crate) mod gossip;
pub(crate) mod names;

use std::num::NonZeroUsize;
use std::time::Duration;

use libp2p::identity::Keypair;
use libp2p::kad::store::{MemoryStore, MemoryStoreConfig};
use libp2p::request_response::ProtocolSupport;
use libp2p::swarm::NetworkBehaviour;
use libp2p::swarm::behaviour::toggle::Toggle;
use libp2p::{autonat, connection_limits, dcutr, identify, kad, mdns, ping, relay, request_response};

use self::book::Book;
use self::gate::Gate;
use self::gossip::Counted;
use self::names::Names;
use crate::config::NetConfig;
use crate::error::NetError;

/// A request that is not answered for so long has failed.
pub(crate) const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Requests under way on one connection, both directions together. Both sides keep to the outbox's window of batches.
const MAX_STREAMS: usize = 64;
/// AutoNAT asks a first peer whether it gets in so soon after the start: a node with a bootstrap peer has joined by then.
const NAT_FIRST_PROBE: Duration = Duration::from_secs(3);
/// It asks again at this distance until three answers agree; in a small swarm it is one peer that is asked each time.
const NAT_PROBE_EVERY: Duration = Duration::from_secs(20);
/// Keys whose providers are kept here, this node's own among them.
const MAX_PROVIDED_KEYS: usize = 4096;
/// What a provider said counts for so long; it says it again well before.
pub(crate) const PROVIDER_TTL: Duration = Duration::from_secs(30 * 60);
const PROVIDE_AGAIN: Duration = Duration::from_secs(10 * 60);

/// All protocols. The order is that in which they are asked about a connection: whoever refuses comes first.
#[derive(NetworkBehaviour)]
pub(crate) struct Behaviour {
    pub(crate) gate: Gate,
    pub(crate) limits: connection_limits::Behaviour,
    pub(crate) book: Book,
    pub(crate) ping: ping::Behaviour,
    pub(crate) identify: identify::Behaviour,
    pub(crate) direct: direct::Behaviour,
    pub(crate) gossip: gossip::Behaviour,
    pub(crate) kad: kad::Behaviour<MemoryStore>,
    pub(crate) streams: libp2p_stream::Behaviour,
    pub(crate) mdns: Toggle<mdns::tokio::Behaviour>,
    pub(crate) autonat: autonat::v1::Behaviour,
    pub(crate) relay_server: Toggle<relay::Behaviour>,
    pub(crate) relay_client: relay::client::Behaviour,
    pub(crate) dcutr: dcutr::Behaviour,
}

impl Behaviour {
    /// Sets all protocols up. `agent` is what `identify` says of this process.
    pub(crate) fn new(
        cfg: &NetConfig,
        names: &Names,
        keys: &Keypair,
        agent: String,
        relay_client: relay::client::Behaviour,
        arrived: Counted,
    ) -> Result<Self, NetError> {
        let me = keys.public().to_peer_id();
        let identify = identify::Config::new(names.identify.clone(), keys.public())
            .with_agent_version(agent)
            .with_push_listen_addr_updates(true)
            .with_cache_size(0);
        let direct = request_response::Config::default()
            .with_request_timeout(REQUEST_TIMEOUT)
            .with_max_concurrent_streams(MAX_STREAMS);
        let ping = ping::Config::new().with_interval(cfg.ping_interval).with_timeout(cfg.ping_interval);
        Ok(Self {
            gate: Gate::new(&cfg.conn),
            limits: connection_limits::Behaviour::new(limits(cfg)),
            book: Book::new(me),
            ping: ping::Behaviour::new(ping),
            identify: identify::Behaviour::new(identify),
            direct: direct::Behaviour::new([(names.direct.clone(), ProtocolSupport::Full)], direct),
            gossip: gossip::behaviour(names, arrived)?,
            kad: kad(cfg, names, keys),
            streams: libp2p_stream::Behaviour::new(),
            mdns: Toggle::from(cfg.mdns.then(|| mdns(keys)).flatten()),
            autonat: autonat::v1::Behaviour::new(me, autonat()),
            relay_server: Toggle::from(cfg.relay_server.then(|| relay::Behaviour::new(me, relay_config(cfg)))),
            relay_client,
            dcutr: dcutr::Behaviour::new(me),
        })
    }
}

fn limits(cfg: &NetConfig) -> connection_limits::ConnectionLimits {
    connection_limits::ConnectionLimits::default()
        .with_max_established_per_peer(Some(cfg.conn.per_peer))
        .with_max_established(Some(cfg.conn.total))
        .with_max_established_incoming(Some((cfg.conn.total / 4 * 3).max(1)))
        .with_max_pending_incoming(Some(cfg.conn.pending))
        .with_max_pending_outgoing(Some(cfg.conn.pending))
}

/// The DHT finds peers, and who provides what. It takes no values from anybody: nothing is stored that nobody vouches for.
fn kad(cfg: &NetConfig, names: &Names, keys: &Keypair) -> kad::Behaviour<MemoryStore> {
    let me = keys.public().to_peer_id();
    let mut config = kad::Config::new(names.kad.clone());
    config
        .set_record_filtering(kad::StoreInserts::FilterBoth)
        .set_query_timeout(Duration::from_secs(10))
        .set_periodic_bootstrap_interval(Some(cfg.kad_refresh))
        .set_parallelism(NonZeroUsize::new(3).expect("three is not zero"))
        .set_replication_interval(None)
        .set_publication_interval(None)
        .set_provider_record_ttl(Some(PROVIDER_TTL))
        .set_provider_publication_interval(Some(PROVIDE_AGAIN))
        .set_caching(kad::Caching::Disabled);
    let bounds = MemoryStoreConfig {
        max_records: 0,
        max_value_bytes: 0,
        max_provided_keys: MAX_PROVIDED_KEYS,
        ..Default::default()
    };
    let mut kad = kad::Behaviour::with_config(me, MemoryStore::with_config(me, bounds), config);
    // A swarm at home has no address that the world confirmed, and must find itself all the same.
    kad.set_mode(Some(kad::Mode::Server));
    kad
}

/// Multicast may be forbidden or missing on a host: then the node does without.
fn mdns(keys: &Keypair) -> Option<mdns::tokio::Behaviour> {
    let config =
        mdns::Config { ttl: Duration::from_secs(120), query_interval: Duration::from_secs(30), enable_ipv6: false };
    mdns::tokio::Behaviour::new(config, keys.public().to_peer_id())
        .inspect_err(
            |error| tracing::warn!(%error, "no multicast here: peers on the local network are not found by themselves"),
        )
        .ok()
}

fn autonat() -> autonat::v1::Config {
    autonat::v1::Config {
        boot_delay: NAT_FIRST_PROBE,
        retry_interval: NAT_PROBE_EVERY,
        throttle_server_period: NAT_PROBE_EVERY,
        ..autonat::v1::Config::default()
    }
}

fn relay_config(cfg: &NetConfig) -> relay::Config {
    let limits = &cfg.relay;
    relay::Config {
        max_reservations: limits.reservations as usize,
        max_circuits: limits.circuits as usize,
        max_circuits_per_peer: limits.circuits_per_peer as usize,
        max_circuit_duration: Duration::from_secs(u64::from(limits.circuit_seconds)),
        max_circuit_bytes: limits.circuit_bytes,
        ..relay::Config::default()
    }
}
