//! The stream of rollouts through the bulk plane and onto the disk, against QUIC alone.
//!
//! A sampler sends signed frames of about 256 KiB over loopback. In *rollouts*, the trainer verifies each, writes it into its database and
//! acknowledges it when it is on the disk, as a training room does: those that wait together with one sync; those that an update has used
//! meanwhile are deleted. In *plane*, it acknowledges each as it comes, so what is measured is the plane alone. *Bare* is quinn with the
//! same bytes behind the same lengths, read into a buffer and thrown away; once with the plane's settings, once with quinn's own. *Store*
//! is the same frames into the same database without any network, and *disk* the same bytes appended to a file and synced as often: what
//! is acknowledged when it is on the disk is no faster than that. All take turns in one run and one process.
//!
//! Run it with `scripts/bench stream`.

#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_precision_loss)]

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::mpsc as sync;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use chorus_net::{BulkConfig, BulkError, BulkEvent, BulkHandle, BulkPlane, Net, NetConfig, NetEvent, SessionId, Way};
use chorus_protocol::job::Finish;
use chorus_protocol::policy::{PolicyId, Version};
use chorus_protocol::rollout::{Bulk, GroupId, Rollout, RolloutFrame, Segment};
use chorus_protocol::{Hash, List, NetworkId, SecretKey, Text, Verified, WallTime};
use chorus_store::{Blobs, Committer, Staged, StoreError};
use quinn::rustls;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::sign::any_eddsa_type;
use rustls::crypto::ring::{cipher_suite, default_provider};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::AlwaysResolvesServerRawPublicKeys;
use rustls::sign::CertifiedKey;
use rustls::{DigitallySignedStruct, SignatureScheme};
use tokio::sync::mpsc;

/// The node's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const ROUNDS: usize = 9;
/// Frames that everyone sends in each round: 150 MiB.
const FRAMES: u64 = 600;
/// Frames that are written together at most, as in a training room, and that wait for it.
const GROUP: usize = 64;
/// Frames that no update has used yet, or whose checkpoint is not written: four updates of 1,024 rollouts. Older ones are deleted.
const LIVE: usize = 64;
/// The plane's settings, for the bare connection.
const WINDOW: u32 = 8 << 20;
const MAX_PACKET: u16 = 6400;
const ACK_EVERY: u32 = 10;

/// A frame of 8 groups with 8 rollouts of 512 tokens, whose ids take four bytes each.
fn frame(owner: &SecretKey, sequence: u64) -> RolloutFrame {
    let version = Version::from_hash(Hash::from_bytes([1; 32]));
    let one = |group: u64, member: u16| Rollout {
        group: GroupId(sequence * 8 + group),
        member,
        environment: Text::truncated("arithmetic"),
        seed: group,
        prompt: (0..32).collect(),
        completion: (0..512).map(|token| 100_000 + token * 7 + u32::from(member)).collect(),
        log_probs: (0..512u16).map(|token| -f32::from(token) / 100.0).collect(),
        reward: 1.0,
        finish: Finish::Stop,
        segments: vec![Segment { version, from: 0 }],
    };
    let items: Vec<Rollout> = (0..8).flat_map(|group| (0..8).map(move |member| one(group, member))).collect();
    let policy = PolicyId { owner: owner.node_id(), name: Text::truncated("bench") };
    RolloutFrame::new(policy, sequence, WallTime::from_millis(1_800_000_000_000), &items).unwrap()
}

struct Peer {
    bulk: BulkHandle,
    events: mpsc::Receiver<BulkEvent>,
    session: SessionId,
}

