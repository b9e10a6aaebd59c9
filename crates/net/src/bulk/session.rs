//! One open session: messages in, messages out, until either end has had enough.

use bytes::Bytes;
use chorus_protocol::NodeId;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::event::{BulkEvent, CloseReason, SessionId};
use super::plane::{FAREWELL, Outgoing, Plane, Session};
use super::quic::KEEP_ALIVE;
use super::wire::{PREFIX_BYTES, Reader, Wire, Writer};

/// What leaves together at most: so many messages, and so many bytes with the message that goes over them.
const BATCH_MESSAGES: usize = 64;
const BATCH_BYTES: usize = 1 << 20;

/// Runs a session from here to its end, and returns why it ended.
pub(super) async fn run(plane: &Plane, session: &mut Session, wire: Wire) -> CloseReason {
    let way = wire.way();
    let (mut reader, writer, end) = wire.split();
    let Session { id, node, inbound, queue, closing } = session;
    let (session, node, inbound) = (*id, *node, *inbound);
    tracing::debug!(%session, peer = %node.fmt_short(), ?way, inbound, "a bulk session is open");
    plane.emit(BulkEvent::Opened { session, node, way, inbound }).await;
    let hearing = hear(plane, session, node, &mut reader);
    let speaking = Speaker { plane, session, queue, closing, writer }.run();
    tokio::pin!(hearing, speaking);
    let reason = tokio::select! {
        reason = &mut hearing => reason,
        reason = &mut speaking => reason,
    };
    // Before either stream is dropped: else the peer may learn of their end first, and not why.
    end.close(&reason);
    reason
}

/// Passes messages on to the node until there are no more. While the node does not take them, nothing is read, and so the peer's
/// window closes.
async fn hear(plane: &Plane, session: SessionId, node: NodeId, reader: &mut Reader) -> CloseReason {
    loop {
        match reader.next().await {
            Ok(message) => plane.emit(BulkEvent::Message { session, node, message }).await,
            Err(reason) => return reason,
        }
    }
}

/// What sends one session's messages.
struct Speaker<'a> {
    plane: &'a Plane,
    session: SessionId,
    queue: &'a mut mpsc::Receiver<Outgoing>,
    closing: &'a CancellationToken,
    writer: Writer,
}

impl Speaker<'_> {
    /// Sends what is queued, until the session is closed or breaks. Whatever it was, the peer's last words may still have to be
    /// read, so this end hangs up only if the peer does not.
    async fn run(mut self) -> CloseReason {
        let reason = match self.speak().await {
            Ok(()) => {
                self.writer.finish().await;
                CloseReason::Asked
            }
            Err(reason) => reason,
        };
        tokio::time::sleep(FAREWELL).await;
        reason
    }

    async fn speak(&mut self) -> Result<(), CloseReason> {
        let mut batch = Vec::with_capacity(BATCH_MESSAGES);
        let mut parts = Vec::with_capacity(3 * BATCH_MESSAGES);
        while let Some(first) = self.next().await {
            gather(first, self.queue, &mut batch);
            for message in &batch {
                parts.push(prefix_of(message.len()));
                parts.extend(message.parts.iter().cloned());
            }
            self.writer.write(&mut parts).await?;
            parts.clear();
            for Outgoing { token, .. } in batch.drain(..) {
                if let Some(token) = token {
                    self.plane.emit(BulkEvent::Sent { session: self.session, token }).await;
                }
            }
        }
        Ok(())
    }

    /// Waits for a message; `None` when the session is closed and the last one has left. An empty one is a sign of life.
    async fn next(&mut self) -> Option<Outgoing> {
        tokio::select! {
            biased;
            first = self.queue.recv() => return first,
            () = self.closing.cancelled() => {}
            () = tokio::time::sleep(KEEP_ALIVE), if self.writer.needs_signs() => return Some(Outgoing::sign()),
        }
        self.queue.close();
        self.queue.recv().await
    }
}

/// Takes what waits already, up to what may leave together.
fn gather(first: Outgoing, queue: &mut mpsc::Receiver<Outgoing>, batch: &mut Vec<Outgoing>) {
    let mut size = first.len();
    batch.push(first);
    while batch.len() < BATCH_MESSAGES && size < BATCH_BYTES {
        let Ok(next) = queue.try_recv() else { break };
        size += next.len();
        batch.push(next);
    }
}

fn prefix_of(len: usize) -> Bytes {
    let len = u32::try_from(len).expect("no message is over its limit");
    let prefix: [u8; PREFIX_BYTES] = len.to_be_bytes();
    Bytes::copy_from_slice(&prefix)
}
