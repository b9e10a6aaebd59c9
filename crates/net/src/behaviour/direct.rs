//! The direct protocol: one request carries a batch of messages, one response acknowledges it whole.
//!
//! ```text
//! request:   count (2, big-endian) ‖ { length (4, big-endian) ‖ message }…      response: one byte, the Ack
//! ```
//!
//! What waits for a peer while earlier requests are under way leaves in one batch, so the cost of a stream is shared under load
//! and not paid when there is none. Sizes are checked before anything is read, and memory grows only with bytes that arrived.

use std::io;

use async_trait::async_trait;
use chorus_protocol::limits::MAX_DIRECT_BYTES;
use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use libp2p::StreamProtocol;
use libp2p::request_response;

/// Messages in one batch.
pub(crate) const MAX_BATCH_MESSAGES: usize = 128;
/// Bytes of messages in one batch: one message of the largest size fits.
pub(crate) const MAX_BATCH_BYTES: usize = MAX_DIRECT_BYTES;
/// A message's memory is reserved in steps of this many bytes, as they arrive.
const READ_STEP_BYTES: usize = 64 * 1024;

/// Messages on one stream, in order.
pub(crate) type Batch = Vec<Vec<u8>>;

/// What a request holds. A malformed one is handed up as well, because the layer between forgets failed reads, and whoever sends
/// such a thing is to be known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    /// Messages.
    Batch(Batch),
    /// Bytes that are no batch, and what is wrong with them.
    Malformed(String),
}

/// What became of a batch: all of it, or nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ack {
    /// The node has it.
    Accepted,
    /// The node is behind with its work.
    Overloaded,
    /// The sender is over its rate.
    RateLimited,
}

/// The codec.
#[derive(Clone, Debug, Default)]
pub(crate) struct Codec;

/// The behaviour that speaks it.
pub(crate) type Behaviour = request_response::Behaviour<Codec>;

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

async fn read_message<T: AsyncRead + Unpin + Send>(io: &mut T, left: &mut usize) -> io::Result<Vec<u8>> {
    let mut len = [0; 4];
    io.read_exact(&mut len).await?;
    let len = usize::try_from(u32::from_be_bytes(len)).map_err(|_| invalid("length"))?;
    if len == 0 {
        return Err(invalid("an empty message"));
    }
    *left = left.checked_sub(len).ok_or_else(|| invalid("a batch beyond the limit"))?;
    let mut bytes = Vec::new();
    while bytes.len() < len {
        let at = bytes.len();
        bytes.resize(len.min(at + READ_STEP_BYTES), 0);
        io.read_exact(&mut bytes[at..]).await?;
    }
    Ok(bytes)
}

async fn read_batch<T: AsyncRead + Unpin + Send>(io: &mut T) -> io::Result<Batch> {
    let mut count = [0; 2];
    io.read_exact(&mut count).await?;
    let count = usize::from(u16::from_be_bytes(count));
    if count == 0 || count > MAX_BATCH_MESSAGES {
        return Err(invalid("a batch of no messages, or of too many"));
    }
    let mut left = MAX_BATCH_BYTES;
    let mut batch = Vec::with_capacity(count);
    for _ in 0..count {
        batch.push(read_message(io, &mut left).await?);
    }
    Ok(batch)
}

#[async_trait]
impl request_response::Codec for Codec {
    type Protocol = StreamProtocol;
    type Request = Frame;
    type Response = Ack;

    async fn read_request<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Frame>
    where
        T: AsyncRead + Unpin + Send,
    {
        match read_batch(io).await {
            Err(error) if error.kind() == io::ErrorKind::InvalidData => Ok(Frame::Malformed(error.to_string())),
            batch => batch.map(Frame::Batch),
        }
    }

    async fn read_response<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Ack>
    where
        T: AsyncRead + Unpin + Send,
    {
        let mut ack = [0];
        io.read_exact(&mut ack).await?;
        match ack[0] {
            0 => Ok(Ack::Accepted),
            1 => Ok(Ack::Overloaded),
            2 => Ok(Ack::RateLimited),
            _ => Err(invalid("an unknown acknowledgement")),
        }
    }

