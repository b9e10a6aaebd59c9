//! The stream of rollouts in virtual time: one buffer, several samplers, a scripted engine and a scripted learner, with delays, lost
//! connections, crashes and full disks.
#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation, missing_docs, unreachable_pub)]

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::time::Duration;

use chorus_machine::{Ctx, Machine, Outbox, Rng, Time, WallTime};
use chorus_protocol::job::Finish;
use chorus_protocol::policy::{PolicyId, Version};
use chorus_protocol::rollout::{
    Assignment, Bulk, Credit, GroupId, Hello, Refusal, Rollout, RolloutFrame, Segment, Want,
};
use chorus_protocol::{Hash, List, NetworkId, NodeId, SecretKey, Text, Verified};
use chorus_rollout::buffer::{
    Batch, Buffer, BufferConfig, BufferEffect, BufferInput, FrameKey, LearnerAwaits, Mode, Progress,
};
use chorus_rollout::plan::Plan;
use chorus_rollout::sampler::{
    Sampler, SamplerAwaits, SamplerConfig, SamplerEffect, SamplerInput, SamplerStatus, WhenFull,
};

const LATENCY: Duration = Duration::from_millis(5);

fn network() -> NetworkId {
    "test".parse().unwrap()
}

fn key(n: usize) -> SecretKey {
    SecretKey::from_bytes(&[n as u8 + 1; 32])
}

fn policy() -> PolicyId {
    PolicyId { owner: key(200).node_id(), name: Text::new("p").unwrap() }
}

fn version(step: u64) -> Version {
    Version::from_hash(Hash::derive("test version", &[&step.to_le_bytes()]))
}

/// What a sampler with these weights says to this task: a function of nothing else.
fn scripted(group: GroupId, member: u16, environment: Text<96>, seed: u64, version: Version) -> Rollout {
    let word =
        Hash::derive("test rollout", &[version.as_hash().as_bytes(), &seed.to_le_bytes(), &member.to_le_bytes()]);
    let completion: Vec<u32> = word.as_bytes()[..8].iter().map(|byte| u32::from(*byte)).collect();
    Rollout {
        group,
        member,
        environment,
        seed,
        prompt: [1, 2, 3].into(),
        log_probs: completion.iter().map(|token| -f32::from(*token as u8) / 100.0).collect(),
        completion,
        reward: f32::from(word.as_bytes()[9]) / 255.0,
        finish: Finish::Stop,
        segments: vec![Segment { version, from: 0 }],
    }
}

#[derive(Debug)]
enum Event {
    ToBuffer(BufferInput),
    ToSampler(usize, SamplerInput),
    /// A message on the connection with this number; it dies with it.
    Up(usize, u64, Bulk),
    Down(usize, u64, Bulk),
    WakeBuffer,
    WakeSampler(usize),
    Updated(u64),
}

struct Node {
    machine: Sampler,
    connection: u64,
    connected: bool,
    alive: bool,
    /// It takes work and does nothing.
    hung: bool,
    /// Its time for one rollout.
    pace: Duration,
    disk: BTreeMap<u64, Verified<RolloutFrame>>,
    /// Rollouts that the trainer said count.
    counted: u64,
    lost: BTreeMap<Refusal, u32>,
}

struct World {
    now: Time,
    rng: Rng,
    cfg: BufferConfig,
    buffer: Buffer,
    nodes: Vec<Node>,
    queue: BinaryHeap<Reverse<(Time, u64)>>,
    events: BTreeMap<u64, Event>,
    count: u64,
    /// The trainer's disk: frames, and the last checkpoint.
    disk: BTreeMap<FrameKey, Verified<RolloutFrame>>,
    checkpoint: Progress,
    /// Groups that were complete at the last checkpoint.
    complete: usize,
    trainer_disk_full_until: Time,
    /// Until then no sampler can read what it keeps.
    unreadable_until: Time,
    update: Duration,
    /// Updates between two checkpoints, each of which is published.
    period: u64,
    swap: Duration,
    batches: Vec<Batch>,
    /// How likely a message to the trainer is doubled.
    doubled: f64,
    trainer_up: bool,
    acked: BTreeSet<(NodeId, u64)>,
    /// When the run is given up.
    limit: Time,
}

fn config(mode: Mode) -> BufferConfig {
    let name = |text: &str| Text::new(text).unwrap();
    let plan = Plan { seed: 5, environments: vec![(name("arithmetic"), 2), (name("sokoban"), 1)] };
    BufferConfig {
        batch: 3,
        members: 4,
        capacity: 200,
        patience: Duration::from_secs(4),
        ..BufferConfig::new(policy(), mode, plan)
    }
}

