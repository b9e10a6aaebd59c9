//! One task under way: its chains, its money, its events, and how it ends.
//!
//! Every input changes some state and then calls [`Task::advance`], which does all that can be done. So no order of inputs
//! matters beyond what they say, and nothing is done twice. `work.rs` has the half that submits jobs and takes their results.

use std::collections::BTreeMap;

use chorus_beacon::job::{JobEvent, JobEventKind};
use chorus_machine::{Time, earliest};
use chorus_protocol::job::Risk;
use chorus_protocol::{Embedding, JobId, NodeId, TaskId};

use crate::answer::AnswerFormat;
use crate::budget::{MIN_SHARE_FOR_MORE, MIN_TIME_FOR_CHAINS, Purse};
use crate::chain::{Chain, Phase, Stage};
use crate::desk::Desk;
use crate::error::{ChainError, TaskError};
use crate::event::{Place, TaskEvent, TaskEventKind, TaskStatus};
use crate::prompt::{PLANNER_SKILL, PLANNER_TAG};
use crate::report::TaskAnswer;
use crate::requirement::{Needed, Slot, nearest, tags_of};
use crate::scheduler::SchedulerEffect;
use crate::spec::{EVENTS_A_RUN, MAX_CHAINS, MAX_SKILLS, Strategy, TaskSpec};
use crate::vote::{Ballot, Tally, heaviest, is_decided, tally};

/// Chains that a low margin at high risk adds, once.
pub(crate) const EXTRA_CHAINS: u8 = 2;
/// Events of one task after which the chatter of elections and text is no longer passed on; results always are.
const MAX_CHATTER_EVENTS: u64 = 50_000;

/// A job under way.
#[derive(Debug)]
pub(crate) struct Work {
    pub(crate) chain: usize,
    pub(crate) stage: Stage,
    pub(crate) submitted: Time,
    pub(crate) reserved: u32,
    /// What it waits for, in words.
    pub(crate) state: String,
}

#[derive(Debug)]
pub(crate) struct Task {
    pub(crate) spec: TaskSpec,
    /// What the answer looks like, read from the question if nobody said.
    pub(crate) format: AnswerFormat,
    pub(crate) began: Time,
    pub(crate) end: Time,
    pub(crate) chains: Vec<Chain>,
    pub(crate) jobs: BTreeMap<JobId, Work>,
    pub(crate) pool: Purse,
    pub(crate) planner_skill: Slot,
    pub(crate) answer_skill: Slot,
    /// Until when the next planner waits for the election of the one before it.
    pub(crate) planner_gate: Option<Time>,
    /// Nodes that plan, or planned, for this task.
    pub(crate) planners: Vec<(usize, NodeId)>,
    /// Nodes that answer, or answered, the whole question.
    pub(crate) answerers: Vec<(usize, NodeId)>,
    /// Whether any job found a candidate or an executor: then *nobody can* means that everybody is busy.
    pub(crate) somebody_can: bool,
    pub(crate) prompt_tokens: u64,
    pub(crate) completion_tokens: u64,
    pub(crate) submitted: u32,
    strategy: Strategy,
    fallback: Option<String>,
    /// The number of the next event.
    events: u64,
    widened: bool,
    over: bool,
}

impl Task {
    /// Begins a task that was validated.
    pub(crate) fn begin(mut spec: TaskSpec, desk: &mut Desk<'_, '_>) -> Self {
        let now = desk.now();
        spec.skills.truncate(MAX_SKILLS);
        let mut pool = Purse::of(&spec);
        let (strategy, fallback) = affordable(&spec, &pool);
        let count = match strategy {
            Strategy::Direct => 1,
            Strategy::Chains { planners } => planners,
        };
        let planned = strategy != Strategy::Direct;
        let chains = (0..count).map(|i| Chain::new(i, now, pool.split(count - i), planned)).collect();
        let mut task = Self {
            format: if spec.json_schema.is_some() { AnswerFormat::Json } else { spec.format.resolve(&spec.question) },
            began: now,
            end: now + spec.deadline,
            chains,
            jobs: BTreeMap::new(),
            pool,
            planner_skill: Slot::Unasked,
            answer_skill: Slot::Unasked,
            planner_gate: None,
            planners: Vec::new(),
            answerers: Vec::new(),
            somebody_can: false,
            prompt_tokens: 0,
            completion_tokens: 0,
            submitted: 0,
            strategy,
            fallback: fallback.clone(),
            events: first_event(spec.restarts),
            widened: false,
            over: false,
            spec,
        };
        if task.spec.restarts > 0 {
            task.emit(desk, TaskEventKind::Resumed { restarts: task.spec.restarts });
        }
        let (risk, deadline) = (task.spec.risk, task.spec.deadline);
        task.emit(desk, TaskEventKind::Accepted { strategy: strategy.name(), chains: count, risk, deadline, fallback });
        if planned {
            task.planner_skill = desk.need(task.spec.task, PLANNER_SKILL, &[]);
            if let Slot::Known(needed) = &mut task.planner_skill {
                *needed = planner(needed.embedding.take());
            }
        }
        task.advance(desk);
        task
    }

