//! Direct messages: fast, in order, acknowledged, bounded.

use std::time::{Duration, Instant};

use chorus_net::{NetError, NetEvent, SendError};
use chorus_protocol::limits::MAX_DIRECT_BYTES;

use crate::harness::{Node, config, key};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_takes_well_under_a_millisecond() {
    let mut a = Node::join(1, &[]).await;
    let mut b = Node::join(2, &[&a]).await;
    b.wait_up(a.id).await;
    a.wait_up(b.id).await;
    let mut one_way = Vec::new();
    for token in 0..1000 {
        let sent = Instant::now();
        b.handle.send(a.id, token, vec![1; 256]).unwrap();
        assert_eq!(a.wait_message().await.0, b.id);
        one_way.push(sent.elapsed());
        assert_eq!(b.wait_fate(token).await, Ok(()));
    }
    one_way.sort();
    println!("direct, one way, 256 bytes, loopback: p50 {:?}, p99 {:?}", one_way[500], one_way[990]);
    // Tests share two cores; the benchmark measures, this only catches a lost factor of ten.
    assert!(one_way[500] < Duration::from_millis(5), "{:?}", one_way[500]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_arrives_whole_and_nearly_in_order() {
    const MESSAGES: u64 = 5000;
    let mut a = Node::join(1, &[]).await;
    let mut b = Node::join(2, &[&a]).await;
    b.wait_up(a.id).await;
    let sender = tokio::spawn(async move {
        for token in 0..MESSAGES {
            while b.handle.send(a.id, token, token.to_le_bytes().to_vec()).is_err() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        let mut delivered = 0;
        while delivered < MESSAGES {
            b.wait("delivery", |event| matches!(event, NetEvent::Delivered { .. }).then_some(())).await;
            delivered += 1;
        }
        b
    });
    let mut numbers = Vec::new();
    while numbers.len() < MESSAGES as usize {
        let (_, bytes) = a.wait_message().await;
        numbers.push(u64::from_le_bytes(bytes.try_into().unwrap()));
    }
    let swaps = numbers.windows(2).filter(|pair| pair[0] > pair[1]).count();
    println!("{MESSAGES} messages, {swaps} out of order");
    numbers.sort_unstable();
    assert!(numbers.into_iter().eq(0..MESSAGES), "each once");
    assert!(swaps < 500, "{swaps}");
    sender.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sizes_are_checked_before_anything_is_queued() {
    let mut a = Node::join(1, &[]).await;
    let mut b = Node::join(2, &[&a]).await;
    b.wait_up(a.id).await;
    b.handle.send(a.id, 1, vec![5; MAX_DIRECT_BYTES]).unwrap();
    assert_eq!(a.wait_message().await.1.len(), MAX_DIRECT_BYTES);
    assert_eq!(b.wait_fate(1).await, Ok(()));
    let error = b.handle.send(a.id, 2, vec![5; MAX_DIRECT_BYTES + 1]).unwrap_err();
    assert!(matches!(error, NetError::DirectTooLarge { len } if len == MAX_DIRECT_BYTES + 1));
    assert!(matches!(b.handle.send(a.id, 3, Vec::new()), Err(NetError::Empty)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_is_found_by_its_id_alone() {
    let hub = Node::join(1, &[]).await;
    let mut far = Node::join(2, &[&hub]).await;
    far.wait_up(hub.id).await;
    let mut cfg = config();
    cfg.bootstrap = hub.addrs();
    cfg.conn.target = 1;
    let mut near = Node::start(cfg, &key(3)).await;
    near.wait_up(hub.id).await;
    near.handle.send(far.id, 9, b"hello".to_vec()).unwrap();
    assert_eq!(far.wait_message().await, (near.id, b"hello".to_vec()));
    assert_eq!(near.wait_fate(9).await, Ok(()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_there_is_an_error_that_may_be_tried_again() {
    let hub = Node::join(1, &[]).await;
    let mut node = Node::join(2, &[&hub]).await;
    node.handle.send(key(99).node_id(), 1, b"?".to_vec()).unwrap();
    let error = node.wait_fate(1).await.unwrap_err();
    assert_eq!(error, SendError::Unreachable);
    assert!(error.is_retryable() && !error.may_have_arrived());
    node.handle.send(node.id, 2, b"me".to_vec()).unwrap();
    let error = node.wait_fate(2).await.unwrap_err();
    assert_eq!(error, SendError::Refused);
    assert!(!error.is_retryable());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_stops_in_the_middle_leaves_no_message_without_a_fate() {
    let mut a = Node::join(1, &[]).await;
    let mut b = Node::join(2, &[&a]).await;
    b.wait_up(a.id).await;
    a.wait_up(b.id).await;
    let mut tokens = 0;
    let a_id = a.id;
    let stop = tokio::spawn(async move {
        a.wait_message().await;
        a.handle.shutdown().await;
    });
    for token in 0..2000 {
        if b.handle.send(a_id, token, vec![3; 2000]).is_ok() {
            tokens += 1;
        }
    }
    stop.await.unwrap();
    for _ in 0..tokens {
        b.wait("a fate", |event| {
            matches!(event, NetEvent::Delivered { .. } | NetEvent::SendFailed { .. }).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_behind_says_so_and_stays_within_its_bounds() {
    let mut cfg = config();
    cfg.event_queue = 64;
    let slow = Node::start(cfg, &key(1)).await;
    let mut fast = Node::join(2, &[&slow]).await;
    fast.wait_up(slow.id).await;
    // Nobody reads the slow node's events.
    for token in 0..2000 {
        fast.handle.send(slow.id, token, vec![1; 100]).unwrap();
    }
    let (mut delivered, mut refused) = (0, 0);
    for _ in 0..2000 {
        match fast
            .wait("a fate", |event| match event {
                NetEvent::Delivered { .. } => Some(Ok(())),
                NetEvent::SendFailed { error, .. } => Some(Err(error)),
                _ => None,
            })
            .await
        {
            Ok(()) => delivered += 1,
            Err(SendError::Overloaded) => refused += 1,
            Err(error) => panic!("{error}"),
        }
    }
    println!("{delivered} delivered, {refused} refused");
    assert!(delivered <= 64 + 64, "{delivered}");
    let mut slow = slow;
    let shed = slow
        .wait("the account of what was shed", |event| match event {
            NetEvent::Shed { messages } => Some(messages),
            _ => None,
        })
        .await;
    assert!(shed >= refused, "{shed} < {refused}");
}
