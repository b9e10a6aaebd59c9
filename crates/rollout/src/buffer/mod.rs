//! The trainer's side of the stream: hands out groups, takes rollouts in, gives batches to the learner.
//!
//! ```text
//!            Assign ◀── desk (who samples what, how far) ◀── open groups
//!  sampler                                                      │
//!            Frame ───▶ admit (once, fresh, asked for) ──Persist──▶ disk
//!            Ack  ◀───────────────────────────────────Persisted──┘
//!                        complete groups ──Want──▶ Batch ──▶ learner ──Stepped, Published, Checkpointed──▶
//! ```
//!
//! 1. The learner says [`BufferInput::Want`] when it is idle and gets one [`BufferEffect::Batch`]: the groups whose rollouts are oldest,
//!    each complete, every rollout within the bound `S`.
//! 2. Groups are opened only when they can be used within `S` ([`crate::pacing`]) and when there is room for all of their members, so a
//!    sampler that does what it is told is never refused for lack of room, and never samples in vain.
//! 3. A batch waits for a group that could not be used later (its *last call*): by then it is too old, or later updates have no room for
//!    it. It waits until its samplers' time is up. With `S = 0` every group is on its last call, which makes it the sequential mode: [`Mode::Sequential`] differs only in that each assignment names the
//!    very version and that groups are opened when the learner wants them.
//! 4. A frame counts once: by its sampler's number, and each rollout by its place in its group. It is acknowledged when it is on disk.
//! 5. Members of a sampler that is gone, late or gives up go to another. If both deliver, the first counts.
//! 6. Frames stay on disk until a checkpoint that does not need them any more; with it and them [`Buffer::restore`] goes on where the
//!    learner does, and nothing that was acknowledged is lost. A restored buffer first takes what samplers made meanwhile, and hands
//!    nothing out until the grace is over: so little is sampled twice.
//!
//! What does not count is counted too, by reason ([`Tally`]), and told to its sampler in the acknowledgement.

mod admit;
mod batch;
mod desk;
mod group;
mod progress;
mod reach;
mod sequences;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use chorus_machine::{Ctx, Machine, Outbox, Time, earliest};
use chorus_protocol::policy::{PolicyId, Version};
use chorus_protocol::rollout::{Bulk, GroupId, Hello, Refusal, Rollout, RolloutFrame};
use chorus_protocol::{NodeId, Text, Verified};

use crate::hiring::Track;
use crate::pacing::Pacing;
use crate::plan::Plan;
use desk::Session;
use group::{Group, Member};
pub use progress::Progress;
use reach::Reach;
use sequences::Sequences;

/// Samplers whose frame numbers are remembered.
pub const MAX_SAMPLERS: usize = 4096;
/// Frames that are held.
pub const MAX_FRAMES: usize = 65_536;
/// Versions whose steps are remembered.
pub const MAX_VERSIONS: usize = 256;
/// Groups beyond the last one in the checkpoint that may have been handed out before a crash.
const MAX_ADOPT: u64 = 4096;
/// Lags that are counted one by one; the last counts all above.
pub const LAGS: usize = 17;

/// How samplers and learner keep step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Every update waits for rollouts of its own weights.
    Sequential,
    /// Samplers go on while the learner learns.
    Streaming {
        /// How many steps the weights that wrote a rollout may be behind those that it updates.
        staleness: u32,
    },
}

/// What a user may set.
#[derive(Clone, Debug, PartialEq)]
pub struct BufferConfig {
    /// Whose rollouts.
    pub policy: PolicyId,
    /// How samplers and learner keep step.
    pub mode: Mode,
    /// Groups in a batch.
    pub batch: usize,
    /// Rollouts in a group.
    pub members: u16,
    /// Rollouts that may be held or under way. At least two batches.
    pub capacity: usize,
    /// Bytes that may be held or under way.
    pub capacity_bytes: usize,
    /// Bytes that one rollout may take ([`Rollout::weight`]).
    pub max_rollout_bytes: usize,
    /// How long a sampler has for a member at least. Default 30 s; slow samplers have more, as measured.
    pub patience: Duration,
    /// How long a sampler may be away before its members go to others, and how long a restored trainer lets samplers deliver what they
    /// have before it hands anything out. Default 3 s.
    pub grace: Duration,
    /// Which task a group has.
    pub plan: Plan,
}