impl World {
    fn new(cfg: BufferConfig, samplers: usize, seed: u64) -> Self {
        let node = |n: usize| Node {
            machine: Sampler::new(SamplerConfig::new(policy(), 2), network(), key(n), &[]),
            connection: 0,
            connected: false,
            alive: true,
            hung: false,
            pace: Duration::from_millis(30 + 20 * n as u64),
            disk: BTreeMap::new(),
            counted: 0,
            lost: BTreeMap::new(),
        };
        Self {
            now: Time::ZERO,
            rng: Rng::from_u64(seed),
            buffer: Buffer::new(cfg.clone()).unwrap(),
            cfg,
            nodes: (0..samplers).map(node).collect(),
            queue: BinaryHeap::new(),
            events: BTreeMap::new(),
            count: 0,
            disk: BTreeMap::new(),
            checkpoint: Progress::default(),
            complete: 0,
            trainer_disk_full_until: Time::ZERO,
            unreadable_until: Time::ZERO,
            update: Duration::from_millis(100),
            period: 1,
            swap: Duration::from_millis(20),
            batches: Vec::new(),
            doubled: 0.0,
            trainer_up: true,
            acked: BTreeSet::new(),
            limit: Time::from_millis(120_000),
        }
    }

    fn start(&mut self) {
        self.publish(0);
        self.at(Duration::ZERO, Event::ToBuffer(BufferInput::Want));
        for n in 0..self.nodes.len() {
            self.connect(n);
        }
    }

    fn at(&mut self, after: Duration, event: Event) {
        self.count += 1;
        self.events.insert(self.count, event);
        self.queue.push(Reverse((self.now + after, self.count)));
    }

    fn connect(&mut self, n: usize) {
        self.nodes[n].connection += 1;
        self.nodes[n].connected = true;
        self.at(LATENCY, Event::ToSampler(n, SamplerInput::Connected));
    }

    fn disconnect(&mut self, n: usize) {
        self.nodes[n].connection += 1;
        self.nodes[n].connected = false;
        self.at(Duration::ZERO, Event::ToSampler(n, SamplerInput::Disconnected));
        self.at(Duration::ZERO, Event::ToBuffer(BufferInput::Gone(key(n).node_id())));
    }

    fn publish(&mut self, step: u64) {
        self.at(Duration::ZERO, Event::ToBuffer(BufferInput::Published { version: version(step), step }));
        for n in 0..self.nodes.len() {
            let after = self.swap + self.rng.between(Duration::ZERO, self.swap);
            self.at(after, Event::ToSampler(n, SamplerInput::Serving { version: version(step), step }));
        }
    }

    fn kill_sampler(&mut self, n: usize) {
        self.disconnect(n);
        self.nodes[n].alive = false;
    }

    fn restart_sampler(&mut self, n: usize) {
        let node = &mut self.nodes[n];
        let found: Vec<_> = node.disk.iter().map(|(n, frame)| (*n, frame.encoded_len(), frame.len() as u32)).collect();
        node.machine = Sampler::new(SamplerConfig::new(policy(), 2), network(), key(n), &found);
        node.alive = true;
        let step = self.checkpoint.step;
        self.at(Duration::ZERO, Event::ToSampler(n, SamplerInput::Serving { version: version(step), step }));
        self.connect(n);
    }

    fn crash_trainer(&mut self) {
        self.trainer_up = false;
        for n in 0..self.nodes.len() {
            self.disconnect(n);
        }
    }

    fn restore_trainer(&mut self) {
        let bytes = self.checkpoint.to_bytes();
        let progress = Progress::from_bytes(&bytes).unwrap();
        let versions: Vec<_> = (0..=progress.step).map(|step| (version(step), step)).collect();
        let frames: Vec<_> = self.disk.values().cloned().collect();
        let (buffer, idle) = Buffer::restore(self.cfg.clone(), &progress, &versions, &frames).unwrap();
        for key in idle {
            self.disk.remove(&key);
        }
        // What was learned after the checkpoint is learned again.
        self.batches.retain(|batch| batch.step < progress.step);
        self.buffer = buffer;
        self.trainer_up = true;
        self.publish(progress.step);
        self.at(Duration::ZERO, Event::ToBuffer(BufferInput::Want));
        for n in 0..self.nodes.len() {
            self.connect(n);
        }
    }

    fn buffer(&mut self, input: Option<BufferInput>) {
        if !self.trainer_up {
            return;
        }
        let mut out = Outbox::new();
        let mut rng = self.rng.fork();
        let mut cx = Ctx { now: self.now, wall: WallTime::from_millis(1), rng: &mut rng };
        match input {
            Some(input) => self.buffer.handle(&mut cx, input, &mut out),
            None => self.buffer.expire(&mut cx, &mut out),
        }
        if let Some(deadline) = self.buffer.deadline() {
            self.at(deadline.since(self.now).max(Duration::from_nanos(1)), Event::WakeBuffer);
        }
        for effect in out.drain().collect::<Vec<_>>() {
            self.buffer_effect(effect);
        }
    }

