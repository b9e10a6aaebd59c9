//! A node that nobody can dial is reached through a relay.

use chorus_net::NetEvent;

use crate::harness::{Node, config, key};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_without_a_door_of_its_own_is_reached_through_a_relay() {
    let mut cfg = config();
    cfg.relay_server = true;
    let mut relay = Node::start(cfg, &key(1)).await;
    relay.wait("the relay's address", |event| matches!(event, NetEvent::ExternalAddr(_)).then_some(())).await;

    let mut cfg = config();
    cfg.listen = vec![relay.tcp_addr().circuit()];
    let mut hidden = Node::start(cfg, &key(2)).await;
    let door = hidden
        .wait("the door at the relay", |event| match event {
            NetEvent::Listening(addr) => Some(addr),
            _ => None,
        })
        .await;
    assert!(door.is_relayed());
    let ticket = hidden.handle.ticket().bootstrap();
    assert!(
        !ticket.is_empty() && ticket.iter().all(|addr| addr.is_relayed() && addr.node() == Some(hidden.id)),
        "{ticket:?}"
    );

    let mut cfg = config();
    cfg.bootstrap = hidden.addrs();
    let mut visitor = Node::start(cfg, &key(3)).await;
    visitor.wait_up(hidden.id).await;
    let info = visitor.handle.peers().await.into_iter().find(|peer| peer.node == hidden.id).unwrap();
    assert!(info.relayed, "{info:?}");

    visitor.handle.send(hidden.id, 1, vec![4; 100_000]).unwrap();
    assert_eq!(hidden.wait_message().await, (visitor.id, vec![4; 100_000]));
    assert_eq!(visitor.wait_fate(1).await, Ok(()));
    hidden.handle.send(visitor.id, 2, b"and back".to_vec()).unwrap();
    assert_eq!(visitor.wait_message().await, (hidden.id, b"and back".to_vec()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_door_at_a_relay_is_opened_again_when_the_relay_is_back() {
    let mut cfg = config();
    cfg.relay_server = true;
    let relay = Node::start(cfg.clone(), &key(1)).await;
    cfg.listen = relay.handle.listening();
    let mut hidden_cfg = config();
    hidden_cfg.listen = vec![relay.tcp_addr().circuit()];
    let mut hidden = Node::start(hidden_cfg, &key(2)).await;
    hidden.wait("the door", |event| matches!(event, NetEvent::Listening(_)).then_some(())).await;
    relay.handle.shutdown().await;
    hidden.wait("the door to close", |event| matches!(event, NetEvent::ListenLost { .. }).then_some(())).await;
    let _relay = Node::start(cfg, &key(1)).await;
    hidden.wait("the door again", |event| matches!(event, NetEvent::Listening(_)).then_some(())).await;
}
