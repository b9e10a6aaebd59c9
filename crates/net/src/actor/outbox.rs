//! The queues of direct messages, one line per peer. Pure: it decides what leaves next, and knows nothing of sockets.
//!
//! At most [`WINDOW`] batches to one peer are under way; what comes meanwhile waits and then leaves together. So a single message
//! leaves at once, a stream shares its cost under load, and a peer that does not answer holds up nobody but itself.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use libp2p::PeerId;
use libp2p::request_response::OutboundRequestId;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use crate::addr::Addr;
use crate::behaviour::direct::{Batch, MAX_BATCH_BYTES, MAX_BATCH_MESSAGES};
use crate::handle::Outgoing;

/// Batches under way to one peer.
pub(crate) const WINDOW: usize = 8;
/// Messages that wait for one peer.
pub(crate) const MAX_LINE: usize = 8192;
/// Callers that wait for a connection to one peer.
const MAX_CALLERS: usize = 64;
/// A message or a caller waits so long for a connection to its peer.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// What is done about a missing connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Nothing needs to be done, or nothing has been yet.
    Idle,
    /// The known addresses are being dialled.
    Dialling,
    /// The DHT is being asked for better ones.
    Asking,
    /// What the DHT said is being dialled; there is nothing after that.
    LastTry,
}

/// Who waits for a connection, and is told the addresses at its other end.
pub(crate) type Caller = oneshot::Sender<Vec<Addr>>;

#[derive(Debug)]
struct Line {
    queue: VecDeque<Outgoing>,
    callers: Vec<Caller>,
    under_way: usize,
    way: Way,
    waiting_since: Instant,
}

impl Line {
    const fn new(now: Instant) -> Self {
        Self { queue: VecDeque::new(), callers: Vec::new(), under_way: 0, way: Way::Idle, waiting_since: now }
    }

    /// Whether anything waits for a connection.
    fn waits(&self) -> bool {
        !self.queue.is_empty() || !self.callers.is_empty()
    }
}

/// A message under way, and its share of the bytes that may be.
pub(crate) type Sent = (u64, OwnedSemaphorePermit);

/// All lines.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    lines: BTreeMap<PeerId, Line>,
    under_way: BTreeMap<OutboundRequestId, (PeerId, Vec<Sent>)>,
}

impl Outbox {
    /// Adds a message; it comes back when the peer's line is full.
    pub(crate) fn push(&mut self, peer: PeerId, outgoing: Outgoing, now: Instant) -> Result<(), Outgoing> {
        let line = self.lines.entry(peer).or_insert_with(|| Line::new(now));
        if line.queue.len() >= MAX_LINE {
            return Err(outgoing);
        }
        if !line.waits() {
            line.waiting_since = now;
        }
        line.queue.push_back(outgoing);
        Ok(())
    }

    /// Lets a caller wait for a connection; one that is too many is dropped, which tells it that there is none.
    pub(crate) fn call(&mut self, peer: PeerId, caller: Caller, now: Instant) {
        let line = self.lines.entry(peer).or_insert_with(|| Line::new(now));
        if !line.waits() {
            line.waiting_since = now;
        }
        if line.callers.len() < MAX_CALLERS {
            line.callers.push(caller);
        }
    }

    /// Returns the callers of a peer that is connected now.
    pub(crate) fn take_callers(&mut self, peer: &PeerId) -> Vec<Caller> {
        let Some(line) = self.lines.get_mut(peer) else { return Vec::new() };
        let callers = std::mem::take(&mut line.callers);
        if line.under_way == 0 && line.queue.is_empty() {
            self.lines.remove(peer);
        }
        callers
    }

    /// Takes the next batch for a connected peer, if one may leave now.
    pub(crate) fn next_batch(&mut self, peer: &PeerId) -> Option<(Batch, Vec<Sent>)> {
        let line = self.lines.get_mut(peer)?;
        line.way = Way::Idle;
        if line.under_way >= WINDOW || line.queue.is_empty() {
            return None;
        }
        let (mut batch, mut sent, mut size) = (Batch::new(), Vec::new(), 0);
        while let Some(next) = line.queue.front() {
            size += next.bytes.len();
            if batch.len() >= MAX_BATCH_MESSAGES || (size > MAX_BATCH_BYTES && !batch.is_empty()) {
                break;
            }
            let Some(next) = line.queue.pop_front() else { break };
            batch.push(next.bytes);
            sent.push((next.token, next.permit));
        }
        line.under_way += 1;
        Some((batch, sent))
    }

    /// Notes that a batch left.
    pub(crate) fn on_sent(&mut self, id: OutboundRequestId, peer: PeerId, sent: Vec<Sent>) {
        self.under_way.insert(id, (peer, sent));
    }

    /// Notes that a batch is settled, either way, and returns its messages.
    pub(crate) fn settle(&mut self, id: OutboundRequestId) -> Option<(PeerId, Vec<Sent>)> {
        let (peer, sent) = self.under_way.remove(&id)?;
        if let Some(line) = self.lines.get_mut(&peer) {
            line.under_way = line.under_way.saturating_sub(1);
            if line.under_way == 0 && !line.waits() {
                self.lines.remove(&peer);
            }
        }
        Some((peer, sent))
    }

