//! How gossip spreads: a model of gossipsub's mesh, hop by hop.
//!
//! libp2p's gossipsub runs on the wall clock, so it cannot run here. The model keeps what matters to the protocols above it:
//!
//! 1. Every node is connected to about `peers` others and passes a new frame on to `degree` of them. An author sends to all its
//!    peers at once (flood publishing).
//! 2. A frame is passed on only after the node's verdict: a rejected or ignored frame stops there.
//! 3. Each hop takes a drawn latency, and loses the frame with the link's probability. The first copy counts, the others are
//!    recognised by the hash of topic and bytes for `remember_ms`.
//! 4. A peer whose frames are rejected too often is heard no longer, for the rest of the run (gossipsub's graylist).
//! 5. What it leaves out: the lazy repair by `IHAVE` and `IWANT`, so that a frame which every mesh neighbour lost is lost here and
//!    not there; grafting and pruning by finer scores; queues of slow peers. The first makes the model's losses pessimistic.
//!
//! Against real swarms: `scripts/bench net` gossips in swarms of 20 and 50 libp2p nodes on one machine's loopback. Over six runs on two
//! cores their meshes had 6.2 to 7.2 links a node, a delivery cost 5.9 to 7.1 copies, and nothing was lost; each of 50 nodes, which seek
//! 24 connections, had 43 to 49, since it is sought as often as it seeks. From that come `degree` and `peers`; this model then costs
//! 6.7 copies a delivery. A swarm of 20 took 2 to 7 ms at the median for all hops, so what a hop costs beside its link is far below the
//! links of the scenarios, and the model counts it as nothing. `tolerated_rejects` is the shipped node's setting. How losses and long
//! links act together is not measured on real swarms.
//!
//! Copies that would come later than one already under way are not simulated: only their bytes are counted. If the first copy then
//! dies on a link that is cut in that very moment, the later ones are missing too; the ledger's reconciliation makes up for it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use chorus_core::Topic;
use chorus_machine::{Rng, Time};
use serde::{Deserialize, Serialize};

use crate::link::Links;
use crate::queue::{Event, HostId, Queue};

/// Hashes of frames kept for recognition before old ones are looked for and dropped.
const SWEEP_AT: usize = 65_536;

/// How gossip spreads.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct GossipParams {
    /// Connections that a node has, in the mean: the shipped node seeks 24, and is sought by as many.
    pub peers: u32,
    /// Peers to which a node passes a frame on, in the mean. The shipped node aims at 8 (gossipsub's D) and has 7.
    pub degree: u32,
    /// How long a frame is recognised when it comes again.
    pub remember_ms: u64,
    /// Rejected frames after which a peer's gossip is heard no longer. In the shipped node nine within a few seconds.
    pub tolerated_rejects: u32,
}

impl Default for GossipParams {
    fn default() -> Self {
        Self { peers: 48, degree: 7, remember_ms: 120_000, tolerated_rejects: 9 }
    }
}

/// A frame on its way through the swarm.
#[derive(Debug)]
pub struct Frame {
    /// The topic.
    pub topic: Topic,
    /// The frame itself.
    pub bytes: Arc<[u8]>,
    /// First eight bytes of its hash, for the trace.
    pub tag: u64,
    /// When it was published.
    pub published: Time,
    /// When its first copy reaches each node: planned, or already there. Dropped when nothing is under way any more.
    arrival: Vec<Time>,
    /// Copies under way.
    under_way: u32,
}

/// No copy is on its way to a node.
const NEVER: Time = Time::from_nanos(u64::MAX);
/// A node has had the frame.
const HAD: Time = Time::ZERO;

/// Everything that is being gossiped.
#[derive(Debug)]
pub struct Gossip {
    params: GossipParams,
    nodes: usize,
    frames: Vec<Frame>,
    known: BTreeMap<[u8; 32], u32>,
}