/// A setting with which no buffer can work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Zero where something must be.
    #[error("trainer.{0} is 0; set it above 0")]
    Zero(&'static str),
    /// Two batches do not fit.
    #[error("trainer.{field} holds less than two batches; set it to {needed} or more")]
    TooSmall {
        /// The setting.
        field: &'static str,
        /// What two batches take.
        needed: usize,
    },
    /// No environment has a weight.
    #[error("no environment has a weight; name at least one in trainer.environments")]
    NoEnvironment,
}

impl BufferConfig {
    /// Returns the settings for a policy, with everything else at its default.
    #[must_use]
    pub fn new(policy: PolicyId, mode: Mode, plan: Plan) -> Self {
        Self {
            policy,
            mode,
            batch: 8,
            members: 8,
            capacity: 4096,
            capacity_bytes: 256 << 20,
            max_rollout_bytes: 64 << 10,
            patience: Duration::from_secs(30),
            grace: Duration::from_secs(3),
            plan,
        }
    }

    /// Checks that a buffer can work with these settings.
    ///
    /// # Errors
    /// [`ConfigError`] names the first setting that cannot stand.
    pub fn validate(&self) -> Result<(), ConfigError> {
        for (field, value) in [("batch", self.batch), ("members", usize::from(self.members))] {
            if value == 0 {
                return Err(ConfigError::Zero(field));
            }
        }
        let rollouts = self.batch.saturating_mul(usize::from(self.members)).saturating_mul(2);
        let bytes = rollouts.saturating_mul(self.max_rollout_bytes);
        for (field, value, needed) in
            [("capacity", self.capacity, rollouts), ("capacity_bytes", self.capacity_bytes, bytes)]
        {
            if value < needed {
                return Err(ConfigError::TooSmall { field, needed });
            }
        }
        if self.plan.environments.iter().all(|(_, weight)| *weight == 0) {
            return Err(ConfigError::NoEnvironment);
        }
        Ok(())
    }

    pub(crate) fn staleness(&self) -> u32 {
        match self.mode {
            Mode::Sequential => 0,
            Mode::Streaming { staleness } => staleness,
        }
    }
}

/// A frame: whose, and which.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FrameKey {
    /// The sampler.
    pub sampler: NodeId,
    /// Its number.
    pub sequence: u64,
}

/// What a buffer is told.
#[derive(Debug)]
pub enum BufferInput {
    /// The learner published a version, which it can restore after a crash.
    Published {
        /// The version.
        version: Version,
        /// Its step.
        step: u64,
    },
    /// The learner has nothing to do.
    Want,
    /// The learner did its update: these are its updates so far.
    Stepped(u64),
    /// A checkpoint with this progress is on disk.
    Checkpointed(Progress),
    /// A sampler is connected, and said hello.
    Hello {
        /// Who.
        from: NodeId,
        /// What it said.
        hello: Hello,
    },
    /// A sampler's connection is gone.
    Gone(NodeId),
    /// A node holds a lease to sample: from now on it is given members.
    Hired(NodeId),
    /// Its lease has ended: it is given no more. What it was given before still counts.
    Dismissed(NodeId),
    /// Rollouts, of the node that is connected and signed them.
    Frame {
        /// Who brought them.
        from: NodeId,
        /// The rollouts.
        frame: Verified<RolloutFrame>,
    },
    /// A sampler's `GiveUp` or `Serving`. Others are ignored.
    Message {
        /// Who.
        from: NodeId,
        /// What.
        message: Bulk,
    },
    /// A frame is on disk.
    Persisted(FrameKey),
    /// The disk did not take a frame.
    PersistFailed(FrameKey),
}

/// Complete groups for one update.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// The step of the weights that it updates.
    pub step: u64,
    /// The groups, by number.
    pub groups: Vec<BatchGroup>,
}