    fn buffer_effect(&mut self, effect: BufferEffect) {
        match effect {
            BufferEffect::Send { to, message } => {
                let n = (0..self.nodes.len()).find(|n| key(*n).node_id() == to).unwrap();
                if let Bulk::Ack { sequence, .. } = message {
                    self.acked.insert((to, sequence));
                }
                let message = Bulk::from_bytes(&message.to_bytes().unwrap()).unwrap();
                self.at(LATENCY, Event::Down(n, self.nodes[n].connection, message));
            }
            BufferEffect::Persist { key, frame } => {
                if self.now < self.trainer_disk_full_until {
                    self.at(Duration::from_millis(1), Event::ToBuffer(BufferInput::PersistFailed(key)));
                } else {
                    self.disk.insert(key, frame);
                    self.at(Duration::from_millis(2), Event::ToBuffer(BufferInput::Persisted(key)));
                }
            }
            BufferEffect::Forget(keys) => keys.iter().for_each(|key| assert!(self.disk.remove(key).is_some())),
            BufferEffect::Batch(batch) => {
                self.check(&batch);
                let step = batch.step + 1;
                self.batches.push(batch);
                self.at(self.update, Event::Updated(step));
            }
            BufferEffect::Refused { .. } => {}
        }
    }

    /// The invariants of every batch.
    fn check(&self, batch: &Batch) {
        let staleness = match self.cfg.mode {
            Mode::Sequential => 0,
            Mode::Streaming { staleness } => u64::from(staleness),
        };
        assert_eq!(batch.groups.len(), self.cfg.batch);
        for group in &batch.groups {
            assert!(self.batches.iter().all(|old| old.groups.iter().all(|other| other.id != group.id)), "used twice");
            assert_eq!(group.rollouts.len(), usize::from(self.cfg.members));
            for ((_, lag, rollout), member) in group.rollouts.iter().zip(0u16..) {
                let written = rollout.segments[0].version;
                let step = (0..=batch.step).rev().find(|step| version(*step) == written).unwrap();
                assert_eq!(batch.step - step, *lag);
                assert!(*lag <= staleness, "lag {lag} is over {staleness}");
                let (environment, seed) = self.cfg.plan.task(group.id);
                assert_eq!(**rollout, scripted(group.id, member, environment, seed, written));
            }
        }
    }

    fn sampler(&mut self, n: usize, input: Option<SamplerInput>) {
        if !self.nodes[n].alive {
            return;
        }
        let mut out = Outbox::new();
        let mut rng = self.rng.fork();
        let mut cx = Ctx { now: self.now, wall: WallTime::from_millis(1), rng: &mut rng };
        let node = &mut self.nodes[n];
        match input {
            Some(input) => node.machine.handle(&mut cx, input, &mut out),
            None => node.machine.expire(&mut cx, &mut out),
        }
        if let Some(deadline) = node.machine.deadline() {
            self.at(deadline.since(self.now).max(Duration::from_nanos(1)), Event::WakeSampler(n));
        }
        for effect in out.drain().collect::<Vec<_>>() {
            self.sampler_effect(n, effect);
        }
    }

    fn sampler_effect(&mut self, n: usize, effect: SamplerEffect) {
        match effect {
            SamplerEffect::Send(message) => {
                let connection = self.nodes[n].connection;
                if self.nodes[n].connected {
                    if self.rng.chance(self.doubled) {
                        self.at(LATENCY * 3, Event::Up(n, connection, message.clone()));
                    }
                    self.at(LATENCY, Event::Up(n, connection, message));
                }
            }
            SamplerEffect::Start { group, member, environment, seed, version } => {
                if !self.nodes[n].hung {
                    let pace = self.nodes[n].pace;
                    let after = pace / 2 + self.rng.between(Duration::ZERO, pace);
                    let rollout = scripted(group, member, environment, seed, version);
                    self.at(after, Event::ToSampler(n, SamplerInput::Sampled(rollout)));
                }
            }
            SamplerEffect::Persist { sequence, frame } => {
                self.nodes[n].disk.insert(sequence, frame);
                self.at(Duration::from_millis(1), Event::ToSampler(n, SamplerInput::Persisted(sequence)));
            }
            SamplerEffect::Load(sequence) => {
                let frame = self.nodes[n].disk.get(&sequence).cloned();
                let input = if self.now < self.unreadable_until {
                    SamplerInput::LoadFailed(sequence)
                } else {
                    SamplerInput::Loaded { sequence, frame }
                };
                self.at(Duration::from_millis(1), Event::ToSampler(n, input));
            }
            SamplerEffect::Forget(sequence) => {
                self.nodes[n].disk.remove(&sequence);
            }
            SamplerEffect::Counted { taken, .. } => self.nodes[n].counted += u64::from(taken),
            SamplerEffect::Lost { rollouts, reason } => {
                *self.nodes[n].lost.entry(reason).or_default() += rollouts;
            }
            SamplerEffect::Refresh { .. } => {}
        }
    }