    pub(crate) fn id(&self) -> TaskId {
        self.spec.task
    }

    /// Returns whether the task has ended and can be forgotten.
    pub(crate) fn is_over(&self) -> bool {
        self.over
    }

    /// Returns the next moment at which [`Task::expire`] has something to do.
    pub(crate) fn deadline(&self) -> Option<Time> {
        let queued = self.chains.iter().any(|chain| chain.phase == Phase::Queued);
        let gate = self.planner_gate.filter(|_| queued);
        let slots = [self.planner_skill.due(), self.answer_skill.due(), gate];
        let steps = self
            .chains
            .iter()
            .filter(|chain| chain.is_live())
            .flat_map(|chain| chain.steps.iter().map(|step| step.needed.due()));
        let waits = self.chains.iter().map(Chain::wakes_at);
        slots.into_iter().chain(steps).chain(waits).fold(Some(self.end), earliest)
    }

    /// Does what is due: ends the task at its deadline, and goes on without an embedder that does not answer.
    pub(crate) fn expire(&mut self, desk: &mut Desk<'_, '_>) {
        let now = desk.now();
        if now >= self.end {
            return self.run_out(desk);
        }
        let late: Vec<u64> = self.slots().filter_map(|slot| late_request(slot, now)).collect();
        for request in late {
            self.fill(request, None);
        }
        self.advance(desk);
    }

    pub(crate) fn on_embedded(&mut self, desk: &mut Desk<'_, '_>, request: u64, embedding: Option<&Embedding>) {
        self.fill(request, embedding);
        self.advance(desk);
    }

    pub(crate) fn cancel(&mut self, desk: &mut Desk<'_, '_>) {
        self.fail(desk, TaskError::Cancelled);
    }

    pub(crate) fn status(&self, now: Time) -> TaskStatus {
        TaskStatus { task: self.id(), elapsed: now.since(self.began), waiting_for: self.waiting_for() }
    }

    /// Does everything that can be done now, until nothing more can or the task is over.
    pub(crate) fn advance(&mut self, desk: &mut Desk<'_, '_>) {
        loop {
            while !self.over && self.step(desk) {}
            if self.over || !self.conclude(desk) {
                return;
            }
        }
    }

    /// Does one thing that can be done: lets a chain plan, asks for an embedding, or submits a job.
    fn step(&mut self, desk: &mut Desk<'_, '_>) -> bool {
        self.let_one_plan(desk);
        if self.chains.iter().any(|chain| chain.phase == Phase::Answering) && self.answer_skill == Slot::Unasked {
            self.answer_skill = self.ask_answer_skill(desk);
        }
        let now = desk.now();
        let known = |slot: &Slot| slot.known().is_some();
        let (may_plan, may_answer) = (known(&self.planner_skill), known(&self.answer_skill));
        let wish = self.chains.iter().enumerate().find_map(|(at, chain)| {
            let wish = chain.wishes(now).into_iter().find(|stage| match stage {
                Stage::Plan { .. } => may_plan,
                Stage::Step(_) => true,
                Stage::Direct => may_answer,
            });
            wish.map(|stage| (at, stage))
        });
        match wish {
            Some((at, stage)) => {
                self.submit(desk, at, stage);
                true
            }
            None => false,
        }
    }

    /// Planners are elected one after the other, so that each can pass over the others. An election that takes long is not
    /// waited for.
    fn let_one_plan(&mut self, desk: &Desk<'_, '_>) {
        if self.planner_skill.known().is_none() || self.planner_gate.is_some_and(|gate| gate > desk.now()) {
            return;
        }
        if let Some(chain) = self.chains.iter_mut().find(|chain| chain.phase == Phase::Queued) {
            chain.phase = Phase::Planning { repair: None };
            self.planner_gate = Some(desk.now() + desk.config.planner_stagger);
        }
    }

