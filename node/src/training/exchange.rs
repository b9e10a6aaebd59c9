//! Evidence between nodes: what this one holds is served, and what its user asks for is fetched.
//!
//! ```text
//!  API ──Ask──▶ disk ──here──▶ answer
//!                 └──not here──▶ Fetch ◀─holders─ DHT, neighbours
//!                                  └─WantEvidence─▶ holder ─Evidence─▶ Fetch ─whole─▶ answer, disk, DHT
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use chorus_net::NetHandle;
use chorus_protocol::limits::MAX_EVIDENCE_PIECE_BYTES;
use chorus_protocol::rollout::Bulk;
use chorus_protocol::{Hash, List, NodeId};
use chorus_rollout::evidence::{Fetch, FetchStep};
use tokio::sync::oneshot;

use super::commons::Commons;
use super::disk::Job;

/// Pieces of evidence that are fetched at a time.
const MAX_FETCHES: usize = 4;
/// Requests of the API for one piece of evidence that wait together.
const MAX_REPLIES: usize = 16;
/// Evidence that is said to be here in the DHT, which keeps only so much for one node.
const MAX_PROVIDED: usize = 32;
/// How often holders are looked for while nobody is left to ask.
const SEEK: Duration = Duration::from_secs(2);

/// What the API is answered: the evidence, or why there is none.
pub(super) type Reply = oneshot::Sender<Result<Vec<u8>, String>>;

/// A piece of a piece of evidence, as the disk read it.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) to: NodeId,
    pub(super) evidence: Hash,
    pub(super) from: u64,
    /// Bytes of all of it, and those from there on; `None` where there is no such evidence.
    pub(super) found: Option<(u64, List<u8, MAX_EVIDENCE_PIECE_BYTES>)>,
}

/// What is asked for.
struct Wanted {
    replies: Vec<Reply>,
    /// Absent while the disk looks whether it is here.
    fetch: Option<Fetch>,
    seek_at: Instant,
}

/// See the module.
#[derive(Default)]
pub(super) struct Exchange {
    /// Nodes whose question the disk is busy with.
    serving: BTreeSet<NodeId>,
    wanted: BTreeMap<Hash, Wanted>,
    /// Nodes with which a session was opened for evidence alone: nothing is said of any policy there.
    guests: BTreeSet<NodeId>,
    provided: usize,
}

impl Exchange {
    /// Tells the DHT what is here.
    pub(super) fn provide(&mut self, net: &NetHandle, evidence: Hash) {
        if self.provided < MAX_PROVIDED && net.provide(evidence).is_ok() {
            self.provided += 1;
        }
    }

    /// The API asks for evidence.
    pub(super) fn ask(&mut self, room: &Commons, evidence: Hash, reply: Reply) {
        let known = self.wanted.get_mut(&evidence);
        // Whoever asked may have gone meanwhile; then nobody minds what becomes of the answer.
        if let Some(wanted) = known {
            if wanted.replies.len() < MAX_REPLIES {
                wanted.replies.push(reply);
            } else {
                let _ = reply.send(Err("too many wait for it already; ask again".to_owned()));
            }
        } else if self.wanted.len() >= MAX_FETCHES || room.disk.submit(Job::LoadEvidence(evidence)).is_err() {
            let _ = reply.send(Err("this node has enough to do; ask again".to_owned()));
        } else {
            self.wanted.insert(evidence, Wanted { replies: vec![reply], fetch: None, seek_at: Instant::now() });
        }
    }

    /// The disk looked for what the API asked for. What is not here is fetched, from neighbours first.
    pub(super) fn loaded(&mut self, room: &mut Commons, net: &NetHandle, evidence: Hash, bytes: Option<Vec<u8>>) {
        let now = room.now();
        let Some(wanted) = self.wanted.get_mut(&evidence) else { return };
        if let Some(bytes) = bytes {
            return self.end(room, evidence, Ok(bytes));
        }
        let mut fetch = Fetch::new(evidence, now);
        let step = fetch.found(room.sessions.connected().map(|(node, _)| node).collect::<Vec<_>>(), now);
        wanted.fetch = Some(fetch);
        let _ = net.find_providers(evidence);
        wanted.seek_at = Instant::now() + SEEK;
        self.carry_out(room, net, evidence, step);
    }

    /// The DHT names nodes that hold something.
    pub(super) fn holders(&mut self, room: &mut Commons, net: &NetHandle, evidence: Hash, nodes: &[NodeId]) {
        let me = room.me;
        self.step(room, net, evidence, |fetch, now| {
            fetch.found(nodes.iter().copied().filter(|node| *node != me).collect::<Vec<_>>(), now)
        });
    }

