//! The sampler's side of the stream: begins what it is asked for with the right weights, keeps what it made until the trainer has it.
//!
//! ```text
//!  trainer ──Assign──▶ work ──right version?──▶ Start ──▶ engine
//!                       │ no: Refresh                      │ Sampled
//!                       ▼                                  ▼
//!                   waits, and says for what        frame ──Persist──▶ spool ──Send──▶ trainer
//!                                                                        ▲──── Ack: Forget
//! ```
//!
//! 1. A member is begun when a slot is free, the weights are those that its assignment wants, and the spool has room for its result.
//! 2. Rollouts are cut into signed frames by size and age, or at once when nothing else runs.
//! 3. A frame is sent when it is on this node's disk, and forgotten when the trainer has it on its own. After a reconnection or a
//!    restart everything that is not acknowledged is sent again, in order, a window at a time.
//! 4. While the trainer is away the spool fills; then sampling stops, or the oldest frame goes and is counted ([`WhenFull`]).
//! 5. What will not be delivered is given up at once, so that another can sample it.
//!
//! [`Sampler::status`] always names what is waited for.

mod spool;
mod work;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use chorus_machine::{Ctx, Machine, Outbox, Time, earliest};
use chorus_protocol::policy::{PolicyId, Version};
use chorus_protocol::rollout::{Bulk, Credit, GroupId, Hello, Refusal, Rollout, RolloutFrame};
use chorus_protocol::{List, NetworkId, SecretKey, Text, Verified};

use spool::Spool;
use work::Work;

/// Members that may wait to be begun.
pub const MAX_WORK: usize = 65_536;
/// Rollouts in one frame, unless it is cut earlier.
pub const MAX_CUT: usize = 1024;

/// What happens when the spool is full while the trainer is away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenFull {
    /// Nothing new is begun.
    Stop,
    /// The oldest frame goes, and is counted.
    DropOldest,
}

/// What an operator may set.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerConfig {
    /// For whose policy.
    pub policy: PolicyId,
    /// Rollouts that the engine samples at a time.
    pub slots: u16,
    /// Size at which a frame is cut. Default 256 KiB.
    pub frame_bytes: usize,
    /// Age at which a frame is cut. Default 100 ms.
    pub frame_age: Duration,
    /// Bytes on disk that are not acknowledged. Default 256 MiB.
    pub spool_bytes: usize,
    /// What happens at that.
    pub when_full: WhenFull,
    /// Frames sent and not acknowledged. Default 16.
    pub window: usize,
    /// How long a frame is left alone that the disk or the trainer did not take. Default 500 ms.
    pub pause: Duration,
}

impl SamplerConfig {
    /// Returns the settings for a policy, with everything else at its default.
    #[must_use]
    pub fn new(policy: PolicyId, slots: u16) -> Self {
        Self {
            policy,
            slots,
            frame_bytes: 256 << 10,
            frame_age: Duration::from_millis(100),
            spool_bytes: 256 << 20,
            when_full: WhenFull::Stop,
            window: 16,
            pause: Duration::from_millis(500),
        }
    }
}

/// What a sampler is told.
#[derive(Debug)]
pub enum SamplerInput {
    /// The connection to the trainer stands.
    Connected,
    /// It is gone.
    Disconnected,
    /// The trainer said something.
    Message(Bulk),
    /// The engine begins every rollout with these weights from now on.
    Serving {
        /// The version.
        version: Version,
        /// Its step.
        step: u64,
    },
    /// The engine is done with a member.
    Sampled(Rollout),
    /// The engine could not.
    Failed {
        /// The group.
        group: GroupId,
        /// The member.
        member: u16,
    },
    /// A frame is on disk.
    Persisted(u64),
    /// The disk did not take a frame.
    PersistFailed(u64),
    /// A frame could not be read just now; it may be there all the same.
    LoadFailed(u64),
    /// A frame from the disk, or none if it is not there any more.
    Loaded {
        /// Its number.
        sequence: u64,
        /// The frame.
        frame: Option<Verified<RolloutFrame>>,
    },
}

