//! What will happen, in order: a heap of (virtual time, sequence number).
//!
//! The sequence number breaks ties, so that events of one moment happen in the order in which they were planned, on every run.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use chorus_core::{Effect, RunId};
use chorus_machine::Time;
use chorus_protocol::Embedding;
use chorus_protocol::job::Failure;

/// A node, by its place in the world.
pub type HostId = u32;
/// A life of a node: grows with every crash, so that what was planned for a dead process does not reach the next one.
pub type Life = u32;

/// Something that will happen.
#[derive(Debug)]
pub enum Event {
    /// A process starts.
    Start {
        /// Which.
        host: HostId,
    },
    /// A process has measured its model, and offers it.
    Offer {
        /// Which.
        host: HostId,
        /// In which life.
        life: Life,
    },
    /// A process dies.
    Crash {
        /// Which.
        host: HostId,
        /// How long it stays away, in nanoseconds; for ever when absent.
        down: Option<u64>,
        /// Whether the machine loses power.
        power: bool,
    },
    /// A node's own deadline.
    Wake {
        /// Which.
        host: HostId,
        /// In which life.
        life: Life,
    },
    /// A gossiped frame arrives.
    Gossip {
        /// Where.
        host: HostId,
        /// From whom.
        from: HostId,
        /// Which frame.
        frame: u32,
    },
    /// A direct frame arrives.
    Direct {
        /// Where.
        host: HostId,
        /// From whom.
        from: HostId,
        /// The life of the sender when it sent it.
        life: Life,
        /// The frame.
        bytes: Vec<u8>,
    },
    /// A direct frame could not be delivered.
    SendFailed {
        /// Who learns of it.
        host: HostId,
        /// In which life.
        life: Life,
        /// Whom it was meant for.
        to: HostId,
    },
    /// Two nodes are connected.
    PeerUp {
        /// The one.
        a: HostId,
        /// The other.
        b: HostId,
    },
    /// A node notices that a connection is gone.
    PeerDown {
        /// Who notices.
        host: HostId,
        /// In which life.
        life: Life,
        /// Who is gone.
        peer: HostId,
    },
    /// The disk is done with a batch.
    Disk {
        /// Whose.
        host: HostId,
        /// In which life.
        life: Life,
    },
    /// A run of an engine goes on.
    Engine {
        /// Whose.
        host: HostId,
        /// In which life.
        life: Life,
        /// The engine's number for the run.
        run: u64,
    },
    /// A run of an engine ended at once: it was stopped, or its engine broke down.
    RunEnded {
        /// Whose.
        host: HostId,
        /// In which life.
        life: Life,
        /// The run, and why.
        ended: Box<(RunId, Failure)>,
    },
    /// A text is embedded.
    Embedded {
        /// For whom.
        host: HostId,
        /// In which life.
        life: Life,
        /// The node's number for the request.
        request: u64,
        /// What it means.
        embedding: Box<Embedding>,
    },
    /// A user asks.
    Ask {
        /// Which task of the workload.
        task: u32,
    },
    /// A fault of the scenario sets in.
    Fault {
        /// Which.
        index: u32,
    },
    /// A fault of the scenario is over.
    FaultOver {
        /// Which.
        index: u32,
    },
    /// An effect that an adversary held back.
    HeldBack {
        /// Whose.
        host: HostId,
        /// In which life.
        life: Life,
        /// What.
        effect: Box<Effect>,
    },
    /// An adversary does its work.
    Attack {
        /// Which node.
        host: HostId,
    },
    /// The world looks at itself: bounds of queues, and whether ledgers are equal.
    Look,
}

#[derive(Debug)]
struct Planned<E> {
    at: Time,
    seq: u64,
    event: E,
}

impl<E> PartialEq for Planned<E> {
    fn eq(&self, other: &Self) -> bool {
        self.seq == other.seq
    }
}

impl<E> Eq for Planned<E> {}

impl<E> PartialOrd for Planned<E> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<E> Ord for Planned<E> {
    /// The heap gives the greatest first, and the soonest is to come first.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.seq).cmp(&(self.at, self.seq))
    }
}

/// The queue of a world.
#[derive(Debug)]
pub struct Queue<E = Event> {
    heap: BinaryHeap<Planned<E>>,
    planned: u64,
}

impl<E> Default for Queue<E> {
    fn default() -> Self {
        Self { heap: BinaryHeap::new(), planned: 0 }
    }
}

impl<E> Queue<E> {
    /// Plans an event.
    pub fn push(&mut self, at: Time, event: E) {
        self.planned += 1;
        self.heap.push(Planned { at, seq: self.planned, event });
    }

    /// Takes the next event.
    pub fn pop(&mut self) -> Option<(Time, E)> {
        self.heap.pop().map(|planned| (planned.at, planned.event))
    }

    /// Returns when the next event is due.
    #[must_use]
    pub fn next_at(&self) -> Option<Time> {
        self.heap.peek().map(|planned| planned.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sooner_comes_first_and_ties_keep_their_order() {
        let mut queue = Queue::default();
        for (at, host) in [(5, 0), (3, 1), (5, 2), (3, 3)] {
            queue.push(Time::from_millis(at), Event::Start { host });
        }
        let mut order = Vec::new();
        while let Some((_, event)) = queue.pop() {
            if let Event::Start { host } = event {
                order.push(host);
            }
        }
        assert_eq!(order, [1, 3, 0, 2]);
    }
}
