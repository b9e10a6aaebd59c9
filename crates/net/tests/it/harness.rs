//! Nodes to test with, and patience.

use std::time::Duration;

use chorus_net::{Addr, Net, NetConfig, NetEvent, NetHandle, Verdict};
use chorus_protocol::{NodeId, SecretKey};
use tokio::sync::mpsc;
use tokio::time::timeout;

/// How long a test waits for anything. The machine may be busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn key(seed: u8) -> SecretKey {
    SecretKey::from_bytes(&[seed; 32])
}

/// A configuration for loopback: free ports, no multicast.
pub(crate) fn config() -> NetConfig {
    NetConfig {
        listen: vec![addr("/ip4/127.0.0.1/tcp/0"), addr("/ip4/127.0.0.1/udp/0/quic-v1")],
        mdns: false,
        ..NetConfig::new("test".parse().unwrap())
    }
}

pub(crate) fn addr(text: &str) -> Addr {
    text.parse().unwrap()
}

pub(crate) struct Node {
    pub(crate) handle: NetHandle,
    pub(crate) events: mpsc::Receiver<NetEvent>,
    pub(crate) id: NodeId,
}

impl Node {
    pub(crate) async fn start(cfg: NetConfig, key: &SecretKey) -> Self {
        // The first test of the process wins.
        let _ = tracing_subscriber::fmt().with_env_filter(tracing_subscriber::EnvFilter::from_default_env()).try_init();
        let (handle, events) = Net::start(cfg, key).await.unwrap();
        Self { handle, events, id: key.node_id() }
    }

    /// Starts a node that knows the given ones.
    pub(crate) async fn join(seed: u8, known: &[&Node]) -> Self {
        let mut cfg = config();
        cfg.bootstrap = known.iter().flat_map(|node| node.addrs()).collect();
        Self::start(cfg, &key(seed)).await
    }

    /// Where the node listens, ending in its id.
    pub(crate) fn addrs(&self) -> Vec<Addr> {
        self.handle.ticket().bootstrap()
    }

    pub(crate) fn tcp_addr(&self) -> Addr {
        self.addrs().into_iter().find(|addr| addr.to_string().contains("/tcp/")).unwrap()
    }

    /// Waits for an event; gossip that comes meanwhile is accepted.
    pub(crate) async fn wait<T>(&mut self, what: &str, mut want: impl FnMut(NetEvent) -> Option<T>) -> T {
        let waiting = async {
            loop {
                let event =
                    self.events.recv().await.unwrap_or_else(|| panic!("the network stopped while waiting for {what}"));
                if let NetEvent::Gossip { token, .. } = &event {
                    self.handle.validated(*token, Verdict::Accept).unwrap();
                }
                if let Some(found) = want(event) {
                    return found;
                }
            }
        };
        timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("waited too long for {what}"))
    }

    pub(crate) async fn wait_up(&mut self, node: NodeId) {
        self.wait("a peer", |event| matches!(event, NetEvent::PeerUp { node: up, .. } if up == node).then_some(()))
            .await;
    }

    pub(crate) async fn wait_down(&mut self, node: NodeId) {
        self.wait("a peer to leave", |event| {
            matches!(event, NetEvent::PeerDown { node: down } if down == node).then_some(())
        })
        .await;
    }

    pub(crate) async fn wait_message(&mut self) -> (NodeId, Vec<u8>) {
        self.wait("a message", |event| match event {
            NetEvent::Message { from, bytes } => Some((from, bytes)),
            _ => None,
        })
        .await
    }

    pub(crate) async fn wait_fate(&mut self, token: u64) -> Result<(), chorus_net::SendError> {
        self.wait("a message's fate", |event| match event {
            NetEvent::Delivered { token: t } if t == token => Some(Ok(())),
            NetEvent::SendFailed { token: t, error, .. } if t == token => Some(Err(error)),
            _ => None,
        })
        .await
    }

    /// Takes all events of a while, accepting gossip.
    pub(crate) async fn watch(&mut self, time: Duration) -> Vec<NetEvent> {
        let mut seen = Vec::new();
        let end = tokio::time::Instant::now() + time;
        while let Ok(Some(event)) = tokio::time::timeout_at(end, self.events.recv()).await {
            if let NetEvent::Gossip { token, .. } = &event {
                self.handle.validated(*token, Verdict::Accept).unwrap();
            }
            seen.push(event);
        }
        seen
    }

    /// Waits until the node has at least `count` peers.
    pub(crate) async fn wait_peers(&self, count: usize) {
        let enough = async {
            while self.handle.peers().await.len() < count {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(PATIENCE, enough).await.unwrap_or_else(|_| panic!("waited too long for {count} peers"));
    }
}