/// What a sampler wants done.
#[derive(Debug)]
pub enum SamplerEffect {
    /// Send this to the trainer.
    Send(Bulk),
    /// Sample a member, with the weights that are served.
    Start {
        /// The group.
        group: GroupId,
        /// The member.
        member: u16,
        /// The environment.
        environment: Text<96>,
        /// The task's seed.
        seed: u64,
        /// The version that is served now.
        version: Version,
    },
    /// Work waits for these weights: fetch and load them first.
    Refresh {
        /// The version.
        version: Version,
        /// Its step.
        step: u64,
    },
    /// Write a frame, and say [`SamplerInput::Persisted`] or [`SamplerInput::PersistFailed`].
    Persist {
        /// Its number.
        sequence: u64,
        /// Its signed form.
        frame: Verified<RolloutFrame>,
    },
    /// Read a frame, and say [`SamplerInput::Loaded`].
    Load(u64),
    /// Delete a frame.
    Forget(u64),
    /// What the trainer made of a frame: the answer to "am I being counted?".
    Counted {
        /// Its number.
        sequence: u64,
        /// Rollouts that count.
        taken: u32,
        /// Rollouts that do not, by reason.
        refused: Vec<(Refusal, u32)>,
    },
    /// Rollouts that were sampled, or asked for, and will not be delivered.
    Lost {
        /// How many.
        rollouts: u32,
        /// Why.
        reason: Refusal,
    },
}

/// What a sampler that does nothing waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SamplerAwaits {
    /// Nothing: all slots are busy.
    Nothing,
    /// The connection to the trainer.
    Trainer,
    /// The trainer to hand out work: it has enough under way.
    Work,
    /// Weights of this step, or later ones.
    Version {
        /// The step.
        step: u64,
        /// The version, where only one will do.
        exactly: Option<Version>,
    },
    /// The trainer to acknowledge frames: the spool is full.
    Spool,
    /// The disk to take frames.
    Disk,
}

/// Where a sampler stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SamplerStatus {
    /// The version that it serves, and its step.
    pub serving: Option<(Version, u64)>,
    /// Where the trainer stands.
    pub credit: Option<Credit>,
    /// Members being sampled.
    pub running: usize,
    /// Members that wait.
    pub queued: usize,
    /// Frames that are not acknowledged, and their bytes.
    pub spooled: (usize, usize),
    /// What it waits for.
    pub awaits: SamplerAwaits,
}

/// One policy's sampler.
#[derive(Debug)]
pub struct Sampler {
    cfg: SamplerConfig,
    network: NetworkId,
    key: SecretKey,
    connected: bool,
    /// Tells this process from the one before it.
    boot: Option<u64>,
    /// Members received since the hello; the trainer counts the same.
    received: u64,
    credit: Option<Credit>,
    serving: Option<(Version, u64)>,
    work: VecDeque<Work>,
    running: BTreeMap<(GroupId, u16), Work>,
    /// What [`SamplerEffect::Refresh`] asked for last.
    refreshing: Option<Version>,
    rollouts: Vec<Rollout>,
    rollout_bytes: usize,
    oldest_rollout: Option<Time>,
    spool: Spool,
}

impl Sampler {
    /// Makes a sampler. `spool` is what its disk holds: numbers, bytes and rollouts of frames that were not acknowledged.
    #[must_use]
    pub fn new(cfg: SamplerConfig, network: NetworkId, key: SecretKey, spool: &[(u64, usize, u32)]) -> Self {
        Self {
            cfg,
            network,
            key,
            connected: false,
            boot: None,
            received: 0,
            credit: None,
            serving: None,
            work: VecDeque::new(),
            running: BTreeMap::new(),
            refreshing: None,
            rollouts: Vec::new(),
            rollout_bytes: 0,
            oldest_rollout: None,
            spool: Spool::new(spool),
        }
    }

