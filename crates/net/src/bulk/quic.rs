//! QUIC for sessions: sockets, settings, and how a dialler proves that it is who opened the stream.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use chorus_protocol::NodeId;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    AckFrequencyConfig, ClientConfig, Endpoint, EndpointConfig, MtuDiscoveryConfig, ServerConfig, TransportConfig,
    VarInt,
};

use super::tls::{self, Identity};
use super::wire::QuicWire;
use crate::addr::Addr;
use crate::error::NetError;

/// A dead peer is noticed after this time; a living one says so this often.
pub(super) const IDLE: Duration = Duration::from_secs(5);
pub(super) const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// Bytes that a sender may be ahead of its receiver's reader, and bytes that it keeps until they are acknowledged: the product of
/// bandwidth and delay of a gigabit over 64 ms. It is also what a session can make its receiver hold.
const WINDOW: u32 = 8 << 20;
/// The largest packet that is tried, on LANs with jumbo frames and on loopback; ordinary links take 1452 bytes, which a few lost
/// probes find out. Quinn hands the system ten packets at once, and what is over 65,507 bytes together is never sent.
const MAX_PACKET: u16 = 6400;
/// Asked of the system for each socket; it gives what its administrator allows.
const SOCKET_BYTES: usize = 4 << 20;
/// Packets that may go unacknowledged by a receiver, and for how long.
const ACK_EVERY: u32 = 10;
const ACK_WITHIN: Duration = Duration::from_millis(25);
/// Handshakes under way; from some of them on, a stranger must first prove that it is where it says it is.
pub(super) const MAX_HANDSHAKES: usize = 64;
const TRUSTING_HANDSHAKES: usize = 16;
/// Ports that a node may tell others.
pub(super) const MAX_PORTS: usize = 4;
/// Length of the number by which the acceptor knows the session that a connection is for.
pub(super) const NONCE_BYTES: usize = 16;
/// What the acceptor answers to it.
pub(super) const WELCOME: u8 = 1;
/// TLS wants a name, which is never sent.
const NAME: &str = "chorus.invalid";

/// The number of one session.
pub(super) type Nonce = [u8; NONCE_BYTES];

/// The sockets of the bulk plane.
#[derive(Debug)]
pub(super) struct Quic {
    identity: Identity,
    transport: Arc<TransportConfig>,
    /// Those that listen.
    pub(super) doors: Vec<Endpoint>,
    /// Those that dial, by the family of addresses.
    dial_v4: Option<Endpoint>,
    dial_v6: Option<Endpoint>,
    ports: Vec<u16>,
}

fn transport() -> TransportConfig {
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(MAX_PACKET);
    let mut acks = AckFrequencyConfig::default();
    acks.ack_eliciting_threshold(ACK_EVERY.into()).max_ack_delay(Some(ACK_WITHIN));
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .stream_receive_window(WINDOW.into())
        .receive_window(WINDOW.into())
        .send_window(WINDOW.into())
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_idle_timeout(Some(IDLE.try_into().expect("five seconds fit")))
        .ack_frequency_config(Some(acks))
        .mtu_discovery_config(Some(mtu));
    config
}

fn setup(what: &'static str) -> impl Fn(&dyn std::fmt::Display) -> NetError {
    move |error| NetError::Setup { what: format!("bulk plane: {what}: {error}") }
}

fn listen_error(addr: SocketAddr, source: io::Error) -> NetError {
    let addr = Addr::quic(addr);
    match source.kind() {
        io::ErrorKind::AddrInUse => NetError::PortInUse { addr },
        _ => NetError::Listen { addr, source },
    }
}

fn endpoint(addr: SocketAddr, server: Option<ServerConfig>) -> io::Result<Endpoint> {
    let socket = UdpSocket::bind(addr)?;
    let state = quinn::udp::UdpSocketState::new((&socket).into())?;
    // Less than asked for is still a socket.
    let _ = state.set_send_buffer_size((&socket).into(), SOCKET_BYTES);
    let _ = state.set_recv_buffer_size((&socket).into(), SOCKET_BYTES);
    let mut config = EndpointConfig::default();
    config.max_udp_payload_size(MAX_PACKET).map_err(io::Error::other)?;
    Endpoint::new(config, server, socket, Arc::new(quinn::TokioRuntime))
}

