//! Who is connected over the bulk plane, and whom to connect to.
//!
//! One session a node: a second one takes the first one's place, because the other side has noticed an end that this side has not.
//! Whoever has the smaller id opens it, and a sampler always opens the one to its trainer; so two nodes never open two at once.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use chorus_net::{BulkError, BulkHandle, SessionId, Way};
use chorus_protocol::NodeId;
use chorus_protocol::rollout::Bulk;

/// Neighbours that weights are exchanged with, the trainer not counted.
const MAX_NEIGHBOURS: usize = 8;
/// Back-off between two attempts to reach one node.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));

/// A node that is connected.
#[derive(Debug)]
struct Link {
    session: SessionId,
    way: Way,
    inbound: bool,
    greeted: bool,
    /// It said hello about the same policy.
    up: bool,
}

/// An attempt to connect.
#[derive(Debug)]
struct Attempt {
    opening: Option<SessionId>,
    next: Instant,
    wait: Duration,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Sessions {
    bulk: BulkHandle,
    me: NodeId,
    owner: NodeId,
    links: BTreeMap<NodeId, Link>,
    attempts: BTreeMap<NodeId, Attempt>,
}

impl Sessions {
    pub(super) fn new(bulk: BulkHandle, me: NodeId, owner: NodeId) -> Self {
        let mut sessions = Self { bulk, me, owner, links: BTreeMap::new(), attempts: BTreeMap::new() };
        if me != owner {
            sessions.seek(owner);
        }
        sessions
    }

    fn seek(&mut self, node: NodeId) {
        let fresh = || Attempt { opening: None, next: Instant::now(), wait: BACK_OFF.0 };
        self.attempts.entry(node).or_insert_with(fresh);
    }

    /// Takes in nodes that are said to hold versions of the policy.
    pub(super) fn providers(&mut self, nodes: &[NodeId]) {
        for node in nodes {
            let wanted = self.me < *node && *node != self.owner && self.me != self.owner;
            if wanted && !self.links.contains_key(node) && self.attempts.len() + self.links.len() <= MAX_NEIGHBOURS {
                self.seek(*node);
            }
        }
    }

    /// Begins to connect with a node for another reason than the policy. Returns whether nothing else has begun that already.
    pub(super) fn reach(&mut self, node: NodeId) -> bool {
        let fresh = !self.links.contains_key(&node) && !self.attempts.contains_key(&node);
        if fresh {
            self.seek(node);
        }
        fresh
    }

    /// Ends what [`Self::reach`] began.
    pub(super) fn forget(&mut self, node: NodeId) {
        self.attempts.remove(&node);
        self.close(node);
    }

    /// A node that is waited for is connected now, so the next attempt need not wait.
    pub(super) fn hurry(&mut self, node: NodeId) {
        if let Some(attempt) = self.attempts.get_mut(&node) {
            (attempt.next, attempt.wait) = (Instant::now(), BACK_OFF.0);
        }
    }

    /// Opens what is due.
    pub(super) fn pump(&mut self, now: Instant) {
        for (node, attempt) in &mut self.attempts {
            if attempt.opening.is_none() && attempt.next <= now {
                attempt.opening = self.bulk.open(*node).ok();
                attempt.next = now + attempt.wait;
                attempt.wait = (attempt.wait * 2).min(BACK_OFF.1);
            }
        }
    }

    /// Returns when something is to be opened.
    pub(super) fn wakes_at(&self) -> Option<Instant> {
        self.attempts.values().filter(|attempt| attempt.opening.is_none()).map(|attempt| attempt.next).min()
    }

    /// Notes a session that stands. Returns whether another one with the node had to go for it.
    pub(super) fn opened(&mut self, session: SessionId, node: NodeId, way: Way, inbound: bool) -> bool {
        self.attempts.remove(&node);
        let before = self.links.insert(node, Link { session, way, inbound, greeted: false, up: false });
        if let Some(before) = &before {
            self.bulk.close(before.session);
        }
        before.is_some()
    }

    /// Notes the end of a session, and returns whether its node was connected by it.
    pub(super) fn closed(&mut self, session: SessionId, node: NodeId) -> bool {
        if let Some(attempt) = self.attempts.get_mut(&node)
            && attempt.opening == Some(session)
        {
            attempt.opening = None;
        }
        if self.links.get(&node).is_none_or(|link| link.session != session) {
            return false;
        }
        let link = self.links.remove(&node);
        if node == self.owner || link.is_some_and(|link| !link.inbound && link.up) {
            self.seek(node);
        } else {
            // A neighbour that went is found again among the providers, if it is one still.
            self.attempts.remove(&node);
        }
        true
    }

    /// Returns whether a session with a node stands.
    pub(super) fn has(&self, node: NodeId) -> bool {
        self.links.contains_key(&node)
    }

    /// Returns whether a message belongs to the session that stands with its node.
    pub(super) fn is_current(&self, session: SessionId, node: NodeId) -> bool {
        self.links.get(&node).is_some_and(|link| link.session == session)
    }

    /// Notes a hello about this policy. Returns whether it is the session's first.
    pub(super) fn greeted(&mut self, node: NodeId) -> bool {
        self.links.get_mut(&node).is_some_and(|link| !std::mem::replace(&mut link.up, true))
    }

    /// Returns whether this side has still to say hello, and notes that it does.
    pub(super) fn must_greet(&mut self, node: NodeId) -> bool {
        self.links.get_mut(&node).is_some_and(|link| !std::mem::replace(&mut link.greeted, true))
    }

    /// Sends a message. A node that does not take it loses its session, and with it what was on its way: it will say where it stands
    /// when it is back.
    pub(super) fn send(&mut self, to: NodeId, message: &Bulk, token: Option<u64>) -> bool {
        let Some(link) = self.links.get_mut(&to) else { return false };
        match self.bulk.send(link.session, message, token) {
            Ok(()) => true,
            Err(BulkError::Gone) => false,
            Err(error) => {
                tracing::debug!(node = %to.fmt_short(), %error, "the session is given up");
                self.bulk.close(link.session);
                false
            }
        }
    }

    /// Ends the session with a node.
    pub(super) fn close(&mut self, node: NodeId) {
        if let Some(link) = self.links.get(&node) {
            self.bulk.close(link.session);
        }
    }

    /// Ends every session, and seeks nobody any more.
    pub(super) fn close_all(&mut self) {
        for link in std::mem::take(&mut self.links).into_values() {
            self.bulk.close(link.session);
        }
        for opening in std::mem::take(&mut self.attempts).into_values().filter_map(|attempt| attempt.opening) {
            self.bulk.close(opening);
        }
    }

    /// Returns the nodes that are connected, and how.
    pub(super) fn connected(&self) -> impl Iterator<Item = (NodeId, Way)> + '_ {
        self.links.iter().filter(|(_, link)| link.up).map(|(node, link)| (*node, link.way))
    }
}