    fn run(&mut self, mut done: impl FnMut(&Self) -> bool) {
        while !done(self) {
            let Some(Reverse((time, id))) = self.queue.pop() else {
                let status: Vec<SamplerStatus> = self.nodes.iter().map(|node| node.machine.status()).collect();
                panic!("nothing happens any more at {}: {:?} {status:#?}", self.now, self.buffer.awaits());
            };
            assert!(time < self.limit, "too long: {:?} {:?}", self.buffer.awaits(), self.buffer.tally());
            self.now = time;
            match self.events.remove(&id).unwrap() {
                Event::ToBuffer(input) => self.buffer(Some(input)),
                Event::ToSampler(n, input) => self.sampler(n, Some(input)),
                Event::Up(n, connection, message) => {
                    if connection != self.nodes[n].connection {
                        continue;
                    }
                    let from = key(n).node_id();
                    let message = Bulk::from_bytes(&message.to_bytes().unwrap()).unwrap();
                    // Everybody who comes is hired: who is, and for how long, is another machine's business.
                    self.buffer(Some(BufferInput::Hired(from)));
                    let input = match message {
                        Bulk::Hello(hello) => BufferInput::Hello { from, hello },
                        Bulk::Frame(frame) => BufferInput::Frame { from, frame: frame.verify(&network()).unwrap() },
                        message => BufferInput::Message { from, message },
                    };
                    self.buffer(Some(input));
                }
                Event::Down(n, connection, message) => {
                    if connection == self.nodes[n].connection {
                        self.sampler(n, Some(SamplerInput::Message(message)));
                    }
                }
                Event::WakeBuffer => self.buffer(None),
                Event::WakeSampler(n) => self.sampler(n, None),
                Event::Updated(step) => {
                    if !self.trainer_up || self.batches.last().is_none_or(|batch| batch.step + 1 != step) {
                        continue;
                    }
                    self.buffer(Some(BufferInput::Stepped(step)));
                    if step % self.period == 0 {
                        let progress = self.buffer.progress();
                        self.checkpoint = progress.clone();
                        self.complete = self.buffer.fill().1;
                        self.buffer(Some(BufferInput::Checkpointed(progress)));
                        self.publish(step);
                    }
                    self.buffer(Some(BufferInput::Want));
                }
            }
        }
    }

    fn refused(&self, reason: Refusal) -> u64 {
        self.buffer.tally().refused.get(&reason).copied().unwrap_or(0)
    }
}

/// Samples of all batches, in order: what the learner sees.
fn seen(world: &World) -> Vec<(u64, GroupId, u16, Vec<u32>, u32)> {
    let rollouts = world.batches.iter().flat_map(|batch| batch.groups.iter().map(move |group| (batch.step, group)));
    rollouts
        .flat_map(|(step, group)| {
            group.rollouts.iter().map(move |(_, _, rollout)| {
                (step, group.id, rollout.member, rollout.completion.clone(), rollout.reward.to_bits())
            })
        })
        .collect()
}

/// The sequential mode without any machinery: for each step, the next groups, sampled with the weights of that step.
fn by_hand(steps: u64, cfg: &BufferConfig) -> Vec<(u64, GroupId, u16, Vec<u32>, u32)> {
    let mut all = Vec::new();
    for step in 0..steps {
        for group in 0..cfg.batch as u64 {
            let id = GroupId(step * cfg.batch as u64 + group + 1);
            for member in 0..cfg.members {
                let (environment, seed) = cfg.plan.task(id);
                let rollout = scripted(id, member, environment, seed, version(step));
                all.push((step, id, member, rollout.completion, rollout.reward.to_bits()));
            }
        }
    }
    all
}

#[test]
fn no_staleness_is_the_sequential_mode_sample_by_sample() {
    const STEPS: usize = 12;
    for seed in 0..4 {
        let mut runs = Vec::new();
        for mode in [Mode::Sequential, Mode::Streaming { staleness: 0 }] {
            let mut world = World::new(config(mode), 3, seed);
            world.doubled = 0.2;
            world.start();
            world.run(|world| world.batches.len() >= STEPS);
            runs.push(seen(&world));
        }
        assert_eq!(runs[0], runs[1]);
        assert_eq!(runs[0], by_hand(STEPS as u64, &config(Mode::Sequential)));
    }
}

#[test]
fn pacing_makes_nothing_to_be_thrown_away() {
    for staleness in [1, 2, 4] {
        for seed in 0..3 {
            let mut world = World::new(config(Mode::Streaming { staleness }), 5, seed);
            world.start();
            world.run(|world| world.batches.len() >= 40);
            let tally = world.buffer.tally();
            assert_eq!((tally.refused.len(), tally.reissued), (0, 0), "S = {staleness}: {tally:?}");
            assert!(tally.lags[usize::try_from(staleness).unwrap() + 1..].iter().all(|many| *many == 0));
        }
    }
}

