//! Who samples for a trainer, and for how long: the trainer's side of the job counter.
//!
//! ```text
//!  ledger ──Offer──▶ ┌────────┐ ──Submit (a job of kind `Sample`)──▶ beacon ──▶ bid, lease
//!  buffer ─Measured▶ │ Hiring │ ◀──Started, Ended──────────────────────┘
//!                    └────────┘ ──Hired, Dismissed──▶ buffer: who is given members
//! ```
//!
//! 1. Samplers say in the ledger that they sample, and for what price an hour. Nobody is taken at his word about his speed: what a sampler
//!    delivers is measured, and one that is not measured yet is taken for as fast as the others, slot by slot.
//! 2. Whoever asks for nothing is always wanted: idle hands cost nothing, and the pacing shares out what there is to do. Of those that have
//!    a price the cheapest set is wanted that keeps the learner busy ([`Activation`]); all of them until the need is measured.
//! 3. For each sampler that is wanted and has no lease, a job is handed in that only it can get: the choice is made here, by price and by
//!    what was measured, and the beacon asks whether the sampler is there and free, and reserves it. One that does not take the lease
//!    within a moment counts as absent for a while, and the next best is wanted in its place.
//! 4. A lease lasts a term. At its end the sampler signs what it did, which becomes a receipt, and whoever is still wanted gets the next
//!    one. So somebody who is not needed any more is let go by not being asked again, and is owed nothing.
//!
//! A sampler without a lease is given no members; what it was given before counts all the same.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use chorus_machine::{Ctx, Machine, Outbox, Time, earliest};
use chorus_protocol::capability::SamplingOffer;
use chorus_protocol::policy::PolicyId;
use chorus_protocol::{JobId, NodeId};

use crate::capacity::{Activation, Offer};

/// Samplers of which an offer is kept.
const MAX_OFFERS: usize = 4_096;
/// How long after its deadline a job whose end was not told counts as ended.
const OVERDUE: Duration = Duration::from_secs(5);

/// The numbers of hiring that an operator may turn.
#[derive(Clone, Debug, PartialEq)]
pub struct HiringConfig {
    /// How long a lease lasts. Default 60 s.
    pub term: Duration,
    /// How long a sampler has to take a lease. Default 4 s, in which a beacon is repeated.
    pub answer: Duration,
    /// How long a sampler that did not take one, or lost it, is left alone at first; doubles each time in a row. Default 500 ms.
    pub back_off: Duration,
    /// And at most. Default 60 s.
    pub back_off_max: Duration,
    /// Leases at a time. Default 64.
    pub most: usize,
    /// How those that have a price are chosen.
    pub activation: Activation,
}

impl Default for HiringConfig {
    fn default() -> Self {
        Self {
            term: Duration::from_secs(60),
            answer: Duration::from_secs(4),
            back_off: Duration::from_millis(500),
            back_off_max: Duration::from_secs(60),
            most: 64,
            activation: Activation::default(),
        }
    }
}

/// What was measured of one sampler.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Track {
    /// Who.
    pub node: NodeId,
    /// Rollouts a second that it delivers; none until something came.
    pub rate: Option<f64>,
    /// The share of what it was given that came and counted, 0 to 1.
    pub reliability: f64,
}

/// What hiring is told.
#[derive(Clone, Debug)]
pub enum HiringInput {
    /// A node's offer in the ledger, or that it has none any more.
    Offer {
        /// Whose.
        node: NodeId,
        /// What it offers.
        offer: Option<SamplingOffer>,
    },
    /// What the run needs and what samplers deliver, now and then.
    Measured {
        /// Rollouts a second that keep the learner busy; none while that is not known.
        needed: Option<f64>,
        /// Every sampler that is connected.
        tracks: Vec<Track>,
    },
    /// A job's lease was accepted.
    Started(JobId),
    /// A job has ended.
    Ended {
        /// Which.
        job: JobId,
        /// Whether the sampler served to the end of its term.
        served: bool,
    },
    /// A node is at fault and is never hired again.
    Bar(NodeId),
    /// The run has ended: everybody is let go.
    Close,
}

/// What hiring wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HiringEffect {
    /// Hand in a job of kind `Sample` that only this node may get, with one lease.
    Submit {
        /// The job's id.
        job: JobId,
        /// Who may get it.
        node: NodeId,
        /// When its term ends.
        deadline: Time,
    },
    /// Take a job back.
    Withdraw(JobId),
    /// This node may be given members from now on.
    Hired(NodeId),
    /// And this one not any more.
    Dismissed(NodeId),
}

/// A job that is handed in, and the lease that comes of it.
#[derive(Clone, Copy, Debug)]
struct Contract {
    job: JobId,
    deadline: Time,
    /// When it counts as not taken; none once it is.
    answer_by: Option<Time>,
}

#[derive(Debug)]
struct Candidate {
    offer: SamplingOffer,
    contract: Option<Contract>,
    /// Times in a row that it did not take a lease, or lost it.
    failures: u32,
    retry_at: Time,
    rate: Option<f64>,
    reliability: f64,
}

