//! The handle: what a node asks of its network. Everything but [`NetHandle::peers`], [`NetHandle::listen`] and
//! [`NetHandle::shutdown`] returns at once; what cannot be queued comes back as [`NetError::Overloaded`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use chorus_protocol::limits::{MAX_DIRECT_BYTES, MAX_GOSSIP_BYTES};
use chorus_protocol::{Hash, NetworkId, NodeId};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

use crate::addr::Addr;
use crate::error::NetError;
use crate::event::{GossipToken, PeerInfo, Topic, Verdict};
use crate::ticket::Ticket;

/// What waits for the actor.
#[derive(Debug)]
pub(crate) enum Command {
    Publish { topic: Topic, bytes: Vec<u8> },
    Validated { token: GossipToken, verdict: Verdict },
    Send { to: NodeId, outgoing: Outgoing },
    Reach { node: NodeId, reply: oneshot::Sender<Vec<Addr>> },
    Provide(Hash),
    Unprovide(Hash),
    FindProviders(Hash),
    Dial(Addr),
    Disconnect { node: NodeId, reason: &'static str },
    Ban { node: NodeId, ban: Duration },
    Unban(NodeId),
    Listen { addr: Addr, reply: oneshot::Sender<Result<(), NetError>> },
    Unlisten(Addr),
    Peers(oneshot::Sender<Vec<PeerInfo>>),
    Shutdown(oneshot::Sender<()>),
}

/// A direct message on its way out. It holds its share of the bytes that may be on their way, until it is settled.
#[derive(Debug)]
pub(crate) struct Outgoing {
    pub(crate) token: u64,
    pub(crate) bytes: Vec<u8>,
    pub(crate) permit: OwnedSemaphorePermit,
}

/// Where the node can be reached, as of now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Doors {
    pub(crate) external: Vec<Addr>,
    pub(crate) listening: Vec<Addr>,
}

/// The handle of libp2p's streams, which does not describe itself.
#[derive(Clone)]
struct Streams(libp2p_stream::Control);

impl std::fmt::Debug for Streams {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Streams")
    }
}

/// A running network. Clones share it; when the last one is dropped, it stops.
#[derive(Clone, Debug)]
pub struct NetHandle {
    commands: mpsc::Sender<Command>,
    bytes: Arc<Semaphore>,
    doors: watch::Receiver<Doors>,
    network: NetworkId,
    node: NodeId,
    arrived: Arc<AtomicU64>,
    streams: Streams,
}

impl NetHandle {
    pub(crate) fn new(
        commands: mpsc::Sender<Command>,
        send_bytes: u32,
        doors: watch::Receiver<Doors>,
        (network, node): (NetworkId, NodeId),
        arrived: Arc<AtomicU64>,
        streams: libp2p_stream::Control,
    ) -> Self {
        let bytes = Arc::new(Semaphore::new(send_bytes as usize));
        Self { commands, bytes, doors, network, node, arrived, streams: Streams(streams) }
    }