#[test]
fn the_learner_does_not_wait_when_it_need_not() {
    let time = |mode| {
        let mut world = World::new(config(mode), 5, 1);
        world.start();
        world.run(|world| world.batches.len() >= 30);
        (world.now - Time::ZERO).as_secs_f64()
    };
    let (sequential, streaming) = (time(Mode::Sequential), time(Mode::Streaming { staleness: 2 }));
    // An update takes 100 ms: 3 s for 30 of them is the least.
    println!("30 updates: sequential {sequential:.2} s, S = 2 {streaming:.2} s");
    assert!(streaming < 4.0 && sequential > 1.5 * streaming, "{sequential} {streaming}");
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let run = || {
        let mut world = World::new(config(Mode::Streaming { staleness: 2 }), 4, 9);
        world.doubled = 0.3;
        world.start();
        world.run(|world| world.batches.len() >= 20);
        (world.now, seen(&world))
    };
    assert_eq!(run(), run());
}

#[test]
fn members_of_a_dead_and_of_a_hung_sampler_go_to_others() {
    for seed in 0..3 {
        let mut world = World::new(config(Mode::Streaming { staleness: 2 }), 4, seed);
        world.nodes[1].hung = true;
        world.start();
        world.run(|world| world.batches.len() >= 5);
        world.kill_sampler(2);
        world.run(|world| world.batches.len() >= 25);
        assert!(world.buffer.tally().reissued > 0);
    }
}

#[test]
fn a_learner_that_waits_says_for_whom() {
    let mut world = World::new(config(Mode::Streaming { staleness: 1 }), 1, 1);
    world.nodes[0].hung = true;
    world.at(Duration::ZERO, Event::ToBuffer(BufferInput::Want));
    world.run(|world| world.queue.is_empty());
    assert_eq!(world.buffer.awaits(), LearnerAwaits::Version { step: 0 });
    assert_eq!(world.nodes[0].machine.status().awaits, SamplerAwaits::Trainer);
    world.publish(0);
    world.run(|world| world.now >= Time::from_millis(20) && world.queue.len() <= 1);
    assert_eq!(world.buffer.awaits(), LearnerAwaits::Sampler);
    world.connect(0);
    let soon = world.now + Duration::from_secs(1);
    world.at(Duration::from_secs(1), Event::WakeBuffer);
    world.run(|world| world.now >= soon);
    let longest = Some(key(0).node_id());
    assert_eq!(world.buffer.awaits(), LearnerAwaits::Rollouts { ready: 0, batch: 3, longest });
    assert_eq!(world.nodes[0].machine.status().awaits, SamplerAwaits::Nothing);
}

#[test]
fn frames_count_once_however_often_they_come() {
    let mut world = World::new(config(Mode::Streaming { staleness: 2 }), 3, 2);
    world.doubled = 1.0;
    world.start();
    for round in 1..12 {
        world.run(|world| world.batches.len() >= 2 * round);
        let n = round % 3;
        world.disconnect(n);
        world.connect(n);
    }
    let tally = world.buffer.tally();
    let (_, _, held) = world.buffer.fill();
    assert_eq!(tally.taken, tally.used + held as u64 + world.refused(Refusal::Stale));
}

#[test]
fn nothing_acknowledged_is_lost_when_the_trainer_crashes() {
    let mut complete = 0;
    for (seed, period) in [(0, 1), (1, 1), (2, 2), (3, 3), (4, 3)] {
        let mut world = World::new(config(Mode::Streaming { staleness: 4 }), 3, seed);
        world.period = period;
        world.start();
        for crash in 1..4 {
            world.run(|world| world.batches.len() >= 6 * crash);
            // Somewhere in the middle of an update.
            let at = world.now + Duration::from_millis(37);
            world.at(Duration::from_millis(37), Event::WakeBuffer);
            world.run(|world| world.now >= at);
            world.crash_trainer();
            let open: BTreeSet<GroupId> = world.checkpoint.open.iter().copied().collect();
            let restored_step = world.checkpoint.step;
            // What was acknowledged and not learned before the checkpoint is on the trainer's disk.
            for (sampler, sequence) in &world.acked {
                let on_disk = world.disk.contains_key(&FrameKey { sampler: *sampler, sequence: *sequence });
                let settled = world.checkpoint.settled.iter().any(|(s, through)| s == sampler && sequence <= through);
                assert!(on_disk || settled, "frame {sequence} of {sampler:?} is lost");
            }
            let away = world.now + Duration::from_secs(5);
            world.at(Duration::from_secs(5), Event::WakeBuffer);
            world.run(|world| world.now >= away);
            world.restore_trainer();
            assert!(world.batches.iter().all(|batch| batch.step < restored_step));
            let again: BTreeSet<GroupId> = world.buffer.progress().open.into_iter().collect();
            assert!(open.is_subset(&again));
            assert!(world.buffer.fill().1 >= world.complete, "a complete group is not complete any more");
            complete += world.complete;
        }
        world.run(|world| world.batches.len() >= 24);
    }
    assert!(complete > 0, "the crashes hit an empty buffer");
}