/// One group of a batch.
#[derive(Clone, Debug, PartialEq)]
pub struct BatchGroup {
    /// Its number.
    pub id: GroupId,
    /// Its environment.
    pub environment: Text<96>,
    /// Its task's seed.
    pub seed: u64,
    /// Its rollouts by member, each with who sampled it and how many steps its oldest weights are behind.
    pub rollouts: Vec<(NodeId, u64, Arc<Rollout>)>,
}

/// What a buffer wants done.
#[derive(Debug)]
pub enum BufferEffect {
    /// Send this.
    Send {
        /// To whom.
        to: NodeId,
        /// What.
        message: Bulk,
    },
    /// Write a frame, and say [`BufferInput::Persisted`] or [`BufferInput::PersistFailed`].
    Persist {
        /// Which.
        key: FrameKey,
        /// Its signed form.
        frame: Verified<RolloutFrame>,
    },
    /// Delete frames.
    Forget(Vec<FrameKey>),
    /// Learn from this. Answers [`BufferInput::Want`].
    Batch(Batch),
    /// A rollout does not count.
    Refused {
        /// Who sampled it.
        sampler: NodeId,
        /// Of which group.
        group: GroupId,
        /// Which.
        member: u16,
        /// Why.
        reason: Refusal,
    },
}

/// What became of all rollouts so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Taken into the buffer.
    pub taken: u64,
    /// Given to the learner.
    pub used: u64,
    /// Not counted, by reason.
    pub refused: BTreeMap<Refusal, u64>,
    /// Members that went to another sampler.
    pub reissued: u64,
    /// Used rollouts by lag in steps.
    pub lags: [u64; LAGS],
}

/// Why the learner has no batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LearnerAwaits {
    /// It does not: it learns, or did not ask.
    Nothing,
    /// The first version to be published, or one of a step that may be sampled.
    Version {
        /// The oldest step that would do.
        step: u64,
    },
    /// A sampler that is hired and connected.
    Sampler,
    /// Rollouts that are being sampled.
    Rollouts {
        /// Groups that are complete.
        ready: usize,
        /// Groups that a batch has.
        batch: usize,
        /// The sampler that was asked longest ago, and has not delivered.
        longest: Option<NodeId>,
    },
    /// A group that could not be used later, though enough others are complete.
    LastCall(GroupId),
    /// The disk to take frames.
    Disk,
}

/// A frame of which something is in the buffer.
#[derive(Clone, Debug)]
struct FrameState {
    durable: bool,
    /// Rollouts that a restart would need.
    live: u32,
    taken: u32,
    refused: BTreeMap<Refusal, u32>,
}

/// The replay buffer of one policy's trainer.
#[derive(Debug)]
pub struct Buffer {
    cfg: BufferConfig,
    step: u64,
    learning: bool,
    wanted: bool,
    batch_at: Option<Time>,
    last_call: Option<Time>,
    published: Option<(Version, u64, Time)>,
    versions: BTreeMap<Version, u64>,
    groups: BTreeMap<GroupId, Group>,
    opened: GroupId,
    /// Groups that may have been handed out before a crash, so that anybody may deliver them.
    adopt_until: GroupId,
    /// It was restored, and nobody has said hello since.
    alone: bool,
    /// Until then samplers send what they made while the trainer was away, and nothing is handed out that may be among it.
    quiet_until: Option<Time>,
    frames: BTreeMap<FrameKey, FrameState>,
    /// Frames of rollouts that updates used since the last checkpoint, by step.
    spent: BTreeMap<u64, Vec<FrameKey>>,
    settled: BTreeMap<NodeId, Sequences>,
    sessions: BTreeMap<NodeId, Session>,
    /// Who holds a lease to sample, connected or not.
    hired: BTreeSet<NodeId>,
    held_bytes: usize,
    disk_failed: bool,
    pacing: Pacing,
    reach: Reach,
    tally: Tally,
}

