//! The swarm in one process: the buffer, a learner and samplers, each in a thread of its own, with the machines that nodes run.
//!
//! ```text
//!  sampler ──Bulk, encoded──▶ hub: Buffer ──Batch──▶ learner
//!     ▲  ◀──Bulk, encoded──────┘ │  ◀──Learned──────┘
//!     └──────────weights─────────┘
//! ```
//!
//! Disks are memory that never fails: what is to be written is written at once.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use chorus_machine::{Ctx, Machine, Outbox, Rng, Time, WallTime};
use chorus_protocol::job::Finish;
use chorus_protocol::policy::{PolicyId, Version};
use chorus_protocol::rollout::{Bulk, GroupId, Rollout, Segment};
use chorus_protocol::{Hash, NetworkId, NodeId, SecretKey, Text};
use chorus_rollout::buffer::{Batch, Buffer, BufferConfig, BufferEffect, BufferInput, Mode, Tally};
use chorus_rollout::plan::Plan;
use chorus_rollout::sampler::{Sampler, SamplerConfig, SamplerEffect, SamplerInput};
use chorus_trainer::env::{DEFAULT_LIMIT, Environment, Judge, Task, training_task_of};
use chorus_trainer::policy::{self, END, Policy, Tokenizer};
use chorus_trainer::train::{Learner, Round};
use chorus_trainer::trust::{AuditConfig, Auditor};

/// Messages that may wait in a channel. Credits keep the number far below.
const QUEUE: usize = 4096;
/// Rollouts that a sampler draws at a time.
const SLOTS: u16 = 64;
/// What a thread waits for at most when nothing is due.
const IDLE: Duration = Duration::from_secs(1);

/// What is run.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    pub(crate) environment: Arc<dyn Environment>,
    pub(crate) mode: Mode,
    pub(crate) round: Round,
    pub(crate) steps: u64,
    pub(crate) samplers: usize,
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) seconds: f64,
    /// Share of the time in which the learner learned.
    pub(crate) busy: f64,
    /// What became of the rollouts.
    pub(crate) tally: Tally,
}

enum Event {
    Up(usize, Vec<u8>),
    Learned { step: u64, weights: Arc<Policy>, busy: Duration },
}

enum Down {
    Message(Vec<u8>),
    Weights { version: Version, step: u64, weights: Arc<Policy> },
}

fn network() -> NetworkId {
    "parity".parse().expect("a network's name")
}

fn key(n: usize) -> SecretKey {
    SecretKey::from_bytes(&[u8::try_from(n + 1).expect("few samplers"); 32])
}

fn policy_id() -> PolicyId {
    PolicyId { owner: key(200).node_id(), name: Text::truncated("parity") }
}

/// Within one run a step has one set of weights.
fn version(step: u64) -> Version {
    Version::from_hash(Hash::derive("chorus parity version v1", &[&step.to_le_bytes()]))
}

/// Trains a policy for a number of steps.
pub(crate) fn run(learner: Learner, setup: &Setup) -> (Learner, Outcome) {
    let (events_tx, events) = sync_channel(QUEUE);
    let (batches, lessons) = sync_channel(1);
    let first = Arc::new(learner.policy().copy().expect("a copy"));
    thread::scope(|scope| {
        let learner = scope.spawn({
            let events_tx = events_tx.clone();
            move || learn(learner, setup, &lessons, &events_tx)
        });
        let mut inboxes = Vec::new();
        for n in 0..setup.samplers {
            let (inbox_tx, inbox) = sync_channel(QUEUE);
            inboxes.push(inbox_tx);
            let node = Node::new(n, setup, &first, events_tx.clone());
            scope.spawn(move || node.run(&inbox));
        }
        drop(events_tx);
        let outcome = Hub::new(setup, batches, inboxes).run(&events, &first);
        (learner.join().expect("the learner"), outcome)
    })
}

fn learn(mut learner: Learner, setup: &Setup, lessons: &Receiver<Batch>, events: &SyncSender<Event>) -> Learner {
    // Rewards are computed again and copies are watched for; what a look at log-probabilities costs is `cheaters`' subject.
    let mut auditor = Auditor::new(AuditConfig { share: 0.0, newcomer: 0, ..AuditConfig::default() }, [1; 32]);
    let mut judge = Judge::new([Arc::clone(&setup.environment)], DEFAULT_LIMIT);
    for batch in lessons {
        let begun = Instant::now();
        let admission = auditor.admit(&batch, &mut judge).expect("an examination");
        assert!(admission.findings.is_empty(), "all samplers are honest: {:?}", admission.findings);
        learner.step(&admission.groups).expect("a step");
        let weights = Arc::new(learner.policy().copy().expect("a copy"));
        let learned = Event::Learned { step: learner.steps(), weights, busy: begun.elapsed() };
        if events.send(learned).is_err() {
            break;
        }
    }
    learner
}

