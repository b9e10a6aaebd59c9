//! How a session comes about, seen from both ends.
//!
//! ```text
//!  dialler                                                        acceptor
//!     │ ── stream on the control connection: nonce (16 bytes) ──────▶ │
//!     │ ◀────────────── answer (1 byte: 255 busy, or 0..=4), UDP ports │
//!     │ ── QUIC, both keys proven; on its one stream: the nonce ─────▶ │
//!     │ ◀──────────────────────────────────────────── welcome (1 byte) │
//!     │ ── on the first stream: the way (1 byte: 1 QUIC, 0 stream) ──▶ │
//! ```
//!
//! Without a port, or without a welcome within two seconds, the session runs over the first stream.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use chorus_protocol::NodeId;
use futures::StreamExt;
use futures::io::{AsyncReadExt, AsyncWriteExt};
use libp2p::core::upgrade::NegotiationError;
use libp2p::{Stream, StreamProtocol};
use libp2p_stream::{IncomingStreams, OpenStreamError};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::event::CloseReason;
use super::plane::{Plane, Session};
use super::quic::{self, MAX_HANDSHAKES, MAX_PORTS, NONCE_BYTES, Nonce};
use super::session;
use super::wire::{QuicWire, Wire};
use crate::identity::{node_of, peer_of};
use crate::limits::jitter;

/// A connection to the peer is there after this time, or none is possible: what a direct message is given, and a little more.
const REACH_WITHIN: Duration = Duration::from_secs(12);
/// A peer on a connection answers within this time, or not at all.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// QUIC comes about within this time, or is done without.
const QUIC_WITHIN: Duration = Duration::from_secs(2);
/// A peer that accepts many streams at the same instant loses some: then it is asked again, so often and after about this time.
const TRIES: u8 = 4;
const TRY_AGAIN: Duration = Duration::from_millis(100);
/// Streams whose dialler has not yet said which way.
const MAX_UNDECIDED: usize = 64;
/// Places that are dialled at once.
const MAX_PLACES: usize = 8;
/// The acceptor's answer when it has too many sessions.
const BUSY: u8 = 0xff;
/// The dialler's last word.
const WAY_STREAM: u8 = 0;
const WAY_QUIC: u8 = 1;

/// Opens a session and runs it to its end.
pub(super) async fn dial(plane: Arc<Plane>, mut session: Session, protocol: StreamProtocol) {
    let closing = session.closing.clone();
    let met = tokio::select! {
        met = meet(&plane, session.node, &protocol, true) => met,
        () = closing.cancelled() => Err(CloseReason::Asked),
    };
    let reason = match met {
        Ok(wire) => session::run(&plane, &mut session, wire).await,
        Err(reason) => reason,
    };
    plane.end(&session, reason).await;
}

/// Meets a node; over QUIC if it has ports and `quic` is wanted.
pub(super) async fn meet(
    plane: &Plane,
    node: NodeId,
    protocol: &StreamProtocol,
    quic: bool,
) -> Result<Wire, CloseReason> {
    let unreachable = |why| CloseReason::Unreachable { why };
    let reached = timeout(REACH_WITHIN, plane.net.reach(node)).await.ok().flatten();
    let addrs = reached.ok_or(unreachable("no address of it is known to answer"))?;
    let nonce = plane.quic.nonce().ok_or(unreachable("this system gives no random numbers"))?;
    let (mut stream, ports) = knock(plane, node, protocol, &nonce).await?;
    let mut places: Vec<SocketAddr> = Vec::new();
    for ip in addrs.iter().filter_map(|addr| addr.ip()) {
        let of_ip = ports.iter().map(|port| SocketAddr::new(ip, *port));
        places.extend(of_ip.filter(|place| !places.contains(place)).collect::<Vec<_>>());
    }
    places.truncate(if quic { MAX_PLACES } else { 0 });
    let quic = timeout(QUIC_WITHIN, plane.quic.dial(node, &places, nonce)).await.ok().flatten();
    let way = if quic.is_some() { WAY_QUIC } else { WAY_STREAM };
    say(&mut stream, &[way]).await.map_err(|error| CloseReason::Lost { what: error.to_string() })?;
    match quic {
        Some(wire) => {
            // The acceptor closes it as well; an error would say that it has.
            let _ = stream.close().await;
            Ok(Wire::Quic(wire))
        }
        None => Ok(Wire::Stream(stream)),
    }
}

/// Opens the stream and hears the acceptor's ports.
async fn knock(
    plane: &Plane,
    node: NodeId,
    protocol: &StreamProtocol,
    nonce: &Nonce,
) -> Result<(Stream, Vec<u16>), CloseReason> {
    let mut tries = 0;
    loop {
        tries += 1;
        let knocked = timeout(ANSWER_WITHIN, knock_once(plane, node, protocol, nonce)).await;
        match knocked.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok((stream, Some(ports))) => return Ok((stream, ports)),
            Ok((_, None)) => return Err(CloseReason::Busy),
            Err(error) if is_unsupported(&error) => return Err(CloseReason::Unsupported),
            Err(error) if tries < TRIES && error.kind() == io::ErrorKind::UnexpectedEof => {
                tokio::time::sleep(jitter(TRY_AGAIN * u32::from(tries), nonce)).await;
            }
            Err(error) => {
                tracing::debug!(peer = %node.fmt_short(), %error, "no bulk session");
                return Err(CloseReason::Unreachable { why: "it does not answer on its connection" });
            }
        }
    }
}

