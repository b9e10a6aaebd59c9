//! The sampler's role in a room: what `chorus_rollout::sampler` wants done is done here.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use chorus_core::RunId;
use chorus_engine::{EngineError, Order, VersionedEngine};
use chorus_machine::{Machine, Outbox};
use chorus_protocol::policy::{Manifest, Version};
use chorus_protocol::rollout::{Bulk, Rollout};
use chorus_protocol::{Admitted, NodeId};
use chorus_rollout::broadcast::{Awaits, BroadcastInput};
use chorus_rollout::buffer::FrameKey;
use chorus_rollout::sampler::{Sampler, SamplerAwaits, SamplerEffect, SamplerInput};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::commons::Commons;
use super::disk::{Done, Job};
use super::lease::{Grant, Lease};
use super::sampling::{self, Member};

/// What comes back from the engine.
pub(super) enum Drawn {
    /// A member is sampled.
    Sampled(Box<Rollout>),
    /// A member could not be.
    Failed { member: Member, why: String },
    /// A version serves, or never will.
    Loaded { version: Version, step: u64, result: Result<(), String> },
}

/// See the module.
pub(super) struct SamplerRole {
    sampler: Sampler,
    /// Absent on a node that only keeps versions.
    engine: Option<Arc<VersionedEngine>>,
    drawn: mpsc::Sender<Drawn>,
    counted: u64,
    refused: u64,
    lost: u64,
    tokens: u64,
    /// The version that is being loaded.
    loading: Option<Version>,
    /// Why the newest version does not serve.
    trouble: Option<String>,
    /// Whether the policy is trained, by the ledger, if that says.
    trained: Option<bool>,
    lease: Lease,
}

impl SamplerRole {
    pub(super) fn new(
        sampler: Sampler,
        engine: Option<Arc<VersionedEngine>>,
        drawn: mpsc::Sender<Drawn>,
        lease: Lease,
    ) -> Self {
        let (loading, trouble, trained) = (None, None, None);
        Self { sampler, engine, drawn, counted: 0, refused: 0, lost: 0, tokens: 0, loading, trouble, trained, lease }
    }

    /// What the ledger says of the policy now.
    pub(super) fn trained(&mut self, trained: Option<bool>) {
        self.trained = trained;
    }

    /// The policy's trainer, or somebody who takes himself for it, hires this node.
    pub(super) fn granted(&mut self, room: &Commons, grant: Grant) {
        self.lease.take(grant, &room.policy, self.tokens);
    }

    /// A run was taken back.
    pub(super) fn stopped(&mut self, run: RunId) {
        self.lease.stop(run);
    }

    /// Returns whether it has no lease, and nothing left that was sampled under one.
    pub(super) fn is_idle(&self) -> bool {
        let status = self.sampler.status();
        self.lease.left().is_none() && status.running == 0 && status.spooled.0 == 0
    }

    pub(super) fn wakes_at(&self) -> Option<Instant> {
        self.lease.wakes_at()
    }

    pub(super) fn tick(&mut self) {
        if self.lease.wakes_at().is_some_and(|at| at <= Instant::now()) {
            self.lease.tick(self.tokens, self.sampler.status().serving.map(|(version, _)| version));
        }
    }

    pub(super) fn deadline(&self) -> Option<chorus_machine::Time> {
        self.sampler.deadline()
    }

    pub(super) fn expire(&mut self, room: &mut Commons) {
        let mut out = Outbox::new();
        room.with(|cx| self.sampler.expire(cx, &mut out));
        self.carry_out(room, out);
    }

    pub(super) fn tell(&mut self, room: &mut Commons, input: SamplerInput) {
        let mut out = Outbox::new();
        room.with(|cx| self.sampler.handle(cx, input, &mut out));
        self.carry_out(room, out);
    }

    fn carry_out(&mut self, room: &mut Commons, mut out: Outbox<SamplerEffect>) {
        let mut effects: VecDeque<SamplerEffect> = out.drain().collect();
        while let Some(effect) = effects.pop_front() {
            let Some(input) = self.one(room, effect) else { continue };
            let mut out = Outbox::new();
            room.with(|cx| self.sampler.handle(cx, input, &mut out));
            effects.extend(out.drain());
        }
    }