/// What samplers made while the trainer was away is not sampled again by others.
#[test]
fn a_restored_trainer_hears_everybody_before_it_hands_anything_out() {
    let mut world = World::new(config(Mode::Streaming { staleness: 4 }), 3, 5);
    world.start();
    world.run(|world| world.batches.len() >= 4);
    world.crash_trainer();
    let away = world.now + Duration::from_secs(5);
    world.at(Duration::from_secs(5), Event::WakeBuffer);
    world.run(|world| world.now >= away);
    assert!(world.nodes.iter().any(|node| !node.disk.is_empty()), "nobody made anything meanwhile");
    world.restore_trainer();
    let batches = world.batches.len();
    world.run(|world| world.batches.len() >= batches + 10);
    assert_eq!(world.buffer.tally().refused, BTreeMap::new());
}

/// It crashed, or the network between them did.
#[test]
fn a_trainer_that_is_away_for_an_hour_finds_everything_as_it_left_it() {
    const HOUR: Duration = Duration::from_secs(3_600);
    for crashed in [true, false] {
        let mut world = World::new(config(Mode::Streaming { staleness: 4 }), 3, 6);
        world.limit = Time::ZERO + HOUR * 2;
        world.start();
        world.run(|world| world.batches.len() >= 4);
        if crashed {
            world.crash_trainer();
        } else {
            (0..3).for_each(|n| world.disconnect(n));
        }
        let back = world.now + HOUR;
        world.at(HOUR, Event::WakeBuffer);
        world.run(|world| world.now >= back);
        let kept: Vec<(NodeId, u64)> = (0..3)
            .flat_map(|n| world.nodes[n].disk.keys().map(move |sequence| (key(n).node_id(), *sequence)))
            .collect();
        assert!(!kept.is_empty(), "nobody made anything meanwhile");
        for node in &world.nodes {
            let status = node.machine.status();
            assert_eq!((status.awaits, status.running), (SamplerAwaits::Trainer, 0));
        }
        let batches = world.batches.len();
        if crashed {
            world.restore_trainer();
        } else {
            assert_eq!(world.buffer.awaits(), LearnerAwaits::Sampler);
            (0..3).for_each(|n| world.connect(n));
        }
        world.run(|world| world.batches.len() >= batches + 10 && kept.iter().all(|frame| world.acked.contains(frame)));
        assert!(world.now < back + Duration::from_secs(30), "it took until {}", world.now);
    }
}

#[test]
fn a_restarted_sampler_sends_what_it_had_kept() {
    let mut world = World::new(config(Mode::Streaming { staleness: 4 }), 2, 3);
    world.start();
    world.run(|world| world.batches.len() >= 3);
    world.disconnect(0);
    world.run(|world| !world.nodes[0].disk.is_empty());
    world.kill_sampler(0);
    let kept: Vec<u64> = world.nodes[0].disk.keys().copied().collect();
    let reissued = world.buffer.tally().reissued;
    world.restart_sampler(0);
    world.run(|world| kept.iter().all(|sequence| world.acked.contains(&(key(0).node_id(), *sequence))));
    world.run(|world| kept.iter().all(|sequence| !world.nodes[0].disk.contains_key(sequence)));
    // What it had not sampled went to others at once, not when its time was up.
    assert!(world.buffer.tally().reissued > reissued && world.now < Time::from_millis(3_000));
    world.run(|world| world.batches.len() >= 12);
}

#[test]
fn what_a_sampler_cannot_read_just_now_is_sent_later() {
    let mut world = World::new(config(Mode::Streaming { staleness: 4 }), 2, 3);
    world.start();
    world.run(|world| world.batches.len() >= 3);
    world.disconnect(0);
    let unheard = |world: &World| -> Vec<u64> {
        let kept = world.nodes[0].disk.keys().copied();
        kept.filter(|sequence| !world.acked.contains(&(key(0).node_id(), *sequence))).collect()
    };
    world.run(|world| !unheard(world).is_empty());
    world.kill_sampler(0);
    world.unreadable_until = world.now + Duration::from_secs(5);
    world.restart_sampler(0);
    world.run(|world| unheard(world).is_empty());
    assert!(world.now >= world.unreadable_until && world.nodes[0].lost.is_empty(), "{:?}", world.nodes[0].lost);
}