    fn ask_answer_skill(&self, desk: &mut Desk<'_, '_>) -> Slot {
        if let Some(skill) = &self.spec.skill {
            return desk.need(self.id(), skill, &self.spec.skills);
        }
        if self.spec.skills.iter().filter(|skill| skill.embedding.is_some()).count() < 2 {
            return Slot::Known(Needed::default());
        }
        match desk.embed(self.id(), &self.spec.question) {
            Ok(meaning) => Slot::Known(nearest(&meaning, &self.spec.skills).unwrap_or_default()),
            Err((request, due)) => Slot::Asked { request, due },
        }
    }

    fn slots(&self) -> impl Iterator<Item = &Slot> {
        let steps = self.chains.iter().flat_map(|chain| chain.steps.iter().map(|step| &step.needed));
        [&self.planner_skill, &self.answer_skill].into_iter().chain(steps)
    }

    /// Gives an embedding, or the lack of one, to the slots that wait for it.
    fn fill(&mut self, request: u64, embedding: Option<&Embedding>) {
        let waits = |slot: &Slot| matches!(slot, Slot::Asked { request: asked, .. } if *asked == request);
        if waits(&self.planner_skill) {
            self.planner_skill = Slot::Known(planner(embedding.cloned()));
        }
        if waits(&self.answer_skill) {
            self.answer_skill = Slot::Known(match (&self.spec.skill, embedding) {
                (Some(text), _) => needed(text, embedding, &self.spec),
                (None, Some(meaning)) => nearest(meaning, &self.spec.skills).unwrap_or_default(),
                (None, None) => Needed::default(),
            });
        }
        for chain in &mut self.chains {
            let Some(plan) = &chain.plan else { continue };
            for (state, step) in chain.steps.iter_mut().zip(plan.steps()) {
                if waits(&state.needed) {
                    state.needed = Slot::Known(needed(&step.skill, embedding, &self.spec));
                }
            }
        }
    }

    /// Passes on what the beacon tells of a job.
    pub(crate) fn on_job_event(&mut self, desk: &mut Desk<'_, '_>, event: JobEvent) {
        let Some(work) = self.jobs.get_mut(&event.job) else { return };
        let place = place(event.job, &self.chains, work);
        let (chain, stage) = (work.chain, work.stage);
        let (state, kind) = translate(place, event.kind);
        if let Some(state) = state {
            work.state = state;
        }
        if let Some(TaskEventKind::Announced { candidates, .. }) = &kind {
            self.somebody_can |= *candidates > 0;
        }
        if let Some(TaskEventKind::Elected { node, .. }) = &kind {
            self.somebody_can = true;
            match stage {
                Stage::Plan { .. } => {
                    self.planners.push((chain, *node));
                    self.planner_gate = None;
                }
                Stage::Direct => self.answerers.push((chain, *node)),
                Stage::Step(_) => {}
            }
        }
        if let Some(kind) = kind.filter(|_| self.events - first_event(self.spec.restarts) < MAX_CHATTER_EVENTS) {
            self.emit(desk, kind);
        }
        self.advance(desk);
    }

    pub(crate) fn emit(&mut self, desk: &mut Desk<'_, '_>, kind: TaskEventKind) {
        let (task, at) = (self.id(), desk.now());
        desk.out.push(SchedulerEffect::Event(TaskEvent {
            task,
            index: self.events,
            at,
            elapsed: at.since(self.began),
            kind,
        }));
        self.events += 1;
    }

    fn ballots(&self) -> Vec<Ballot> {
        self.chains.iter().filter_map(Chain::ballot).cloned().collect()
    }

    /// Ends the task if its vote can be counted. Returns whether there is more to do instead, because chains were added.
    fn conclude(&mut self, desk: &mut Desk<'_, '_>) -> bool {
        let live = self.chains.iter().filter(|chain| chain.is_live()).count();
        let ballots = self.ballots();
        if live > 0 {
            let decided = desk.config.stop_when_decided
                && self.spec.risk == Risk::Low
                && is_decided(&ballots, live, heaviest(self.spec.weighting));
            if decided && let Some(tally) = tally(&ballots, self.spec.risk) {
                self.finish(desk, tally, true);
            }
            return false;
        }
        match tally(&ballots, self.spec.risk) {
            Some(tally) if self.wants_more(desk, &tally) => self.widen(desk, &tally),
            Some(tally) => {
                self.finish(desk, tally, false);
                false
            }
            None => {
                let causes: Vec<ChainError> = self.chains.iter().filter_map(|chain| chain.error().cloned()).collect();
                let error = match (causes.as_slice(), self.chains.len()) {
                    ([cause], 1) => TaskError::Failed(cause.clone()),
                    _ => TaskError::AllChainsFailed { causes },
                };
                self.fail(desk, error);
                false
            }
        }
    }

