//! Time, the queue of events, and whose turn it is; messages on their way.

use std::collections::BTreeMap;
use std::time::Duration;

use chorus_machine::{Ctx, Machine, Outbox, Rng, Time, WallTime};
use chorus_protocol::policy::{PolicyId, Version};
use chorus_protocol::rollout::{Bulk, GroupId};
use chorus_protocol::{JobId, NetworkId, NodeId, Text, memo};

use super::counter::Leases;
use super::disk::{Checkpoint, Op};
use super::host::{self, Host, Process, Role};
use super::invariant::{Monitor, Rule};
use super::report::{Outcome, Stats};
use super::scenario::Scenario;
use super::session::{Pair, Place, Sessions, pair};
use crate::clock::WALL_START_MS;
use crate::queue::Queue;
use crate::trace::{Trace, tag};

/// Records that are verified once and not once a node: manifests, which every neighbour passes on.
const MAX_REMEMBERED: usize = 1 << 14;
/// Turns of one host at one moment before it counts as spinning.
const MAX_TURNS_AT_ONCE: u32 = 20_000;

/// What is broken on purpose, to see whether the rules notice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mutant {
    /// Nothing.
    #[default]
    None,
    /// The trainer's disk loses frames in a crash.
    LosesFrames,
    /// The trainer acknowledges what is not on disk yet.
    AcknowledgesEarly,
    /// The learner is given each batch twice.
    LearnsTwice,
    /// The buffer has a greater `S` than the run.
    Lax,
    /// Samplers load a version when its first chunk is there.
    ServesEarly,
    /// A version is published before its checkpoint is on disk.
    PublishesEarly,
    /// A sampler is taken for hired when its job is handed in.
    HiresEarly,
}

/// A member that an engine samples.
#[derive(Clone, Debug)]
pub(super) struct Item {
    pub(super) group: GroupId,
    pub(super) member: u16,
    pub(super) environment: Text<96>,
    pub(super) seed: u64,
    pub(super) version: Version,
}

/// Something that will happen.
#[derive(Debug)]
pub(super) enum Event {
    /// A process starts.
    Start { place: Place },
    /// A process dies.
    Crash { place: Place, down: Option<Duration>, power: bool },
    /// A node's own deadline.
    Wake { place: Place, life: u32 },
    /// A message arrives.
    Deliver { from: Place, to: Place, epoch: u32, bytes: Vec<u8> },
    /// A chunk has left.
    Left { place: Place, life: u32, chunk: (Place, Version, u32) },
    /// A disk ends a commit.
    Disk { place: Place, life: u32 },
    /// An engine is done with a member.
    Sampled { place: Place, life: u32, item: Box<Item> },
    /// An engine has loaded a version.
    Loaded { place: Place, life: u32, version: Version },
    /// The learner did an update, and is now at this step.
    Learned { life: u32, step: u64 },
    /// The weights of a checkpoint are ready to be written.
    Saved { life: u32, checkpoint: Box<Checkpoint> },
    /// A sampler takes a lease, if it is there.
    Elected { life: u32, place: Place, job: JobId },
    /// A lease ends.
    TermEnds { life: u32, job: JobId, silent: bool },
    /// Two nodes try to connect.
    Dial { pair: Pair },
    /// A session breaks.
    Break { pair: Pair },
    /// A node notices that a session is gone.
    Down { place: Place, life: u32, peer: Place },
    /// A fault of the scenario sets in.
    Fault { index: usize },
    /// It is over.
    FaultOver { index: usize },
}

/// A simulated training run.
#[derive(Debug)]
pub(super) struct World {
    pub(super) scenario: Scenario,
    pub(super) network: NetworkId,
    pub(super) policy: PolicyId,
    pub(super) now: Time,
    pub(super) queue: Queue<Event>,
    /// The trainer, then the samplers.
    pub(super) hosts: Vec<Host>,
    pub(super) places: BTreeMap<NodeId, Place>,
    pub(super) sessions: Sessions,
    pub(super) leases: Leases,
    pub(super) monitor: Monitor,
    pub(super) stats: Stats,
    pub(super) rng: Rng,
    pub(super) fault_rng: Rng,
    pub(super) mutant: Mutant,
    pub(super) seed: u64,
    trace: Trace,
    turns_at_once: (Time, Place, u32),
}