    /// A session stands. Returns whether it is for evidence alone.
    pub(super) fn opened(&mut self, room: &mut Commons, node: NodeId) -> bool {
        let waiting = self.waiting_for(node);
        for evidence in &waiting {
            room.sessions.send(node, &Bulk::WantEvidence { evidence: *evidence, from: 0 }, None);
        }
        self.guests.contains(&node)
    }

    /// A session ended, or came never about.
    pub(super) fn gone(&mut self, room: &mut Commons, net: &NetHandle, node: NodeId) {
        self.serving.remove(&node);
        for evidence in self.waiting_for(node) {
            self.step(room, net, evidence, |fetch, now| fetch.lost(node, now));
        }
    }

    fn waiting_for(&self, node: NodeId) -> Vec<Hash> {
        let waits = |wanted: &Wanted| wanted.fetch.as_ref().and_then(Fetch::holder) == Some(node);
        self.wanted.iter().filter(|(_, wanted)| waits(wanted)).map(|(evidence, _)| *evidence).collect()
    }

    /// Takes a message about evidence. Returns any other.
    pub(super) fn message(&mut self, room: &mut Commons, net: &NetHandle, node: NodeId, message: Bulk) -> Option<Bulk> {
        match message {
            Bulk::WantEvidence { evidence, from } => {
                let job = Job::ReadEvidence { to: node, evidence, from };
                // One question of a node at a time, so that nobody fills the disk's queue.
                if self.serving.insert(node) && room.disk.submit(job).is_err() {
                    self.serving.remove(&node);
                }
            }
            Bulk::Evidence { evidence, from, total, bytes } => {
                self.step(room, net, evidence, |fetch, now| fetch.piece(node, from, total, &bytes, now));
            }
            other => return Some(other),
        }
        None
    }

    /// The disk read what a node asked for.
    pub(super) fn read(&mut self, room: &mut Commons, piece: Piece) {
        let Piece { to, evidence, from, found } = piece;
        let (total, bytes) = found.unwrap_or_default();
        self.serving.remove(&to);
        room.sessions.send(to, &Bulk::Evidence { evidence, from, total, bytes }, None);
    }

    /// Does what is due.
    pub(super) fn tick(&mut self, room: &mut Commons, net: &NetHandle) {
        let now = Instant::now();
        for evidence in self.wanted.keys().copied().collect::<Vec<_>>() {
            self.step(room, net, evidence, Fetch::expire);
            if let Some(wanted) = self.wanted.get_mut(&evidence)
                && wanted.fetch.as_ref().is_some_and(|fetch| fetch.holder().is_none())
                && wanted.seek_at <= now
            {
                let _ = net.find_providers(evidence);
                wanted.seek_at = now + SEEK;
            }
        }
    }

    fn step(
        &mut self,
        room: &mut Commons,
        net: &NetHandle,
        evidence: Hash,
        with: impl FnOnce(&mut Fetch, chorus_machine::Time) -> FetchStep,
    ) {
        let now = room.now();
        let Some(fetch) = self.wanted.get_mut(&evidence).and_then(|wanted| wanted.fetch.as_mut()) else { return };
        let step = with(fetch, now);
        self.carry_out(room, net, evidence, step);
    }

    fn carry_out(&mut self, room: &mut Commons, net: &NetHandle, evidence: Hash, step: FetchStep) {
        match step {
            FetchStep::Wait => {}
            FetchStep::Ask { holder, from } => {
                let wanted = Bulk::WantEvidence { evidence, from };
                if !room.sessions.send(holder, &wanted, None) && room.sessions.reach(holder) {
                    self.guests.insert(holder);
                }
            }
            FetchStep::Done(bytes) => {
                let kept = room.disk.submit(Job::KeepEvidence { evidence, bytes: bytes.clone() });
                if kept.is_ok() {
                    self.provide(net, evidence);
                }
                self.end(room, evidence, Ok(bytes));
            }
            FetchStep::Failed { asked } => {
                let why = format!(
                    "{asked} nodes were asked, and nobody has it who can be reached; ask again when its accuser is there"
                );
                self.end(room, evidence, Err(why));
            }
        }
    }

    /// Answers whoever waits. Sessions that were for evidence alone are closed with the last fetch.
    fn end(&mut self, room: &mut Commons, evidence: Hash, result: Result<Vec<u8>, String>) {
        for reply in self.wanted.remove(&evidence).map(|wanted| wanted.replies).unwrap_or_default() {
            let _ = reply.send(result.clone());
        }
        if self.wanted.is_empty() {
            for guest in std::mem::take(&mut self.guests) {
                room.sessions.forget(guest);
            }
        }
    }
}