    fn wants_more(&self, desk: &Desk<'_, '_>, tally: &Tally) -> bool {
        let left = self.end.since(desk.now()).as_secs_f64() / self.spec.deadline.as_secs_f64();
        self.spec.risk == Risk::High
            && tally.low_margin
            && !self.widened
            && self.strategy != Strategy::Direct
            && left >= MIN_SHARE_FOR_MORE
            && self.extra_chains() > 0
    }

    fn extra_chains(&self) -> u8 {
        let room = usize::from(MAX_CHAINS).saturating_sub(self.chains.len());
        let wanted = EXTRA_CHAINS.min(u8::try_from(room).unwrap_or_default());
        self.pool.chains(wanted, self.spec.max_tokens)
    }

    fn widen(&mut self, desk: &mut Desk<'_, '_>, tally: &Tally) -> bool {
        let (count, now) = (self.extra_chains(), desk.now());
        self.widened = true;
        for part in 0..count {
            let Ok(index) = u8::try_from(self.chains.len()) else { break };
            let purse = self.pool.split(count - part);
            self.chains.push(Chain::new(index, now, purse, true));
        }
        let reason = format!("the risk is high and the margin only {:.2}", tally.margin);
        self.emit(desk, TaskEventKind::Widened { chains: count, reason });
        true
    }

    /// The deadline is there: what has been answered is put to the vote, and nothing more is waited for.
    fn run_out(&mut self, desk: &mut Desk<'_, '_>) {
        match tally(&self.ballots(), self.spec.risk) {
            Some(tally) => self.finish(desk, tally, true),
            None => {
                let (elapsed, waiting_for) = (desk.now().since(self.began), self.waiting_for());
                self.fail(desk, TaskError::Deadline { elapsed, waiting_for });
            }
        }
    }

    fn waiting_for(&self) -> String {
        let oldest = self.jobs.values().min_by_key(|work| work.submitted);
        let Some(work) = oldest else { return "the embedder or a free node was waited for".to_owned() };
        let what = match work.stage {
            Stage::Plan { .. } => "the plan".to_owned(),
            Stage::Step(step) => format!("step {}", u16::from(step) + 1),
            Stage::Direct => "the answer".to_owned(),
        };
        let others = self.jobs.len() - 1;
        let more = if others > 0 { format!(", and {others} more jobs") } else { String::new() };
        format!("{what} of chain {} {}{more}", work.chain, work.state)
    }

    fn finish(&mut self, desk: &mut Desk<'_, '_>, tally: Tally, early: bool) {
        let early = early && self.chains.iter().any(Chain::is_live);
        self.stop_jobs(desk, |_| true);
        if self.chains.len() > 1 {
            let (answer, votes) = (tally.answer.clone(), tally.votes.clone());
            let Tally { margin, tie, low_margin, .. } = tally;
            self.emit(desk, TaskEventKind::Voted { answer, margin, tie, low_margin, early, votes });
        }
        let answer = Box::new(self.answer(desk.now(), tally));
        self.emit(desk, TaskEventKind::Finished { result: answer.clone() });
        desk.out.push(SchedulerEffect::Done { task: self.id(), result: Ok(answer) });
        self.over = true;
    }

    fn answer(&self, now: Time, tally: Tally) -> TaskAnswer {
        let planned = self
            .chains
            .iter()
            .any(|chain| chain.ballot().is_some() && chain.fallback.is_none() && chain.plan.is_some());
        let unplanned = || {
            let reason = self.chains.iter().find_map(|chain| chain.fallback.as_ref())?;
            Some(format!(
                "no chain could carry out a plan, so each answered the question directly; the first: {reason}"
            ))
        };
        let (strategy, fallback) = match self.strategy {
            Strategy::Direct => (self.strategy.name(), self.fallback.clone()),
            chains if planned => (chains.name(), self.fallback.clone()),
            Strategy::Chains { .. } => (Strategy::Direct.name(), unplanned().or_else(|| self.fallback.clone())),
        };
        TaskAnswer {
            task: self.id(),
            answer: tally.answer,
            text: tally.text,
            finish: tally.finish,
            margin: tally.margin,
            tie: tally.tie,
            low_margin: tally.low_margin,
            votes: tally.votes,
            chains: self.chains.iter().map(Chain::report).collect(),
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.completion_tokens,
            jobs: self.submitted,
            elapsed: now.since(self.began),
            strategy,
            fallback,
        }
    }