impl World {
    /// Makes the world of a scenario. `seed` takes the place of the scenario's own.
    pub(super) fn new(scenario: Scenario, seed: u64, mutant: Mutant) -> Self {
        let mut rng = Rng::from_u64(seed);
        let hosts = host::build(&scenario, &mut rng);
        let policy = PolicyId { owner: hosts[0].id, name: Text::truncated("sim") };
        let places = hosts.iter().map(|host| host.id).zip(0..).collect();
        let learner = &scenario.learner;
        let monitor = Monitor::new(scenario.staleness(), learner.batch, usize::from(learner.members));
        let mut world = Self {
            network: "sim".parse().expect("a short lower-case word is a network's name"),
            policy,
            now: Time::ZERO,
            queue: Queue::default(),
            hosts,
            places,
            sessions: Sessions::new(),
            leases: Leases::default(),
            monitor,
            stats: Stats::default(),
            fault_rng: rng.fork(),
            rng,
            mutant,
            seed,
            trace: Trace::default(),
            turns_at_once: (Time::ZERO, 0, 0),
            scenario,
        };
        world.plan();
        world
    }

    fn plan(&mut self) {
        self.queue.push(Time::ZERO, Event::Start { place: 0 });
        let within = Duration::from_millis(self.scenario.sampling.start_within_ms);
        for place in 1..=self.scenario.samplers {
            let at = Time::ZERO + self.rng.between(Duration::ZERO, within);
            self.queue.push(at, Event::Start { place });
        }
        self.plan_faults();
    }

    /// Runs to the end, or to the first violation. `calm` is what the learner did in the same run without faults.
    pub(super) fn run(mut self, calm: Option<u64>) -> Outcome {
        let _before = memo::remember(MAX_REMEMBERED);
        let end = Time::ZERO + self.scenario.duration();
        while self.monitor.violation().is_none() {
            let Some((at, event)) = self.queue.pop() else { break };
            if at > end {
                break;
            }
            self.now = at;
            self.record(&event);
            self.happen(event);
        }
        self.now = self.now.max(end);
        let uncut = self.uncut();
        self.monitor.check_sums(self.now, uncut);
        memo::remember(0);
        let trace = (self.trace.events(), self.trace.hash());
        Outcome::of(&self, uncut, calm, trace)
    }