    /// Does one thing. Returns what the machine has to hear at once.
    fn one(&mut self, room: &mut Commons, effect: SamplerEffect) -> Option<SamplerInput> {
        let own = |sequence| FrameKey { sampler: room.me, sequence };
        match effect {
            SamplerEffect::Send(message) => {
                if matches!(message, Bulk::Hello(_)) {
                    room.sessions.must_greet(room.policy.owner);
                }
                room.sessions.send(room.policy.owner, &message, None);
            }
            SamplerEffect::Start { group, member, environment, seed, .. } => {
                self.start(room.me, Member { group, member, environment, seed });
            }
            SamplerEffect::Refresh { version, .. } => {
                let ready = room.tell(BroadcastInput::Prefer(version));
                self.load(room, ready);
            }
            SamplerEffect::Persist { sequence, frame } => {
                let asked = room.disk.submit(Job::Persist { key: own(sequence), frame });
                return asked.is_err().then_some(SamplerInput::PersistFailed(sequence));
            }
            SamplerEffect::Load(sequence) => {
                let asked = room.disk.submit(Job::Load(own(sequence)));
                return asked.is_err().then_some(SamplerInput::LoadFailed(sequence));
            }
            SamplerEffect::Forget(sequence) => {
                let _ = room.disk.submit(Job::Delete(vec![own(sequence)]));
            }
            SamplerEffect::Counted { taken, refused, .. } => {
                self.counted += u64::from(taken);
                self.refused += refused.iter().map(|(_, many)| u64::from(*many)).sum::<u64>();
                for (reason, many) in refused {
                    tracing::debug!(many, ?reason, "rollouts do not count");
                }
            }
            SamplerEffect::Lost { rollouts, reason } => {
                self.lost += u64::from(rollouts);
                tracing::debug!(rollouts, ?reason, "rollouts will not be delivered");
            }
        }
        None
    }

    fn start(&self, me: NodeId, member: Member) {
        let Some(engine) = self.engine.clone() else { return };
        let drawn = self.drawn.clone();
        tokio::spawn(async move {
            // A panic in an environment or an engine is one member that failed, and nothing else.
            let work = tokio::spawn(sampling::sample(engine, me, member.clone()));
            let result = work.await.unwrap_or_else(|error| Err(error.to_string()));
            let result = match result {
                Ok(rollout) => Drawn::Sampled(Box::new(rollout)),
                Err(why) => Drawn::Failed { member, why },
            };
            // The room is gone when the process ends, and then nobody waits for this.
            let _ = drawn.send(result).await;
        });
    }

    /// Takes in what the engine brought.
    pub(super) fn drawn(&mut self, room: &mut Commons, drawn: Drawn) {
        match drawn {
            Drawn::Sampled(rollout) => {
                self.tokens += rollout.completion.len() as u64;
                self.tell(room, SamplerInput::Sampled(*rollout));
            }
            Drawn::Failed { member: Member { group, member, .. }, why } => {
                tracing::warn!(%why, group = group.0, member, "not sampled");
                self.tell(room, SamplerInput::Failed { group, member });
            }
            Drawn::Loaded { version, step, result } => {
                if self.loading == Some(version) {
                    self.loading = None;
                }
                match result {
                    Ok(()) => {
                        self.trouble = None;
                        tracing::debug!(?version, step, "serving");
                        self.tell(room, SamplerInput::Serving { version, step });
                    }
                    Err(why) => {
                        tracing::error!(?version, step, %why, "this version does not serve");
                        self.trouble = Some(format!("version {version:?} (step {step}) does not serve: {why}"));
                    }
                }
            }
        }
    }