    fn connect(&mut self, cx: &mut Ctx<'_>, out: &mut Outbox<SamplerEffect>) {
        let boot = *self.boot.get_or_insert_with(|| cx.rng.next_u64());
        self.connected = true;
        self.received = 0;
        self.spool.reconnect();
        out.push(SamplerEffect::Send(Bulk::Hello(Hello {
            policy: self.cfg.policy.clone(),
            serving: self.serving,
            slots: self.cfg.slots,
            first_unacknowledged: self.spool.first_unacknowledged(),
            boot,
        })));
    }

    fn message(&mut self, now: Time, message: Bulk, out: &mut Outbox<SamplerEffect>) {
        match message {
            Bulk::Hello(hello) if hello.policy == self.cfg.policy => self.spool.trainer_has(hello.first_unacknowledged),
            Bulk::Assign { credit, work } => self.assigned(now, credit, work.into_vec(), out),
            Bulk::Ack { sequence, taken, refused } if self.spool.acknowledged(sequence) => {
                out.push(SamplerEffect::Forget(sequence));
                out.push(SamplerEffect::Counted { sequence, taken, refused: refused.into_vec() });
            }
            Bulk::Nack { sequence, reason, retry_ms } if reason.is_retryable() => {
                self.spool.retry(sequence, now + Duration::from_millis(u64::from(retry_ms)));
            }
            Bulk::Nack { sequence, reason, .. } => {
                if let Some(rollouts) = self.spool.remove(sequence) {
                    out.push(SamplerEffect::Forget(sequence));
                    out.push(SamplerEffect::Lost { rollouts, reason });
                }
            }
            _ => {}
        }
    }

    pub(super) fn serves(&mut self, version: Version, step: u64, out: &mut Outbox<SamplerEffect>) {
        self.serving = Some((version, step));
        self.refreshing = None;
        if self.connected {
            out.push(SamplerEffect::Send(Bulk::Serving { version, step }));
        }
    }

    fn sampled(&mut self, now: Time, rollout: Rollout) {
        self.running.remove(&(rollout.group, rollout.member));
        self.rollout_bytes += rollout.weight();
        self.rollouts.push(rollout);
        self.oldest_rollout.get_or_insert(now);
    }

    fn is_time_to_cut(&self, now: Time) -> bool {
        let old = self.oldest_rollout.is_some_and(|at| at + self.cfg.frame_age <= now);
        let idle = self.running.is_empty() && !self.rollouts.is_empty();
        old || idle || self.rollout_bytes >= self.cfg.frame_bytes || self.rollouts.len() >= MAX_CUT
    }

    /// Cuts what was sampled into a signed frame; into several if one cannot hold it.
    fn cut(&mut self, cx: &Ctx<'_>, out: &mut Outbox<SamplerEffect>) {
        (self.rollout_bytes, self.oldest_rollout) = (0, None);
        let mut parts = vec![std::mem::take(&mut self.rollouts)];
        while let Some(part) = parts.pop() {
            let sequence = self.spool.next_sequence();
            let frame = RolloutFrame::new(self.cfg.policy.clone(), sequence, cx.wall, &part).ok();
            let signed = frame.and_then(|frame| Verified::sign(&self.key, &self.network, frame).ok());
            match signed {
                Some(frame) => {
                    self.spool.write(sequence, frame.clone(), part.len());
                    out.push(SamplerEffect::Persist { sequence, frame });
                }
                // Too much for one frame, or one of them breaks a rule: halves find out which.
                None if part.len() > 1 => {
                    let (first, second) = part.split_at(part.len() / 2);
                    parts.extend([second.to_vec(), first.to_vec()]);
                }
                None => {
                    let members = part.iter().map(|rollout| (rollout.group, rollout.member));
                    self.give_up(members.collect(), Refusal::Failed, out);
                }
            }
        }
    }

    /// Tells the trainer what will not come, and whoever watches.
    fn give_up(&self, members: Vec<(GroupId, u16)>, reason: Refusal, out: &mut Outbox<SamplerEffect>) {
        if members.is_empty() {
            return;
        }
        let report = |(group, member): &(GroupId, u16)| chorus_protocol::rollout::WorkReport {
            group: *group,
            member: *member,
            reason,
        };
        if self.connected {
            for part in members.chunks(256) {
                out.push(SamplerEffect::Send(Bulk::GiveUp(List::truncated(part.iter().map(report)))));
            }
        }
        let rollouts = u32::try_from(members.len()).unwrap_or(u32::MAX);
        out.push(SamplerEffect::Lost { rollouts, reason });
    }