/// The trainer's side but for the learning.
struct Hub<'a> {
    setup: &'a Setup,
    buffer: Buffer,
    begun: Instant,
    rng: Rng,
    batches: SyncSender<Batch>,
    inboxes: Vec<SyncSender<Down>>,
}

impl<'a> Hub<'a> {
    fn new(setup: &'a Setup, batches: SyncSender<Batch>, inboxes: Vec<SyncSender<Down>>) -> Self {
        let plan = Plan { seed: setup.round.seed, environments: vec![(Text::truncated(&setup.environment.name()), 1)] };
        let config = BufferConfig {
            batch: setup.round.groups,
            members: u16::try_from(setup.round.members).expect("small groups"),
            max_rollout_bytes: 4 << 10,
            ..BufferConfig::new(policy_id(), setup.mode, plan)
        };
        let buffer = Buffer::new(config).expect("settings that can stand");
        Self { setup, buffer, begun: Instant::now(), rng: Rng::from_u64(setup.round.seed), batches, inboxes }
    }

    fn run(mut self, events: &Receiver<Event>, first: &Arc<Policy>) -> Outcome {
        let mut busy = Duration::ZERO;
        self.publish(0, first);
        self.input(Some(BufferInput::Want));
        loop {
            let now = now(self.begun);
            let wait = self.buffer.deadline().map_or(IDLE, |deadline| deadline.since(now).min(IDLE));
            match events.recv_timeout(wait) {
                Ok(Event::Up(n, bytes)) => self.up(n, &bytes),
                Ok(Event::Learned { step, weights, busy: more }) => {
                    busy += more;
                    if step == self.setup.steps {
                        break;
                    }
                    self.input(Some(BufferInput::Stepped(step)));
                    let progress = self.buffer.progress();
                    self.input(Some(BufferInput::Checkpointed(progress)));
                    self.publish(step, &weights);
                    self.input(Some(BufferInput::Want));
                }
                Err(RecvTimeoutError::Timeout) => self.input(None),
                Err(RecvTimeoutError::Disconnected) => panic_of_a_thread(),
            }
        }
        let seconds = self.begun.elapsed().as_secs_f64();
        Outcome { seconds, busy: busy.as_secs_f64() / seconds, tally: self.buffer.tally().clone() }
    }

    fn up(&mut self, n: usize, bytes: &[u8]) {
        let from: NodeId = key(n).node_id();
        self.input(Some(BufferInput::Hired(from)));
        let input = match Bulk::from_bytes(bytes).expect("a message") {
            Bulk::Hello(hello) => BufferInput::Hello { from, hello },
            Bulk::Frame(frame) => BufferInput::Frame { from, frame: frame.verify(&network()).expect("a signature") },
            message => BufferInput::Message { from, message },
        };
        self.input(Some(input));
    }

    fn publish(&mut self, step: u64, weights: &Arc<Policy>) {
        let version = version(step);
        for inbox in &self.inboxes {
            let _ = inbox.send(Down::Weights { version, step, weights: Arc::clone(weights) });
        }
        self.input(Some(BufferInput::Published { version, step }));
    }

    /// Tells the buffer something, or that time has passed, and does what it wants done.
    fn input(&mut self, input: Option<BufferInput>) {
        let mut out = Outbox::new();
        let mut persisted = Vec::new();
        let mut cx = Ctx { now: now(self.begun), wall: WallTime::from_millis(1), rng: &mut self.rng };
        match input {
            Some(input) => self.buffer.handle(&mut cx, input, &mut out),
            None => self.buffer.expire(&mut cx, &mut out),
        }
        for effect in out.drain() {
            match effect {
                BufferEffect::Send { to, message } => {
                    let inbox = self.inboxes.iter().zip(0..).find(|(_, n)| key(*n).node_id() == to);
                    let (inbox, _) = inbox.expect("a sampler that exists");
                    let _ = inbox.send(Down::Message(message.to_bytes().expect("a message that fits")));
                }
                BufferEffect::Persist { key, .. } => persisted.push(key),
                BufferEffect::Batch(batch) => self.batches.send(batch).expect("a learner"),
                BufferEffect::Forget(_) | BufferEffect::Refused { .. } => {}
            }
        }
        for key in persisted {
            self.input(Some(BufferInput::Persisted(key)));
        }
    }
}

#[allow(clippy::panic, reason = "a benchmark that lost a thread has no figures")]
fn panic_of_a_thread() -> ! {
    panic!("all threads are gone")
}

fn now(begun: Instant) -> Time {
    Time::from_nanos(u64::try_from(begun.elapsed().as_nanos()).expect("a few hundred years"))
}