    async fn write_request<T>(&mut self, _: &StreamProtocol, io: &mut T, frame: Frame) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        let Frame::Batch(batch) = frame else { return Err(invalid("only batches are sent")) };
        let size = batch.iter().map(|message| message.len() + 4).sum::<usize>();
        let mut frame = Vec::with_capacity(size + 2);
        let count = u16::try_from(batch.len()).map_err(|_| invalid("too many messages"))?;
        frame.extend_from_slice(&count.to_be_bytes());
        for message in batch {
            let len = u32::try_from(message.len()).map_err(|_| invalid("a message too long"))?;
            frame.extend_from_slice(&len.to_be_bytes());
            frame.extend_from_slice(&message);
        }
        io.write_all(&frame).await
    }

    async fn write_response<T>(&mut self, _: &StreamProtocol, io: &mut T, ack: Ack) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        let byte = match ack {
            Ack::Accepted => 0,
            Ack::Overloaded => 1,
            Ack::RateLimited => 2,
        };
        io.write_all(&[byte]).await
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use futures::executor::block_on;
    use futures::io::Cursor;
    use libp2p::request_response::Codec as _;

    use super::*;

    const PROTOCOL: StreamProtocol = StreamProtocol::new("/test");

    fn encode(batch: Batch) -> Vec<u8> {
        let mut io = Cursor::new(Vec::new());
        block_on(Codec.write_request(&PROTOCOL, &mut io, Frame::Batch(batch))).unwrap();
        io.into_inner()
    }

    fn decode(bytes: &[u8]) -> io::Result<Frame> {
        block_on(Codec.read_request(&PROTOCOL, &mut Cursor::new(bytes)))
    }

    #[test]
    fn a_batch_survives_the_wire() {
        let batch = vec![vec![1], vec![2; 70_000], vec![3, 3]];
        assert_eq!(decode(&encode(batch.clone())).unwrap(), Frame::Batch(batch));
        let largest = vec![vec![9; MAX_DIRECT_BYTES]];
        assert_eq!(decode(&encode(largest.clone())).unwrap(), Frame::Batch(largest));
    }

    #[test]
    fn malformed_frames_are_errors() {
        let whole = encode(vec![vec![1, 2, 3], vec![4]]);
        for cut in 0..whole.len() {
            assert_eq!(decode(&whole[..cut]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof, "cut at {cut}");
        }
        let bad = |bytes: &[u8]| assert!(matches!(decode(bytes).unwrap(), Frame::Malformed(_)), "{bytes:?}");
        bad(&[0, 0]);
        bad(&[0xff, 0xff]);
        bad(&[0, 1, 0, 0, 0, 0]);
        bad(&[0, 1, 0xff, 0xff, 0xff, 0xff]);
        bad(&[0, 1, 0, 0x10, 0, 1]);
        bad(&[&[0u8, 2, 0, 0, 0, 1, 7][..], &u32::try_from(MAX_BATCH_BYTES).unwrap().to_be_bytes()].concat());
        assert!(block_on(Codec.read_response(&PROTOCOL, &mut Cursor::new(&[7][..]))).is_err());
    }

    #[test]
    fn a_promise_of_bytes_reserves_no_memory() {
        struct Counting(usize);
        impl AsyncRead for Counting {
            fn poll_read(
                mut self: std::pin::Pin<&mut Self>,
                _: &mut std::task::Context<'_>,
                buf: &mut [u8],
            ) -> std::task::Poll<io::Result<usize>> {
                self.0 = self.0.max(buf.len());
                std::task::Poll::Ready(Ok(0))
            }
        }
        // The header promises a mebibyte; nothing follows. The largest buffer ever offered is one step.
        let mut io = AsyncReadExt::chain(Cursor::new([0u8, 1, 0, 0x10, 0, 0]), Counting(0));
        assert!(block_on(Codec.read_request(&PROTOCOL, &mut io)).is_err());
        let (_, counting) = io.into_inner();
        assert_eq!(counting.0, READ_STEP_BYTES);
    }
}
