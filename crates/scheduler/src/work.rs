//! The half of a task that submits jobs and takes their results.

use std::collections::BTreeSet;
use std::time::Duration;

use chorus_beacon::job::{JobDone, JobError, JobSpec};
use chorus_machine::Time;
use chorus_protocol::bounded::Text;
use chorus_protocol::job::{Failure, Finish, JobKind, MAX_STOP_BYTES, MAX_STOPS, Payload, Risk, Turn};
use chorus_protocol::{JobId, List, NodeId};

use crate::answer::judge;
use crate::budget::{PLAN_MAX_TOKENS, STEP_MAX_TOKENS, plan_until, step_until};
use crate::chain::{Chain, Phase, Stage, StepState};
use crate::desk::Desk;
use crate::error::ChainError;
use crate::event::{Place, TaskEventKind};
use crate::plan::{self, Plan, PlanError};
use crate::prompt::{self, Note};
use crate::report::StepReport;
use crate::requirement::{Needed, requirement};
use crate::scheduler::SchedulerEffect;
use crate::seed::{self, STAGE_DIRECT, STAGE_PLAN, STAGE_STEP};
use crate::spec::Strategy;
use crate::task::{Task, Work, place};
use crate::vote::{Ballot, weigh};

/// Leases that a job may be granted; one more at high risk.
const MAX_LEASES: u32 = 4;
/// Nodes that a job is told to pass over.
const MAX_AVOIDED: usize = 8;
/// Temperature of planners, in thousandths (Symphony's). With greedy planners all chains would have one plan.
const PLAN_TEMPERATURE_MILLI: u32 = 600;
/// Times that a job is submitted again because every node was busy.
const MAX_BUSY_TRIES: u8 = 8;
/// How long a job waits for a free node, at first; it doubles each time.
const BUSY_DELAY: Duration = Duration::from_millis(250);
/// How long it waits at most.
const MAX_BUSY_DELAY: Duration = Duration::from_secs(4);
/// Characters of a result that an event shows.
const MAX_SHOWN_CHARS: usize = 300;

/// What is asked, of whom, until when.
struct Order {
    kind: JobKind,
    turns: Vec<Turn>,
    json_schema: Option<String>,
    stop: List<Text<MAX_STOP_BYTES>, MAX_STOPS>,
    want: u32,
    /// Tokens that the chain must keep for its answer.
    keep: u32,
    temperature_milli: u32,
    seed: u64,
    deadline: Time,
    needed: Needed,
    avoid: Vec<NodeId>,
}

impl Task {
    /// Submits a job of a chain, or ends what cannot be paid for.
    pub(crate) fn submit(&mut self, desk: &mut Desk<'_, '_>, at: usize, stage: Stage) {
        let Some(order) = self.order(desk, at, stage) else { return };
        let Some(chain) = self.chains.get_mut(at) else { return };
        let tokens = match chain.purse.pay(order.want, order.keep) {
            Ok(tokens) => tokens,
            Err(what) => return self.stage_failed(desk, at, stage, ChainError::Budget { what }),
        };
        chain.running(stage);
        let job = desk.draw_job(self.id());
        let payload = Payload {
            salt: desk.cx.rng.bytes(),
            json_schema: order.json_schema.and_then(|schema| Text::new(schema).ok()),
            max_tokens: tokens,
            temperature_milli: order.temperature_milli,
            top_p_milli: self.spec.top_p_milli,
            seed: order.seed,
            stop: order.stop,
            stream: self.spec.stream,
            policy: None,
            turns: List::default(),
        };
        let requirement = requirement(&order.needed, self.spec.model.as_ref(), &order.turns, tokens);
        let spec = JobSpec {
            job,
            task: self.id(),
            kind: order.kind,
            requirement,
            payload: Payload { turns: prompt::bounded(order.turns), ..payload },
            deadline: order.deadline,
            risk: self.spec.risk,
            max_leases: MAX_LEASES + u32::from(self.spec.risk == Risk::High),
            avoid: order.avoid,
            only: BTreeSet::new(),
        };
        let state = "is about to be announced".to_owned();
        self.jobs.insert(job, Work { chain: at, stage, submitted: desk.now(), reserved: tokens, state });
        self.submitted += 1;
        desk.out.push(SchedulerEffect::Submit(Box::new(spec)));
    }

    fn order(&self, desk: &Desk<'_, '_>, at: usize, stage: Stage) -> Option<Order> {
        let chain = self.chains.get(at)?;
        match stage {
            Stage::Plan { attempt } => self.order_plan(desk, at, chain, attempt),
            Stage::Step(step) => self.order_step(desk, chain, step),
            Stage::Direct => self.order_direct(at, chain),
        }
    }