    /// Returns where it stands.
    #[must_use]
    pub fn status(&self) -> SamplerStatus {
        SamplerStatus {
            serving: self.serving,
            credit: self.credit,
            running: self.running.len(),
            queued: self.work.len(),
            spooled: self.spool.size(),
            awaits: self.awaits(),
        }
    }

    fn is_full(&self) -> bool {
        self.spool.size().1 + self.rollout_bytes >= self.cfg.spool_bytes
    }

    fn awaits(&self) -> SamplerAwaits {
        if self.running.len() >= usize::from(self.cfg.slots) {
            return SamplerAwaits::Nothing;
        }
        if self.spool.disk_failed() {
            return SamplerAwaits::Disk;
        }
        if self.is_full() {
            return SamplerAwaits::Spool;
        }
        match self.work.front() {
            Some(work) => work.awaits(),
            None if !self.connected => SamplerAwaits::Trainer,
            None => SamplerAwaits::Work,
        }
    }
}

impl Machine for Sampler {
    type Input = SamplerInput;
    type Effect = SamplerEffect;

    fn handle(&mut self, cx: &mut Ctx<'_>, input: SamplerInput, out: &mut Outbox<SamplerEffect>) {
        match input {
            SamplerInput::Connected => self.connect(cx, out),
            SamplerInput::Disconnected => self.connected = false,
            SamplerInput::Message(message) => self.message(cx.now, message, out),
            SamplerInput::Serving { version, step } => self.serves(version, step, out),
            SamplerInput::Sampled(rollout) => self.sampled(cx.now, rollout),
            SamplerInput::Failed { group, member } => {
                if self.running.remove(&(group, member)).is_some() {
                    self.give_up(vec![(group, member)], Refusal::Failed, out);
                }
            }
            SamplerInput::Persisted(sequence) => self.spool.persisted(sequence),
            SamplerInput::PersistFailed(sequence) => self.spool.persist_failed(sequence, cx.now + self.cfg.pause),
            SamplerInput::LoadFailed(sequence) => self.spool.load_failed(sequence, cx.now + self.cfg.pause),
            SamplerInput::Loaded { sequence, frame } => {
                if let Some(rollouts) = self.spool.loaded(sequence, frame) {
                    out.push(SamplerEffect::Forget(sequence));
                    out.push(SamplerEffect::Lost { rollouts, reason: Refusal::Disk });
                }
            }
        }
        self.pump(cx, out);
    }

    fn deadline(&self) -> Option<Time> {
        let cut = self.oldest_rollout.map(|at| at + self.cfg.frame_age);
        let late = self.work.iter().map(|work| work.deadline).min();
        [cut, late, self.spool.retry_at()].into_iter().fold(None, earliest)
    }

    fn expire(&mut self, cx: &mut Ctx<'_>, out: &mut Outbox<SamplerEffect>) {
        self.pump(cx, out);
    }
}

impl Sampler {
    /// Does whatever has become possible: cut, write, send, begin.
    fn pump(&mut self, cx: &mut Ctx<'_>, out: &mut Outbox<SamplerEffect>) {
        self.drop_late(cx.now, out);
        if !self.connected && self.cfg.when_full == WhenFull::DropOldest {
            while self.is_full() {
                let Some((sequence, rollouts)) = self.spool.drop_oldest() else { break };
                out.push(SamplerEffect::Forget(sequence));
                out.push(SamplerEffect::Lost { rollouts, reason: Refusal::SpoolFull });
            }
        }
        self.begin(out);
        if self.is_time_to_cut(cx.now) {
            self.cut(cx, out);
        }
        self.spool.pump(cx.now, self.connected.then_some(self.cfg.window), out);
    }
}