    fn record(&mut self, event: &Event) {
        let (kind, place, detail) = match event {
            Event::Start { place } => (0, *place, 0),
            Event::Crash { place, .. } => (1, *place, 0),
            Event::Wake { place, .. } => (2, *place, 0),
            Event::Deliver { from, to, bytes, .. } => (3, *to, tag(bytes) ^ u64::from(*from)),
            Event::Left { place, chunk, .. } => (4, *place, u64::from(chunk.0)),
            Event::Disk { place, .. } => (5, *place, 0),
            Event::Sampled { place, item, .. } => (6, *place, item.group.0),
            Event::Loaded { place, .. } => (7, *place, 0),
            Event::Learned { step, .. } => (8, 0, *step),
            Event::Dial { pair } => (9, pair.0, u64::from(pair.1)),
            Event::Break { pair } => (10, pair.0, u64::from(pair.1)),
            Event::Down { place, peer, .. } => (11, *place, u64::from(*peer)),
            Event::Fault { index } => (12, 0, *index as u64),
            Event::FaultOver { index } => (13, 0, *index as u64),
            Event::Saved { checkpoint, .. } => (14, 0, checkpoint.step),
            Event::Elected { place, job, .. } => (15, *place, tag(job.as_bytes())),
            Event::TermEnds { job, silent, .. } => (16, u32::from(*silent), tag(job.as_bytes())),
        };
        self.trace.add(self.now, kind, place, detail);
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Start { place: 0 } => self.start_trainer(),
            Event::Start { place } => self.start_sampler(place),
            Event::Crash { place, down, power } => self.crash(place, down, power),
            Event::Wake { place, life } => self.wake(place, life),
            Event::Deliver { from, to, epoch, bytes } => self.deliver(from, to, epoch, &bytes),
            Event::Left { place, life, chunk } => self.left(place, life, chunk),
            Event::Disk { place, life } => self.disk_commits(place, life),
            Event::Sampled { place, life, item } => self.sampled(place, life, *item),
            Event::Loaded { place, life, version } => self.loaded(place, life, version),
            Event::Learned { life, step } => self.learned(life, step),
            Event::Saved { life, checkpoint } => self.saved(life, checkpoint),
            Event::Elected { life, place, job } => self.elected(life, place, job),
            Event::TermEnds { life, job, silent } => self.term_ends(life, job, silent),
            Event::Dial { pair } => self.connect(pair),
            Event::Break { pair } => self.break_session(pair, Duration::ZERO),
            Event::Down { place, life, peer } => self.down(place, life, peer),
            Event::Fault { index } => self.fault(index),
            Event::FaultOver { index } => self.fault_over(index),
        }
    }

    pub(super) fn is_alive(&self, place: Place, life: u32) -> bool {
        let host = &self.hosts[place as usize];
        host.process.is_some() && host.life == life
    }

    /// Lets a machine of a process take a turn. Returns what it wants done.
    pub(super) fn turn<M: Machine>(
        &mut self,
        place: Place,
        machine: impl FnOnce(&mut Process) -> Option<&mut M>,
        input: Option<M::Input>,
    ) -> Vec<M::Effect> {
        let wall = WallTime::from_millis(WALL_START_MS + self.now.as_nanos() / 1_000_000);
        let host = &mut self.hosts[place as usize];
        let Some(machine) = host.process.as_mut().and_then(machine) else { return Vec::new() };
        let mut cx = Ctx { now: self.now, wall, rng: &mut host.rng };
        let mut out = Outbox::new();
        match input {
            Some(input) => machine.handle(&mut cx, input, &mut out),
            None => machine.expire(&mut cx, &mut out),
        }
        self.stats.turns += 1;
        out.drain().collect()
    }

    /// Plans a node's next wake-up, unless an earlier one is planned already.
    pub(super) fn plan_wake(&mut self, place: Place) {
        let host = &mut self.hosts[place as usize];
        let Some(process) = host.process.as_mut() else { return };
        let Some(at) = process.deadline().map(|deadline| deadline.max(self.now)) else { return };
        if process.wake.is_none_or(|planned| at < planned) {
            process.wake = Some(at);
            self.queue.push(at, Event::Wake { place, life: host.life });
        }
    }

    fn wake(&mut self, place: Place, life: u32) {
        let now = self.now;
        let Some(process) = self.hosts[place as usize].process.as_mut().filter(|process| process.wake == Some(now))
        else {
            return;
        };
        process.wake = None;
        let weights = process.broadcast.deadline().is_some_and(|at| at <= now);
        let (role, hiring) = match &process.role {
            Role::Trainer(trainer) => (trainer.buffer.deadline(), trainer.hiring.deadline()),
            Role::Sampler(sampling) => (sampling.sampler.deadline(), None),
        };
        if !self.is_alive(place, life) {
            return;
        }
        let (at, who, turns) = self.turns_at_once;
        self.turns_at_once = if (at, who) == (now, place) { (at, who, turns + 1) } else { (now, place, 1) };
        if turns > MAX_TURNS_AT_ONCE {
            self.monitor.broken(Rule::BoundedTurns, now, place, format!("it wants {turns} turns at one moment"));
        }
        if weights {
            self.broadcast(place, None);
        }
        if hiring.is_some_and(|at| at <= now) {
            self.hiring(None);
        }
        if role.is_some_and(|at| at <= now) {
            if place == 0 { self.buffer(None) } else { self.sampler(place, None) }
        }
        self.plan_wake(place);
    }

    /// Returns how long a message takes between two uplinks.
    pub(super) fn latency(&self, (a, b): Pair) -> Duration {
        self.hosts[a as usize].access.delay + self.hosts[b as usize].access.delay
    }

    /// Sends a message on a session that the sender believes in. Returns when it has left.
    pub(super) fn send(&mut self, from: Place, to: Place, message: &Bulk) -> Option<Time> {
        let pair = pair(from, to);
        let session = self.sessions.get_mut(&pair)?;
        if !*session.belief(pair, from) {
            return None;
        }
        let (up, epoch) = (session.up, session.epoch);
        let bytes = message.to_bytes().expect("a message of valid parts is within its limit");
        let weight = match message {
            Bulk::Chunk { .. } => self.scenario.chunk_bytes(),
            _ => bytes.len() as u64,
        };
        if let Bulk::Frame(_) = message {
            self.stats.frame_bytes += bytes.len() as u64;
        }
        self.stats.messages += 1;
        let left = self.hosts[from as usize].access.leave(self.now, weight);
        if up {
            self.queue.push(left + self.latency(pair), Event::Deliver { from, to, epoch, bytes });
        }
        Some(left)
    }

    fn deliver(&mut self, from: Place, to: Place, epoch: u32, bytes: &[u8]) {
        let session = self.sessions.get(&pair(from, to)).filter(|session| session.up && session.epoch == epoch);
        if session.is_none() {
            self.stats.lost_messages += 1;
            return;
        }
        let message = Bulk::from_bytes(bytes).expect("what a node encodes is decoded");
        match message {
            Bulk::Hello(_) | Bulk::Assign { .. } | Bulk::Ack { .. } | Bulk::Nack { .. } if to != 0 => {
                self.sampler_hears(to, message);
            }
            Bulk::Hello(_) | Bulk::Frame(_) | Bulk::GiveUp(_) | Bulk::Serving { .. } if to == 0 => {
                self.trainer_hears(from, message);
            }
            message => self.weights_come(to, from, message),
        }
    }

    /// Asks a node's disk for something.
    pub(super) fn ask_disk(&mut self, place: Place, op: Op) {
        let host = &mut self.hosts[place as usize];
        if let Some(after) = host.disk.ask(op, &mut host.rng) {
            self.queue.push(self.now + after, Event::Disk { place, life: host.life });
        }
    }

    fn disk_commits(&mut self, place: Place, life: u32) {
        if !self.is_alive(place, life) {
            return;
        }
        let host = &mut self.hosts[place as usize];
        let (done, next) = host.disk.commit(&mut host.rng);
        if let Some(after) = next {
            self.queue.push(self.now + after, Event::Disk { place, life });
        }
        for (op, taken) in done {
            match op {
                Op::Chunk { version, index, .. } => self.chunk_stored(place, version, index, taken),
                Op::Read { to, version, index } => self.chunk_read(place, to, version, index),
                Op::Checkpoint(checkpoint) => self.checkpointed(&checkpoint),
                Op::Frame { key, .. } if place == 0 => self.frame_stored(key, taken),
                Op::Frame { key, .. } => self.frame_spooled(place, key, taken),
                Op::Load(key) => self.frame_loaded(place, key),
                Op::Manifest(_) | Op::Forget(_) | Op::Delete(_) => {}
            }
        }
    }

    /// Both sides of a new session are told, the one here and now.
    pub(super) fn session_up(&mut self, place: Place, peer: Place) {
        if self.hosts[place as usize].neighbours.contains(&peer) {
            self.neighbour(place, peer, true);
        }
        if peer == 0 {
            self.trainer_session(place, true);
        }
    }

    pub(super) fn session_down(&mut self, place: Place, peer: Place) {
        if self.hosts[place as usize].neighbours.contains(&peer) {
            self.neighbour(place, peer, false);
        }
        if peer == 0 {
            self.trainer_session(place, false);
        } else if place == 0 {
            self.sampler_gone(peer);
        }
    }

    pub(super) fn process_died(&mut self, place: Place, process: Process) {
        match process.role {
            Role::Trainer(_) => self.trainer_died(),
            Role::Sampler(sampling) => {
                self.lease_orphaned(place);
                let host = &self.hosts[place as usize];
                self.monitor.sampler_died(host.id, sampling.uncut, &host.disk, host.lost);
            }
        }
    }

    /// Rollouts that samplers hold outside of any frame.
    fn uncut(&mut self) -> u64 {
        self.hosts.iter_mut().filter_map(|host| host.sampling().map(|sampling| sampling.uncut)).sum()
    }
}