    fn order_plan(&self, desk: &Desk<'_, '_>, at: usize, chain: &Chain, attempt: u8) -> Option<Order> {
        let steps = desk.config.plan_steps;
        let asked = prompt::plan(&self.spec.question, &self.spec.context, &self.spec.skills, steps);
        let turns = match &chain.phase {
            Phase::Planning { repair: Some((bad, error)) } => prompt::repair(asked, bad, error),
            _ => asked,
        };
        Some(Order {
            kind: JobKind::Plan,
            turns,
            json_schema: Some(plan::schema(steps, &prompt::named_tags(&self.spec.skills))),
            stop: List::default(),
            want: PLAN_MAX_TOKENS,
            keep: self.answer_reserve(chain),
            temperature_milli: PLAN_TEMPERATURE_MILLI,
            seed: seed::derive(self.spec.seed, chain.index, STAGE_PLAN, u64::from(attempt)),
            deadline: plan_until(chain.began, self.end),
            needed: self.planner_skill.known()?.clone(),
            avoid: others(&self.planners, at),
        })
    }

    fn order_step(&self, desk: &Desk<'_, '_>, chain: &Chain, step: u8) -> Option<Order> {
        let at = usize::from(step);
        let plan = chain.plan.as_ref()?;
        let planned = plan.steps().get(at)?;
        let notes: Vec<Note<'_>> = planned
            .needs
            .iter()
            .filter_map(|need| {
                let index = usize::from(*need).checked_sub(1)?;
                Some(Note { ask: &plan.steps().get(index)?.ask, result: chain.steps.get(index)?.result.as_deref()? })
            })
            .collect();
        let last = chain.is_last(step);
        let turns = if last {
            prompt::last(&self.spec.question, &self.spec.context, &planned.ask, &notes, &self.format)
        } else {
            prompt::middle(&planned.ask, &notes)
        };
        Some(Order {
            kind: JobKind::Answer,
            turns,
            json_schema: self.spec.json_schema.clone().filter(|_| last),
            stop: if last { self.stops() } else { List::default() },
            want: if last { self.spec.max_tokens } else { self.spec.max_tokens.min(STEP_MAX_TOKENS) },
            keep: if last { 0 } else { self.answer_reserve(chain) },
            temperature_milli: self.spec.temperature_milli,
            seed: seed::derive(self.spec.seed, chain.index, STAGE_STEP, u64::from(step)),
            deadline: step_until(desk.now(), self.end, chain.rounds.get(at).copied().unwrap_or(1)),
            needed: chain.steps.get(at)?.needed.known()?.clone(),
            avoid: Vec::new(),
        })
    }

    fn order_direct(&self, at: usize, chain: &Chain) -> Option<Order> {
        let compared = self.chains.len() > 1;
        let alone = self.spec.strategy == Strategy::Direct;
        Some(Order {
            kind: JobKind::Answer,
            turns: prompt::direct(&self.spec.question, &self.spec.context, &self.format, compared),
            json_schema: self.spec.json_schema.clone(),
            stop: self.stops(),
            want: self.spec.max_tokens,
            keep: 0,
            temperature_milli: self.spec.temperature_milli,
            seed: if alone { self.spec.seed } else { seed::derive(self.spec.seed, chain.index, STAGE_DIRECT, 0) },
            deadline: self.end,
            needed: self.answer_skill.known()?.clone(),
            avoid: others(&self.answerers, at),
        })
    }

    fn stops(&self) -> List<Text<MAX_STOP_BYTES>, MAX_STOPS> {
        List::truncated(self.spec.stop.iter().map(|stop| Text::truncated(stop)))
    }

    /// Returns the tokens that plans and middle steps must leave for the answer: all that it may want, or half of a small rest.
    fn answer_reserve(&self, chain: &Chain) -> u32 {
        self.spec.max_tokens.min(chain.purse.tokens / 2)
    }

    /// Takes a job's outcome.
    pub(crate) fn on_job_done(&mut self, desk: &mut Desk<'_, '_>, job: JobId, result: Result<Box<JobDone>, JobError>) {
        let Some(work) = self.jobs.remove(&job) else { return };
        let place = place(job, &self.chains, &work);
        let now = desk.now();
        self.chains.iter_mut().for_each(|chain| chain.wake(now));
        if matches!(work.stage, Stage::Plan { .. }) {
            self.planner_gate = None;
        }
        let Some(chain) = self.chains.get_mut(work.chain) else { return };
        chain.stopped(work.stage);
        match result {
            Ok(done) => {
                chain.purse.refund(work.reserved.saturating_sub(done.output.completion_tokens));
                self.somebody_can = true;
                self.prompt_tokens = self.prompt_tokens.saturating_add(u64::from(done.output.prompt_tokens));
                self.completion_tokens =
                    self.completion_tokens.saturating_add(u64::from(done.output.completion_tokens));
                self.stage_done(desk, &work, place, &done);
            }
            Err(error) => {
                chain.purse.refund(work.reserved);
                if !self.wait_for_a_free_node(desk, &work, place, &error) {
                    self.stage_failed(desk, work.chain, work.stage, ChainError::Job(error));
                }
            }
        }
        self.advance(desk);
    }

