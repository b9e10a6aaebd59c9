//! Measures the network on loopback: `cargo run --release -p chorus-net --example net_bench`.
//!
//! 1. direct messages: one-way latency of single messages, over TCP and over QUIC, beside a bare TCP ping-pong of the same run;
//! 2. direct messages: throughput with many under way, small and large, beside bare TCP;
//! 3. gossip over 20 and 50 nodes: time to form, delay of each delivery, deliveries that were missed, hops, and the copies that
//!    redundancy costs. These are the parameters of the simulator's gossip model.
//!
//! An argument, `direct` or `gossip`, limits it to that part.

#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation)]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use chorus_net::{Addr, Net, NetConfig, NetEvent, NetHandle, Topic, Verdict};
use chorus_protocol::{NodeId, SecretKey};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

const PING_PONGS: usize = 5_000;

struct Node {
    handle: NetHandle,
    events: mpsc::Receiver<NetEvent>,
    id: NodeId,
}

fn config(listen: &[&str]) -> NetConfig {
    let mut cfg = NetConfig {
        listen: listen.iter().map(|addr| addr.parse().unwrap()).collect(),
        mdns: false,
        event_queue: 16_384,
        command_queue: 16_384,
        ..NetConfig::new("bench".parse().unwrap())
    };
    // What is measured is the path, not the limits on it.
    cfg.rate.direct_messages = 10_000_000;
    cfg.rate.direct_bytes = u32::MAX;
    cfg.rate.gossip_messages = 1_000_000;
    cfg.rate.gossip_bytes = u32::MAX;
    cfg
}

async fn start(seed: u8, listen: &[&str], bootstrap: Vec<Addr>) -> Node {
    let key = SecretKey::from_bytes(&[seed; 32]);
    let mut cfg = config(listen);
    cfg.bootstrap = bootstrap;
    let (handle, events) = Net::start(cfg, &key).await.unwrap();
    Node { handle, events, id: key.node_id() }
}

async fn pair(listen: &str) -> (Node, Node) {
    let a = start(1, &[listen], Vec::new()).await;
    let mut b = start(2, &[listen], a.handle.ticket().bootstrap()).await;
    while !matches!(b.events.recv().await.unwrap(), NetEvent::PeerUp { .. }) {}
    tokio::time::sleep(Duration::from_millis(300)).await;
    (a, b)
}

fn quantiles(mut times: Vec<Duration>) -> String {
    times.sort();
    let at = |q: f64| times[((times.len() - 1) as f64 * q) as usize];
    let mean = times.iter().sum::<Duration>() / times.len() as u32;
    format!("mean {mean:.1?}  p50 {:.1?}  p90 {:.1?}  p99 {:.1?}  max {:.1?}", at(0.5), at(0.9), at(0.99), at(1.0))
}

async fn message(node: &mut Node) -> Vec<u8> {
    loop {
        if let NetEvent::Message { bytes, .. } = node.events.recv().await.unwrap() {
            return bytes;
        }
    }
}

async fn latency(what: &str, listen: &str) {
    let (mut a, mut b) = pair(listen).await;
    let mut one_way = Vec::with_capacity(PING_PONGS * 2);
    for token in 0..PING_PONGS as u64 {
        let sent = Instant::now();
        b.handle.send(a.id, token, vec![7; 256]).unwrap();
        message(&mut a).await;
        one_way.push(sent.elapsed());
        let sent = Instant::now();
        a.handle.send(b.id, token, vec![7; 256]).unwrap();
        message(&mut b).await;
        one_way.push(sent.elapsed());
    }
    println!("direct {what}, 256 B, one way:     {}", quantiles(one_way));
}

/// What the machine does without us: half a round trip between two tasks over a bare TCP socket.
async fn bare_latency() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        let mut buf = [0; 256];
        while stream.read_exact(&mut buf).await.is_ok() {
            stream.write_all(&buf).await.unwrap();
        }
    });
    let mut stream = TcpStream::connect(addr).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let mut half = Vec::with_capacity(PING_PONGS);
    let mut buf = [0; 256];
    for _ in 0..PING_PONGS {
        let sent = Instant::now();
        stream.write_all(&buf).await.unwrap();
        stream.read_exact(&mut buf).await.unwrap();
        half.push(sent.elapsed() / 2);
    }
    println!("bare TCP,    256 B, half a trip:  {}", quantiles(half));
}