async fn knock_once(
    plane: &Plane,
    node: NodeId,
    protocol: &StreamProtocol,
    nonce: &Nonce,
) -> io::Result<(Stream, Option<Vec<u16>>)> {
    let opened = plane.net.streams().open_stream(peer_of(&node), protocol.clone()).await;
    let mut stream = opened.map_err(|error| match error {
        OpenStreamError::UnsupportedProtocol(_) => io::Error::other(NegotiationError::Failed),
        OpenStreamError::Io(error) => error,
        other => io::Error::other(other),
    })?;
    say(&mut stream, nonce).await?;
    let mut count = [0];
    stream.read_exact(&mut count).await?;
    match count {
        [BUSY] => Ok((stream, None)),
        [count] if usize::from(count) <= MAX_PORTS => {
            let mut ports = vec![0; 2 * usize::from(count)];
            stream.read_exact(&mut ports).await?;
            let ports = ports.chunks_exact(2).map(|port| u16::from_be_bytes([port[0], port[1]])).collect();
            Ok((stream, Some(ports)))
        }
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Whether the peer said that it does not know the protocol. With a lazy negotiation this comes as an error of the first read.
fn is_unsupported(error: &io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<NegotiationError>());
    matches!(inner, Some(NegotiationError::Failed))
}

async fn say(stream: &mut Stream, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(bytes).await?;
    stream.flush().await
}

/// Takes in the streams that others open.
pub(super) async fn accept_streams(plane: Arc<Plane>, mut incoming: IncomingStreams) {
    let undecided = Arc::new(Semaphore::new(MAX_UNDECIDED));
    while let Some((peer, stream)) = incoming.next().await {
        // Whoever is dropped here asks again.
        let (Some(node), Ok(place)) = (node_of(&peer), Arc::clone(&undecided).try_acquire_owned()) else { continue };
        let host = Arc::clone(&plane);
        plane.spawn(async move {
            let patience = ANSWER_WITHIN + QUIC_WITHIN;
            let met = timeout(patience, receive(&host, node, stream)).await;
            drop(place);
            if let Ok(Ok(Some((mut session, wire)))) = met {
                let reason = session::run(&host, &mut session, wire).await;
                host.end(&session, reason).await;
            }
        });
    }
}

/// A session that is forgotten unless it comes about.
struct Candidate<'a> {
    plane: &'a Plane,
    session: Option<Session>,
}

impl Drop for Candidate<'_> {
    fn drop(&mut self) {
        if let Some(session) = &self.session {
            self.plane.forget(session.id);
        }
    }
}

/// Answers a dialler, and follows it on the way it chose.
async fn receive(plane: &Arc<Plane>, node: NodeId, mut stream: Stream) -> io::Result<Option<(Session, Wire)>> {
    let mut nonce = [0; NONCE_BYTES];
    stream.read_exact(&mut nonce).await?;
    let Ok(session) = plane.admit(node, true) else {
        say(&mut stream, &[BUSY]).await?;
        return stream.close().await.map(|()| None);
    };
    let mut candidate = Candidate { plane, session: Some(session) };
    let Some(mut expecting) = plane.expect(node, nonce) else { return Ok(None) };
    let ports = plane.quic.ports();
    let mut answer = vec![u8::try_from(ports.len()).expect("a few ports")];
    answer.extend(ports.iter().flat_map(|port| port.to_be_bytes()));
    say(&mut stream, &answer).await?;
    let mut way = [0];
    stream.read_exact(&mut way).await?;
    let wire = match way {
        [WAY_STREAM] => Wire::Stream(stream),
        [WAY_QUIC] => match (&mut expecting.connected).await {
            Ok(wire) => Wire::Quic(wire),
            Err(_) => return Ok(None),
        },
        _ => return Err(io::ErrorKind::InvalidData.into()),
    };
    Ok(candidate.session.take().map(|session| (session, wire)))
}

/// Takes in the QUIC connections that others open.
pub(super) async fn accept_quic(plane: Arc<Plane>, door: quinn::Endpoint) {
    let places = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    while let Some(incoming) = door.accept().await {
        let under_way = MAX_HANDSHAKES - places.available_permits();
        let Some(incoming) = quic::screen(incoming, under_way) else { continue };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
        let host = Arc::clone(&plane);
        plane.spawn(async move {
            if let Ok(Some((node, nonce, wire))) = timeout(QUIC_WITHIN, quic::greet(incoming)).await {
                hand_over(&host, node, &nonce, wire).await;
            }
            drop(place);
        });
    }
}

/// Brings a connection to the session that it is for.
async fn hand_over(plane: &Plane, node: NodeId, nonce: &Nonce, mut wire: QuicWire) {
    let Some(waiting) = plane.claim(node, nonce) else { return wire.turn_away() };
    if wire.welcome().await {
        // Whoever waited may have given up.
        let _ = waiting.send(wire);
    }
}