    fn stage_done(&mut self, desk: &mut Desk<'_, '_>, work: &Work, place: Place, done: &JobDone) {
        match work.stage {
            Stage::Plan { attempt } => self.planned(desk, work.chain, attempt, done),
            Stage::Step(step) => self.step_done(desk, work.chain, step, place, done),
            Stage::Direct => self.answered(desk, work, place, done),
        }
    }

    /// A planner has written: the chain goes on with its plan, asks for a repair, or answers without one.
    fn planned(&mut self, desk: &mut Desk<'_, '_>, at: usize, attempt: u8, done: &JobDone) {
        let text = done.output.text.as_str();
        let parsed = Plan::parse(text, done.output.finish == Finish::Length, &self.spec.question);
        let (task, end) = (self.id(), self.end);
        let Some(chain) = self.chains.get_mut(at) else { return };
        match parsed {
            Ok(plan) => {
                chain.planner = Some(done.executor);
                chain.rounds = plan.rounds_left();
                let skills = &self.spec.skills;
                let state =
                    |step: &plan::Step| StepState { needed: desk.need(task, &step.skill, skills), result: None };
                chain.steps = plan.steps().iter().map(state).collect();
                chain.phase = Phase::Working;
                let (index, steps) = (chain.index, plan.steps().to_vec());
                chain.plan = Some(plan);
                self.emit(desk, TaskEventKind::Planned { chain: index, planner: done.executor, steps });
            }
            Err(error) if attempt == 0 && error.is_repairable() && desk.now() < plan_until(chain.began, end) => {
                self.ask_for_repair(desk, at, text, error)
            }
            Err(error) => self.give_up_plan(desk, at, &format!("the plan cannot be used: {error}")),
        }
    }

    fn ask_for_repair(&mut self, desk: &mut Desk<'_, '_>, at: usize, text: &str, error: PlanError) {
        let Some(chain) = self.chains.get_mut(at) else { return };
        let (index, reason) = (chain.index, error.to_string());
        chain.phase = Phase::Planning { repair: Some((text.to_owned(), error)) };
        self.emit(desk, TaskEventKind::PlanRejected { chain: index, reason, then: "repair" });
    }

    fn step_done(&mut self, desk: &mut Desk<'_, '_>, at: usize, step: u8, place: Place, done: &JobDone) {
        let text = done.output.text.as_str().trim();
        let Some(chain) = self.chains.get_mut(at) else { return };
        let index = usize::from(step);
        let ask = chain.plan.as_ref().and_then(|plan| plan.steps().get(index)).map(|step| step.ask.clone());
        let Some(state) = chain.steps.get_mut(index) else { return };
        if text.is_empty() {
            return self.stage_failed(desk, at, Stage::Step(step), ChainError::Empty);
        }
        state.result = Some(prompt::ending(text).to_owned());
        let label = state.needed.known().map(|needed| needed.label.clone()).unwrap_or_default();
        let last = chain.is_last(step);
        chain.reports.push(report(ask.unwrap_or_default(), label, done));
        self.emit(desk, subtask_done(place, done, text));
        if last {
            self.vote_with(desk, at, text, done.output.finish);
        }
    }

    fn answered(&mut self, desk: &mut Desk<'_, '_>, work: &Work, place: Place, done: &JobDone) {
        let text = done.output.text.as_str().trim();
        let label = self.answer_skill.known().map(|needed| needed.label.clone()).unwrap_or_default();
        let Some(chain) = self.chains.get_mut(work.chain) else { return };
        if text.is_empty() {
            return self.stage_failed(desk, work.chain, Stage::Direct, ChainError::Empty);
        }
        chain.reports.push(report(String::new(), label, done));
        self.emit(desk, subtask_done(place, done, text));
        self.vote_with(desk, work.chain, text, done.output.finish);
    }

    /// Ends a chain with the answer in its last text.
    fn vote_with(&mut self, desk: &mut Desk<'_, '_>, at: usize, text: &str, finish: Finish) {
        let weighting = self.spec.weighting;
        let Some(chain) = self.chains.get_mut(at) else { return };
        let Some(answer) = judge(text, &self.format) else {
            return self.end_chain(desk, at, Err(ChainError::Empty));
        };
        let weight = weigh(chain.reports.get(chain.abandoned..).unwrap_or_default(), weighting);
        let ballot = Ballot { chain: chain.index, answer, text: text.to_owned(), finish, weight };
        self.end_chain(desk, at, Ok(ballot));
    }

