//! The sockets: how many there are at a time, and how long a silent or stalled one is kept.
//!
//! A connection is *busy* from the moment its request's head is read until the last byte of its response is handed over; the
//! middleware says so through [`Busy`]. One that is not busy must bring a whole request head within the idle timeout, however
//! slowly it drips; one whose peer does not read is closed after the write timeout.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::extract::connect_info::Connected;
use axum::serve::IncomingStream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Sleep, sleep};

/// A listener that takes a bounded number of connections at a time.
pub(crate) struct Listener {
    inner: TcpListener,
    slots: Arc<Semaphore>,
    idle_timeout: Duration,
    write_timeout: Duration,
}

impl Listener {
    pub(crate) fn new(inner: TcpListener, slots: usize, idle_timeout: Duration, write_timeout: Duration) -> Self {
        Self { inner, slots: Arc::new(Semaphore::new(slots)), idle_timeout, write_timeout }
    }
}

impl axum::serve::Listener for Listener {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        // The semaphore is never closed, so there is always a slot in the end.
        let slot = Arc::clone(&self.slots).acquire_owned().await.ok();
        // axum's own accept logs and waits where the system is out of descriptors.
        let (stream, peer) = axum::serve::Listener::accept(&mut self.inner).await;
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%peer, %error, "small writes to this client may be delayed");
        }
        let connection = Connection {
            stream,
            state: Arc::default(),
            idle: None,
            stall: None,
            idle_timeout: self.idle_timeout,
            write_timeout: self.write_timeout,
            _slot: slot,
        };
        (connection, peer)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }
}

/// What a connection and its requests share.
#[derive(Debug, Default)]
struct State {
    /// Requests under way.
    busy: AtomicUsize,
    /// Requests so far; a new one begins a new idle time.
    requests: AtomicU64,
}

/// The handle by which a request tells its connection that it is under way.
#[derive(Clone, Debug)]
pub(crate) struct ConnectionHandle(Arc<State>);

impl ConnectionHandle {
    /// Marks the connection busy until the guard is dropped.
    pub(crate) fn busy(&self) -> Busy {
        self.0.busy.fetch_add(1, Ordering::AcqRel);
        self.0.requests.fetch_add(1, Ordering::AcqRel);
        Busy(Arc::clone(&self.0))
    }
}

impl Connected<IncomingStream<'_, Listener>> for ConnectionHandle {
    fn connect_info(stream: IncomingStream<'_, Listener>) -> Self {
        Self(Arc::clone(&stream.io().state))
    }
}

/// A request under way.
#[derive(Debug)]
pub(crate) struct Busy(Arc<State>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A socket with two timeouts.
pub(crate) struct Connection {
    stream: TcpStream,
    state: Arc<State>,
    /// How long the peer may still be silent, and after how many requests that began.
    idle: Option<(u64, Pin<Box<Sleep>>)>,
    /// How long the peer may still not read.
    stall: Option<Pin<Box<Sleep>>>,
    idle_timeout: Duration,
    write_timeout: Duration,
    _slot: Option<OwnedSemaphorePermit>,
}

impl Connection {
    /// Waits for as long as the peer may be silent.
    fn poll_idle(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.state.busy.load(Ordering::Acquire) > 0 {
            self.idle = None;
            return Poll::Pending;
        }
        let requests = self.state.requests.load(Ordering::Acquire);
        if self.idle.as_ref().is_none_or(|(since, _)| *since != requests) {
            self.idle = Some((requests, Box::pin(sleep(self.idle_timeout))));
        }
        match &mut self.idle {
            Some((_, timer)) => timer.as_mut().poll(cx).map(|()| Err(late("no whole request came in time"))),
            None => Poll::Pending,
        }
    }

    /// Waits for as long as the peer may not read, or passes on that it does.
    fn poll_stall<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stall = None;
            return written;
        }
        let limit = self.write_timeout;
        let timer = self.stall.get_or_insert_with(|| Box::pin(sleep(limit)));
        ready!(timer.as_mut().poll(cx));
        Poll::Ready(Err(late("the client does not read")))
    }
}

fn late(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, why)
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        match Pin::new(&mut this.stream).poll_read(cx, buf) {
            Poll::Pending => this.poll_idle(cx),
            read => read,
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write(cx, bytes);
        this.poll_stall(cx, written)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write_vectored(cx, bytes);
        this.poll_stall(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
