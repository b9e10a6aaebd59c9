//! Getting lost and coming back: outages, restarts, new addresses.

use std::time::{Duration, Instant};

use chorus_net::{NetError, NetEvent};

use crate::harness::{Node, addr, config, key};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_swarm_is_rejoined_within_ten_seconds() {
    let hub = Node::join(1, &[]).await;
    let (hub_addrs, hub_id) = (hub.addrs(), hub.id);
    let mut node = Node::join(2, &[&hub]).await;
    node.wait_up(hub_id).await;
    hub.handle.shutdown().await;
    node.wait_down(hub_id).await;
    let since = node
        .wait("the news of being alone", |event| match event {
            NetEvent::Isolated { since, next_try, .. } => {
                assert!(next_try <= Duration::from_secs(10));
                Some(since)
            }
            _ => None,
        })
        .await;
    assert!(since.elapsed() < Duration::from_secs(10));

    // A while later the hub is back, at the same place.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let mut cfg = config();
    cfg.listen = hub_addrs.iter().map(chorus_net::Addr::without_node).collect();
    let _hub = Node::start(cfg, &key(1)).await;
    let back = Instant::now();
    node.wait_up(hub_id).await;
    println!("rejoined {:?} after the hub was back", back.elapsed());
    assert!(back.elapsed() < Duration::from_secs(10));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_comes_back_at_another_port_is_found_by_its_id() {
    let mut hub = Node::join(1, &[]).await;
    let mut friend = Node::join(2, &[&hub]).await;
    friend.wait_up(hub.id).await;
    let mover = Node::join(3, &[&hub]).await;
    let (old, mover_id) = (mover.addrs(), mover.id);
    friend.wait_up(mover_id).await;
    hub.wait_up(mover_id).await;
    mover.handle.shutdown().await;
    friend.wait_down(mover_id).await;

    let mut mover = Node::join(3, &[&hub]).await;
    assert!(mover.addrs().iter().all(|addr| !old.contains(addr)), "the ports are other ones");
    friend.handle.send(mover_id, 1, b"still you?".to_vec()).unwrap();
    assert_eq!(mover.wait_message().await, (friend.id, b"still you?".to_vec()));
    assert_eq!(friend.wait_fate(1).await, Ok(()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_address_is_told_to_the_peers() {
    let mut a = Node::join(1, &[]).await;
    let mut b = Node::join(2, &[&a]).await;
    b.wait_up(a.id).await;
    a.wait_up(b.id).await;
    let before = a.handle.listening();
    a.handle.listen(addr("/ip4/127.0.0.1/tcp/0")).await.unwrap();
    let fresh = a
        .wait("the new address", |event| match event {
            NetEvent::Listening(addr) if !before.contains(&addr) => Some(addr),
            _ => None,
        })
        .await;
    let knows = async |wanted: bool, what: &chorus_net::Addr| {
        let end = Instant::now() + Duration::from_secs(10);
        while b.handle.peers().await.first().is_none_or(|peer| peer.listen.contains(what) != wanted) {
            assert!(Instant::now() < end, "{what} known: expected {wanted}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    knows(true, &fresh).await;
    // The old doors close; who is connected stays, and whoever comes later finds the new one.
    for old in config().listen {
        a.handle.unlisten(old).unwrap();
    }
    for old in &before {
        knows(false, old).await;
    }
    assert_eq!(b.handle.peers().await.len(), 1);
    assert_eq!(a.handle.listening(), [fresh]);
    let mut late = Node::join(3, &[&a]).await;
    late.wait_up(a.id).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_halves_grow_together_when_the_cut_heals() {
    let mut hub = Node::join(1, &[]).await;
    let mut a = Node::join(2, &[&hub]).await;
    let mut b = Node::join(3, &[&hub, &a]).await;
    a.wait_up(b.id).await;
    b.wait_up(hub.id).await;
    hub.wait_up(b.id).await;
    // The cut: the hub and the others refuse each other for some seconds.
    let cut = Duration::from_secs(4);
    for node in [&a, &b] {
        hub.handle.ban(node.id, cut).unwrap();
    }
    a.wait_down(hub.id).await;
    hub.wait_down(b.id).await;
    let healed = Instant::now() + cut;
    hub.wait_up(a.id).await;
    a.wait_up(hub.id).await;
    println!("together again {:?} after the cut healed", Instant::now().saturating_duration_since(healed));
}

#[tokio::test]
async fn a_port_in_use_is_an_error_that_names_the_flag() {
    let node = Node::join(1, &[]).await;
    for taken in node.handle.listening() {
        let mut cfg = config();
        cfg.listen = vec![taken.clone()];
        let error = chorus_net::Net::start(cfg, &key(2)).await.unwrap_err();
        assert!(matches!(&error, NetError::PortInUse { addr } if *addr == taken), "{error}");
        assert!(error.to_string().contains("--listen") && error.to_string().contains("--instance"));
        let error = node.handle.listen(taken.clone()).await.unwrap_err();
        assert!(matches!(error, NetError::PortInUse { .. }), "{error}");
    }
    let mut cfg = config();
    cfg.listen = vec![addr("/ip4/192.0.2.1/tcp/0")];
    let error = chorus_net::Net::start(cfg, &key(2)).await.unwrap_err();
    assert!(matches!(error, NetError::Listen { .. }), "{error}");
}

#[tokio::test]
async fn a_dial_that_fails_says_where_and_why() {
    let mut node = Node::join(1, &[]).await;
    let nobody = addr("/ip4/127.0.0.1/tcp/1");
    node.handle.dial(nobody.clone()).unwrap();
    let reason = node
        .wait("the failure", |event| match event {
            NetEvent::DialFailed { addr, reason } if addr == nobody => Some(reason),
            _ => None,
        })
        .await;
    assert!(reason.contains("/ip4/127.0.0.1/tcp/1") && reason.to_lowercase().contains("refused"), "{reason}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ticket_is_all_one_needs_to_join() {
    let mut host = Node::join(1, &[]).await;
    let printed = host.handle.ticket().to_string();
    let ticket: chorus_net::Ticket = printed.parse().unwrap();
    let mut cfg = config();
    cfg.bootstrap = ticket.bootstrap();
    let mut guest = Node::start(cfg, &key(2)).await;
    guest.wait_up(host.id).await;
    host.wait_up(guest.id).await;
    assert_eq!(ticket.node(), host.id);
    let info = guest.handle.peers().await.remove(0);
    assert!(info.agent.starts_with("chorus/") && !info.relayed && info.outbound, "{info:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_node_finds_the_swarm_though_its_bootstrap_peer_is_gone() {
    let dir = std::env::temp_dir().join(format!("chorus-net-peers-{}", std::process::id()));
    let hub = Node::join(1, &[]).await;
    let friend = Node::join(2, &[&hub]).await;
    let mut cfg = config();
    cfg.bootstrap = hub.addrs();
    cfg.peer_file = Some(dir.clone());
    let mut node = Node::start(cfg.clone(), &key(3)).await;
    node.wait_up(friend.id).await;
    node.handle.shutdown().await;
    hub.handle.shutdown().await;

    let mut node = Node::start(cfg.clone(), &key(3)).await;
    node.wait_up(friend.id).await;
    node.handle.shutdown().await;

    // A file that something else wrote over is no reason not to start.
    std::fs::write(&dir, [0xff; 5_000]).unwrap();
    cfg.bootstrap = friend.addrs();
    let mut node = Node::start(cfg, &key(3)).await;
    node.wait_up(friend.id).await;
    node.handle.shutdown().await;
    let written = std::fs::read_to_string(&dir).unwrap();
    assert!(written.lines().all(|line| line.contains("/p2p/")) && !written.is_empty(), "{written}");
    std::fs::remove_file(&dir).unwrap();
}