impl Buffer {
    /// Makes the buffer of a run that begins at step 0.
    ///
    /// # Errors
    /// [`ConfigError`] when the settings cannot stand.
    pub fn new(cfg: BufferConfig) -> Result<Self, ConfigError> {
        cfg.validate()?;
        Ok(Self {
            cfg,
            step: 0,
            learning: false,
            wanted: false,
            batch_at: None,
            last_call: None,
            published: None,
            versions: BTreeMap::new(),
            groups: BTreeMap::new(),
            opened: GroupId(0),
            adopt_until: GroupId(0),
            alone: false,
            quiet_until: None,
            frames: BTreeMap::new(),
            spent: BTreeMap::new(),
            settled: BTreeMap::new(),
            sessions: BTreeMap::new(),
            hired: BTreeSet::new(),
            held_bytes: 0,
            disk_failed: false,
            pacing: Pacing::default(),
            reach: Reach::default(),
            tally: Tally::default(),
        })
    }

    /// Goes on from a checkpoint: its progress, the versions whose steps are known, and the frames that are on disk. Returns the
    /// frames that count for nothing any more and may be deleted. Where two frames bring the same member, the first in `frames` counts,
    /// whichever did before.
    ///
    /// # Errors
    /// [`ConfigError`] when the settings cannot stand.
    pub fn restore(
        cfg: BufferConfig,
        progress: &Progress,
        versions: &[(Version, u64)],
        frames: &[Verified<RolloutFrame>],
    ) -> Result<(Self, Vec<FrameKey>), ConfigError> {
        let mut buffer = Self::new(cfg)?;
        buffer.step = progress.step;
        buffer.versions = versions.iter().rev().take(MAX_VERSIONS).copied().collect();
        buffer.opened = progress.opened;
        buffer.alone = true;
        buffer.adopt_until = GroupId(progress.opened.0.saturating_add(MAX_ADOPT));
        for id in &progress.open {
            buffer.adopt(*id);
        }
        for (sampler, through) in &progress.settled {
            buffer.settled.entry(*sampler).or_default().skip_to(through.saturating_add(1));
        }
        let mut idle = Vec::new();
        for frame in frames {
            let key = FrameKey { sampler: frame.author(), sequence: frame.sequence() };
            let state = buffer.take_in(key, frame, &mut |_, _, _| {});
            buffer.settled.entry(key.sampler).or_default().insert(key.sequence);
            if state.live == 0 {
                idle.push(key);
            } else {
                buffer.frames.insert(key, state);
                buffer.mark_durable(key);
            }
        }
        Ok((buffer, idle))
    }

    /// Returns what the learner's next checkpoint has to hold. Ask for it when an update is done and before the next batch is wanted.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let settled = self.settled.iter().map(|(sampler, settled)| (*sampler, settled.through));
        let open = self.groups.keys().copied().collect();
        Progress { step: self.step, opened: self.opened, open, settled: settled.collect() }
    }

    /// Returns what became of all rollouts so far.
    #[must_use]
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    /// Returns what was measured.
    #[must_use]
    pub fn pacing(&self) -> &Pacing {
        &self.pacing
    }

    /// Returns how long it takes from a version's publication until no sampler serves an older one, in seconds; a moving mean, once a
    /// version was everywhere.
    #[must_use]
    pub fn reach(&self) -> Option<f64> {
        self.reach.seconds()
    }

    /// Returns what was measured of each sampler that is connected.
    pub fn tracks(&self) -> impl Iterator<Item = Track> + '_ {
        self.sessions.iter().map(|(node, session)| Track {
            node: *node,
            rate: session.rate.per_second(),
            reliability: session.reliability(),
        })
    }

    /// Returns groups that are open, groups that are complete, and rollouts that are held.
    #[must_use]
    pub fn fill(&self) -> (usize, usize, usize) {
        let held = self.groups.values().flat_map(|group| &group.members);
        let held = held.filter(|member| matches!(member, Member::Here { .. })).count();
        (self.groups.len(), self.groups.values().filter(|group| group.is_ready()).count(), held)
    }

    /// The step that the next batch updates.
    fn next_step(&self) -> u64 {
        self.step + u64::from(self.learning)
    }

    fn count_refused(&mut self, reason: Refusal) {
        *self.tally.refused.entry(reason).or_default() += 1;
    }

    fn publish(&mut self, now: Time, version: Version, step: u64) {
        while self.versions.len() >= MAX_VERSIONS {
            let oldest = self.versions.iter().min_by_key(|(_, step)| **step).map(|(version, _)| *version);
            oldest.map(|version| self.versions.remove(&version));
        }
        self.versions.insert(version, step);
        self.published = Some((version, step, now));
        self.reach.published(now, step);
    }

    fn checkpointed(&mut self, progress: &Progress, out: &mut Outbox<BufferEffect>) {
        let later = self.spent.split_off(&progress.step);
        let spent = std::mem::replace(&mut self.spent, later);
        for key in spent.into_values().flatten() {
            self.let_go(key);
        }
        let idle: Vec<FrameKey> =
            self.frames.iter().filter(|(_, frame)| frame.durable && frame.live == 0).map(|(key, _)| *key).collect();
        // A frame may go only when the checkpoint itself knows it as settled.
        let known = |key: &FrameKey| {
            progress.settled.iter().any(|(sampler, through)| *sampler == key.sampler && key.sequence <= *through)
        };
        let idle: Vec<FrameKey> = idle.into_iter().filter(known).collect();
        for key in &idle {
            self.frames.remove(key);
        }
        if !idle.is_empty() {
            out.push(BufferEffect::Forget(idle));
        }
    }

    fn let_go(&mut self, key: FrameKey) {
        if let Some(frame) = self.frames.get_mut(&key) {
            frame.live = frame.live.saturating_sub(1);
        }
    }
}