    /// Returns what is being done to connect to a peer for which messages or callers wait.
    pub(crate) fn way(&self, peer: &PeerId) -> Option<Way> {
        self.lines.get(peer).filter(|line| line.waits()).map(|line| line.way)
    }

    pub(crate) fn set_way(&mut self, peer: &PeerId, way: Way) {
        if let Some(line) = self.lines.get_mut(peer) {
            line.way = way;
        }
    }

    /// Gives up on all messages that wait for a peer, and drops its callers.
    pub(crate) fn give_up(&mut self, peer: &PeerId) -> Vec<Outgoing> {
        let Some(line) = self.lines.get_mut(peer) else { return Vec::new() };
        let queue = std::mem::take(&mut line.queue);
        line.callers.clear();
        line.way = Way::Idle;
        if line.under_way == 0 {
            self.lines.remove(peer);
        }
        queue.into()
    }

    /// Returns the unconnected peers whose messages or callers have waited too long.
    pub(crate) fn overdue(&self, now: Instant, connected: impl Fn(&PeerId) -> bool) -> Vec<PeerId> {
        let late = |line: &Line| line.waits() && now.saturating_duration_since(line.waiting_since) >= CONNECT_DEADLINE;
        self.lines.iter().filter(|(peer, line)| late(line) && !connected(peer)).map(|(peer, _)| *peer).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::Arc;

    use tokio::sync::Semaphore;

    use super::*;

    fn message(token: u64, len: usize) -> Outgoing {
        let permit = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        Outgoing { token, bytes: vec![0; len], permit }
    }

    fn tokens(sent: &[Sent]) -> Vec<u64> {
        sent.iter().map(|(token, _)| *token).collect()
    }

    #[test]
    fn order_holds_and_the_window_bounds_what_is_under_way() {
        let (peer, now) = (PeerId::random(), Instant::now());
        let mut outbox = Outbox::default();
        for token in 0..WINDOW as u64 {
            outbox.push(peer, message(token, 10), now).unwrap();
            let (_, sent) = outbox.next_batch(&peer).unwrap();
            assert_eq!(tokens(&sent), [token], "a single message leaves at once");
        }
        for token in 100..103 {
            outbox.push(peer, message(token, 10), now).unwrap();
        }
        assert!(outbox.next_batch(&peer).is_none(), "the window is full");
        outbox.lines.get_mut(&peer).unwrap().under_way -= 1;
        let (batch, sent) = outbox.next_batch(&peer).unwrap();
        assert_eq!((batch.len(), tokens(&sent)), (3, vec![100, 101, 102]));
    }

    #[test]
    fn a_batch_respects_both_limits() {
        let (peer, now) = (PeerId::random(), Instant::now());
        let mut outbox = Outbox::default();
        for token in 0..3 {
            outbox.push(peer, message(token, MAX_BATCH_BYTES / 2), now).unwrap();
        }
        outbox.push(peer, message(3, MAX_BATCH_BYTES), now).unwrap();
        let sizes: Vec<usize> = std::iter::from_fn(|| outbox.next_batch(&peer)).map(|(batch, _)| batch.len()).collect();
        assert_eq!(sizes, [2, 1, 1]);
        for token in 0..MAX_BATCH_MESSAGES as u64 + 1 {
            outbox.push(peer, message(token, 1), now).unwrap();
        }
        assert_eq!(outbox.next_batch(&peer).unwrap().0.len(), MAX_BATCH_MESSAGES);
    }

    #[test]
    fn a_line_is_bounded_and_given_up_whole() {
        let (peer, now) = (PeerId::random(), Instant::now());
        let mut outbox = Outbox::default();
        for token in 0..MAX_LINE as u64 {
            outbox.push(peer, message(token, 1), now).unwrap();
        }
        assert_eq!(outbox.push(peer, message(9999, 1), now).unwrap_err().token, 9999);
        assert!(outbox.overdue(now + Duration::from_secs(9), |_| false).is_empty());
        let late = now + CONNECT_DEADLINE;
        assert!(outbox.overdue(late, |_| true).is_empty());
        assert_eq!(outbox.overdue(late, |_| false), [peer]);
        assert_eq!(outbox.give_up(&peer).len(), MAX_LINE);
        assert!(outbox.lines.is_empty());
    }

    #[test]
    fn callers_wait_like_messages_and_are_bounded() {
        let (peer, now) = (PeerId::random(), Instant::now());
        let mut outbox = Outbox::default();
        let mut replies = Vec::new();
        for _ in 0..=MAX_CALLERS {
            let (caller, reply) = oneshot::channel();
            outbox.call(peer, caller, now);
            replies.push(reply);
        }
        assert!(replies[MAX_CALLERS].try_recv().is_err(), "one too many is told at once");
        assert_eq!(outbox.way(&peer), Some(Way::Idle));
        assert_eq!(outbox.overdue(now + CONNECT_DEADLINE, |_| false), [peer]);
        assert_eq!(outbox.take_callers(&peer).len(), MAX_CALLERS);
        assert!(outbox.lines.is_empty());
    }
}