    fn push(&self, command: Command) -> Result<(), NetError> {
        self.commands.try_send(command).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => NetError::Overloaded,
            mpsc::error::TrySendError::Closed(_) => NetError::Stopped,
        })
    }

    /// Returns this node's id.
    #[must_use]
    pub const fn node(&self) -> NodeId {
        self.node
    }

    /// Gossips a message to every node of the network. When nobody listens, [`NetEvent::PublishFailed`](crate::NetEvent) says so
    /// later; publishing the same bytes again within two minutes does nothing.
    ///
    /// # Errors
    /// [`NetError::GossipTooLarge`], [`NetError::Empty`], [`NetError::Overloaded`], [`NetError::Stopped`].
    pub fn publish(&self, topic: Topic, bytes: Vec<u8>) -> Result<(), NetError> {
        match bytes.len() {
            0 => Err(NetError::Empty),
            len if len > MAX_GOSSIP_BYTES => Err(NetError::GossipTooLarge { topic, len }),
            _ => self.push(Command::Publish { topic, bytes }),
        }
    }

    /// Gives the verdict on a gossiped message. Only an accepted one is passed on.
    ///
    /// # Errors
    /// [`NetError::Overloaded`], [`NetError::Stopped`]; the message is then not passed on.
    pub fn validated(&self, token: GossipToken, verdict: Verdict) -> Result<(), NetError> {
        self.push(Command::Validated { token, verdict })
    }

    /// Sends a message to one node, connecting to it first if need be. [`NetEvent::Delivered`](crate::NetEvent) or
    /// [`NetEvent::SendFailed`](crate::NetEvent) with the same token follows.
    ///
    /// Messages to one peer leave in the order of the calls and arrive in it while at most one batch is under way; under load,
    /// batches can overtake each other, so a stream's messages need numbers.
    ///
    /// # Errors
    /// [`NetError::DirectTooLarge`], [`NetError::Empty`], [`NetError::Overloaded`], [`NetError::Stopped`].
    pub fn send(&self, to: NodeId, token: u64, bytes: Vec<u8>) -> Result<(), NetError> {
        let len = bytes.len();
        if len == 0 {
            return Err(NetError::Empty);
        }
        let size =
            u32::try_from(len).ok().filter(|_| len <= MAX_DIRECT_BYTES).ok_or(NetError::DirectTooLarge { len })?;
        let permit = Arc::clone(&self.bytes).try_acquire_many_owned(size).map_err(|_| NetError::Overloaded)?;
        self.push(Command::Send { to, outgoing: Outgoing { token, bytes, permit } })
    }

    /// Tells the DHT that this node provides what the key names, now and every ten minutes, until [`unprovide`](Self::unprovide).
    ///
    /// # Errors
    /// [`NetError::Overloaded`], [`NetError::Stopped`].
    pub fn provide(&self, key: Hash) -> Result<(), NetError> {
        self.push(Command::Provide(key))
    }

    /// Tells the DHT no more that this node provides what the key names. Others forget it within half an hour.
    ///
    /// # Errors
    /// [`NetError::Overloaded`], [`NetError::Stopped`].
    pub fn unprovide(&self, key: Hash) -> Result<(), NetError> {
        self.push(Command::Unprovide(key))
    }

    /// Asks the DHT who provides what the key names. One or more [`NetEvent::Providers`](crate::NetEvent) follow.
    ///
    /// # Errors
    /// [`NetError::Overloaded`], [`NetError::Stopped`].
    pub fn find_providers(&self, key: Hash) -> Result<(), NetError> {
        self.push(Command::FindProviders(key))
    }

    /// Sees to a connection to a node, and returns where its direct connections end; `None` when there is no way to it.
    pub(crate) async fn reach(&self, node: NodeId) -> Option<Vec<Addr>> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Reach { node, reply }).await.ok()?;
        answer.await.ok()
    }

    /// Returns the network's name.
    pub(crate) const fn network(&self) -> &NetworkId {
        &self.network
    }

    /// Returns what opens and accepts streams on the node's connections.
    pub(crate) fn streams(&self) -> libp2p_stream::Control {
        self.streams.0.clone()
    }

    /// Connects to an address, with or without a node's id in it.
    ///
    /// # Errors
    /// [`NetError::Overloaded`], [`NetError::Stopped`]; a dial that fails is a [`NetEvent::DialFailed`](crate::NetEvent).
    pub fn dial(&self, addr: Addr) -> Result<(), NetError> {
        self.push(Command::Dial(addr))
    }

    /// Closes all connections to a peer, and leaves it alone for a minute. The reason is for the log.
    ///
    /// # Errors
    /// [`NetError::Overloaded`], [`NetError::Stopped`].
    pub fn disconnect(&self, node: NodeId, reason: &'static str) -> Result<(), NetError> {
        self.push(Command::Disconnect { node, reason })
    }

    /// Closes all connections to a peer, and refuses it for a while.
    ///
    /// # Errors
    /// [`NetError::Overloaded`], [`NetError::Stopped`].
    pub fn ban(&self, node: NodeId, ban: Duration) -> Result<(), NetError> {
        self.push(Command::Ban { node, ban })
    }

    /// Lets a banned peer in again, and dials it if an address of it is known.
    ///
    /// # Errors
    /// [`NetError::Overloaded`], [`NetError::Stopped`].
    pub fn unban(&self, node: NodeId) -> Result<(), NetError> {
        self.push(Command::Unban(node))
    }

    /// Begins to listen at one more address; peers are told.
    ///
    /// # Errors
    /// [`NetError::PortInUse`], [`NetError::Listen`], [`NetError::Stopped`].
    pub async fn listen(&self, addr: Addr) -> Result<(), NetError> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Listen { addr, reply }).await.map_err(|_| NetError::Stopped)?;
        answer.await.map_err(|_| NetError::Stopped)?
    }

    /// Stops to listen at an address that was given to [`NetConfig`](crate::NetConfig) or [`listen`](Self::listen); peers are told.
    /// Connections that exist stay.
    ///
    /// # Errors
    /// [`NetError::Overloaded`], [`NetError::Stopped`].
    pub fn unlisten(&self, addr: Addr) -> Result<(), NetError> {
        self.push(Command::Unlisten(addr))
    }

    /// Lists the connected peers.
    pub async fn peers(&self) -> Vec<PeerInfo> {
        let (reply, answer) = oneshot::channel();
        if self.commands.send(Command::Peers(reply)).await.is_err() {
            return Vec::new();
        }
        answer.await.unwrap_or_default()
    }

    /// Returns how many gossiped messages arrived so far, every copy counted: what exceeds the messages is what redundancy costs.
    #[must_use]
    pub fn gossip_copies(&self) -> u64 {
        self.arrived.load(Ordering::Relaxed)
    }

    /// Returns where this node listens now, each address without its id.
    #[must_use]
    pub fn listening(&self) -> Vec<Addr> {
        self.doors.borrow().listening.clone()
    }

    /// Makes a ticket with which others can join through this node: its doors at relays first, since it has them only when its own
    /// lead nowhere; then what it knows to be reachable, then where it listens; loopback addresses only when there is nothing else.
    #[must_use]
    pub fn ticket(&self) -> Ticket {
        let doors = self.doors.borrow();
        let far = |addr: &&Addr| !addr.is_loopback();
        let mut addrs: Vec<Addr> = Vec::new();
        for addr in doors.external.iter().chain(doors.listening.iter().filter(far)) {
            if !addrs.contains(addr) {
                addrs.push(addr.clone());
            }
        }
        if addrs.is_empty() {
            addrs.clone_from(&doors.listening);
        }
        addrs.sort_by_key(|addr| !addr.is_relayed());
        Ticket::new(self.network.clone(), self.node, addrs)
    }

    /// Says good-bye to all peers and stops.
    pub async fn shutdown(self) {
        let (done, stopped) = oneshot::channel();
        if self.commands.send(Command::Shutdown(done)).await.is_ok() {
            // An actor that is gone already has stopped as well.
            let _ = stopped.await;
        }
    }
}
