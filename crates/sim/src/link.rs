//! Links: how long a frame takes, when it is lost, and who can reach whom.
//!
//! A direct frame travels on a reliable stream, so a lost packet costs it a retransmission and not its life. A gossiped frame that
//! is lost on one hop is lost on that hop; the mesh has others. A cut link loses what is under way.

use std::time::Duration;

use chorus_machine::Rng;
use serde::{Deserialize, Serialize};

use crate::queue::HostId;

/// Retransmissions of one frame before the model gives up counting.
const MAX_RETRANSMISSIONS: u32 = 8;

/// How links behave.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct LinkParams {
    /// One way, in the mean.
    pub latency_ms: f64,
    /// Each frame takes up to this share more or less, drawn uniformly.
    pub jitter: f64,
    /// Probability that a frame is lost on its way over one link.
    pub loss: f64,
    /// What a loss costs a direct frame.
    pub retransmit_ms: f64,
    /// Until a silent peer counts as gone: a cut link, a machine without power.
    pub detect_ms: f64,
    /// Connections that a node takes. The shipped node takes 256.
    pub connections: u32,
}

impl Default for LinkParams {
    fn default() -> Self {
        Self { latency_ms: 50.0, jitter: 0.3, loss: 0.0, retransmit_ms: 200.0, detect_ms: 3_000.0, connections: 256 }
    }
}

/// The links between all nodes.
#[derive(Debug)]
pub struct Links {
    params: LinkParams,
    /// The part of the swarm that each node is in.
    part: Vec<u8>,
}

fn millis(ms: f64) -> Duration {
    Duration::from_secs_f64((ms / 1_000.0).max(0.0))
}

impl Links {
    /// Makes links between `nodes` nodes that all reach each other.
    #[must_use]
    pub fn new(params: LinkParams, nodes: usize) -> Self {
        Self { params, part: vec![0; nodes] }
    }

    /// Returns whether two nodes are in one part of the swarm.
    #[must_use]
    pub fn reach(&self, a: HostId, b: HostId) -> bool {
        self.part.get(a as usize) == self.part.get(b as usize)
    }

    /// Moves a node to a part of the swarm.
    pub fn set_part(&mut self, host: HostId, part: u8) {
        if let Some(slot) = self.part.get_mut(host as usize) {
            *slot = part;
        }
    }

    /// Returns whether the swarm is whole.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.part.windows(2).all(|pair| pair[0] == pair[1])
    }

    /// Draws how long one frame takes over one link.
    pub fn latency(&self, rng: &mut Rng) -> Duration {
        millis(self.params.latency_ms * (1.0 + self.params.jitter * (2.0 * rng.unit() - 1.0)))
    }

    /// Draws how long a direct frame takes, retransmissions included.
    pub fn stream(&self, rng: &mut Rng) -> Duration {
        let mut delay = self.latency(rng);
        for _ in 0..MAX_RETRANSMISSIONS {
            if !self.lost(rng) {
                break;
            }
            delay += millis(self.params.retransmit_ms);
        }
        delay
    }

    /// Draws how long two strangers take to connect: a handshake of one round trip and a half.
    pub fn handshake(&self, rng: &mut Rng) -> Duration {
        self.stream(rng) + self.stream(rng) + self.stream(rng)
    }

    /// Draws whether a frame is lost on one hop.
    pub fn lost(&self, rng: &mut Rng) -> bool {
        self.params.loss > 0.0 && rng.chance(self.params.loss)
    }

    /// Returns how long a silent peer goes unnoticed.
    #[must_use]
    pub fn detect(&self) -> Duration {
        millis(self.params.detect_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latency_stays_in_its_band_and_loss_costs_retransmissions() {
        let params = LinkParams { latency_ms: 50.0, jitter: 0.2, loss: 0.5, ..LinkParams::default() };
        let links = Links::new(params, 2);
        let mut rng = Rng::from_u64(1);
        let (low, high) = (Duration::from_millis(40), Duration::from_millis(60));
        let mut slow = 0;
        for _ in 0..1_000 {
            let latency = links.latency(&mut rng);
            assert!(latency >= low && latency <= high);
            slow += u32::from(links.stream(&mut rng) > high);
        }
        assert!((400..600).contains(&slow), "{slow} of 1000 streams were slowed down at a loss of one half");
    }

    #[test]
    fn parts_do_not_reach_each_other() {
        let mut links = Links::new(LinkParams::default(), 3);
        assert!(links.is_whole());
        links.set_part(2, 1);
        assert!(links.reach(0, 1) && !links.reach(1, 2) && !links.is_whole());
    }
}
