//! Who is who: other networks, oneself, and others with one's own key.

use std::time::Duration;

use chorus_net::NetEvent;

use crate::harness::{Node, config, key};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_of_another_network_is_refused_and_both_know_why() {
    let mut ours = Node::join(1, &[]).await;
    let mut cfg = config();
    cfg.network = "other".parse().unwrap();
    cfg.bootstrap = ours.addrs();
    let mut theirs = Node::start(cfg, &key(2)).await;
    for (node, other, speaks) in
        [(&mut ours, theirs.id, "chorus/other/1"), (&mut theirs, key(1).node_id(), "chorus/test/1")]
    {
        let (who, what) = node
            .wait("the refusal", |event| match event {
                NetEvent::Incompatible { node, theirs } => Some((node, theirs)),
                NetEvent::PeerUp { .. } => panic!("taken for one of us"),
                _ => None,
            })
            .await;
        assert_eq!((who, what.as_str()), (other, speaks));
    }
    assert!(ours.handle.peers().await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_dials_itself_or_has_entries_twice_makes_no_fuss() {
    let hub = Node::join(1, &[]).await;
    let first = Node::join(2, &[&hub]).await;
    let own = first.addrs();
    first.handle.shutdown().await;
    let mut cfg = config();
    cfg.listen = own.iter().map(chorus_net::Addr::without_node).collect();
    cfg.bootstrap = [hub.addrs(), hub.addrs(), own.clone(), own.clone()].concat();
    let mut node = Node::start(cfg, &key(2)).await;
    node.wait_up(hub.id).await;
    for addr in own {
        node.handle.dial(addr.clone()).unwrap();
        node.handle.dial(addr.without_node()).unwrap();
    }
    let events = node.watch(Duration::from_secs(6)).await;
    let fuss = |event: &&NetEvent| matches!(event, NetEvent::DuplicateKey { .. } | NetEvent::DialFailed { .. });
    assert_eq!(events.iter().filter(fuss).count(), 0, "{events:?}");
    assert_eq!(node.handle.peers().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_meets_itself_through_an_unknown_address_makes_no_fuss() {
    let mut cfg = config();
    cfg.listen = vec!["/ip4/0.0.0.0/tcp/0".parse().unwrap()];
    let mut node = Node::start(cfg, &key(1)).await;
    let port = node.handle.listening()[0].to_string().rsplit('/').next().unwrap().to_owned();
    // All of 127.0.0.0/8 is this host, but the node only knows of 127.0.0.1.
    node.handle.dial(format!("/ip4/127.3.2.1/tcp/{port}").parse().unwrap()).unwrap();
    let events = node.watch(Duration::from_secs(4)).await;
    assert!(!events.iter().any(|event| matches!(event, NetEvent::DuplicateKey { .. })), "{events:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_with_one_key_are_found_out() {
    let mut one = Node::join(1, &[]).await;
    // The copy was started from a copied directory: it names the original in its bootstrap list.
    let mut cfg = config();
    cfg.bootstrap = one.addrs();
    let mut other = Node::start(cfg, &key(1)).await;
    for node in [&mut one, &mut other] {
        let whose = node
            .wait("the twin", |event| match event {
                NetEvent::DuplicateKey { node, .. } => Some(node),
                _ => None,
            })
            .await;
        assert_eq!(whose, key(1).node_id());
    }
}
