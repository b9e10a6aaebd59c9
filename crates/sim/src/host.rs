//! One simulated machine: a node, and everything around it that is its own.

use std::collections::{BTreeMap, BTreeSet};

use chorus_core::Node;
use chorus_machine::{Rng, Time};
use chorus_protocol::capability::{Capability, Device, DeviceKind, ModelOffer, Rate, Skill};
use chorus_protocol::{Hash, List, NodeId, SecretKey, Text};

use crate::adversary::{Adversary, AdversaryKind};
use crate::clock::Clock;
use crate::disk::Disk;
use crate::embedder::Embedder;
use crate::engine::Engine;
use crate::queue::{HostId, Life};
use crate::scenario::Swarm;

/// Prompt tokens are read so many times faster than answer tokens are written.
const PREFILL_FACTOR: f64 = 8.0;

/// What a host has sent, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Traffic {
    /// Gossip, every copy on every hop.
    pub gossip: u64,
    /// Reconciliation.
    pub sync: u64,
    /// Bids, leases, results.
    pub jobs: u64,
}

impl Traffic {
    /// Returns all of it.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.gossip + self.sync + self.jobs
    }
}

/// One simulated machine.
#[derive(Debug)]
pub struct Host {
    /// Its place.
    pub index: HostId,
    /// Its name in the swarm.
    pub id: NodeId,
    /// Its key.
    pub key: SecretKey,
    /// The process; `None` while it is down.
    pub node: Option<Node>,
    /// Grows with every crash.
    pub life: Life,
    /// The process's randomness.
    pub rng: Rng,
    /// Its clocks.
    pub clock: Clock,
    /// Its disk.
    pub disk: Disk,
    /// Its engine.
    pub engine: Engine,
    /// What it says that it can do; `None` of a node that only asks.
    pub capability: Option<Capability>,
    /// Whom it seeks connections with, in the order in which it prefers them.
    pub neighbours: Vec<HostId>,
    /// Whom it is connected to.
    pub peers: BTreeSet<HostId>,
    /// Whom it passes gossip on to; follows from the two above.
    pub mesh: Vec<HostId>,
    /// Gossiped frames that it rejected, by who brought them.
    pub rejects: BTreeMap<HostId, u32>,
    /// Whose gossip it no longer listens to.
    pub graylist: BTreeSet<HostId>,
    /// The earliest wake-up that is planned.
    pub wake: Option<Time>,
    /// What it is, if it means harm.
    pub adversary: Option<Adversary>,
    /// What it sent.
    pub traffic: Traffic,
}

impl Host {
    /// Returns whether it means no harm.
    #[must_use]
    pub fn is_honest(&self) -> bool {
        self.adversary.is_none()
    }

    /// Returns whether its process runs.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.node.is_some()
    }

    /// Chooses anew whom it passes gossip on to: neighbours it is connected to first, then whoever else is there.
    pub fn graft(&mut self, degree: u32) {
        let chosen = self.neighbours.iter().copied().filter(|peer| self.peers.contains(peer));
        let degree = degree as usize;
        self.mesh = chosen.take(degree).collect();
        if self.mesh.len() < degree {
            let others = self.peers.iter().copied().filter(|peer| !self.neighbours.contains(peer));
            self.mesh.extend(others.take(degree - self.mesh.len()));
        }
    }
}

/// Returns the name of a model of the scenario.
#[must_use]
pub fn model_name(number: u64) -> Text<96> {
    Text::truncated(&format!("model-{number}"))
}

/// Returns the text of a skill of the scenario.
#[must_use]
pub fn skill_text(number: u64) -> String {
    const SUBJECTS: [&str; 8] = ["algebra", "history", "chemistry", "law", "poetry", "logic", "cooking", "travel"];
    let subject = SUBJECTS[usize::try_from(number).unwrap_or(0) % SUBJECTS.len()];
    format!("skill {number} {subject}")
}

