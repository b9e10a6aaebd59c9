//! What a well-behaved plane never does, done to one: strangers' keys, foreign networks, garbage.

use std::time::Duration;

use bytes::Bytes;
use chorus_protocol::limits::MAX_BULK_BYTES;
use chorus_protocol::policy::Version;
use chorus_protocol::rollout::Bulk;
use chorus_protocol::{Hash, NetworkId, SecretKey};
use tokio::time::timeout;

use super::quic::greet;
use super::wire::{Reader, Wire, Writer};
use super::*;
use crate::config::NetConfig;
use crate::event::NetEvent;
use crate::start::Net;

const PATIENCE: Duration = Duration::from_secs(20);

fn key(seed: u8) -> SecretKey {
    SecretKey::from_bytes(&[seed; 32])
}

fn quic(seed: u8, network: &str) -> Quic {
    let network: NetworkId = network.parse().unwrap();
    Quic::bind(&["127.0.0.1:0".parse().unwrap()], Identity::new(&key(seed), &network)).unwrap()
}

/// Dials `from` to `to`, expecting the node of `expected` there. Returns whether both ends then agree on the nonce.
async fn meets(from: &Quic, to: &Quic, expected: u8) -> bool {
    let door = to.doors[0].clone();
    let greeting = tokio::spawn(async move {
        let (node, nonce, mut wire) = greet(door.accept().await?).await?;
        wire.welcome().await.then_some((node, nonce, wire))
    });
    let nonce = from.nonce().unwrap();
    let dialled = from.dial(key(expected).node_id(), &to.listening(), nonce).await;
    let greeted = timeout(PATIENCE, greeting).await.unwrap().unwrap();
    let proven = greeted.as_ref().map(|(node, nonce, _)| (*node, *nonce));
    assert_eq!(dialled.is_some(), proven == Some((key(1).node_id(), nonce)));
    dialled.is_some()
}

#[tokio::test]
async fn only_the_expected_key_will_do_and_the_acceptor_learns_the_diallers() {
    let (dialler, door) = (quic(1, "test"), quic(2, "test"));
    assert!(meets(&dialler, &door, 2).await);
    assert!(!meets(&dialler, &door, 3).await, "TLS is sound, but it is another node");
}

#[tokio::test]
async fn a_key_of_another_network_opens_nothing() {
    assert!(!meets(&quic(1, "other"), &quic(2, "test"), 2).await);
}

/// A plane on loopback, alone or with a peer that it knows.
async fn plane(seed: u8, known: Option<&NetHandle>) -> (NetHandle, BulkHandle, mpsc::Receiver<BulkEvent>) {
    let cfg = NetConfig {
        listen: vec!["/ip4/127.0.0.1/tcp/0".parse().unwrap()],
        bootstrap: known.map(|net| net.ticket().bootstrap()).unwrap_or_default(),
        mdns: false,
        ..NetConfig::new("test".parse().unwrap())
    };
    let (net, mut events) = Net::start(cfg, &key(seed)).await.unwrap();
    while known.is_some() && !matches!(events.recv().await.unwrap(), NetEvent::PeerUp { .. }) {}
    tokio::spawn(async move { while events.recv().await.is_some() {} });
    let bulk = BulkConfig { listen: vec!["127.0.0.1:0".parse().unwrap()], ..BulkConfig::default() };
    let (bulk, events) = BulkPlane::start(bulk, &key(seed), &net).await.unwrap();
    (net, bulk, events)
}

/// A session whose far end is in the test's own hands.
async fn session(from: &BulkHandle, to: &NetHandle, stream: bool) -> (Reader, Writer, wire::End) {
    let protocol = Names::new(to.network()).bulk;
    let wire = meet::meet(&from.plane, to.node(), &protocol, !stream).await.unwrap();
    assert_eq!(matches!(wire, Wire::Stream(_)), stream);
    wire.split()
}

async fn next(events: &mut mpsc::Receiver<BulkEvent>) -> BulkEvent {
    timeout(PATIENCE, events.recv()).await.unwrap().unwrap()
}

fn good() -> Bulk {
    Bulk::HaveOne { version: Version::from_hash(Hash::from_bytes([1; 32])), index: 7 }
}

fn framed(len: usize, bytes: &[u8]) -> Bytes {
    [&u32::try_from(len).unwrap().to_be_bytes()[..], bytes].concat().into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_closes_its_own_session_and_no_other() {
    let (net, _bulk, mut events) = plane(1, None).await;
    let (_evil_net, evil, _evil_events) = plane(2, Some(&net)).await;
    let message = good().to_bytes().unwrap();
    let (_kept, mut spared, _end) = session(&evil, &net, false).await;
    let BulkEvent::Opened { session: spared_id, .. } = next(&mut events).await else { panic!("not open") };
    for stream in [false, true] {
        for (bytes, wrong) in [
            (framed(MAX_BULK_BYTES + 1, b""), "over the limit"),
            (framed(usize::try_from(u32::MAX).unwrap(), b"x"), "over the limit"),
            (framed(3, &[0xee; 3]), "bulk message"),
            (framed(message.len() + 1, &[&message[..], &[0]].concat()), "bulk message"),
        ] {
            let (mut back, mut writer, _end) = session(&evil, &net, stream).await;
            let BulkEvent::Opened { session, .. } = next(&mut events).await else { panic!("not open") };
            // A good message, and signs of life that say nothing, before the bad one.
            let start = [framed(message.len(), &message), framed(0, b""), framed(0, b"")];
            writer.write(&mut [&start[..], &[bytes]].concat()).await.unwrap();
            let BulkEvent::Message { message: heard, .. } = next(&mut events).await else { panic!("no message") };
            assert_eq!(heard, good());
            let BulkEvent::Closed { session: closed, reason, .. } = next(&mut events).await else { panic!("open") };
            assert_eq!(closed, session);
            assert!(reason.merits_ban() && !reason.is_retryable(), "{reason:?}");
            assert!(reason.to_string().contains(wrong), "{reason}");
            let told = back.next().await.unwrap_err();
            assert_eq!(matches!(told, CloseReason::Accused { .. }), !stream, "{told:?}");
        }
    }
    spared.write(&mut [framed(message.len(), &message)]).await.unwrap();
    let BulkEvent::Message { session, message, .. } = next(&mut events).await else { panic!("no message") };
    assert_eq!((session, message), (spared_id, good()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_opens_no_session_but_the_one_that_its_own_node_asked_for() {
    let (net, bulk, mut events) = plane(1, None).await;
    let (_net, _bulk, _events) = plane(2, Some(&net)).await;
    let expecting = bulk.plane.expect(key(2).node_id(), [9; 16]).unwrap();
    assert!(bulk.plane.expect(key(2).node_id(), [9; 16]).is_none(), "a number stands for one session");
    let thief = quic(3, "test");
    let me = key(1).node_id();
    assert!(thief.dial(me, &bulk.listening(), [9; 16]).await.is_none(), "the number is another node's");
    assert!(thief.dial(me, &bulk.listening(), [8; 16]).await.is_none(), "nobody asked for it");
    assert!(quic(2, "test").dial(me, &bulk.listening(), [9; 16]).await.is_some());
    assert!(quic(2, "test").dial(me, &bulk.listening(), [9; 16]).await.is_none(), "it is spent");
    drop(expecting);
    assert!(events.try_recv().is_err(), "no session came of all this");
}