impl Quic {
    /// Binds the sockets.
    pub(super) fn bind(listen: &[SocketAddr], identity: Identity) -> Result<Self, NetError> {
        let transport = Arc::new(transport());
        let tls = identity.server().map_err(|error| setup("TLS")(&error))?;
        let tls = QuicServerConfig::try_from(tls).map_err(|error| setup("TLS")(&error))?;
        let mut server = ServerConfig::with_crypto(Arc::new(tls));
        server.transport_config(Arc::clone(&transport)).max_incoming(MAX_HANDSHAKES);
        let doors: Vec<Endpoint> = listen
            .iter()
            .map(|addr| endpoint(*addr, Some(server.clone())).map_err(|error| listen_error(*addr, error)))
            .collect::<Result<_, _>>()?;
        let mut ports: Vec<u16> = doors.iter().filter_map(|door| Some(door.local_addr().ok()?.port())).collect();
        ports.sort_unstable();
        ports.dedup();
        ports.truncate(MAX_PORTS);
        let (v4, v6) = if doors.is_empty() {
            (None, None)
        } else {
            // A host without one of the families does without sessions over it.
            let dialler = |ip: std::net::IpAddr| endpoint(SocketAddr::new(ip, 0), None).ok();
            (dialler(Ipv4Addr::UNSPECIFIED.into()), dialler(Ipv6Addr::UNSPECIFIED.into()))
        };
        Ok(Self { identity, transport, doors, dial_v4: v4, dial_v6: v6, ports })
    }

    /// Where it listens.
    pub(super) fn listening(&self) -> Vec<SocketAddr> {
        self.doors.iter().filter_map(|door| door.local_addr().ok()).collect()
    }

    /// The ports that others are told.
    pub(super) fn ports(&self) -> &[u16] {
        &self.ports
    }

    /// Draws a session's number.
    pub(super) fn nonce(&self) -> Option<Nonce> {
        let mut nonce = [0; NONCE_BYTES];
        self.identity.random(&mut nonce).ok().map(|()| nonce)
    }

    /// Dials all places at once where a node may be, and returns the first connection on which it welcomes the session.
    pub(super) async fn dial(&self, node: NodeId, places: &[SocketAddr], nonce: Nonce) -> Option<QuicWire> {
        let mut tries: FuturesUnordered<_> = places.iter().map(|place| self.dial_one(node, *place, nonce)).collect();
        while let Some(tried) = tries.next().await {
            if tried.is_some() {
                return tried;
            }
        }
        None
    }

    async fn dial_one(&self, node: NodeId, place: SocketAddr, nonce: Nonce) -> Option<QuicWire> {
        let dialler = if place.is_ipv4() { self.dial_v4.as_ref()? } else { self.dial_v6.as_ref()? };
        let tls = QuicClientConfig::try_from(self.identity.client(node).ok()?).ok()?;
        let mut config = ClientConfig::new(Arc::new(tls));
        config.transport_config(Arc::clone(&self.transport));
        let shaken = dialler.connect_with(config, place, NAME).ok()?.await;
        let connection = shaken.inspect_err(|error| tracing::debug!(%place, %error, "no QUIC session")).ok()?;
        let (mut send, mut recv) = connection.open_bi().await.ok()?;
        send.write_all(&nonce).await.ok()?;
        let mut answer = [0];
        recv.read_exact(&mut answer).await.ok()?;
        (answer == [WELCOME]).then(|| QuicWire::new(connection, send, recv))
    }

    /// Ends all connections, and waits a little until their peers know.
    pub(super) async fn close(&self, patience: Duration) {
        let all = || self.doors.iter().chain(&self.dial_v4).chain(&self.dial_v6);
        for endpoint in all() {
            endpoint.close(VarInt::from_u32(0), b"");
        }
        let idle = async {
            for endpoint in all() {
                endpoint.wait_idle().await;
            }
        };
        // A peer that does not answer learns it from its own timeout.
        let _ = tokio::time::timeout(patience, idle).await;
    }
}

/// Finishes the handshake of a connection that somebody opened, and reads which session it is for.
pub(super) async fn greet(incoming: quinn::Incoming) -> Option<(NodeId, Nonce, QuicWire)> {
    let shaken = incoming.accept().ok()?.await;
    let connection = shaken.inspect_err(|error| tracing::debug!(%error, "a QUIC handshake failed")).ok()?;
    let node = tls::node_of(&connection)?;
    let (send, mut recv) = connection.accept_bi().await.ok()?;
    let mut nonce = [0; NONCE_BYTES];
    recv.read_exact(&mut nonce).await.ok()?;
    Some((node, nonce, QuicWire::new(connection, send, recv)))
}

/// Lets a newcomer go on, send it away, or make it prove its address first; `under_way` handshakes wait already.
pub(super) fn screen(incoming: quinn::Incoming, under_way: usize) -> Option<quinn::Incoming> {
    if under_way >= MAX_HANDSHAKES {
        incoming.refuse();
        return None;
    }
    if under_way >= TRUSTING_HANDSHAKES && !incoming.remote_address_validated() && incoming.may_retry() {
        // It comes back with the token that it is given.
        let _ = incoming.retry();
        return None;
    }
    Some(incoming)
}