impl Machine for Buffer {
    type Input = BufferInput;
    type Effect = BufferEffect;

    fn handle(&mut self, cx: &mut Ctx<'_>, input: BufferInput, out: &mut Outbox<BufferEffect>) {
        match input {
            BufferInput::Published { version, step } => {
                self.publish(cx.now, version, step);
                self.tell_credit(out);
            }
            BufferInput::Want => self.wanted = !self.learning,
            BufferInput::Stepped(step) => self.stepped(cx.now, step, out),
            BufferInput::Checkpointed(progress) => self.checkpointed(&progress, out),
            BufferInput::Hello { from, hello } => self.hello(from, &hello, out),
            BufferInput::Gone(from) => self.gone(cx.now, from),
            BufferInput::Hired(node) => self.hired(node),
            BufferInput::Dismissed(node) => self.dismissed(node),
            BufferInput::Frame { from, frame } => self.frame(cx.now, from, frame, out),
            BufferInput::Message { from, message } => self.message(cx.now, from, message),
            BufferInput::Persisted(key) => self.persisted(key, out),
            BufferInput::PersistFailed(key) => self.persist_failed(key, out),
        }
        self.pump(cx, out);
    }

    fn deadline(&self) -> Option<Time> {
        let out = self.groups.values().flat_map(|group| &group.members).filter_map(|member| match member {
            Member::Out { deadline, .. } => Some(*deadline),
            _ => None,
        });
        let gone = self.sessions.values().filter_map(|session| session.gone.map(|at| at + self.cfg.grace)).min();
        let call = self.last_call.map(|at| at + self.cfg.patience);
        [out.min(), gone, call, self.quiet_until].into_iter().fold(None, earliest)
    }

    fn expire(&mut self, cx: &mut Ctx<'_>, out: &mut Outbox<BufferEffect>) {
        self.expire_members(cx.now);
        self.pump(cx, out);
    }
}

impl Buffer {
    /// Does whatever has become possible: gives a batch, opens groups, hands out members.
    fn pump(&mut self, cx: &mut Ctx<'_>, out: &mut Outbox<BufferEffect>) {
        self.give_batch(cx.now, out);
        self.assign(cx.now, out);
    }
}

/// Groups that a batch could use, and what is in its way.
#[derive(Debug, Default)]
struct Ready {
    /// Complete groups, the most urgent first.
    complete: Vec<GroupId>,
    /// Incomplete groups that could not be used later.
    last_call: BTreeSet<GroupId>,
}
