//! One chain: where it stands, and which jobs it wants next. It decides nothing about nodes, money or time.
//!
//! ```text
//!  Queued ──▶ Planning ──plan──▶ Working ──last step──▶ Ended
//!                │  ▲               │                     ▲
//!        bad plan│  │once           │step failed          │answer, or error
//!                ▼  │               ▼                     │
//!             (repair)──────────▶ Answering ──────────────┘
//! ```
//!
//! The strategy `direct` is one chain that begins at `Answering`.

use std::collections::BTreeMap;

use chorus_machine::Time;
use chorus_protocol::NodeId;

use crate::budget::Purse;
use crate::error::ChainError;
use crate::plan::Plan;
use crate::report::{ChainReport, StepReport};
use crate::requirement::Slot;
use crate::vote::Ballot;

/// One of a chain's jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    /// The plan; the second attempt repairs the first.
    Plan { attempt: u8 },
    /// A step of the plan, from 0.
    Step(u8),
    /// The question itself.
    Direct,
}

/// Where a chain stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// It waits for its turn to elect a planner.
    Queued,
    /// A planner works on it. A text and its error are there when it is to be repaired.
    Planning { repair: Option<(String, crate::plan::PlanError)> },
    /// Its steps are being done.
    Working,
    /// Its plan is given up, or there never was one.
    Answering,
    /// It is over.
    Ended,
}

/// Where a step stands.
#[derive(Clone, Debug)]
pub(crate) struct StepState {
    pub(crate) needed: Slot,
    pub(crate) result: Option<String>,
}

/// A job that found every node busy, or is under way.
#[derive(Clone, Copy, Debug, Default)]
struct Attempt {
    running: bool,
    tries: u8,
    again_at: Option<Time>,
}

#[derive(Debug)]
pub(crate) struct Chain {
    pub(crate) index: u8,
    pub(crate) began: Time,
    pub(crate) phase: Phase,
    pub(crate) purse: Purse,
    pub(crate) planner: Option<NodeId>,
    pub(crate) plan: Option<Plan>,
    pub(crate) rounds: Vec<u32>,
    pub(crate) steps: Vec<StepState>,
    pub(crate) reports: Vec<StepReport>,
    /// Reports that belong to a plan that was given up; they do not count in the vote.
    pub(crate) abandoned: usize,
    pub(crate) fallback: Option<String>,
    pub(crate) outcome: Option<Result<Ballot, ChainError>>,
    attempts: BTreeMap<Stage, Attempt>,
}

impl Chain {
    pub(crate) fn new(index: u8, began: Time, purse: Purse, planned: bool) -> Self {
        Self {
            index,
            began,
            phase: if planned { Phase::Queued } else { Phase::Answering },
            purse,
            planner: None,
            plan: None,
            rounds: Vec::new(),
            steps: Vec::new(),
            reports: Vec::new(),
            abandoned: 0,
            fallback: None,
            outcome: None,
            attempts: BTreeMap::new(),
        }
    }

    pub(crate) fn is_live(&self) -> bool {
        self.phase != Phase::Ended
    }

    pub(crate) fn ballot(&self) -> Option<&Ballot> {
        self.outcome.as_ref()?.as_ref().ok()
    }

    pub(crate) fn error(&self) -> Option<&ChainError> {
        self.outcome.as_ref()?.as_ref().err()
    }

    /// Returns whether a step gives the chain's answer.
    pub(crate) fn is_last(&self, step: u8) -> bool {
        usize::from(step) + 1 == self.steps.len()
    }

    /// Returns the jobs that could be submitted now, as far as the chain itself knows.
    pub(crate) fn wishes(&self, now: Time) -> Vec<Stage> {
        let stages = match &self.phase {
            Phase::Queued | Phase::Ended => Vec::new(),
            Phase::Planning { repair } => vec![Stage::Plan { attempt: u8::from(repair.is_some()) }],
            Phase::Working => self.ready_steps(),
            Phase::Answering => vec![Stage::Direct],
        };
        stages.into_iter().filter(|stage| self.may_try(*stage, now)).collect()
    }

    fn ready_steps(&self) -> Vec<Stage> {
        let Some(plan) = &self.plan else { return Vec::new() };
        let done = |need: &u8| self.steps.get(usize::from(*need) - 1).is_some_and(|step| step.result.is_some());
        let ready = |(state, step): (&StepState, &crate::plan::Step)| {
            state.result.is_none() && state.needed.known().is_some() && step.needs.iter().all(done)
        };
        let steps = self.steps.iter().zip(plan.steps()).map(ready);
        (0u8..).zip(steps).filter(|(_, ready)| *ready).map(|(step, _)| Stage::Step(step)).collect()
    }

    fn may_try(&self, stage: Stage, now: Time) -> bool {
        self.attempts.get(&stage).is_none_or(|attempt| !attempt.running && attempt.again_at.is_none_or(|at| at <= now))
    }

    pub(crate) fn running(&mut self, stage: Stage) {
        let attempt = self.attempts.entry(stage).or_default();
        (attempt.running, attempt.again_at) = (true, None);
    }

    pub(crate) fn stopped(&mut self, stage: Stage) {
        self.attempts.entry(stage).or_default().running = false;
    }

    /// Counts a try that found every node busy, and returns how many there were.
    pub(crate) fn count_try(&mut self, stage: Stage) -> u8 {
        let attempt = self.attempts.entry(stage).or_default();
        attempt.tries = attempt.tries.saturating_add(1);
        attempt.tries
    }

    pub(crate) fn again_at(&mut self, stage: Stage, at: Time) {
        self.attempts.entry(stage).or_default().again_at = Some(at);
    }

    /// A node may be free now, so whoever waits for one need not wait longer.
    pub(crate) fn wake(&mut self, now: Time) {
        for attempt in self.attempts.values_mut() {
            attempt.again_at = attempt.again_at.map(|at| at.min(now));
        }
    }

    /// Returns when a waiting job is to be tried again.
    pub(crate) fn wakes_at(&self) -> Option<Time> {
        if !self.is_live() {
            return None;
        }
        self.attempts.values().filter_map(|attempt| attempt.again_at).min()
    }

    /// Gives the plan up: what ran for it no longer counts.
    pub(crate) fn fall_back(&mut self, reason: String) {
        self.phase = Phase::Answering;
        self.fallback = Some(reason);
        self.abandoned = self.reports.len();
        self.attempts.clear();
    }

    pub(crate) fn end(&mut self, outcome: Result<Ballot, ChainError>) {
        self.phase = Phase::Ended;
        self.outcome = Some(outcome);
        self.attempts.clear();
    }

    pub(crate) fn report(&self) -> ChainReport {
        let cut_short = || self.is_live().then(|| "it was not waited for".to_owned());
        ChainReport {
            chain: self.index,
            planner: self.planner,
            steps: self.reports.clone(),
            answer: self.ballot().map(|ballot| ballot.answer.shown.clone()),
            weight: self.ballot().map_or(0.0, |ballot| ballot.weight),
            fallback: self.fallback.clone(),
            error: self.error().map(ToString::to_string).or_else(cut_short),
        }
    }
}
