//! One session's bytes: frames over QUIC or over a stream of the control connection.
//!
//! A frame is a length (4 bytes, big-endian) and one message; a length of 0 says only that its sender lives.

use std::io;

use bytes::Bytes;
use chorus_protocol::limits::MAX_BULK_BYTES;
use chorus_protocol::rollout::Bulk;
use futures::io::{AsyncReadExt, AsyncWriteExt, BufReader, BufWriter, ReadHalf, WriteHalf};
use quinn::{Connection, ConnectionError, ReadError, RecvStream, SendStream, VarInt, WriteError};
use tokio::time::timeout;

use super::event::{CloseReason, Way};
use super::quic::{IDLE, WELCOME};

/// Codes that a QUIC connection is closed with.
const CODE_DONE: VarInt = VarInt::from_u32(0);
const CODE_PROTOCOL: VarInt = VarInt::from_u32(1);
const CODE_UNEXPECTED: VarInt = VarInt::from_u32(2);
/// What a peer says was wrong is cut to this many characters.
const MAX_ACCUSATION_CHARS: usize = 160;
/// Bytes of a frame's length.
pub(super) const PREFIX_BYTES: usize = 4;
/// A buffer grows as bytes arrive, this much at a time: a length that is only claimed costs nothing.
const GROW_BYTES: usize = 256 << 10;
/// A buffer that grew beyond this is given back after the message.
const KEEP_BYTES: usize = (1 << 20) + 4096;
/// Small messages share a packet of the stream.
const STREAM_BUFFER_BYTES: usize = 16 << 10;

/// A QUIC connection, and the one stream on it.
#[derive(Debug)]
pub(super) struct QuicWire {
    connection: Connection,
    send: SendStream,
    recv: RecvStream,
}

impl QuicWire {
    pub(super) const fn new(connection: Connection, send: SendStream, recv: RecvStream) -> Self {
        Self { connection, send, recv }
    }

    /// Tells the dialler that this connection belongs to its session.
    pub(super) async fn welcome(&mut self) -> bool {
        self.send.write_all(&[WELCOME]).await.is_ok()
    }

    /// Closes a connection that belongs to no session.
    pub(super) fn turn_away(self) {
        self.connection.close(CODE_UNEXPECTED, b"no such session");
    }
}

/// What carries a session.
#[derive(Debug)]
pub(super) enum Wire {
    Quic(QuicWire),
    Stream(libp2p::Stream),
}

impl Wire {
    pub(super) const fn way(&self) -> Way {
        match self {
            Self::Quic(_) => Way::Quic,
            Self::Stream(_) => Way::Stream,
        }
    }

    /// Parts both directions, and what ends them.
    pub(super) fn split(self) -> (Reader, Writer, End) {
        let (source, writer, end) = match self {
            Self::Quic(QuicWire { connection, send, recv }) => {
                (Source::Quic(recv), Writer::Quic(send), End(Some(connection)))
            }
            Self::Stream(stream) => {
                let (read, write) = stream.split();
                let write = BufWriter::with_capacity(STREAM_BUFFER_BYTES, write);
                (Source::Stream(Box::new(BufReader::new(read))), Writer::Stream(Box::new(write)), End(None))
            }
        };
        (Reader { source, buffer: Vec::new() }, writer, end)
    }
}

/// Ends a session's connection. (A stream ends when both of its halves are dropped.)
#[derive(Debug)]
pub(super) struct End(Option<Connection>);

impl End {
    /// Tells the peer why, as far as it concerns it.
    pub(super) fn close(self, reason: &CloseReason) {
        let Some(connection) = self.0 else { return };
        match reason {
            CloseReason::Protocol { what } => connection.close(CODE_PROTOCOL, what.as_bytes()),
            _ => connection.close(CODE_DONE, b""),
        }
    }
}

fn reason_of(error: &ConnectionError) -> CloseReason {
    match error {
        ConnectionError::TimedOut => CloseReason::Silent,
        ConnectionError::LocallyClosed => CloseReason::Asked,
        ConnectionError::ApplicationClosed(close) if close.error_code == CODE_DONE => CloseReason::Remote,
        ConnectionError::ApplicationClosed(close) if close.error_code == CODE_PROTOCOL => {
            let text = String::from_utf8_lossy(&close.reason);
            let what = text.chars().filter(|c| !c.is_control()).take(MAX_ACCUSATION_CHARS).collect();
            CloseReason::Accused { what }
        }
        other => CloseReason::Lost { what: other.to_string() },
    }
}

