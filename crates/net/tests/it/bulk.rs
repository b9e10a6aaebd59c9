//! The bulk plane: sessions over QUIC and over streams, in order, bounded, and noticed when they die.

use std::time::{Duration, Instant};

use chorus_net::{BulkConfig, BulkError, BulkEvent, BulkHandle, BulkPlane, CloseReason, SessionId, Way};
use chorus_protocol::job::Finish;
use chorus_protocol::policy::{ManifestBuilder, PolicyId, Version};
use chorus_protocol::rollout::{
    Assignment, Bulk, Credit, GroupId, Hello, Refusal, Rollout, RolloutFrame, Segment, Want, WorkReport,
};
use chorus_protocol::{Hash, List, NodeId, SecretKey, Text, Verified, WallTime};
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::harness::{Node, PATIENCE, config, key};

/// A node and its bulk plane.
struct Peer {
    node: Node,
    bulk: BulkHandle,
    events: mpsc::Receiver<BulkEvent>,
}

fn quic() -> BulkConfig {
    BulkConfig { listen: vec!["127.0.0.1:0".parse().unwrap()], ..BulkConfig::default() }
}

impl Peer {
    async fn start(node: Node, cfg: BulkConfig, key: &SecretKey) -> Self {
        let (bulk, events) = BulkPlane::start(cfg, key, &node.handle).await.unwrap();
        Self { node, bulk, events }
    }

    async fn join(seed: u8, known: &[&Self], cfg: BulkConfig) -> Self {
        let known: Vec<&Node> = known.iter().map(|peer| &peer.node).collect();
        Self::start(Node::join(seed, &known).await, cfg, &key(seed)).await
    }

    async fn next(&mut self) -> BulkEvent {
        timeout(PATIENCE, self.events.recv()).await.expect("waited too long for an event").expect("the plane stopped")
    }

    async fn opened(&mut self) -> (SessionId, NodeId, Way, bool) {
        match self.next().await {
            BulkEvent::Opened { session, node, way, inbound } => (session, node, way, inbound),
            other => panic!("expected an open session, got {other:?}"),
        }
    }

    async fn message(&mut self) -> (SessionId, Bulk) {
        loop {
            match self.next().await {
                BulkEvent::Message { session, message, .. } => return (session, message),
                BulkEvent::Sent { .. } => {}
                other => panic!("expected a message, got {other:?}"),
            }
        }
    }

    async fn closed(&mut self) -> (SessionId, CloseReason) {
        loop {
            match self.next().await {
                BulkEvent::Closed { session, reason, .. } => return (session, reason),
                BulkEvent::Sent { .. } | BulkEvent::Message { .. } => {}
                other => panic!("expected an end, got {other:?}"),
            }
        }
    }
}

/// Two nodes, and a session that the second opened with the first.
async fn pair(a: BulkConfig, b: BulkConfig) -> (Peer, SessionId, Peer, SessionId, Way) {
    let mut a = Peer::join(1, &[], a).await;
    let mut b = Peer::join(2, &[&a], b).await;
    let at_b = b.bulk.open(a.node.id).unwrap();
    let (session, node, way, inbound) = b.opened().await;
    assert_eq!((session, node, inbound), (at_b, a.node.id, false));
    let (at_a, node, same, inbound) = a.opened().await;
    assert_eq!((node, same, inbound), (b.node.id, way, true));
    (a, at_a, b, at_b, way)
}

fn number(index: u32) -> Bulk {
    Bulk::HaveOne { version: version(), index }
}

fn chunk(index: u32, bytes: usize) -> Bulk {
    let byte = u8::try_from(index % 251).unwrap();
    Bulk::Chunk { version: version(), index, bytes: List::new(vec![byte; bytes]).unwrap() }
}

fn version() -> Version {
    Version::from_hash(Hash::from_bytes([3; 32]))
}

fn frame(key: &SecretKey) -> RolloutFrame {
    let rollout = |member| Rollout {
        group: GroupId(1),
        member,
        environment: Text::truncated("arithmetic"),
        seed: 1,
        prompt: (0..16).collect(),
        completion: (0..64).collect(),
        log_probs: vec![-0.5; 64],
        reward: 1.0,
        finish: Finish::Stop,
        segments: vec![Segment { version: version(), from: 0 }],
    };
    let policy = PolicyId { owner: key.node_id(), name: Text::truncated("p") };
    RolloutFrame::new(policy, 1, WallTime::from_millis(1), &[rollout(0), rollout(1)]).unwrap()
}