    /// Takes in what the disk did. Chunks are the room's own affair.
    pub(super) fn disk_done(&mut self, room: &mut Commons, done: Done) {
        match done {
            Done::Persisted { key, ok: true } => self.tell(room, SamplerInput::Persisted(key.sequence)),
            Done::Persisted { key, ok: false } => self.tell(room, SamplerInput::PersistFailed(key.sequence)),
            Done::Unread(key) => self.tell(room, SamplerInput::LoadFailed(key.sequence)),
            Done::Loaded { key, frame } => self.tell(room, SamplerInput::Loaded { sequence: key.sequence, frame }),
            Done::Evidence(_)
            | Done::EvidenceRead(_)
            | Done::EvidenceLoaded { .. }
            | Done::Stored { .. }
            | Done::Read { .. } => {}
        }
    }

    /// Loads versions that are whole, beside the one that serves.
    pub(super) fn load(&mut self, room: &Commons, ready: Vec<Admitted<Manifest>>) {
        for manifest in &ready {
            tracing::debug!(version = ?manifest.version, step = manifest.step, "a version is whole");
        }
        let Some(serves) = &self.engine else { return };
        for manifest in ready {
            let (version, step) = (manifest.version, manifest.step);
            let (engine, drawn, directory) = (Arc::clone(serves), self.drawn.clone(), room.library.directory(version));
            self.loading = Some(version);
            tokio::spawn(async move {
                let result = match engine.load(version, step, &directory, Order::Forward).await {
                    // A newer one was faster, and told of itself.
                    Err(EngineError::OlderVersion { .. }) => return,
                    Ok(_) => Ok(()),
                    Err(error) => Err(error.to_string()),
                };
                let _ = drawn.send(Drawn::Loaded { version, step, result }).await;
            });
        }
    }

    /// Returns where it stands.
    pub(super) fn status(&self, room: &Commons) -> Value {
        let status = self.sampler.status();
        json!({
            "role": "sampler",
            "serving": status.serving.map(|(version, step)| json!({ "version": version, "step": step })),
            "waits_for": self.waits_for(&status.awaits, &room.broadcast.status().awaits),
            "hired_for_s": self.lease.left().map(|left| left.as_secs()),
            "running": status.running,
            "queued": status.queued,
            "spooled_frames": status.spooled.0,
            "spooled_bytes": status.spooled.1,
            "credit_until": status.credit.map(|credit| credit.until),
            "trainer_step": status.credit.map(|credit| credit.step),
            "counted": self.counted,
            "refused": self.refused,
            "lost": self.lost,
            "tokens": self.tokens,
        })
    }

    /// A disk that takes no version is named whatever that leads to: work that waits for weights is taken back after a while, and then
    /// neither work nor a lease is what is lacking.
    fn waits_for(&self, awaits: &SamplerAwaits, weights: &Awaits) -> String {
        if let Some(trouble) = &self.trouble {
            return trouble.clone();
        }
        match awaits {
            SamplerAwaits::Trainer => "the connection to the trainer".to_owned(),
            SamplerAwaits::Spool => "the trainer to acknowledge frames: the spool is full".to_owned(),
            SamplerAwaits::Disk => "the disk to take frames; is it full?".to_owned(),
            SamplerAwaits::Nothing if self.engine.is_some() => "nothing: every slot is busy".to_owned(),
            _ if *weights == Awaits::Disk => format!("a version, and that for {weights}"),
            SamplerAwaits::Nothing => format!("no work, since it only keeps versions; they wait for {weights}"),
            SamplerAwaits::Work if self.lease.left().is_none() && self.trained == Some(false) => {
                "nothing: the trainer's run has ended, and if it goes on, this node is hired again".to_owned()
            }
            SamplerAwaits::Work if self.lease.left().is_none() => {
                "the trainer to hire this node: chorus ledger ls shows what it offers".to_owned()
            }
            SamplerAwaits::Work => "work: the trainer has enough under way".to_owned(),
            SamplerAwaits::Version { step, exactly } => match (self.loading, exactly) {
                (Some(version), _) => format!("version {version:?} to load"),
                (None, Some(version)) => {
                    format!("version {version:?} of step {step} to arrive, and that for {weights}")
                }
                (None, None) => format!("a version of step {step} or later to arrive, and that for {weights}"),
            },
        }
    }
}