/// One sampler, for `status`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HiredView {
    /// Who.
    pub node: NodeId,
    /// What an hour costs, in the swarm's unit.
    pub price: f64,
    /// When its term ends; none while it has no lease.
    pub until: Option<Time>,
    /// Whether it is wanted.
    pub wanted: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Hiring {
    cfg: HiringConfig,
    policy: PolicyId,
    candidates: BTreeMap<NodeId, Candidate>,
    jobs: BTreeMap<JobId, NodeId>,
    barred: BTreeSet<NodeId>,
    wanted: BTreeSet<NodeId>,
    needed: Option<f64>,
    closed: bool,
    reviewed: Time,
}

impl Hiring {
    /// Makes the hiring of a policy's run, which knows nobody yet.
    #[must_use]
    pub fn new(cfg: HiringConfig, policy: PolicyId) -> Self {
        Self {
            cfg,
            policy,
            candidates: BTreeMap::new(),
            jobs: BTreeMap::new(),
            barred: BTreeSet::new(),
            wanted: BTreeSet::new(),
            needed: None,
            closed: false,
            reviewed: Time::ZERO,
        }
    }

    /// Returns every sampler that offers itself.
    pub fn view(&self) -> impl Iterator<Item = HiredView> + '_ {
        self.candidates.iter().map(|(node, candidate)| HiredView {
            node: *node,
            price: price(&candidate.offer),
            until: candidate.contract.filter(|contract| contract.answer_by.is_none()).map(|contract| contract.deadline),
            wanted: self.wanted.contains(node),
        })
    }

    fn offer(&mut self, node: NodeId, offer: Option<SamplingOffer>) {
        let Some(offer) = offer.filter(|offer| offer.covers(&self.policy) && !self.barred.contains(&node)) else {
            // Its lease, if it has one, lasts to its end.
            if let Some(candidate) = self.candidates.get_mut(&node) {
                candidate.offer.slots = 0;
                self.forget_if_gone(node);
            }
            return;
        };
        if let Some(candidate) = self.candidates.get_mut(&node) {
            candidate.offer = offer;
        } else if self.candidates.len() < MAX_OFFERS {
            let fresh =
                Candidate { offer, contract: None, failures: 0, retry_at: Time::ZERO, rate: None, reliability: 1.0 };
            self.candidates.insert(node, fresh);
        }
    }

    fn forget_if_gone(&mut self, node: NodeId) {
        let gone = |candidate: &Candidate| candidate.offer.slots == 0 && candidate.contract.is_none();
        if self.candidates.get(&node).is_some_and(gone) {
            self.candidates.remove(&node);
        }
    }

    fn measured(&mut self, needed: Option<f64>, tracks: &[Track]) {
        self.needed = needed;
        for track in tracks {
            if let Some(candidate) = self.candidates.get_mut(&track.node) {
                candidate.rate = track.rate.or(candidate.rate);
                candidate.reliability = track.reliability;
            }
        }
    }

    fn started(&mut self, job: JobId, out: &mut Outbox<HiringEffect>) {
        let Some(node) = self.jobs.get(&job) else { return };
        let contract = self.candidates.get_mut(node).and_then(|candidate| candidate.contract.as_mut());
        if let Some(contract) = contract.filter(|contract| contract.job == job)
            && contract.answer_by.take().is_some()
        {
            out.push(HiringEffect::Hired(*node));
        }
    }

    fn ended(&mut self, now: Time, job: JobId, served: bool, out: &mut Outbox<HiringEffect>) {
        let Some(node) = self.jobs.remove(&job) else { return };
        let (first, most) = (self.cfg.back_off, self.cfg.back_off_max);
        let Some(candidate) = self.candidates.get_mut(&node) else { return };
        let Some(contract) = candidate.contract.take_if(|contract| contract.job == job) else { return };
        if served {
            (candidate.failures, candidate.retry_at) = (0, now);
        } else {
            let wait = first.saturating_mul(1 << candidate.failures.min(16)).min(most);
            candidate.failures = candidate.failures.saturating_add(1);
            candidate.retry_at = now + wait;
        }
        if contract.answer_by.is_none() {
            out.push(HiringEffect::Dismissed(node));
        }
        self.forget_if_gone(node);
    }

    fn withdraw(&mut self, now: Time, node: NodeId, out: &mut Outbox<HiringEffect>) {
        let contract = self.candidates.get(&node).and_then(|candidate| candidate.contract);
        if let Some(contract) = contract {
            out.push(HiringEffect::Withdraw(contract.job));
            self.ended(now, contract.job, false, out);
        }
    }

    /// Gives up on whoever does not answer, and on jobs of whose end nobody told.
    fn give_up(&mut self, now: Time, out: &mut Outbox<HiringEffect>) {
        let due = |candidate: &Candidate| candidate.contract.is_some_and(|contract| contract.due() <= now);
        let late: Vec<NodeId> = self.candidates.iter().filter(|(_, c)| due(c)).map(|(node, _)| *node).collect();
        for node in late {
            self.withdraw(now, node, out);
        }
    }

    /// Decides who is wanted.
    fn choose(&mut self, now: Time) {
        let there = |candidate: &Candidate| candidate.contract.is_some() || candidate.retry_at <= now;
        let able = self.candidates.iter().filter(|(_, candidate)| candidate.offer.slots > 0 && there(candidate));
        let (free, paid): (Vec<_>, Vec<_>) = able.partition(|(_, candidate)| candidate.offer.price_milli == 0);
        let each = per_slot(self.candidates.values());
        let worth = |candidate: &Candidate| {
            candidate.rate.unwrap_or_else(|| each * f64::from(candidate.offer.slots)) * candidate.reliability
        };
        let have: f64 = free.iter().map(|(_, candidate)| worth(candidate)).sum();
        let offers: Vec<Offer> = paid
            .iter()
            .map(|(node, candidate)| Offer {
                node: **node,
                price: price(&candidate.offer),
                rate: candidate.rate.unwrap_or_else(|| each * f64::from(candidate.offer.slots)),
                reliability: candidate.reliability,
            })
            .collect();
        let clock = now.since(Time::ZERO);
        let hired = match self.needed {
            Some(needed) => self.cfg.activation.choose(clock, (needed - have).max(0.0), &offers).active,
            None => offers.iter().map(|offer| offer.node).collect(),
        };
        self.wanted = free.into_iter().map(|(node, _)| *node).chain(hired).collect();
    }

    /// Hands in a job for each who is wanted and has none.
    fn submit(&mut self, cx: &mut Ctx<'_>, out: &mut Outbox<HiringEffect>) {
        for node in &self.wanted {
            if self.jobs.len() >= self.cfg.most {
                return;
            }
            let Some(candidate) = self.candidates.get_mut(node) else { continue };
            if candidate.contract.is_some() || candidate.retry_at > cx.now {
                continue;
            }
            let job = JobId::from_bytes(cx.rng.bytes());
            let deadline = cx.now + self.cfg.term;
            candidate.contract = Some(Contract { job, deadline, answer_by: Some(cx.now + self.cfg.answer) });
            self.jobs.insert(job, *node);
            out.push(HiringEffect::Submit { job, node: *node, deadline });
        }
    }

    fn review(&mut self, cx: &mut Ctx<'_>, out: &mut Outbox<HiringEffect>) {
        self.reviewed = cx.now;
        self.give_up(cx.now, out);
        if !self.closed {
            self.choose(cx.now);
            self.submit(cx, out);
        }
    }
}