/// Two nodes and a session between them: the sampler, and the trainer.
async fn pair(network: &NetworkId) -> (Peer, Peer) {
    let node = |seed: u8, bootstrap| async move {
        let key = SecretKey::from_bytes(&[seed; 32]);
        let listen = vec!["/ip4/127.0.0.1/tcp/0".parse().unwrap()];
        let cfg = NetConfig { listen, bootstrap, mdns: false, ..NetConfig::new(network.clone()) };
        let (net, net_events) = Net::start(cfg, &key).await.unwrap();
        let cfg = BulkConfig { listen: vec![SocketAddr::from((Ipv4Addr::LOCALHOST, 0))], ..BulkConfig::default() };
        let (bulk, events) = BulkPlane::start(cfg, &key, &net).await.unwrap();
        (net, net_events, bulk, events)
    };
    let (trainer_net, trainer_nets, trainer, mut at_trainer) = node(1, Vec::new()).await;
    let (net, mut nets, sampler, mut at_sampler) = node(2, trainer_net.ticket().bootstrap()).await;
    while !matches!(nets.recv().await.unwrap(), NetEvent::PeerUp { .. }) {}
    drain(trainer_nets);
    drain(nets);
    drop(net);
    let session = sampler.open(trainer_net.node()).unwrap();
    let opened = at_sampler.recv().await.unwrap();
    assert!(matches!(opened, BulkEvent::Opened { way: Way::Quic, .. }), "{opened:?}");
    let BulkEvent::Opened { session: inbound, .. } = at_trainer.recv().await.unwrap() else { panic!("not opened") };
    (Peer { bulk: sampler, events: at_sampler, session }, Peer { bulk: trainer, events: at_trainer, session: inbound })
}

fn ack(sequence: u64) -> Bulk {
    Bulk::Ack { sequence, taken: 64, refused: List::default() }
}

/// The control plane's events matter to nobody here.
fn drain(mut events: mpsc::Receiver<NetEvent>) {
    tokio::spawn(async move { while events.recv().await.is_some() {} });
}

/// The trainer's frames on disk, as a training room keeps them.
struct Kept {
    store: Blobs,
    live: Arc<Mutex<VecDeque<Vec<u8>>>>,
    written: u64,
}

/// Frames that are being brought onto the disk: their keys, and their numbers.
type Ticket = (Vec<Vec<u8>>, Vec<u64>);

impl Kept {
    fn open(path: &Path, network: &NetworkId) -> Self {
        Self { store: Blobs::open(path, network, "frames").unwrap(), live: Arc::default(), written: 0 }
    }

    /// Writes frames, to be synced together.
    fn stage(&mut self, frames: &[Verified<RolloutFrame>]) -> (Ticket, Staged) {
        let mut keys = Vec::new();
        let mut values = Vec::new();
        for frame in frames {
            self.written += 1;
            // The same frames come again and again, so they are told apart by when they came.
            let key = [frame.author().as_bytes().as_slice(), &self.written.to_be_bytes()].concat();
            let (envelope, rollouts) = frame.to_wire().to_parts();
            keys.push(key.clone());
            values.push((key, vec![envelope.into(), rollouts]));
        }
        let sequences = frames.iter().map(|frame| frame.sequence()).collect();
        ((keys, sequences), self.store.stage(values).unwrap())
    }

    /// Starts the thread that waits for the disk: it tells which frames are there, and deletes as many of the oldest.
    fn committer(&self, there: impl Fn(u64) + Send + 'static) -> Committer<Ticket> {
        let (store, live) = (self.store.clone(), Arc::clone(&self.live));
        let done = move |(keys, sequences): Ticket, committed: Result<(), StoreError>| {
            committed.unwrap();
            sequences.into_iter().for_each(&there);
            let mut live = live.lock().unwrap();
            live.extend(keys);
            let used = live.len().saturating_sub(LIVE);
            store.delete(live.drain(..used).collect()).unwrap();
        };
        Committer::spawn(self.store.clone(), done).unwrap()
    }
}

/// Writes frames and acknowledges those that are on the disk.
fn keep(mut kept: Kept, frames: &sync::Receiver<Verified<RolloutFrame>>, bulk: BulkHandle, session: SessionId) {
    let committer = kept.committer(move |sequence| bulk.send(session, &ack(sequence), None).unwrap());
    while let Ok(first) = frames.recv() {
        let group: Vec<_> = std::iter::once(first).chain(frames.try_iter().take(GROUP - 1)).collect();
        let (ticket, staged) = kept.stage(&group);
        committer.commit(ticket, staged);
    }
}

