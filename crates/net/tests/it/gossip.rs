//! Gossip: it reaches all, once, and only after a verdict.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use chorus_net::{BanReason, NetError, NetEvent, PublishError, Topic, Verdict};
use chorus_protocol::limits::MAX_GOSSIP_BYTES;

use crate::harness::{Node, config, key};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_swarm_of_twenty_forms_and_every_message_reaches_every_node_once() {
    const NODES: u8 = 20;
    let started = Instant::now();
    let first = Node::join(1, &[]).await;
    let mut nodes = vec![first];
    for seed in 2..=NODES {
        let node = Node::join(seed, &[&nodes[0]]).await;
        nodes.push(node);
    }
    for node in &nodes {
        node.wait_peers(usize::from(NODES) - 1).await;
    }
    println!("20 nodes know each other after {:?}", started.elapsed());

    // Subscriptions travel right behind the handshake.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let published = Instant::now();
    for (number, node) in nodes.iter().enumerate() {
        node.handle.publish(Topic::Ledger, vec![number as u8; 200]).unwrap();
    }
    let listeners = nodes.into_iter().enumerate().map(|(number, mut node)| {
        tokio::spawn(async move {
            let mut seen = BTreeMap::new();
            while seen.len() < usize::from(NODES) - 1 {
                let author = node
                    .wait("gossip", |event| match event {
                        NetEvent::Gossip { topic: Topic::Ledger, bytes, .. } => Some(bytes[0]),
                        _ => None,
                    })
                    .await;
                *seen.entry(author).or_insert(0) += 1;
            }
            assert!(!seen.contains_key(&(number as u8)), "nobody hears itself");
            let complete = published.elapsed();
            let late = node.watch(Duration::from_secs(1)).await;
            let again = late.iter().filter(|event| matches!(event, NetEvent::Gossip { .. })).count();
            assert_eq!(again, 0, "a message came twice");
            (complete, node)
        })
    });
    let heard = futures::future::join_all(listeners).await;
    let slowest = heard.into_iter().map(|node| node.unwrap().0).max().unwrap();
    println!("20 messages of 20 authors reached everybody within {slowest:?}");
}

/// Three nodes in a row: the first and the last do not talk to each other.
async fn row() -> (Node, Node, Node) {
    let left = Node::join(1, &[]).await;
    left.handle.ban(key(3).node_id(), Duration::from_secs(600)).unwrap();
    let mut middle = Node::join(2, &[&left]).await;
    middle.wait_up(left.id).await;
    let mut right = Node::join(3, &[&middle]).await;
    right.wait_up(middle.id).await;
    middle.wait_up(right.id).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    (left, middle, right)
}

async fn verdict(node: &mut Node, verdict: Verdict) -> Vec<u8> {
    loop {
        if let NetEvent::Gossip { token, bytes, .. } = node.events.recv().await.unwrap() {
            node.handle.validated(token, verdict).unwrap();
            return bytes;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_what_was_accepted_is_passed_on() {
    let (mut left, mut middle, right) = row().await;
    for (number, judged) in [(1, Verdict::Reject), (2, Verdict::Ignore), (3, Verdict::Accept)] {
        right.handle.publish(Topic::Beacon, vec![number; 10]).unwrap();
        assert_eq!(verdict(&mut middle, judged).await, [number; 10]);
    }
    let heard = left.watch(Duration::from_secs(2)).await;
    let heard: Vec<_> = heard
        .into_iter()
        .filter_map(|event| match event {
            NetEvent::Gossip { bytes, from, .. } => Some((from, bytes[0])),
            _ => None,
        })
        .collect();
    assert_eq!(heard, [(middle.id, 3)], "the one accepted message, from the peer that passed it on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_gossips_rubbish_is_banned_and_nobody_else() {
    let (_left, mut middle, right) = row().await;
    let rubbish = tokio::spawn({
        let handle = right.handle.clone();
        async move {
            for number in 0..30u8 {
                let _ = handle.publish(Topic::Ledger, vec![number, 0xbb]);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    });
    let banned = loop {
        match middle.events.recv().await.unwrap() {
            NetEvent::Gossip { token, .. } => middle.handle.validated(token, Verdict::Reject).unwrap(),
            NetEvent::Banned { node, reason, .. } => break (node, reason),
            _ => {}
        }
    };
    assert_eq!(banned, (right.id, BanReason::InvalidGossip));
    rubbish.await.unwrap();
    assert_eq!(middle.handle.peers().await.len(), 1, "the honest peer stays");
}

#[tokio::test]
async fn a_node_alone_is_told_that_nobody_listens() {
    let mut node = Node::start(config(), &key(1)).await;
    node.handle.publish(Topic::Beacon, b"anybody?".to_vec()).unwrap();
    let error = node
        .wait("the failure", |event| match event {
            NetEvent::PublishFailed { topic: Topic::Beacon, error } => Some(error),
            _ => None,
        })
        .await;
    assert_eq!(error, PublishError::NoPeers);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_largest_message_passes_and_a_larger_one_is_refused_at_once() {
    let mut a = Node::join(1, &[]).await;
    let mut b = Node::join(2, &[&a]).await;
    b.wait_up(a.id).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    b.handle.publish(Topic::Ledger, vec![7; MAX_GOSSIP_BYTES]).unwrap();
    let len = a
        .wait("the large message", |event| match event {
            NetEvent::Gossip { bytes, .. } => Some(bytes.len()),
            _ => None,
        })
        .await;
    assert_eq!(len, MAX_GOSSIP_BYTES);
    let error = b.handle.publish(Topic::Ledger, vec![7; MAX_GOSSIP_BYTES + 1]).unwrap_err();
    assert!(matches!(error, NetError::GossipTooLarge { len, .. } if len == MAX_GOSSIP_BYTES + 1), "{error}");
    assert!(!error.is_retryable());
    assert!(matches!(b.handle.publish(Topic::Ledger, Vec::new()), Err(NetError::Empty)));
}