    fn fail(&mut self, desk: &mut Desk<'_, '_>, error: TaskError) {
        self.stop_jobs(desk, |_| true);
        self.emit(desk, TaskEventKind::Failed { error: error.clone() });
        desk.out.push(SchedulerEffect::Done { task: self.id(), result: Err(error) });
        self.over = true;
    }
}

/// Returns the number of the first event of a task's run.
fn first_event(restarts: u32) -> u64 {
    u64::from(restarts) * EVENTS_A_RUN
}

/// Returns how the task can be run with its budget and its time, and why that is not what was asked for.
fn affordable(spec: &TaskSpec, pool: &Purse) -> (Strategy, Option<String>) {
    let Strategy::Chains { planners } = spec.strategy else { return (Strategy::Direct, None) };
    if spec.deadline < MIN_TIME_FOR_CHAINS {
        return (Strategy::Direct, Some("the deadline is too close for planning".to_owned()));
    }
    match pool.chains(planners, spec.max_tokens) {
        0 => (Strategy::Direct, Some("the budget cannot pay for a plan and an answer".to_owned())),
        n if n < planners => {
            (Strategy::Chains { planners: n }, Some(format!("the budget pays for {n} of {planners} chains")))
        }
        _ => (spec.strategy, None),
    }
}

fn planner(embedding: Option<Embedding>) -> Needed {
    let tags = vec![chorus_protocol::Text::truncated(PLANNER_TAG)];
    Needed { label: PLANNER_SKILL.to_owned(), embedding, tags }
}

fn needed(text: &str, embedding: Option<&Embedding>, spec: &TaskSpec) -> Needed {
    Needed { label: text.to_owned(), embedding: embedding.cloned(), tags: tags_of(text, &spec.skills) }
}

fn late_request(slot: &Slot, now: Time) -> Option<u64> {
    match slot {
        Slot::Asked { request, due } if *due <= now => Some(*request),
        _ => None,
    }
}

/// Names a job for an event.
pub(crate) fn place(job: JobId, chains: &[Chain], work: &Work) -> Place {
    let chain = chains.get(work.chain);
    let (stage, step) = match work.stage {
        Stage::Plan { .. } => ("plan", None),
        Stage::Direct => ("answer", None),
        Stage::Step(step) => {
            let last = chain.is_some_and(|chain| chain.is_last(step));
            (if last { "answer" } else { "step" }, Some(step.saturating_add(1)))
        }
    };
    Place { job, chain: chain.map_or(0, |chain| chain.index), stage, step }
}

/// Turns the beacon's event into the task's, and into the words that say what the job waits for.
fn translate(place: Place, kind: JobEventKind) -> (Option<String>, Option<TaskEventKind>) {
    match kind {
        JobEventKind::Announced { beacon, candidates } => {
            let state = format!("waits for bids of {candidates} candidates");
            (Some(state), Some(TaskEventKind::Announced { place, beacon, candidates }))
        }
        JobEventKind::Bid { node, score, claimed } => (None, Some(TaskEventKind::Bid { place, node, score, claimed })),
        JobEventKind::Elected { node, score, fence, bids, hedge } => {
            let state = format!("waits for {} to begin", node.fmt_short());
            (Some(state), Some(TaskEventKind::Elected { place, node, score, fence, bids, hedge }))
        }
        JobEventKind::Started { node } => {
            (Some(format!("is being written by {}", node.fmt_short())), Some(TaskEventKind::Started { place, node }))
        }
        JobEventKind::Progress { node, tokens, text } => {
            let state = format!("is being written by {} ({tokens} tokens so far)", node.fmt_short());
            (Some(state), (!text.is_empty()).then_some(TaskEventKind::Text { place, node, tokens, text }))
        }
        JobEventKind::Lost { node, reason } => {
            let state = format!("lost {} ({reason}) and looks for another node", node.fmt_short());
            (Some(state), Some(TaskEventKind::Lost { place, node, reason }))
        }
        JobEventKind::Finished { .. } => (None, None),
    }
}