/// One message of every kind, the largest possible among them.
fn every_message(key: &SecretKey) -> Vec<Bulk> {
    let network = "test".parse().unwrap();
    let policy = PolicyId { owner: key.node_id(), name: Text::truncated("p") };
    let mut builder = ManifestBuilder::new(1024);
    builder.file("weights").unwrap();
    builder.write(&[7; 3000]);
    let (manifest, _) = builder.finish(policy.clone(), None, 0, WallTime::from_millis(1)).unwrap();
    let hello = Hello { policy, serving: Some((version(), 1)), slots: 4, first_unacknowledged: 9, boot: 77 };
    let credit = Credit { until: 64, version: version(), step: 1, staleness: 2 };
    let assignment = Assignment {
        group: GroupId(5),
        environment: Text::truncated("sokoban"),
        seed: 6,
        first: 0,
        members: 8,
        want: Want::AtLeast { step: 1 },
        deadline_ms: 1000,
    };
    let report = WorkReport { group: GroupId(5), member: 3, reason: Refusal::Failed };
    let indices = || List::new(vec![1, 2, 3]).unwrap();
    vec![
        Bulk::Hello(hello),
        Bulk::Assign { credit, work: List::new(vec![assignment]).unwrap() },
        Bulk::Frame(Verified::sign(key, &network, frame(key)).unwrap().to_wire()),
        Bulk::Ack { sequence: 1, taken: 2, refused: List::new(vec![(Refusal::Stale, 1)]).unwrap() },
        Bulk::Nack { sequence: 1, reason: Refusal::Full, retry_ms: 10 },
        Bulk::GiveUp(List::new(vec![report]).unwrap()),
        Bulk::Serving { version: version(), step: 1 },
        Bulk::Announce(Box::new(Verified::sign(key, &network, manifest).unwrap().to_wire())),
        Bulk::Have { version: version(), chunks: List::new(vec![1; 8192]).unwrap() },
        Bulk::HaveOne { version: version(), index: 1 },
        Bulk::WantChunks { version: version(), indices: indices() },
        Bulk::Cancel { version: version(), indices: indices() },
        chunk(1, 4 << 20),
        Bulk::NoChunk { version: version(), index: 1 },
        Bulk::WantEvidence { evidence: Hash::ZERO, from: 7 },
        Bulk::Evidence { evidence: Hash::ZERO, from: 7, total: 9, bytes: List::new(vec![1; 2]).unwrap() },
    ]
}

