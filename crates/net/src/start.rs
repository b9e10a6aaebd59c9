//! Starting: from a configuration and a key to a running actor.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::num::{NonZeroU8, NonZeroUsize};
use std::time::Duration;

use chorus_protocol::SecretKey;
use libp2p::core::upgrade::Version;
use libp2p::identity::Keypair;
use libp2p::{Swarm, SwarmBuilder, dns, noise, tcp, yamux};
use tokio::sync::{mpsc, watch};

use crate::actor::Actor;
use crate::behaviour::Behaviour;
use crate::behaviour::gossip::Counted;
use crate::behaviour::names::Names;
use crate::config::NetConfig;
use crate::error::NetError;
use crate::event::NetEvent;
use crate::handle::{Doors, NetHandle};
use crate::identity::keypair_of;

/// A handshake that takes longer has failed.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections stay until somebody closes them: a swarm of peers that elect each other every moment has no idle ones. Dead ones
/// are found by `ping`.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30 * 24 * 3600);
/// Listeners get their addresses within milliseconds; a slow interface does not hold the start up for longer than this.
const SETTLE: Duration = Duration::from_secs(1);
/// Streams of one connection that are being negotiated at once.
const MAX_NEGOTIATING: usize = 256;

/// The network of one node.
#[derive(Debug)]
pub struct Net;

impl Net {
    /// Binds the listen addresses and starts the network. It runs until [`NetHandle::shutdown`], or until all handles, or the
    /// receiver of events, are dropped. Must be called within a Tokio runtime.
    ///
    /// # Errors
    /// [`NetError::Config`], [`NetError::PortInUse`], [`NetError::Listen`], [`NetError::Setup`].
    pub async fn start(cfg: NetConfig, key: &SecretKey) -> Result<(NetHandle, mpsc::Receiver<NetEvent>), NetError> {
        cfg.validate()?;
        let (command_tx, command_rx) = mpsc::channel(cfg.command_queue);
        let (event_tx, event_rx) = mpsc::channel(cfg.event_queue);
        let (door_tx, door_rx) = watch::channel(Doors::default());
        let names = Names::new(&cfg.network);
        let arrived = Counted::default();
        let swarm = swarm(&cfg, &names, keypair_of(key), &arrived)?;
        let (who, streams) = ((cfg.network.clone(), key.node_id()), swarm.behaviour().streams.new_control());
        let handle = NetHandle::new(command_tx, cfg.send_bytes, door_rx, who, arrived.0, streams);
        let (listen, external) = (cfg.listen.clone(), cfg.external.clone());
        let mut actor = Actor::new(cfg, names, key.node_id(), swarm, (command_rx, event_tx), door_tx);
        for addr in &external {
            actor.add_external(addr);
        }
        for addr in &listen {
            actor.listen(addr)?;
        }
        actor.take_bootstrap();
        actor.recall_peers();
        actor.settle(SETTLE).await;
        tokio::spawn(actor.run());
        Ok((handle, event_rx))
    }
}

/// Tells this process from another one with the same key. Nothing secret hangs on it.
fn instance() -> u32 {
    let hash = RandomState::new().build_hasher().finish();
    u32::try_from(hash >> 32).unwrap_or_default()
}

fn setup(what: &str, error: &dyn std::fmt::Display) -> NetError {
    NetError::Setup { what: format!("{what}: {error}") }
}

/// Puts relays, behaviours and the swarm's settings on top of the transports, whose type cannot be named.
macro_rules! furnish {
    ($transports:expr, $behaviour:expr) => {
        $transports
            .with_relay_client(noise::Config::new, yamux::Config::default)
            .map_err(|error| setup("relay", &error))?
            .with_behaviour($behaviour)
            .map_err(|error| setup("protocols", &error))?
            .with_swarm_config(swarm_config)
            .with_connection_timeout(CONNECT_TIMEOUT)
            .build()
    };
}

fn swarm_config(config: libp2p::swarm::Config) -> libp2p::swarm::Config {
    config
        .with_idle_connection_timeout(IDLE_TIMEOUT)
        .with_max_negotiating_inbound_streams(MAX_NEGOTIATING)
        .with_notify_handler_buffer_size(NonZeroUsize::new(64).expect("64 is not zero"))
        .with_per_connection_event_buffer_size(32)
        // For the dials of the behaviours. This node's own ones say how many at once, see the book.
        .with_dial_concurrency_factor(NonZeroU8::MIN)
        // A stream's first bytes leave together with its protocol's name: one round trip less for every message.
        .with_substream_upgrade_protocol_override(Version::V1Lazy)
}

fn swarm(cfg: &NetConfig, names: &Names, keys: Keypair, arrived: &Counted) -> Result<Swarm<Behaviour>, NetError> {
    let agent = format!("{}#{:08x}", cfg.agent, instance());
    let transports = SwarmBuilder::with_existing_identity(keys)
        .with_tokio()
        .with_tcp(tcp::Config::default(), noise::Config::new, yamux::Config::default)
        .map_err(|error| setup("noise", &error))?
        .with_quic();
    let behaviour = |keys: &Keypair, relay_client| {
        Behaviour::new(cfg, names, keys, agent, relay_client, arrived.clone())
            .map_err(|error| Box::<dyn std::error::Error + Send + Sync>::from(error.to_string()))
    };
    // Names are resolved with the host's own servers. On a host without any, addresses by number still work.
    match dns::tokio::Transport::system(()) {
        Ok(_) => Ok(furnish!(transports.with_dns().map_err(|error| setup("DNS", &error))?, behaviour)),
        Err(error) => {
            tracing::warn!(%error, "no DNS servers are configured here: addresses with names cannot be dialled");
            let nobody = dns::ResolverConfig::new();
            Ok(furnish!(transports.with_dns_config(nobody, dns::ResolverOpts::default()), behaviour))
        }
    }
}
