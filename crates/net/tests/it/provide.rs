//! Who provides what: told to the DHT, found by others.

use std::collections::BTreeSet;
use std::time::Duration;

use chorus_net::NetEvent;
use chorus_protocol::{Hash, NodeId};

use crate::harness::Node;

/// Asks until the answers hold all of `expected`, or the test's patience ends.
async fn find(node: &mut Node, key: Hash, expected: &BTreeSet<NodeId>) {
    let mut found = BTreeSet::new();
    while !found.is_superset(expected) {
        tokio::time::sleep(Duration::from_millis(50)).await;
        node.handle.find_providers(key).unwrap();
        let nodes = node
            .wait("providers", |event| match event {
                NetEvent::Providers { key: of, nodes } if of == key => Some(nodes),
                _ => None,
            })
            .await;
        found.extend(nodes);
    }
    assert_eq!(&found, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn providers_are_found_by_nodes_that_never_met_them() {
    let hub = Node::join(1, &[]).await;
    let first = Node::join(2, &[&hub]).await;
    let second = Node::join(3, &[&hub]).await;
    let mut seeker = Node::join(4, &[&hub]).await;
    seeker.wait_up(hub.id).await;
    let (key, other) = (Hash::from_bytes([1; 32]), Hash::from_bytes([2; 32]));
    hub.wait_peers(3).await;
    first.handle.provide(key).unwrap();
    second.handle.provide(key).unwrap();
    find(&mut seeker, key, &BTreeSet::from([first.id, second.id])).await;
    seeker.handle.find_providers(other).unwrap();
    let nobody = seeker
        .wait("the end of a search", |event| match event {
            NetEvent::Providers { key, nodes } if key == other => Some(nodes),
            _ => None,
        })
        .await;
    assert_eq!(nobody, [], "nobody provides the other key, and that is said");
}