async fn throughput(what: &str, listen: &str, size: usize, messages: u64) {
    let (mut a, mut b) = pair(listen).await;
    let to = a.id;
    let started = Instant::now();
    let receive = tokio::spawn(async move {
        let mut got = 0;
        while got < messages {
            message(&mut a).await;
            got += 1;
        }
        (a, Instant::now())
    });
    let (mut sent, mut settled, mut failed, mut refused) = (0, 0, 0u64, 0u64);
    while settled < messages {
        while sent < messages && sent - settled < 4096 {
            if b.handle.send(to, sent, vec![7; size]).is_err() {
                refused += 1;
                break;
            }
            sent += 1;
        }
        match b.events.recv().await.unwrap() {
            NetEvent::Delivered { .. } => settled += 1,
            NetEvent::SendFailed { token, .. } => {
                failed += 1;
                while b.handle.send(to, token, vec![7; size]).is_err() {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
            _ => {}
        }
    }
    let (_a, done) = receive.await.unwrap();
    let seconds = (done - started).as_secs_f64();
    println!(
        "direct {what}, {size} B: {:.0} messages/s, {:.1} MB/s ({failed} sent again, {refused} refused by the queue)",
        messages as f64 / seconds,
        messages as f64 * size as f64 / seconds / 1e6,
    );
}

async fn bare_throughput() {
    const BYTES: usize = 1 << 30;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let started = Instant::now();
    tokio::spawn(async move {
        let mut stream = TcpStream::connect(addr).await.unwrap();
        let buf = vec![7; 1 << 17];
        for _ in 0..BYTES / buf.len() {
            stream.write_all(&buf).await.unwrap();
        }
    });
    let (mut stream, _) = listener.accept().await.unwrap();
    let (mut got, mut buf) = (0, vec![0; 1 << 17]);
    while got < BYTES {
        got += stream.read(&mut buf).await.unwrap();
    }
    println!("bare TCP, no encryption: {:.1} MB/s", BYTES as f64 / started.elapsed().as_secs_f64() / 1e6);
}

/// One delivery: which message, from whom, and how long after it was published.
struct Delivery {
    round: u32,
    from: NodeId,
    delay: Duration,
}

async fn form(nodes: u8) -> Vec<Node> {
    let listen = ["/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"];
    let started = Instant::now();
    let mut swarm = vec![start(1, &listen, Vec::new()).await];
    for seed in 2..=nodes {
        swarm.push(start(seed, &listen, swarm[0].handle.ticket().bootstrap()).await);
    }
    let enough = (usize::from(nodes) - 1).min(config(&[]).conn.target as usize);
    for node in &swarm {
        while node.handle.peers().await.len() < enough {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    println!("swarm of {nodes}: each has {enough} peers or more after {:.0?}", started.elapsed());
    // The mesh takes some heartbeats to settle.
    tokio::time::sleep(Duration::from_secs(4)).await;
    swarm
}

/// Listens until nothing comes any more.
async fn listen(node: &mut Node, clock: Instant) -> Vec<Delivery> {
    let mut heard = Vec::new();
    while let Ok(Some(event)) = tokio::time::timeout(Duration::from_secs(3), node.events.recv()).await {
        let NetEvent::Gossip { bytes, token, from, .. } = event else { continue };
        node.handle.validated(token, Verdict::Accept).unwrap();
        let sent = Duration::from_nanos(u64::from_le_bytes(bytes[..8].try_into().unwrap()));
        let round = u32::from_le_bytes(bytes[8..12].try_into().unwrap());
        heard.push(Delivery { round, from, delay: clock.elapsed() - sent });
    }
    heard
}

/// How many hands each delivery went through, in shares: a message's path is followed back to its author.
fn hops(heard: &BTreeMap<(NodeId, u32), NodeId>) -> String {
    let mut counts = BTreeMap::new();
    for (&(to, round), &from) in heard {
        let (mut at, mut hops) = (from, 1);
        while let Some(before) = heard.get(&(at, round)).filter(|before| **before != to && hops < 32) {
            (at, hops) = (*before, hops + 1);
        }
        *counts.entry(hops).or_insert(0_u32) += 1;
    }
    let share = |(hops, count): (&u32, &u32)| format!("{hops}: {:.3}", f64::from(*count) / heard.len() as f64);
    counts.iter().map(share).collect::<Vec<_>>().join("  ")
}

async fn gossip(nodes: u8, size: usize, rounds: u32, per_second: u32) {
    let swarm = form(nodes).await;
    let (mut meshed, mut connected) = (0, 0);
    for node in &swarm {
        let peers = node.handle.peers().await;
        connected += peers.len();
        meshed += peers.iter().filter(|peer| peer.in_mesh).count();
    }
    let handles: Vec<NetHandle> = swarm.iter().map(|node| node.handle.clone()).collect();
    let copies = || handles.iter().map(NetHandle::gossip_copies).sum::<u64>();
    let (clock, before) = (Instant::now(), copies());
    let listeners: Vec<_> =
        swarm.into_iter().map(|mut node| tokio::spawn(async move { (listen(&mut node, clock).await, node) })).collect();
    for round in 0..rounds {
        let author = &handles[round as usize % handles.len()];
        let mut bytes = vec![3; size];
        bytes[..8].copy_from_slice(&(clock.elapsed().as_nanos() as u64).to_le_bytes());
        bytes[8..12].copy_from_slice(&round.to_le_bytes());
        author.publish(Topic::Ledger, bytes).unwrap();
        tokio::time::sleep(Duration::from_secs(1) / per_second).await;
    }
    let (mut delays, mut heard) = (Vec::new(), BTreeMap::new());
    for listener in listeners {
        let (deliveries, node) = listener.await.unwrap();
        delays.extend(deliveries.iter().map(|delivery| delivery.delay));
        heard.extend(deliveries.into_iter().map(|delivery| ((node.id, delivery.round), delivery.from)));
    }
    let (expected, arrived) = (rounds as usize * (usize::from(nodes) - 1), heard.len());
    let degree = |links: usize| links as f64 / f64::from(nodes);
    println!("gossip, {nodes} nodes, {size} B, {per_second} a second");
    println!("  delay: {}", quantiles(delays));
    println!("  arrived: {arrived} of {expected}; mesh degree {:.1} of {:.1} peers", degree(meshed), degree(connected));
    println!("  hops: {}", hops(&heard));
    println!("  copies a delivery: {:.2}", (copies() - before) as f64 / arrived as f64);
}

async fn direct() {
    bare_latency().await;
    latency("TCP ", "/ip4/127.0.0.1/tcp/0").await;
    latency("QUIC", "/ip4/127.0.0.1/udp/0/quic-v1").await;
    throughput("TCP ", "/ip4/127.0.0.1/tcp/0", 128, 200_000).await;
    throughput("QUIC", "/ip4/127.0.0.1/udp/0/quic-v1", 128, 200_000).await;
    bare_throughput().await;
    throughput("TCP ", "/ip4/127.0.0.1/tcp/0", 256 << 10, 1_500).await;
    throughput("QUIC", "/ip4/127.0.0.1/udp/0/quic-v1", 256 << 10, 1_500).await;
}

#[tokio::main]
async fn main() {
    // The direct figures alone, or those of gossip alone, where only they are asked for.
    let only = std::env::args().nth(1);
    let wants = |what| only.as_deref().is_none_or(|only| only == what);
    println!("loopback, one process, {} cores", std::thread::available_parallelism().map_or(0, usize::from));
    if wants("direct") {
        direct().await;
    }
    if wants("gossip") {
        for nodes in [20, 50] {
            for (size, rounds, per_second) in [(300, 100, 10), (300, 200, 50), (16 << 10, 50, 5)] {
                gossip(nodes, size, rounds, per_second).await;
            }
        }
    }
}
