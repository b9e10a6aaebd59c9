//! Peers that mean ill: floods of messages, of connections, of rubbish. Whatever they do, others are served.

use std::io;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use chorus_net::{BanReason, NetEvent, SendError, Topic};
use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, StreamExt};
use libp2p::request_response::{self, ProtocolSupport};
use libp2p::swarm::{NetworkBehaviour, SwarmEvent};
use libp2p::{StreamProtocol, Swarm, SwarmBuilder, identify, noise, ping, tcp, yamux};
use tokio::net::TcpSocket;

use crate::harness::{Node, config, key};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flooding_peer_is_banned_while_others_are_served() {
    let mut cfg = config();
    cfg.rate.direct_messages = 200;
    cfg.rate.strikes = 50;
    cfg.rate.ban_seconds = 60;
    let mut victim = Node::start(cfg, &key(1)).await;
    let mut honest = Node::join(2, &[&victim]).await;
    let mut flooder = Node::join(3, &[&victim]).await;
    honest.wait_up(victim.id).await;
    flooder.wait_up(victim.id).await;

    let (victim_id, flooder_id) = (victim.id, flooder.id);
    let flood = tokio::spawn(async move {
        let (mut limited, mut refused) = (0u32, 0u32);
        let end = Instant::now() + Duration::from_secs(5);
        let mut token = 0;
        while Instant::now() < end {
            for _ in 0..50 {
                token += 1;
                let _ = flooder.handle.send(victim_id, token, vec![0; 64]);
            }
            for event in flooder.watch(Duration::from_millis(5)).await {
                match event {
                    NetEvent::SendFailed { error: SendError::RateLimited, .. } => limited += 1,
                    NetEvent::SendFailed { .. } => refused += 1,
                    _ => {}
                }
            }
        }
        (limited, refused)
    });
    let serve = tokio::spawn(async move {
        let mut slowest = Duration::ZERO;
        for token in 0..100 {
            let sent = Instant::now();
            honest.handle.send(victim_id, token, vec![1; 64]).unwrap();
            assert_eq!(honest.wait_fate(token).await, Ok(()));
            slowest = slowest.max(sent.elapsed());
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
        (honest, slowest)
    });
    let (mut banned, mut after) = (None, 0);
    let end = Instant::now() + Duration::from_secs(6);
    while Instant::now() < end {
        for event in victim.watch(Duration::from_millis(100)).await {
            match event {
                NetEvent::Banned { node, reason, .. } => banned = Some((node, reason)),
                NetEvent::Message { from, .. } if from == flooder_id && banned.is_some() => after += 1,
                _ => {}
            }
        }
    }
    assert_eq!(banned, Some((flooder_id, BanReason::Flood)));
    assert_eq!(after, 0, "a banned peer is not heard");
    let (limited, refused) = flood.await.unwrap();
    assert!(limited > 0, "it was told first");
    assert!(refused > 0);
    let (honest, slowest) = serve.await.unwrap();
    println!("the honest peer's slowest message during the flood took {slowest:?}");
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
    let peers = victim.handle.peers().await;
    assert_eq!(peers.iter().map(|peer| peer.node).collect::<Vec<_>>(), [honest.id]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_gossip_is_neither_passed_on_nor_forgiven() {
    let mut cfg = config();
    cfg.rate.gossip_messages = 50;
    cfg.rate.strikes = 20;
    let mut victim = Node::start(cfg, &key(1)).await;
    let mut flooder = Node::join(2, &[&victim]).await;
    flooder.wait_up(victim.id).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    for number in 0..1000u32 {
        flooder.handle.publish(Topic::Beacon, number.to_le_bytes().to_vec()).unwrap();
    }
    let mut heard = 0;
    let reason = victim
        .wait("the ban", |event| match event {
            NetEvent::Gossip { .. } => {
                heard += 1;
                None
            }
            NetEvent::Banned { reason, .. } => Some(reason),
            _ => None,
        })
        .await;
    assert_eq!(reason, BanReason::Flood);
    assert!((50..=200).contains(&heard), "{heard}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_of_connections_from_one_address_leaves_the_door_open_for_others() {
    let mut victim = Node::join(1, &[]).await;
    let target = victim.tcp_addr().to_string();
    let port: u16 = target.split('/').nth(4).unwrap().parse().unwrap();
    let storm = tokio::spawn(async move {
        let mut held = Vec::new();
        for _ in 0..500 {
            let socket = TcpSocket::new_v4().unwrap();
            socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
            if let Ok(Ok(stream)) =
                tokio::time::timeout(Duration::from_millis(200), socket.connect(([127, 0, 0, 1], port).into())).await
            {
                held.push(stream);
            }
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
        held.len()
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    let knocking = Instant::now();
    let mut honest = Node::join(2, &[&victim]).await;
    honest.wait_up(victim.id).await;
    victim.wait_up(honest.id).await;
    println!("joined {:?} into the storm", knocking.elapsed());
    assert!(knocking.elapsed() < Duration::from_secs(5));
    assert!(storm.await.unwrap() > 100, "the storm was real");
}

/// Writes whatever it is given where a batch belongs.
#[derive(Clone, Default)]
struct Raw;

#[async_trait]
impl request_response::Codec for Raw {
    type Protocol = StreamProtocol;
    type Request = Vec<u8>;
    type Response = u8;

    async fn read_request<T: AsyncRead + Unpin + Send>(
        &mut self,
        _: &StreamProtocol,
        _: &mut T,
    ) -> io::Result<Vec<u8>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    async fn read_response<T: AsyncRead + Unpin + Send>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<u8> {
        let mut byte = [0];
        io.read_exact(&mut byte).await?;
        Ok(byte[0])
    }

    async fn write_request<T: AsyncWrite + Unpin + Send>(
        &mut self,
        _: &StreamProtocol,
        io: &mut T,
        bytes: Vec<u8>,
    ) -> io::Result<()> {
        io.write_all(&bytes).await
    }

    async fn write_response<T: AsyncWrite + Unpin + Send>(
        &mut self,
        _: &StreamProtocol,
        _: &mut T,
        _: u8,
    ) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[derive(NetworkBehaviour)]
struct Hostile {
    ping: ping::Behaviour,
    identify: identify::Behaviour,
    raw: request_response::Behaviour<Raw>,
}

fn hostile() -> Swarm<Hostile> {
    SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(tcp::Config::default(), noise::Config::new, yamux::Config::default)
        .unwrap()
        .with_behaviour(|keys| Hostile {
            ping: ping::Behaviour::default(),
            identify: identify::Behaviour::new(identify::Config::new("chorus/test/1".to_owned(), keys.public())),
            raw: request_response::Behaviour::new(
                [(StreamProtocol::new("/chorus/test/direct/1"), ProtocolSupport::Outbound)],
                request_response::Config::default(),
            ),
        })
        .unwrap()
        .with_swarm_config(|config| config.with_idle_connection_timeout(Duration::from_secs(60)))
        .build()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_frames_get_their_sender_banned_and_nothing_else() {
    let mut victim = Node::join(1, &[]).await;
    let mut honest = Node::join(2, &[&victim]).await;
    honest.wait_up(victim.id).await;
    let mut swarm = hostile();
    swarm.dial(victim.tcp_addr().to_string().parse::<libp2p::Multiaddr>().unwrap()).unwrap();
    let frames: [&[u8]; 5] = [
        &[0, 0],
        &[0xff; 2],
        &[0, 1, 0xff, 0xff, 0xff, 0xff],
        &[0, 1, 0, 0, 0, 0],
        &[0, 2, 0, 0, 0, 1, 9, 0, 0x10, 0, 0],
    ];
    let attack = tokio::spawn(async move {
        let mut failed = 0;
        loop {
            match swarm.select_next_some().await {
                SwarmEvent::ConnectionEstablished { peer_id, .. } => {
                    for frame in frames.iter().cycle().take(40) {
                        swarm.behaviour_mut().raw.send_request(&peer_id, frame.to_vec());
                    }
                }
                SwarmEvent::Behaviour(HostileEvent::Raw(request_response::Event::Message { .. })) => {
                    panic!("a malformed frame was acknowledged")
                }
                SwarmEvent::Behaviour(HostileEvent::Raw(request_response::Event::OutboundFailure { .. })) => {
                    failed += 1
                }
                SwarmEvent::ConnectionClosed { .. } => return failed,
                _ => {}
            }
        }
    });
    let reason = victim
        .wait("the ban", |event| match event {
            NetEvent::Banned { reason, .. } => Some(reason),
            NetEvent::Message { .. } => panic!("a malformed frame was delivered"),
            _ => None,
        })
        .await;
    assert_eq!(reason, BanReason::Malformed);
    assert!(attack.await.unwrap() <= 40);
    honest.handle.send(victim.id, 1, b"business as usual".to_vec()).unwrap();
    assert_eq!(honest.wait_fate(1).await, Ok(()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_never_says_what_it_hears_is_asked_to_connect_anew_once() {
    let victim = Node::join(1, &[]).await;
    let target: libp2p::Multiaddr = victim.tcp_addr().to_string().parse().unwrap();
    let mut swarm = hostile();
    let mut closed = 0;
    swarm.dial(target.clone()).unwrap();
    let end = tokio::time::sleep(Duration::from_secs(8));
    tokio::pin!(end);
    loop {
        tokio::select! {
            event = swarm.select_next_some() => if let SwarmEvent::ConnectionClosed { .. } = event {
                closed += 1;
                swarm.dial(target.clone()).unwrap();
            },
            () = &mut end => break,
        }
    }
    assert_eq!(closed, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rubbish_on_the_socket_harms_nobody() {
    let mut victim = Node::join(1, &[]).await;
    for addr in victim.handle.listening() {
        let parts: Vec<_> = addr.to_string().split('/').map(ToOwned::to_owned).collect();
        let socket: std::net::SocketAddr = format!("{}:{}", parts[2], parts[4]).parse().unwrap();
        for round in 0..10u8 {
            let rubbish: Vec<u8> = (0..2000u32).map(|i| (i * 31 + u32::from(round) * 7) as u8).collect();
            if parts[3] == "tcp" {
                let mut stream = tokio::net::TcpStream::connect(socket).await.unwrap();
                let _ = tokio::io::AsyncWriteExt::write_all(&mut stream, &rubbish).await;
            } else {
                let udp = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
                udp.send_to(&rubbish[..1200], socket).await.unwrap();
            }
        }
    }
    let mut honest = Node::join(2, &[&victim]).await;
    honest.wait_up(victim.id).await;
    victim.wait_up(honest.id).await;
}
