//! The job counter of a training run: hiring is the shipped machine, the beacon a model of what it brings.
//!
//! Beacon, bids and leases have a simulator of their own. Here a job is answered after a drawn time by the sampler that it is for, if that
//! one runs and can be reached, and lasts to just before its deadline, or until its sampler is given up as silent. What is watched is that
//! nobody is given work without a lease.

use std::collections::BTreeMap;
use std::time::Duration;

use chorus_protocol::JobId;
use chorus_protocol::capability::SamplingOffer;
use chorus_rollout::buffer::BufferInput;
use chorus_rollout::hiring::{Hiring, HiringConfig, HiringEffect, HiringInput};

use super::host::{Process, Role};
use super::invariant::Rule;
use super::session::{Place, pair};
use super::world::{Event, Mutant, World};

/// From a beacon to an accepted lease.
const ELECTION: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(200));
/// How long before its deadline a sampler ends a term and signs for it.
const EARLY: Duration = Duration::from_secs(1);
/// How long a silent executor keeps its lease.
const SILENCE: Duration = Duration::from_secs(4);
/// A term is short here, so that a minute has several.
const TERM: Duration = Duration::from_secs(15);

/// Leases of the trainer's present process.
#[derive(Debug, Default)]
pub(super) struct Leases {
    /// The place and its life, by job.
    held: BTreeMap<JobId, (Place, u32)>,
}

fn machine(process: &mut Process) -> Option<&mut Hiring> {
    match &mut process.role {
        Role::Trainer(trainer) => Some(&mut trainer.hiring),
        Role::Sampler(_) => None,
    }
}

impl World {
    pub(super) fn new_hiring(&self) -> Hiring {
        let most = self.scenario.samplers as usize;
        Hiring::new(HiringConfig { term: TERM, most, ..HiringConfig::default() }, self.policy.clone())
    }

    /// Tells a trainer that starts what its ledger holds: every sampler offers itself, for nothing.
    pub(super) fn read_offers(&mut self) {
        self.leases = Leases::default();
        for place in 1..=self.scenario.samplers {
            let node = self.hosts[place as usize].id;
            let offer = SamplingOffer { slots: self.scenario.sampling.slots, price_milli: 0, policy: None };
            self.hiring(Some(HiringInput::Offer { node, offer: Some(offer) }));
        }
    }

    /// Lets hiring take a turn, and carries out what it wants.
    pub(super) fn hiring(&mut self, input: Option<HiringInput>) {
        for effect in self.turn(0, machine, input) {
            match effect {
                HiringEffect::Submit { job, node, deadline } => {
                    let place = self.places[&node];
                    if self.mutant == Mutant::HiresEarly {
                        self.buffer(Some(BufferInput::Hired(node)));
                    }
                    let at = self.now + self.rng.between(ELECTION.0, ELECTION.1);
                    let life = self.hosts[0].life;
                    self.queue.push(at, Event::Elected { life, place, job });
                    let ends = self.now + deadline.since(self.now).saturating_sub(EARLY);
                    self.queue.push(ends, Event::TermEnds { life, job, silent: false });
                }
                HiringEffect::Withdraw(job) => {
                    self.leases.held.remove(&job);
                }
                HiringEffect::Hired(node) => self.buffer(Some(BufferInput::Hired(node))),
                HiringEffect::Dismissed(node) => self.buffer(Some(BufferInput::Dismissed(node))),
            }
        }
        self.plan_wake(0);
    }

    pub(super) fn elected(&mut self, life: u32, place: Place, job: JobId) {
        let there = self.sessions.get(&pair(0, place)).is_some_and(|session| session.up);
        if self.is_alive(0, life) && there {
            self.leases.held.insert(job, (place, self.hosts[place as usize].life));
            self.hiring(Some(HiringInput::Started(job)));
        }
    }

    /// A term is over, or its sampler has been silent for too long.
    pub(super) fn term_ends(&mut self, life: u32, job: JobId, silent: bool) {
        if !self.is_alive(0, life) {
            return;
        }
        if let Some((place, at)) = self.leases.held.remove(&job) {
            let served = !silent && self.is_alive(place, at);
            self.hiring(Some(HiringInput::Ended { job, served }));
        }
    }

    /// A sampler is gone: its lease lasts until its silence is noticed.
    pub(super) fn lease_orphaned(&mut self, place: Place) {
        let life = self.hosts[0].life;
        for (job, (holder, _)) in &self.leases.held {
            if *holder == place {
                self.queue.push(self.now + SILENCE, Event::TermEnds { life, job: *job, silent: true });
            }
        }
    }

    /// Watches that whoever is given work holds a lease.
    pub(super) fn check_lease(&mut self, to: Place) {
        if !self.leases.held.values().any(|(place, _)| *place == to) {
            self.monitor.broken(Rule::NoWorkWithoutLease, self.now, to, "it was given members".to_owned());
        }
    }
}