#[test]
fn a_full_disk_at_the_trainer_delays_and_loses_nothing() {
    let mut world = World::new(config(Mode::Streaming { staleness: 2 }), 3, 4);
    world.trainer_disk_full_until = Time::from_millis(3_000);
    world.start();
    world.run(|world| world.now > Time::from_millis(1_500));
    assert_eq!(world.buffer.awaits(), LearnerAwaits::Disk);
    assert!(world.batches.is_empty() && world.acked.is_empty());
    world.run(|world| world.batches.len() >= 5);
}

/// The trainer is away, two rollouts are under way and one waits; the spool has room for less than a frame, or for about one.
#[test]
fn a_full_spool_stops_or_drops_as_it_was_told() {
    for (when_full, spool_bytes) in [(WhenFull::Stop, 100), (WhenFull::DropOldest, 400)] {
        let mut world = World::new(config(Mode::Streaming { staleness: 4 }), 1, 4);
        let cfg = SamplerConfig { spool_bytes, when_full, ..SamplerConfig::new(policy(), 2) };
        world.nodes[0].machine = Sampler::new(cfg, network(), key(0), &[]);
        world.start();
        world.run(|world| {
            let status = world.nodes[0].machine.status();
            status.running == 2 && status.queued > 0
        });
        world.disconnect(0);
        let later = world.now + Duration::from_millis(1_000);
        world.at(Duration::from_millis(1_000), Event::WakeSampler(0));
        world.run(|world| world.now >= later);
        let (status, lost) = (world.nodes[0].machine.status(), world.nodes[0].lost.get(&Refusal::SpoolFull));
        match when_full {
            WhenFull::Stop => {
                assert_eq!((status.awaits, status.queued > 0, lost), (SamplerAwaits::Spool, true, None));
            }
            WhenFull::DropOldest => {
                assert!(status.spooled.1 < spool_bytes && status.queued == 0 && lost.is_some(), "{status:?} {lost:?}");
            }
        }
        world.connect(0);
        world.run(|world| world.batches.len() >= 3);
    }
}

/// A sampler that comes back with an empty disk goes on above every number that the trainer knows, not in the first gap: in the gap it
/// would soon come to a number that is settled, and its frame would be taken for the old one.
#[test]
fn numbers_go_on_above_all_that_the_trainer_knows() {
    let mut buffer = Buffer::new(config(Mode::Streaming { staleness: 1 })).unwrap();
    let (from, mut rng, mut out) = (key(0).node_id(), Rng::from_u64(1), Outbox::new());
    let mut handle = |input| {
        let mut cx = Ctx { now: Time::from_millis(1), wall: WallTime::default(), rng: &mut rng };
        buffer.handle(&mut cx, input, &mut out);
        out.drain().collect::<Vec<_>>()
    };
    handle(BufferInput::Published { version: version(0), step: 0 });
    let nothing = || scripted(GroupId(99), 0, Text::new("arithmetic").unwrap(), 1, version(0));
    for sequence in [1, 2, 4, 5] {
        handle(BufferInput::Frame { from, frame: one_frame(0, sequence, &[nothing()]) });
    }
    let hello = Hello { policy: policy(), serving: None, slots: 2, first_unacknowledged: 1, boot: 2 };
    let effects = handle(BufferInput::Hello { from, hello });
    let told = effects.iter().find_map(|effect| match effect {
        BufferEffect::Send { message: Bulk::Hello(hello), .. } => Some(hello.first_unacknowledged),
        _ => None,
    });
    assert_eq!(told, Some(6));
}

fn one_frame(author: usize, sequence: u64, rollouts: &[Rollout]) -> Verified<RolloutFrame> {
    let frame = RolloutFrame::new(policy(), sequence, WallTime::from_millis(1), rollouts).unwrap();
    Verified::sign(&key(author), &network(), frame).unwrap()
}