/// Receives, verifies and hands to the disk, for ever.
async fn train(mut peer: Peer, network: NetworkId, disk: sync::SyncSender<Verified<RolloutFrame>>) {
    while let Some(event) = peer.events.recv().await {
        let BulkEvent::Message { message: Bulk::Frame(received), .. } = event else { continue };
        let verified = received.verify(&network).unwrap();
        // The channel is there to be waited for: the network then waits as well.
        tokio::task::block_in_place(|| disk.send(verified).unwrap());
    }
}

/// Acknowledges whatever comes, for ever.
async fn nod(mut peer: Peer) {
    while let Some(event) = peer.events.recv().await {
        if matches!(event, BulkEvent::Message { .. }) {
            peer.bulk.send(peer.session, &ack(0), None).unwrap();
        }
    }
}

/// A folder beside the build's other outputs: on a disk, where a temporary folder may be in memory.
fn folder_in_target() -> tempfile::TempDir {
    let here = std::env::current_exe().unwrap();
    tempfile::Builder::new().prefix("stream_bench-").tempdir_in(here.parent().unwrap()).unwrap()
}

/// Sends all frames and waits until the last is acknowledged.
async fn sample(peer: &mut Peer, frames: &[Bulk]) -> Duration {
    let begun = Instant::now();
    let mut acknowledged = 0;
    let mut queue = (0..FRAMES).map(|index| &frames[usize::try_from(index).unwrap() % frames.len()]).peekable();
    while acknowledged < FRAMES {
        while let Some(frame) = queue.peek() {
            match peer.bulk.send(peer.session, frame, None) {
                Ok(()) => drop(queue.next()),
                Err(BulkError::Full) => break,
                Err(other) => panic!("{other}"),
            }
        }
        // Room comes sooner than the acknowledgement of what needs it.
        let event = tokio::time::timeout(Duration::from_millis(1), peer.events.recv()).await;
        match event {
            Ok(Some(BulkEvent::Message { message: Bulk::Ack { .. }, .. })) => acknowledged += 1,
            Ok(other) => panic!("{other:?}"),
            Err(_) => {}
        }
    }
    begun.elapsed()
}

/// Takes any key: bare.
#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

fn tuned() -> quinn::TransportConfig {
    let mut mtu = quinn::MtuDiscoveryConfig::default();
    mtu.upper_bound(MAX_PACKET);
    let mut acks = quinn::AckFrequencyConfig::default();
    acks.ack_eliciting_threshold(ACK_EVERY.into()).max_ack_delay(Some(Duration::from_millis(25)));
    let mut config = quinn::TransportConfig::default();
    config.stream_receive_window(WINDOW.into()).receive_window(WINDOW.into()).send_window(WINDOW.into());
    config.ack_frequency_config(Some(acks)).mtu_discovery_config(Some(mtu));
    config
}

fn socket(server: Option<quinn::ServerConfig>, tuned: bool) -> quinn::Endpoint {
    let socket = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let mut config = quinn::EndpointConfig::default();
    if tuned {
        let state = quinn::udp::UdpSocketState::new((&socket).into()).unwrap();
        let _ = state.set_send_buffer_size((&socket).into(), 4 << 20);
        let _ = state.set_recv_buffer_size((&socket).into(), 4 << 20);
        config.max_udp_payload_size(MAX_PACKET).unwrap();
    }
    quinn::Endpoint::new(config, server, socket, Arc::new(quinn::TokioRuntime)).unwrap()
}

/// Two ends of a bare connection.
struct Bare {
    send: quinn::SendStream,
    answer: quinn::RecvStream,
    _ends: (quinn::Endpoint, quinn::Endpoint, quinn::Connection),
}