fn lost(what: &impl ToString) -> CloseReason {
    CloseReason::Lost { what: what.to_string() }
}

/// Where bytes come from.
#[derive(Debug)]
enum Source {
    Quic(RecvStream),
    Stream(Box<BufReader<ReadHalf<libp2p::Stream>>>),
}

impl Source {
    /// Reads some bytes; none when the peer has ended the session.
    async fn read(&mut self, into: &mut [u8]) -> Result<usize, CloseReason> {
        match self {
            // A dead peer is noticed by the connection itself.
            Self::Quic(recv) => match recv.read(into).await {
                Ok(read) => Ok(read.unwrap_or(0)),
                Err(ReadError::ConnectionLost(error)) => Err(reason_of(&error)),
                Err(error) => Err(lost(&error)),
            },
            Self::Stream(stream) => match timeout(IDLE, stream.read(into)).await {
                Ok(read) => read.map_err(|error| lost(&error)),
                Err(_) => Err(CloseReason::Silent),
            },
        }
    }
}

/// Reads messages, one after the other, through one buffer.
#[derive(Debug)]
pub(super) struct Reader {
    source: Source,
    buffer: Vec<u8>,
}

impl Reader {
    /// Reads the next message.
    ///
    /// # Errors
    /// The reason why there is none: [`CloseReason::Remote`] when the peer ended the session between two messages.
    pub(super) async fn next(&mut self) -> Result<Bulk, CloseReason> {
        let len = self.next_len().await?;
        self.fill(len).await?;
        let message =
            Bulk::from_bytes(&self.buffer[..len]).map_err(|error| CloseReason::Protocol { what: error.to_string() });
        if self.buffer.len() > KEEP_BYTES {
            self.buffer = Vec::new();
        }
        message
    }

    /// Reads the length of the next message, past all signs of life.
    async fn next_len(&mut self) -> Result<usize, CloseReason> {
        loop {
            let mut prefix = [0; PREFIX_BYTES];
            let mut filled = 0;
            while filled < PREFIX_BYTES {
                match self.source.read(&mut prefix[filled..]).await? {
                    0 if filled == 0 => return Err(CloseReason::Remote),
                    0 => return Err(lost(&"it ended inside a length")),
                    read => filled += read,
                }
            }
            let len = usize::try_from(u32::from_be_bytes(prefix)).unwrap_or(usize::MAX);
            if len > MAX_BULK_BYTES {
                let what = format!("a message of {len} bytes is over the limit of {MAX_BULK_BYTES}");
                return Err(CloseReason::Protocol { what });
            }
            if len > 0 {
                return Ok(len);
            }
        }
    }

    /// Reads `len` bytes to the buffer's beginning.
    async fn fill(&mut self, len: usize) -> Result<(), CloseReason> {
        let mut filled = 0;
        while filled < len {
            let end = len.min(filled + GROW_BYTES);
            if self.buffer.len() < end {
                self.buffer.resize(end, 0);
            }
            match self.source.read(&mut self.buffer[filled..end]).await? {
                0 => return Err(lost(&"it ended inside a message")),
                read => filled += read,
            }
        }
        Ok(())
    }
}

/// Where frames go.
#[derive(Debug)]
pub(super) enum Writer {
    Quic(SendStream),
    Stream(Box<BufWriter<WriteHalf<libp2p::Stream>>>),
}

impl Writer {
    /// Hands frames to the transport: lengths and messages, in turn.
    pub(super) async fn write(&mut self, parts: &mut [Bytes]) -> Result<(), CloseReason> {
        match self {
            Self::Quic(send) => send.write_all_chunks(parts).await.map_err(|error| match error {
                WriteError::ConnectionLost(error) => reason_of(&error),
                other => lost(&other),
            }),
            Self::Stream(stream) => {
                let written: io::Result<()> = async {
                    for part in parts {
                        stream.write_all(part).await?;
                    }
                    stream.flush().await
                }
                .await;
                written.map_err(|error| lost(&error))
            }
        }
    }

    /// Whether the peer must be told that this end lives while nothing else is said.
    pub(super) const fn needs_signs(&self) -> bool {
        matches!(self, Self::Stream(_))
    }

    /// Says that nothing more comes.
    pub(super) async fn finish(&mut self) {
        match self {
            // What is lost already needs no end.
            Self::Quic(send) => drop(send.finish()),
            Self::Stream(stream) => drop(stream.close().await),
        }
    }
}