/// Every reason for which a rollout does not count, in one frame, each told apart and told to its sampler.
#[test]
fn what_does_not_count_is_named() {
    let cfg = config(Mode::Streaming { staleness: 1 });
    let mut buffer = Buffer::new(cfg.clone()).unwrap();
    let mut rng = Rng::from_u64(1);
    let mut out = Outbox::new();
    let mut handle = |buffer: &mut Buffer, input| {
        let mut cx = Ctx { now: Time::from_millis(1), wall: WallTime::default(), rng: &mut rng };
        buffer.handle(&mut cx, input, &mut out);
        out.drain().collect::<Vec<_>>()
    };
    let hello = |slots| Hello { policy: policy(), serving: None, slots, first_unacknowledged: 1, boot: 1 };
    for step in 0..=2 {
        handle(&mut buffer, BufferInput::Stepped(step));
        handle(&mut buffer, BufferInput::Published { version: version(step), step });
    }
    let hired = |buffer: &mut Buffer| buffer.fill().0;
    handle(&mut buffer, BufferInput::Hello { from: key(0).node_id(), hello: hello(16) });
    assert_eq!(hired(&mut buffer), 0, "who holds no lease is given nothing");
    handle(&mut buffer, BufferInput::Hired(key(0).node_id()));
    let (environment, seed) = cfg.plan.task(GroupId(1));
    let good = |member, at| scripted(GroupId(1), member, environment.clone(), seed, version(at));
    let (other_environment, other_seed) = cfg.plan.task(GroupId(2));
    let mut wrong_task = scripted(GroupId(2), 0, other_environment, other_seed, version(2));
    wrong_task.seed ^= 1;
    let mut unknown = good(2, 2);
    unknown.segments[0].version = version(77);
    let mut long = good(3, 2);
    long.completion = vec![1; 10_000];
    long.log_probs = vec![-1.0; 10_000];
    let closed = scripted(GroupId(99), 0, environment.clone(), seed, version(2));
    let beyond = good(9, 2);
    let items = [good(0, 2), good(1, 0), unknown, long, wrong_task, closed, beyond];
    let effects = handle(&mut buffer, BufferInput::Frame { from: key(0).node_id(), frame: one_frame(0, 1, &items) });
    let mut reasons: Vec<_> = effects
        .iter()
        .filter_map(|effect| match effect {
            BufferEffect::Refused { reason, .. } => Some(*reason),
            _ => None,
        })
        .collect();
    reasons.sort_unstable();
    assert_eq!(
        reasons,
        [
            Refusal::Stale,
            Refusal::UnknownVersion,
            Refusal::ClosedGroup,
            Refusal::WrongTask,
            Refusal::NotAssigned,
            Refusal::TooLong
        ]
    );
    let persisted = FrameKey { sampler: key(0).node_id(), sequence: 1 };
    let acked = handle(&mut buffer, BufferInput::Persisted(persisted));
    assert!(acked.iter().any(|effect| matches!(
        effect,
        BufferEffect::Send { message: Bulk::Ack { sequence: 1, taken: 1, refused }, .. } if refused.len() == 6
    )));
    // A copy in a frame of its own, and one by somebody who was never asked.
    handle(&mut buffer, BufferInput::Hello { from: key(1).node_id(), hello: hello(0) });
    for (author, item, reason) in [(0, good(0, 2), Refusal::Duplicate), (1, good(1, 2), Refusal::NotAssigned)] {
        let frame = one_frame(author, 2, &[item]);
        let effects = handle(&mut buffer, BufferInput::Frame { from: key(author).node_id(), frame });
        assert!(
            effects.iter().any(|e| matches!(e, BufferEffect::Refused { reason: r, .. } if *r == reason)),
            "{effects:?}"
        );
    }
    // Somebody else's frame does not count for who brings it.
    let frame = one_frame(0, 3, &[good(1, 2)]);
    let effects = handle(&mut buffer, BufferInput::Frame { from: key(1).node_id(), frame });
    let nack = |e: &BufferEffect| {
        matches!(e, BufferEffect::Send { message: Bulk::Nack { reason: Refusal::WrongPolicy, .. }, .. })
    };
    assert!(effects.iter().any(nack));
}

/// An update that changes no weight makes no new version. Who serves it must not wait for another that never comes.
#[test]
fn a_version_that_stays_the_same_stands_for_the_later_step() {
    let mut sampler = Sampler::new(SamplerConfig::new(policy(), 2), network(), key(0), &[]);
    let (mut rng, mut out) = (Rng::from_u64(1), Outbox::new());
    let mut handle = |input| {
        let mut cx = Ctx { now: Time::from_millis(1), wall: WallTime::default(), rng: &mut rng };
        sampler.handle(&mut cx, input, &mut out);
        out.drain().collect::<Vec<_>>()
    };
    handle(SamplerInput::Connected);
    handle(SamplerInput::Serving { version: version(7), step: 7 });
    let assign = |version, step| {
        let credit = Credit { until: 1, version, step, staleness: 0 };
        let work = Assignment {
            group: GroupId(1),
            environment: Text::new("arithmetic").unwrap(),
            seed: 1,
            first: 0,
            members: 1,
            want: Want::AtLeast { step: 8 },
            deadline_ms: 1_000,
        };
        SamplerInput::Message(Bulk::Assign { credit, work: List::truncated([work]) })
    };
    let begins = |effects: &[SamplerEffect]| effects.iter().any(|effect| matches!(effect, SamplerEffect::Start { .. }));
    assert!(!begins(&handle(assign(version(8), 8))), "another version is to come");
    let effects = handle(assign(version(7), 8));
    assert!(begins(&effects), "{effects:?}");
    let told = |effect: &SamplerEffect| matches!(effect, SamplerEffect::Send(Bulk::Serving { step: 8, .. }));
    assert!(effects.iter().any(told), "{effects:?}");
}
