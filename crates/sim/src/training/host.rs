//! One simulated machine: the trainer or a sampler, and everything that is its own.

use std::collections::BTreeSet;
use std::time::Duration;

use chorus_machine::{Machine, Rng, Time, earliest};
use chorus_protocol::policy::{PolicyId, Version};
use chorus_protocol::{NetworkId, NodeId, SecretKey};
use chorus_rollout::broadcast::{Broadcast, BroadcastConfig};
use chorus_rollout::buffer::Buffer;
use chorus_rollout::hiring::Hiring;
use chorus_rollout::sampler::Sampler;

use super::disk::{Disk, draw_ms};
use super::scenario::Scenario;
use super::session::{Access, Place};

/// What a trainer's process holds.
#[derive(Debug)]
pub(super) struct Trainer {
    pub(super) buffer: Buffer,
    pub(super) hiring: Hiring,
    /// Every version whose step it knows, the oldest first.
    pub(super) versions: Vec<(Version, u64)>,
}

/// What a sampler's process holds.
#[derive(Debug)]
pub(super) struct Sampling {
    pub(super) sampler: Sampler,
    pub(super) serving: Option<(Version, u64)>,
    /// A version that is being loaded.
    pub(super) loading: Option<(Version, u64)>,
    /// Rollouts that were sampled and are in no frame yet.
    pub(super) uncut: u64,
}

/// What a process is.
#[derive(Debug)]
pub(super) enum Role {
    Trainer(Box<Trainer>),
    Sampler(Box<Sampling>),
}

/// A running process.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) broadcast: Broadcast,
    pub(super) role: Role,
    /// The earliest wake-up that is planned.
    pub(super) wake: Option<Time>,
}

impl Process {
    /// Returns when its machines want a turn.
    pub(super) fn deadline(&self) -> Option<Time> {
        let role = match &self.role {
            Role::Trainer(trainer) => earliest(trainer.buffer.deadline(), trainer.hiring.deadline()),
            Role::Sampler(sampling) => sampling.sampler.deadline(),
        };
        earliest(role, self.broadcast.deadline())
    }
}

/// One simulated machine.
#[derive(Debug)]
pub(super) struct Host {
    pub(super) id: NodeId,
    pub(super) key: SecretKey,
    /// `None` while it is down.
    pub(super) process: Option<Process>,
    /// Grows with every crash.
    pub(super) life: u32,
    pub(super) rng: Rng,
    pub(super) disk: Disk,
    pub(super) access: Access,
    /// With whom it exchanges weights.
    pub(super) neighbours: BTreeSet<Place>,
    /// How many times longer a rollout takes here.
    pub(super) slowness: f64,
    /// The step of the newest version that was ever whole here.
    pub(super) whole: Option<u64>,
    /// It comes back no more.
    pub(super) lost: bool,
}

impl Host {
    pub(super) fn trainer(&mut self) -> Option<&mut Trainer> {
        match &mut self.process.as_mut()?.role {
            Role::Trainer(trainer) => Some(trainer),
            Role::Sampler(_) => None,
        }
    }

    pub(super) fn sampling(&mut self) -> Option<&mut Sampling> {
        match &mut self.process.as_mut()?.role {
            Role::Sampler(sampling) => Some(sampling),
            Role::Trainer(_) => None,
        }
    }
}

/// Makes all machines, the trainer first, and draws who exchanges weights with whom.
pub(super) fn build(scenario: &Scenario, rng: &mut Rng) -> Vec<Host> {
    let mut hosts: Vec<Host> = (0..=scenario.samplers).map(|place| build_one(scenario, place, rng.fork())).collect();
    draw_neighbours(&mut hosts, scenario.weights.neighbours, rng);
    hosts
}

fn build_one(scenario: &Scenario, place: Place, mut rng: Rng) -> Host {
    let key = SecretKey::from_bytes(&rng.bytes());
    let link = &scenario.link;
    let ordinary = link.uplink_mbit[0] + (link.uplink_mbit[1] - link.uplink_mbit[0]) * rng.unit();
    let mbit = match place {
        0 => link.trainer_mbit,
        _ if rng.chance(link.slow_share) => link.slow_mbit,
        _ => ordinary,
    };
    let delay = draw_ms(link.access_ms, &mut rng);
    let slow = rng.chance(scenario.sampling.slow_share);
    Host {
        id: key.node_id(),
        key,
        process: None,
        life: 0,
        disk: Disk::new(scenario.disk_ms),
        access: Access { delay, uplink: mbit * 125_000.0, free: Time::ZERO, part: 0 },
        neighbours: BTreeSet::new(),
        slowness: if slow { scenario.sampling.slow_factor } else { 1.0 },
        whole: None,
        lost: false,
        rng,
    }
}

/// A ring in drawn order, so that all are connected, and drawn pairs up to the bound.
fn draw_neighbours(hosts: &mut [Host], most: usize, rng: &mut Rng) {
    let mut order: Vec<usize> = (0..hosts.len()).collect();
    rng.shuffle(&mut order);
    let mut link = |a: usize, b: usize| {
        if let (Ok(to_a), Ok(to_b)) = (Place::try_from(a), Place::try_from(b))
            && a != b
        {
            hosts[a].neighbours.insert(to_b);
            hosts[b].neighbours.insert(to_a);
        }
    };
    for at in 0..order.len() {
        link(order[at], order[(at + 1) % order.len()]);
    }
    let mut stubs: Vec<usize> =
        (0..order.len()).flat_map(|host| std::iter::repeat_n(host, most.saturating_sub(2))).collect();
    rng.shuffle(&mut stubs);
    for ends in stubs.chunks_exact(2) {
        link(ends[0], ends[1]);
    }
}

/// Makes a node's part in the broadcast.
pub(super) fn broadcast(network: &NetworkId, policy: &PolicyId, me: NodeId) -> Broadcast {
    Broadcast::new(BroadcastConfig::default(), network.clone(), policy.clone(), me)
}

/// How long a rollout takes at a machine.
pub(super) fn rollout_time(scenario: &Scenario, host: &mut Host) -> Duration {
    draw_ms(scenario.sampling.rollout_ms, &mut host.rng).mul_f64(host.slowness)
}