impl Bare {
    async fn open(settings: bool) -> Self {
        let mut provider: CryptoProvider = default_provider();
        if settings {
            provider.cipher_suites = vec![cipher_suite::TLS13_AES_128_GCM_SHA256];
        }
        let provider = Arc::new(provider);
        let seed = [&b"\x30\x2e\x02\x01\x00\x30\x05\x06\x03\x2b\x65\x70\x04\x22\x04\x20"[..], &[5; 32]].concat();
        let key = any_eddsa_type(&PrivatePkcs8KeyDer::from(seed)).unwrap();
        let shown = CertificateDer::from(key.public_key().unwrap().to_vec());
        let resolver = AlwaysResolvesServerRawPublicKeys::new(Arc::new(CertifiedKey::new(vec![shown], key)));
        let server = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(resolver));
        let client = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anybody))
            .with_no_client_auth();
        let server = quinn::crypto::rustls::QuicServerConfig::try_from(server).unwrap();
        let client = quinn::crypto::rustls::QuicClientConfig::try_from(client).unwrap();
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(server));
        let mut client = quinn::ClientConfig::new(Arc::new(client));
        let transport = Arc::new(if settings { tuned() } else { quinn::TransportConfig::default() });
        server.transport_config(Arc::clone(&transport));
        client.transport_config(transport);
        let (door, dialler) = (socket(Some(server), settings), socket(None, settings));
        let connecting = dialler.connect_with(client, door.local_addr().unwrap(), "bench.invalid").unwrap();
        let host = door.clone();
        tokio::spawn(async move {
            let connection = host.accept().await.unwrap().await.unwrap();
            let (answer, recv) = connection.accept_bi().await.unwrap();
            discard(recv, answer).await;
        });
        let connection = connecting.await.unwrap();
        let (send, answer) = connection.open_bi().await.unwrap();
        Self { send, answer, _ends: (door, dialler, connection) }
    }

    /// Sends all messages and waits until the last was read.
    async fn send(&mut self, messages: &[Bytes]) -> Duration {
        let begun = Instant::now();
        for index in 0..FRAMES {
            let message = messages[usize::try_from(index).unwrap() % messages.len()].clone();
            let len = u32::try_from(message.len()).unwrap().to_be_bytes();
            self.send.write_all_chunks(&mut [Bytes::copy_from_slice(&len), message]).await.unwrap();
        }
        self.answer.read_exact(&mut [0]).await.unwrap();
        begun.elapsed()
    }
}

/// Reads messages into one buffer, and says after each round that it has them.
async fn discard(mut recv: quinn::RecvStream, mut answer: quinn::SendStream) {
    let (mut buffer, mut count, mut prefix) = (Vec::new(), 0, [0; 4]);
    while recv.read_exact(&mut prefix).await.is_ok() {
        buffer.resize(usize::try_from(u32::from_be_bytes(prefix)).unwrap(), 0);
        recv.read_exact(&mut buffer).await.unwrap();
        count += 1;
        if count == FRAMES {
            count = 0;
            answer.write_all(&[1]).await.unwrap();
        }
    }
}

/// Writes all frames into the database, without a network.
fn store_alone(kept: &mut Kept, frames: &[Verified<RolloutFrame>]) -> Duration {
    let begun = Instant::now();
    let committer = kept.committer(|_| {});
    let count = usize::try_from(FRAMES).unwrap();
    for first in (0..count).step_by(GROUP) {
        let group = (first..count.min(first + GROUP)).map(|index| frames[index % frames.len()].clone());
        let (ticket, staged) = kept.stage(&group.collect::<Vec<_>>());
        committer.commit(ticket, staged);
    }
    drop(committer);
    begun.elapsed()
}

/// Appends all messages to a file, synced as often.
fn write_and_sync(file: &mut File, messages: &[Bytes]) -> Duration {
    let begun = Instant::now();
    for index in 0..usize::try_from(FRAMES).unwrap() {
        file.write_all(&messages[index % messages.len()]).unwrap();
        if (index + 1).is_multiple_of(GROUP) {
            file.sync_data().unwrap();
        }
    }
    file.sync_data().unwrap();
    begun.elapsed()
}

fn median(mut values: Vec<f64>) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    (values[0], values[values.len() / 2], values[values.len() - 1])
}