/// A member to sample.
struct Start {
    group: GroupId,
    member: u16,
    seed: u64,
    task: Task,
}

/// A sampler's thread.
struct Node {
    machine: Sampler,
    environment: Arc<dyn Environment>,
    weights: Policy,
    serving: Option<Version>,
    rng: Rng,
    begun: Instant,
    starts: Vec<Start>,
    up: SyncSender<Event>,
    n: usize,
}

impl Node {
    fn new(n: usize, setup: &Setup, first: &Policy, up: SyncSender<Event>) -> Self {
        let machine = Sampler::new(SamplerConfig::new(policy_id(), SLOTS), network(), key(n), &[]);
        Self {
            machine,
            environment: Arc::clone(&setup.environment),
            weights: first.copy().expect("a copy"),
            serving: None,
            rng: Rng::from_u64(setup.round.seed ^ (n as u64 + 1) << 32),
            begun: Instant::now(),
            starts: Vec::new(),
            up,
            n,
        }
    }

    fn run(mut self, inbox: &Receiver<Down>) {
        self.input(Some(SamplerInput::Connected));
        loop {
            let now = now(self.begun);
            let wait = self.machine.deadline().map_or(IDLE, |deadline| deadline.since(now).min(IDLE));
            let wait = if self.starts.is_empty() { wait } else { Duration::ZERO };
            match inbox.recv_timeout(wait) {
                Ok(Down::Message(bytes)) => {
                    let message = Bulk::from_bytes(&bytes).expect("a message");
                    self.input(Some(SamplerInput::Message(message)));
                }
                Ok(Down::Weights { version, step, weights }) => {
                    self.weights.set(&weights).expect("weights of this shape");
                    self.serving = Some(version);
                    self.input(Some(SamplerInput::Serving { version, step }));
                }
                Err(RecvTimeoutError::Timeout) if self.starts.is_empty() => self.input(None),
                // Everything that was said is heard: draw what was begun meanwhile, all at once.
                Err(RecvTimeoutError::Timeout) => self.draw(),
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
    }

    fn input(&mut self, input: Option<SamplerInput>) {
        let mut out = Outbox::new();
        let mut persisted = Vec::new();
        let mut cx = Ctx { now: now(self.begun), wall: WallTime::from_millis(1), rng: &mut self.rng };
        match input {
            Some(input) => self.machine.handle(&mut cx, input, &mut out),
            None => self.machine.expire(&mut cx, &mut out),
        }
        for effect in out.drain() {
            match effect {
                SamplerEffect::Send(message) => {
                    let bytes = message.to_bytes().expect("a message that fits");
                    let _ = self.up.send(Event::Up(self.n, bytes));
                }
                SamplerEffect::Start { group, member, seed, .. } => {
                    let task = match self.starts.last() {
                        Some(last) if last.group == group => last.task.clone(),
                        _ => training_task_of(&*self.environment, seed),
                    };
                    self.starts.push(Start { group, member, seed, task });
                }
                SamplerEffect::Persist { sequence, .. } => persisted.push(sequence),
                // Weights come by themselves, and what is on disk is never forgotten before it was sent.
                SamplerEffect::Refresh { .. }
                | SamplerEffect::Load(_)
                | SamplerEffect::Forget(_)
                | SamplerEffect::Counted { .. }
                | SamplerEffect::Lost { .. } => {}
            }
        }
        for sequence in persisted {
            self.input(Some(SamplerInput::Persisted(sequence)));
        }
    }

    fn draw(&mut self) {
        let starts = std::mem::take(&mut self.starts);
        let version = self.serving.expect("members are begun with weights");
        let prompts: Vec<Vec<u32>> = starts.iter().map(|start| Tokenizer.encode(&start.task.prompt)).collect();
        let sampler = policy::Sampler { max_tokens: self.environment.max_tokens(), temperature: 1.0 };
        let samples = sampler.draw(&self.weights, &prompts, &mut self.rng).expect("samples");
        for ((start, prompt), sample) in starts.into_iter().zip(prompts).zip(samples) {
            let rollout = Rollout {
                group: start.group,
                member: start.member,
                environment: Text::truncated(&self.environment.name()),
                seed: start.seed,
                prompt: prompt.into(),
                reward: self.environment.reward(&start.task, &Tokenizer.decode(&sample.tokens)),
                finish: if sample.tokens.last() == Some(&END) { Finish::Stop } else { Finish::Length },
                completion: sample.tokens,
                log_probs: sample.logprobs.into_iter().map(|logprob| logprob.min(0.0)).collect(),
                segments: vec![Segment { version, from: 0 }],
            };
            self.input(Some(SamplerInput::Sampled(rollout)));
        }
    }
}
