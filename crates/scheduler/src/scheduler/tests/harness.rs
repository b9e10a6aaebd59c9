//! The test's side of the counter.

use std::collections::{BTreeMap, BTreeSet};

use chorus_beacon::job::JobEventKind;
use chorus_machine::{Rng, WallTime};
use chorus_protocol::job::{Finish, JobKind, Output};
use chorus_protocol::{BeaconId, Hash, NodeId, SecretKey, Text};

use super::super::*;

pub(super) type Outcome = Result<Box<TaskAnswer>, TaskError>;

/// A scheduler, its clock, and all that it wanted.
pub(super) struct World {
    pub(super) scheduler: Scheduler,
    pub(super) now: Time,
    pub(super) rng: Rng,
    /// Whether the embedder answers at once, with a vector made from the text's length.
    pub(super) embeds: bool,
    pub(super) embedded: Vec<(u64, String)>,
    /// Jobs that are neither done nor cancelled, in order of submission.
    pub(super) open: Vec<JobSpec>,
    pub(super) submitted: Vec<JobSpec>,
    pub(super) cancelled: BTreeSet<JobId>,
    pub(super) events: Vec<TaskEvent>,
    pub(super) done: BTreeMap<TaskId, Outcome>,
}

pub(super) fn node(i: u8) -> NodeId {
    SecretKey::from_bytes(&[i; 32]).node_id()
}

pub(super) fn task(i: u8) -> TaskId {
    TaskId::from_bytes([i; 16])
}

pub(super) fn meaning(text: &str) -> Embedding {
    let mut vector = [0.0; 384];
    vector[text.len() % 384] = 1.0;
    Embedding::from_f32(&vector).unwrap()
}

pub(super) fn output(text: &str) -> Output {
    Output {
        text: Text::truncated(text),
        prompt_tokens: 10,
        completion_tokens: 5,
        finish: Finish::Stop,
        model: Hash::ZERO,
    }
}

pub(super) fn nobody() -> JobError {
    JobError::NobodyCan { reason: "no node runs a model".into() }
}

pub(super) const PLAN: &str = r#"{"steps":[{"ask":"Add 2 and 3","skill":"arithmetic","needs":[]},{"ask":"Add 4 and 5","skill":"arithmetic","needs":[]},{"ask":"Multiply the sums","skill":"products","needs":[1,2]}]}"#;

impl World {
    pub(super) fn new(config: SchedulerConfig) -> Self {
        Self {
            scheduler: Scheduler::new(config),
            now: Time::ZERO,
            rng: Rng::from_u64(7),
            embeds: true,
            embedded: Vec::new(),
            open: Vec::new(),
            submitted: Vec::new(),
            cancelled: BTreeSet::new(),
            events: Vec::new(),
            done: BTreeMap::new(),
        }
    }

    pub(super) fn ask(spec: TaskSpec) -> Self {
        let mut world = Self::new(SchedulerConfig::default());
        world.give(SchedulerInput::Ask(Box::new(spec)));
        world
    }

    pub(super) fn give(&mut self, input: SchedulerInput) {
        let mut out = Outbox::new();
        let mut cx = Ctx { now: self.now, wall: WallTime::from_millis(0), rng: &mut self.rng };
        self.scheduler.handle(&mut cx, input, &mut out);
        self.take(out);
    }

    fn expire(&mut self) {
        let mut out = Outbox::new();
        let mut cx = Ctx { now: self.now, wall: WallTime::from_millis(0), rng: &mut self.rng };
        self.scheduler.expire(&mut cx, &mut out);
        self.take(out);
        let next = self.scheduler.deadline();
        assert!(next.is_none_or(|at| at > self.now), "the scheduler would spin at {}", self.now);
    }

    /// Lets time pass, waking the scheduler whenever it asked to be woken.
    pub(super) fn pass(&mut self, millis: u64) {
        let until = self.now + Duration::from_millis(millis);
        while let Some(at) = self.scheduler.deadline().filter(|at| *at <= until) {
            self.now = self.now.max(at);
            self.expire();
        }
        self.now = until;
    }

    fn take(&mut self, mut out: Outbox<SchedulerEffect>) {
        let mut asked = Vec::new();
        for effect in out.drain() {
            match effect {
                SchedulerEffect::Submit(spec) => self.on_submit(*spec),
                SchedulerEffect::CancelJob(job) => {
                    assert!(self.open.iter().any(|spec| spec.job == job), "a job is cancelled that is not open");
                    self.open.retain(|spec| spec.job != job);
                    self.cancelled.insert(job);
                }
                SchedulerEffect::Embed { request, text } => asked.push((request, text)),
                SchedulerEffect::Event(event) => self.on_event(event),
                SchedulerEffect::Done { task, result } => {
                    assert!(self.done.insert(task, result).is_none(), "a task ended twice");
                    assert!(self.open.iter().all(|spec| spec.task != task), "a task left jobs behind");
                }
            }
        }
        for (request, text) in asked {
            self.embedded.push((request, text.clone()));
            if self.embeds {
                self.give(SchedulerInput::Embedded { request, embedding: Some(meaning(&text)) });
            }
        }
    }