#[tokio::main]
async fn main() {
    let network: NetworkId = "bench".parse().unwrap();
    let key = SecretKey::from_bytes(&[2; 32]);
    let made: Vec<RolloutFrame> = (1..=16).map(|sequence| frame(&key, sequence)).collect();
    let tokens = made[0].completion_tokens();
    let signed: Vec<Verified<RolloutFrame>> =
        made.into_iter().map(|frame| Verified::sign(&key, &network, frame).unwrap()).collect();
    let frames: Vec<Bulk> = signed.iter().map(|frame| Bulk::Frame(frame.to_wire())).collect();
    let messages: Vec<Bytes> = frames.iter().map(|frame| frame.to_bytes().unwrap().into()).collect();
    let bytes = messages[0].len();
    let (mut sampler, trainer) = pair(&network).await;
    let (mut talker, nodder) = pair(&network).await;
    let folder = folder_in_target();
    let mut alone = Kept::open(&folder.path().join("alone"), &network);
    let kept = Kept::open(&folder.path().join("rollouts"), &network);
    // While a group is written, another gathers.
    let (disk, written) = sync::sync_channel(2 * GROUP);
    let (bulk, session) = (trainer.bulk.clone(), trainer.session);
    let keeper = std::thread::spawn(move || keep(kept, &written, bulk, session));
    let training = tokio::spawn(train(trainer, network, disk));
    tokio::spawn(nod(nodder));
    let (mut tuned, mut default) = (Bare::open(true).await, Bare::open(false).await);
    let cost = (bytes + 4) as f64 / tokens as f64;
    println!("{FRAMES} frames of {bytes} bytes, {cost:.2} bytes a token with their length; MB/s");
    let mut disk = File::create(folder.path().join("disk")).unwrap();
    println!(
        "{:>6} {:>10} {:>10} {:>14} {:>14} {:>10} {:>10}",
        "round", "rollouts", "plane", "bare, tuned", "bare, default", "store", "disk"
    );
    if std::env::var("PROBE").is_ok() {
        for _ in 0..20 {
            let t = sample(&mut sampler, &frames).await;
            println!("{:.0}", bytes as f64 * FRAMES as f64 / t.as_secs_f64() / 1e6);
        }
        return;
    }
    let rate = |time: Duration| bytes as f64 * FRAMES as f64 / time.as_secs_f64() / 1e6;
    let mut rounds = Vec::new();
    for round in 0..=ROUNDS {
        let rates = [
            rate(sample(&mut sampler, &frames).await),
            rate(sample(&mut talker, &frames).await),
            rate(tuned.send(&messages).await),
            rate(default.send(&messages).await),
            rate(tokio::task::block_in_place(|| store_alone(&mut alone, &signed))),
            rate(tokio::task::block_in_place(|| write_and_sync(&mut disk, &messages))),
        ];
        // The first round finds packet sizes and windows.
        if round > 0 {
            let [rollouts, plane, tuned, default, store, disk] = rates;
            println!(
                "{round:>6} {rollouts:>10.0} {plane:>10.0} {tuned:>14.0} {default:>14.0} {store:>10.0} {disk:>10.0}"
            );
            rounds.push(rates);
        }
    }
    let show = |name: &str, of: fn(&[f64; 6]) -> f64, scale: f64| {
        let (least, middle, most) = median(rounds.iter().map(|rates| of(rates) * scale).collect());
        println!("{name}: median {middle:.2}, from {least:.2} to {most:.2}");
    };
    show("rollouts, millions of tokens a second", |rates| rates[0], tokens as f64 / bytes as f64);
    show("rollouts to bare quinn as it comes", |rates| rates[0] / rates[3], 1.0);
    show(
        "rollouts to the slower of bare quinn as it comes and the disk",
        |rates| rates[0] / rates[3].min(rates[5]),
        1.0,
    );
    show("rollouts to bare quinn with the plane's settings", |rates| rates[0] / rates[2], 1.0);
    show("plane to bare quinn as it comes", |rates| rates[1] / rates[3], 1.0);
    show("plane to bare quinn with the plane's settings", |rates| rates[1] / rates[2], 1.0);
    // A process that ends while its database is being closed aborts.
    training.abort();
    let _ = training.await;
    tokio::task::block_in_place(|| keeper.join().unwrap());
}