/// Draws what a node can do. `rate` is its true speed in tokens a second.
pub fn draw_capability(swarm: &Swarm, index: HostId, rate: f64, rng: &mut Rng, embedder: &mut Embedder) -> Capability {
    let model = ModelOffer {
        name: model_name(u64::from(index) % u64::from(swarm.models)),
        fingerprint: Hash::derive("chorus simulated weights", &[]),
        architecture: Text::truncated("llama"),
        quantisation: Text::truncated("Q8_0"),
        context: 4_096,
        prefill: Rate::from_tokens_per_s(rate * PREFILL_FACTOR),
        decode: Rate::from_tokens_per_s(rate),
    };
    let device = Device { kind: DeviceKind::Cpu, name: Text::truncated("simulated"), memory_mib: 8_192 };
    let skills = [(); 2].map(|()| {
        let text = skill_text(rng.below(u64::from(swarm.skills)));
        let tags = text.split(' ').map(Text::truncated).collect::<Vec<_>>();
        Skill { tags: List::truncated(tags), embedding: Some(embedder.embed(&text)), text: Text::truncated(&text) }
    });
    Capability {
        name: Text::truncated(&format!("node {index}")),
        software: Text::truncated("chorus-sim"),
        models: List::truncated([model]),
        devices: List::truncated([device]),
        slots: swarm.slots,
        skills: List::truncated(skills),
        tools: List::default(),
        sampling: None,
    }
}

/// Makes a host. It is down until the world starts it.
pub fn build(
    index: HostId,
    swarm: &Swarm,
    kind: Option<AdversaryKind>,
    disk: Disk,
    mut rng: Rng,
    embedder: &mut Embedder,
) -> Host {
    let key = SecretKey::from_bytes(&rng.bytes());
    let [slowest, fastest] = swarm.tokens_per_s;
    let rate = slowest + (fastest - slowest) * rng.unit();
    let works = kind.is_some() || rng.chance(swarm.workers);
    let truth = draw_capability(swarm, index, rate, &mut rng, embedder);
    let claims = kind.map_or_else(|| truth.clone(), |kind| Adversary::claims(kind, truth.clone()));
    let skew = i64::try_from(swarm.skew_ms).unwrap_or(0);
    let drift = i64::from(swarm.drift_ppm);
    let clock = Clock {
        epoch: 0,
        drift_ppm: i32::try_from(between(&mut rng, -drift, drift)).unwrap_or(0),
        skew_ms: between(&mut rng, -skew, skew),
    };
    Host {
        index,
        id: key.node_id(),
        key,
        node: None,
        life: 0,
        clock,
        disk,
        engine: Engine::new(rate, kind.map(Adversary::manner).unwrap_or_default()),
        capability: works.then_some(claims),
        neighbours: Vec::new(),
        peers: BTreeSet::new(),
        mesh: Vec::new(),
        rejects: BTreeMap::new(),
        graylist: BTreeSet::new(),
        wake: None,
        adversary: kind.map(Adversary::new),
        traffic: Traffic::default(),
        rng,
    }
}

fn between(rng: &mut Rng, low: i64, high: i64) -> i64 {
    let span = u64::try_from(high - low).unwrap_or(0);
    low.saturating_add_unsigned(rng.below(span + 1))
}

/// Draws who seeks connections with whom: on average `peers` neighbours each, everybody in a swarm that small.
pub fn draw_neighbours(hosts: &mut [Host], peers: u32, rng: &mut Rng) {
    let count = hosts.len();
    let (wanted, others) = (peers as usize, count.saturating_sub(1));
    let mut sets = vec![BTreeSet::new(); count];
    for host in 0..count {
        if others <= wanted {
            sets[host].extend((0..count).filter(|other| *other != host));
            continue;
        }
        let mut drawn = 0;
        while drawn < wanted.div_ceil(2) {
            let other = usize::try_from(rng.below(count as u64)).unwrap_or(0);
            if other != host && sets[host].insert(other) {
                sets[other].insert(host);
                drawn += 1;
            }
            if sets[host].len() >= others {
                break;
            }
        }
    }
    for (host, set) in hosts.iter_mut().zip(sets) {
        let mut neighbours: Vec<HostId> = set.into_iter().filter_map(|other| HostId::try_from(other).ok()).collect();
        rng.shuffle(&mut neighbours);
        host.neighbours = neighbours;
    }
}