    fn end_chain(&mut self, desk: &mut Desk<'_, '_>, at: usize, outcome: Result<Ballot, ChainError>) {
        self.stop_jobs(desk, |work| work.chain == at);
        let Some(chain) = self.chains.get_mut(at) else { return };
        chain.end(outcome);
        self.pool.collect(&mut chain.purse);
        let event = TaskEventKind::ChainDone {
            chain: chain.index,
            answer: chain.ballot().map(|ballot| ballot.answer.shown.clone()),
            weight: chain.ballot().map_or(0.0, |ballot| ballot.weight),
            error: chain.error().map(ToString::to_string),
        };
        self.emit(desk, event);
    }

    /// A job that the chain needs has failed. A chain with a plan gives it up and answers; one that was answering is over.
    fn stage_failed(&mut self, desk: &mut Desk<'_, '_>, at: usize, stage: Stage, error: ChainError) {
        match stage {
            Stage::Plan { .. } => self.give_up_plan(desk, at, &format!("nobody planned: {error}")),
            Stage::Step(step) => {
                let reason = format!("step {} failed: {error}", u16::from(step) + 1);
                self.give_up_plan(desk, at, &reason);
            }
            Stage::Direct => self.end_chain(desk, at, Err(error)),
        }
    }

    fn give_up_plan(&mut self, desk: &mut Desk<'_, '_>, at: usize, reason: &str) {
        self.stop_jobs(desk, |work| work.chain == at);
        let Some(chain) = self.chains.get_mut(at) else { return };
        chain.fall_back(reason.to_owned());
        let event = TaskEventKind::PlanRejected { chain: chain.index, reason: reason.to_owned(), then: "direct" };
        self.emit(desk, event);
    }

    /// Cancels jobs that are no longer wanted, and takes back what they would have cost.
    pub(crate) fn stop_jobs(&mut self, desk: &mut Desk<'_, '_>, unwanted: impl Fn(&Work) -> bool) {
        let stopped: Vec<JobId> = self.jobs.iter().filter(|(_, work)| unwanted(work)).map(|(job, _)| *job).collect();
        for job in stopped {
            let Some(work) = self.jobs.remove(&job) else { continue };
            desk.routes.jobs.remove(&job);
            desk.out.push(SchedulerEffect::CancelJob(job));
            if let Some(chain) = self.chains.get_mut(work.chain) {
                chain.stopped(work.stage);
                chain.purse.refund(work.reserved);
            }
        }
    }

    /// When every node that could do a job is busy, the job waits for one and is handed in again. Returns whether it does.
    fn wait_for_a_free_node(&mut self, desk: &mut Desk<'_, '_>, work: &Work, place: Place, error: &JobError) -> bool {
        let busy = match error {
            JobError::NobodyCan { .. } => self.somebody_can,
            JobError::Overloaded { .. } | JobError::Exhausted { last: Failure::Busy, .. } => true,
            _ => false,
        };
        let end = self.end;
        let Some(chain) = self.chains.get_mut(work.chain).filter(|_| busy) else { return false };
        let tries = chain.count_try(work.stage);
        let delay = BUSY_DELAY.saturating_mul(1 << u32::from(tries - 1).min(8)).min(MAX_BUSY_DELAY);
        // Jitter, so that chains that found the same nodes busy do not come back at the same moment.
        let at = desk.now() + desk.cx.rng.between(delay / 2, delay);
        if tries > MAX_BUSY_TRIES || at >= end {
            return false;
        }
        chain.again_at(work.stage, at);
        self.emit(desk, TaskEventKind::Waiting { place, reason: error.to_string() });
        true
    }
}

fn others(nodes: &[(usize, NodeId)], at: usize) -> Vec<NodeId> {
    let mut avoid: Vec<NodeId> = Vec::new();
    for (chain, node) in nodes {
        if *chain != at && !avoid.contains(node) && avoid.len() < MAX_AVOIDED {
            avoid.push(*node);
        }
    }
    avoid
}

fn report(subtask: String, requirement: String, done: &JobDone) -> StepReport {
    StepReport {
        subtask,
        requirement,
        executor: done.executor,
        score: done.score,
        reputation: done.reputation,
        tokens: done.output.completion_tokens,
        election: done.election,
        elapsed: done.elapsed,
    }
}

fn subtask_done(place: Place, done: &JobDone, text: &str) -> TaskEventKind {
    TaskEventKind::SubtaskDone {
        place,
        node: done.executor,
        score: done.score,
        tokens: done.output.completion_tokens,
        took: done.elapsed,
        result: text.chars().take(MAX_SHOWN_CHARS).collect(),
    }
}