/// What a hop cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Copies sent, duplicates included.
    pub copies: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Gossip {
    /// Makes an empty gossip among `nodes` nodes.
    #[must_use]
    pub fn new(params: GossipParams, nodes: usize) -> Self {
        Self { params, nodes, frames: Vec::new(), known: BTreeMap::new() }
    }

    /// Returns a frame.
    #[must_use]
    pub fn frame(&self, frame: u32) -> Option<&Frame> {
        self.frames.get(frame as usize)
    }

    /// Takes a frame from its publisher. Returns `None` when the publisher has had these bytes already.
    pub fn publish(&mut self, host: HostId, topic: Topic, bytes: Vec<u8>, now: Time) -> Option<u32> {
        let hash = *blake3::Hasher::new().update(&[topic as u8]).update(&bytes).finalize().as_bytes();
        let remember = Duration::from_millis(self.params.remember_ms);
        if let Some(&known) = self.known.get(&hash)
            && let Some(frame) = self.frames.get_mut(known as usize)
            && now - frame.published < remember
        {
            // Peers recognise the bytes; only who has not had them can be new to it.
            let slot = frame.arrival.get_mut(host as usize)?;
            return (std::mem::replace(slot, HAD) != HAD).then_some(known);
        }
        if self.known.len() >= SWEEP_AT {
            let frames = &self.frames;
            self.known.retain(|_, index| now - frames[*index as usize].published < remember);
        }
        let index = u32::try_from(self.frames.len()).ok()?;
        let mut arrival = vec![NEVER; self.nodes];
        *arrival.get_mut(host as usize)? = HAD;
        let mut tag = [0; 8];
        tag.copy_from_slice(&hash[..8]);
        let tag = u64::from_le_bytes(tag);
        self.frames.push(Frame { topic, bytes: bytes.into(), tag, published: now, arrival, under_way: 0 });
        self.known.insert(hash, index);
        Some(index)
    }

    /// Sends a frame from one node to some of its peers.
    #[allow(clippy::too_many_arguments, reason = "a hop is made of exactly these")]
    pub fn hop(
        &mut self,
        frame: u32,
        host: HostId,
        to: impl Iterator<Item = HostId>,
        now: Time,
        links: &Links,
        rng: &mut Rng,
        queue: &mut Queue,
    ) -> Sent {
        let mut sent = Sent::default();
        let Some(state) = self.frames.get_mut(frame as usize) else { return sent };
        for peer in to {
            sent.copies += 1;
            sent.bytes += state.bytes.len() as u64;
            if links.lost(rng) {
                continue;
            }
            let at = now + links.latency(rng);
            let Some(slot) = state.arrival.get_mut(peer as usize).filter(|slot| at < **slot) else { continue };
            *slot = at;
            state.under_way += 1;
            queue.push(at, Event::Gossip { host: peer, from: host, frame });
        }
        sent
    }

    /// Takes a copy that arrives. Returns its topic and bytes if it is the first one.
    pub fn arrive(&mut self, frame: u32, host: HostId, now: Time, alive: bool) -> Option<(Topic, Arc<[u8]>)> {
        let state = self.frames.get_mut(frame as usize)?;
        state.under_way -= 1;
        let slot = state.arrival.get_mut(host as usize)?;
        if *slot != now {
            return None;
        }
        *slot = if alive { HAD } else { NEVER };
        alive.then(|| (state.topic, Arc::clone(&state.bytes)))
    }

    /// Lets go of what a frame needed while copies of it were under way, once none is.
    pub fn settle(&mut self, frame: u32) {
        if let Some(state) = self.frames.get_mut(frame as usize).filter(|state| state.under_way == 0) {
            state.arrival = Vec::new();
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::link::LinkParams;

    fn flood(loss: f64, stops_at: Option<HostId>) -> (usize, Sent) {
        let nodes: HostId = 200;
        let links = Links::new(LinkParams { loss, ..LinkParams::default() }, nodes as usize);
        let mut gossip = Gossip::new(GossipParams::default(), nodes as usize);
        let (mut queue, mut rng) = (Queue::default(), Rng::from_u64(3));
        let ring = |host: HostId| (1..=4).map(move |step| (host + step * step) % nodes);
        let frame = gossip.publish(0, Topic::Beacon, vec![1, 2, 3], Time::ZERO).unwrap();
        let mut all = gossip.hop(frame, 0, ring(0), Time::ZERO, &links, &mut rng, &mut queue);
        let mut had = 1;
        while let Some((now, event)) = queue.pop() {
            let Event::Gossip { host, frame, .. } = event else { continue };
            let Some((_, bytes)) = gossip.arrive(frame, host, now, true) else { continue };
            assert_eq!(&*bytes, [1, 2, 3]);
            had += 1;
            if stops_at.is_none() {
                let sent = gossip.hop(frame, host, ring(host), now, &links, &mut rng, &mut queue);
                all = Sent { copies: all.copies + sent.copies, bytes: all.bytes + sent.bytes };
            }
        }
        (had, all)
    }

    #[test]
    fn a_flood_reaches_everybody_once_and_counts_every_copy() {
        let (had, sent) = flood(0.0, None);
        assert_eq!((had, sent.copies, sent.bytes), (200, 800, 2_400));
    }

    #[test]
    fn a_verdict_against_a_frame_stops_it_after_one_hop() {
        assert_eq!(flood(0.0, Some(0)).0, 5);
    }

    #[test]
    fn loss_on_hops_is_made_up_for_by_other_paths() {
        assert!(flood(0.1, None).0 >= 195);
    }

    #[test]
    fn the_same_bytes_travel_once_while_they_are_remembered() {
        let mut gossip = Gossip::new(GossipParams { remember_ms: 1_000, ..GossipParams::default() }, 2);
        let at = Time::from_millis;
        let first = gossip.publish(0, Topic::Ledger, vec![7], at(0));
        assert!(first.is_some());
        assert_eq!(gossip.publish(0, Topic::Ledger, vec![7], at(500)), None);
        assert_eq!(
            gossip.publish(1, Topic::Ledger, vec![7], at(500)),
            first,
            "a peer that has not had them may be first"
        );
        assert_ne!(gossip.publish(0, Topic::Ledger, vec![7], at(2_000)), None);
    }
}