async fn exchange_all(a: &mut Peer, at_a: SessionId, b: &mut Peer, at_b: SessionId) {
    let all = every_message(&key(9));
    for message in &all {
        a.bulk.send(at_a, message, None).unwrap();
        b.bulk.send(at_b, message, None).unwrap();
    }
    for message in &all {
        assert_eq!(b.message().await, (at_b, message.clone()));
        assert_eq!(a.message().await, (at_a, message.clone()));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_message_crosses_in_both_directions_over_quic() {
    let (mut a, at_a, mut b, at_b, way) = pair(quic(), quic()).await;
    assert_eq!(way, Way::Quic);
    exchange_all(&mut a, at_a, &mut b, at_b).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_quic_at_either_end_the_session_stays_on_the_stream() {
    for (ours, theirs) in [(quic(), BulkConfig::default()), (BulkConfig::default(), quic())] {
        let (mut a, at_a, mut b, at_b, way) = pair(ours, theirs).await;
        assert_eq!(way, Way::Stream);
        exchange_all(&mut a, at_a, &mut b, at_b).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_port_that_nobody_answers_at_costs_two_seconds_and_no_more() {
    // The control connection goes to 127.0.0.1; at 127.0.0.2 the named port leads nowhere for it.
    let elsewhere = BulkConfig { listen: vec!["127.0.0.2:0".parse().unwrap()], ..quic() };
    let begun = Instant::now();
    let (mut a, at_a, mut b, at_b, way) = pair(elsewhere, quic()).await;
    assert_eq!(way, Way::Stream);
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    exchange_all(&mut a, at_a, &mut b, at_b).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_queued_before_the_close_arrives_and_then_the_session_is_gone() {
    for cfg in [quic(), BulkConfig::default()] {
        let (mut a, at_a, mut b, at_b, _) = pair(cfg.clone(), cfg).await;
        for index in 0..500 {
            b.bulk.send(at_b, &number(index), None).unwrap();
        }
        b.bulk.close(at_b);
        for index in 0..500 {
            assert_eq!(a.message().await, (at_a, number(index)));
        }
        assert_eq!(a.closed().await, (at_a, CloseReason::Remote));
        assert_eq!(b.closed().await, (at_b, CloseReason::Asked));
        assert_eq!(b.bulk.send(at_b, &number(0), None), Err(BulkError::Gone));
        assert_eq!(a.bulk.send(at_a, &number(0), None), Err(BulkError::Gone));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_come_back_in_order_and_messages_sent_at_once_follow_the_opening() {
    let mut a = Peer::join(1, &[], quic()).await;
    let mut b = Peer::join(2, &[&a], quic()).await;
    let at_b = b.bulk.open(a.node.id).unwrap();
    for index in 0..100 {
        b.bulk.send(at_b, &number(index), Some(u64::from(index))).unwrap();
    }
    b.opened().await;
    let (at_a, ..) = a.opened().await;
    for index in 0..100 {
        assert_eq!(a.message().await, (at_a, number(index)));
        assert!(matches!(b.next().await, BulkEvent::Sent { token, .. } if token == u64::from(index)));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_dies_is_noticed_within_seconds() {
    for cfg in [quic(), BulkConfig::default()] {
        let mut a = Peer::join(1, &[], cfg.clone()).await;
        let bootstrap = a.node.addrs();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let to = a.node.id;
        let dying = runtime.spawn(async move {
            let mut net = config();
            net.bootstrap = bootstrap;
            let mut b = Peer::start(Node::start(net, &key(2)).await, cfg, &key(2)).await;
            b.bulk.open(to).unwrap();
            b.opened().await;
            b
        });
        let b = dying.await.unwrap();
        let (at_a, ..) = a.opened().await;
        let killed = Instant::now();
        // No task of the node runs again, so nobody says good-bye.
        runtime.shutdown_background();
        let (session, reason) = a.closed().await;
        assert_eq!(session, at_a);
        assert!(reason.is_retryable() && !reason.merits_ban(), "{reason:?}");
        assert!(killed.elapsed() < Duration::from_secs(8), "{:?}: {reason:?}", killed.elapsed());
        println!("a dead node is noticed after {:?}: {reason}", killed.elapsed());
        drop(b);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_reader_stops_the_sender_and_loses_nothing() {
    const BYTES: usize = 256 << 10;
    for listen in [quic().listen, Vec::new()] {
        let cfg = BulkConfig { listen, send_bytes: 8 << 20, event_queue: 4, ..quic() };
        let (mut a, at_a, b, at_b, way) = pair(cfg.clone(), cfg).await;
        let (mut sent, mut full_since) = (0, None::<Instant>);
        // Full for a whole second: everything on the way is full as well.
        while full_since.is_none_or(|since| since.elapsed() < Duration::from_secs(1)) {
            match b.bulk.send(at_b, &chunk(sent, BYTES), None) {
                Ok(()) => (sent, full_since) = (sent + 1, None),
                Err(BulkError::Full) => {
                    full_since.get_or_insert_with(Instant::now);
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                Err(other) => panic!("{other}"),
            }
        }
        let held = sent as usize * BYTES;
        println!("{way:?}: {} MiB are held while nobody reads", held >> 20);
        // The queue, both windows, the events, and one message in each hand.
        assert!(held <= (8 << 20) + 2 * (8 << 20) + 7 * BYTES, "{held} bytes");
        // Another session with the same slow node is another queue, but its events wait for the same reader.
        for index in 0..sent {
            assert_eq!(a.message().await, (at_a, chunk(index, BYTES)));
        }
        b.bulk.send(at_b, &chunk(sent, BYTES), None).unwrap();
        assert_eq!(a.message().await, (at_a, chunk(sent, BYTES)));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_networks_do_not_mix() {
    let mut other = config();
    other.network = "other".parse().unwrap();
    let mut a = Peer::start(Node::start(other, &key(1)).await, quic(), &key(1)).await;
    let mut b = Peer::join(2, &[&a], quic()).await;
    let session = b.bulk.open(a.node.id).unwrap();
    let (closed, reason) = b.closed().await;
    assert_eq!(closed, session);
    assert!(matches!(reason, CloseReason::Unsupported | CloseReason::Unreachable { .. }), "{reason:?}");
    assert!(a.events.try_recv().is_err(), "the other network heard nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_not_there_is_unreachable_and_oneself_as_well() {
    let mut a = Peer::join(1, &[], quic()).await;
    for node in [a.node.id, key(77).node_id()] {
        let session = a.bulk.open(node).unwrap();
        let (closed, reason) = a.closed().await;
        assert_eq!(closed, session);
        assert!(matches!(reason, CloseReason::Unreachable { .. }), "{reason:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_are_limited_for_each_node_and_altogether() {
    let mut a = Peer::join(1, &[], quic()).await;
    let mut b = Peer::join(2, &[&a], BulkConfig { max_sessions: 6, ..quic() }).await;
    let opened: Vec<SessionId> = (0..6).map(|_| b.bulk.open(a.node.id).unwrap()).collect();
    assert_eq!(b.bulk.open(a.node.id), Err(BulkError::TooMany { max: 6 }));
    let (mut up, mut busy) = (Vec::new(), Vec::new());
    for _ in &opened {
        match b.next().await {
            BulkEvent::Opened { session, .. } => up.push(session),
            BulkEvent::Closed { session, reason: CloseReason::Busy, .. } => busy.push(session),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((up.len(), busy.len()), (4, 2));
    b.bulk.close(up[0]);
    for _ in &up {
        a.opened().await;
    }
    a.closed().await;
    b.closed().await;
    b.bulk.open(a.node.id).unwrap();
    assert_eq!(b.opened().await.1, a.node.id, "there is room again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plane_that_shuts_down_says_so_to_both_ends() {
    let (mut a, at_a, mut b, at_b, _) = pair(quic(), quic()).await;
    let (bulk, again) = (b.bulk.clone(), b.bulk.clone());
    let begun = Instant::now();
    bulk.shutdown().await;
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    assert_eq!(b.closed().await, (at_b, CloseReason::Stopped));
    assert_eq!(a.closed().await, (at_a, CloseReason::Remote));
    assert_eq!(again.open(a.node.id), Err(BulkError::Stopped));
    assert_eq!(again.send(at_b, &number(0), None), Err(BulkError::Stopped));
}