    fn on_submit(&mut self, spec: JobSpec) {
        assert!(self.submitted.iter().all(|other| other.job != spec.job), "two jobs have one id");
        assert!(!self.done.contains_key(&spec.task), "a task goes on after its end");
        assert!(!spec.payload.turns.is_empty() && spec.payload.max_tokens > 0);
        self.open.push(spec.clone());
        self.submitted.push(spec);
    }

    fn on_event(&mut self, event: TaskEvent) {
        let before = self.events.iter().filter(|other| other.task == event.task).count();
        assert_eq!(event.index % crate::spec::EVENTS_A_RUN, before as u64, "events have gaps");
        assert!(!self.done.contains_key(&event.task), "an event after the end");
        let json = serde_json::to_value(&event).unwrap();
        assert!(json["event"].is_string() && json["task"].is_string() && json["elapsed_ms"].is_number(), "{json}");
        self.events.push(event);
    }

    /// Returns the open jobs of one kind whose last turn holds `text`.
    pub(super) fn find(&self, kind: JobKind, text: &str) -> Vec<JobSpec> {
        let holds = |spec: &&JobSpec| spec.kind == kind && prompt(spec).contains(text);
        self.open.iter().filter(holds).cloned().collect()
    }

    pub(super) fn plans(&self) -> Vec<JobSpec> {
        self.find(JobKind::Plan, "")
    }

    pub(super) fn answers(&self) -> Vec<JobSpec> {
        self.find(JobKind::Answer, "")
    }

    pub(super) fn elect(&mut self, spec: &JobSpec, node: NodeId) {
        for kind in [
            JobEventKind::Announced { beacon: BeaconId::default(), candidates: 5 },
            JobEventKind::Bid { node, score: 0.5, claimed: 0.5 },
            JobEventKind::Elected { node, score: 0.5, fence: 1, bids: 1, hedge: false },
            JobEventKind::Started { node },
        ] {
            self.tell(spec, kind);
        }
    }

    pub(super) fn tell(&mut self, spec: &JobSpec, kind: JobEventKind) {
        self.give(SchedulerInput::Job(JobEvent { job: spec.job, task: spec.task, kind }));
    }

    /// Answers a job as `node` with a match score.
    pub(super) fn reply(&mut self, spec: &JobSpec, node: NodeId, score: f64, text: &str) {
        self.reply_with(spec, node, score, output(text));
    }

    pub(super) fn reply_with(&mut self, spec: &JobSpec, node: NodeId, score: f64, output: Output) {
        self.open.retain(|other| other.job != spec.job);
        let done = JobDone {
            output,
            executor: node,
            score,
            reputation: 0.9,
            leases: 1,
            election: Duration::from_millis(3),
            elapsed: Duration::from_millis(40),
        };
        self.give(SchedulerInput::JobDone { job: spec.job, result: Ok(Box::new(done)) });
    }

    pub(super) fn fail(&mut self, spec: &JobSpec, error: JobError) {
        self.open.retain(|other| other.job != spec.job);
        self.give(SchedulerInput::JobDone { job: spec.job, result: Err(error) });
    }

    pub(super) fn outcome(&self) -> &Outcome {
        self.done.get(&task(1)).expect("the task has ended")
    }

    pub(super) fn kinds(&self) -> Vec<String> {
        let kind = |event: &TaskEvent| serde_json::to_value(event).unwrap()["event"].as_str().unwrap().to_owned();
        self.events.iter().map(kind).collect()
    }

    /// Elects a different planner for each of `n` chains, and has each write `text`.
    pub(super) fn plan_all(&mut self, n: u8, text: &str) {
        for i in 0..n {
            let spec = self.plans().last().cloned().unwrap_or_else(|| panic!("no job for planner {i}"));
            self.elect(&spec, node(i + 1));
        }
        for (i, spec) in (1u8..).zip(self.plans()) {
            self.reply(&spec, node(i), 0.9, text);
        }
    }
}

/// Returns what the executor of a job is asked.
pub(super) fn prompt(spec: &JobSpec) -> String {
    spec.payload.turns.last().unwrap().content.as_str().to_owned()
}