impl Contract {
    /// When it is given up, if nothing happens before.
    fn due(&self) -> Time {
        self.answer_by.unwrap_or(self.deadline + OVERDUE)
    }
}

fn price(offer: &SamplingOffer) -> f64 {
    f64::from(offer.price_milli) / 1_000.0
}

/// Rollouts a second of one slot, over all who were measured.
fn per_slot<'a>(candidates: impl Iterator<Item = &'a Candidate>) -> f64 {
    let (mut rate, mut slots) = (0.0, 0.0);
    for candidate in candidates {
        if let Some(measured) = candidate.rate {
            rate += measured;
            slots += f64::from(candidate.offer.slots);
        }
    }
    if slots > 0.0 { rate / slots } else { 1.0 }
}

impl Machine for Hiring {
    type Input = HiringInput;
    type Effect = HiringEffect;

    fn handle(&mut self, cx: &mut Ctx<'_>, input: HiringInput, out: &mut Outbox<HiringEffect>) {
        match input {
            HiringInput::Offer { node, offer } => self.offer(node, offer),
            HiringInput::Measured { needed, tracks } => self.measured(needed, &tracks),
            HiringInput::Started(job) => self.started(job, out),
            HiringInput::Ended { job, served } => self.ended(cx.now, job, served, out),
            HiringInput::Bar(node) => {
                self.barred.insert(node);
                self.withdraw(cx.now, node, out);
                self.candidates.remove(&node);
            }
            HiringInput::Close => {
                self.closed = true;
                self.wanted.clear();
                for node in self.candidates.keys().copied().collect::<Vec<_>>() {
                    self.withdraw(cx.now, node, out);
                }
            }
        }
        self.review(cx, out);
    }

    fn deadline(&self) -> Option<Time> {
        let contracts = self.candidates.values().filter_map(|candidate| candidate.contract.map(|c| c.due())).min();
        let idle = self.candidates.values().filter(|candidate| candidate.contract.is_none());
        // One whose time has come already is not wanted now, or there is no lease left for it.
        let retries = idle.map(|candidate| candidate.retry_at).filter(|at| *at > self.reviewed).min();
        earliest(contracts, retries.filter(|_| !self.closed))
    }

    fn expire(&mut self, cx: &mut Ctx<'_>, out: &mut Outbox<HiringEffect>) {
        self.review(cx, out);
    }
}

#[cfg(test)]
mod tests;
