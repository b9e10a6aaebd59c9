//! The trainer's shell: the buffer, the learner's time, checkpoints, publications.
//!
//! ```text
//!  Batch ─▶ learner ─▶ Stepped ─▶ progress() ─▶ checkpoint to the disk ─▶ Checkpointed, Publish, Published
//!                                    └─▶ Want
//! ```

use std::collections::BTreeSet;

use chorus_protocol::policy::{Manifest, ManifestBuilder};
use chorus_protocol::rollout::{Bulk, GroupId, Refusal, RolloutFrame};
use chorus_protocol::{Verified, WallTime};
use chorus_rollout::broadcast::BroadcastInput;
use chorus_rollout::buffer::{Batch, Buffer, BufferConfig, BufferEffect, BufferInput, FrameKey, Mode, Progress};

use super::disk::{Checkpoint, Op, draw_ms};
use super::host::{Process, Role, Trainer, broadcast};
use super::sampler::completion;
use super::session::{Place, pair};
use super::world::{Event, Mutant, World};

/// What a chunk has in memory.
const CHUNK_BYTES: u32 = 1_024;

fn machine(process: &mut Process) -> Option<&mut Buffer> {
    match &mut process.role {
        Role::Trainer(trainer) => Some(&mut trainer.buffer),
        Role::Sampler(_) => None,
    }
}

impl World {
    fn buffer_config(&self) -> BufferConfig {
        let mut cfg = self.scenario.buffer_config(self.policy.clone());
        if let (Mutant::Lax, Mode::Streaming { staleness }) = (self.mutant, &mut cfg.mode) {
            *staleness += 3;
        }
        cfg
    }

    /// Starts the trainer with what its disk holds.
    pub(super) fn start_trainer(&mut self) {
        let cfg = self.buffer_config();
        let host = &self.hosts[0];
        let (buffer, idle, versions) = match &host.disk.checkpoint {
            None => (Buffer::new(cfg), Vec::new(), Vec::new()),
            Some(checkpoint) => {
                let progress = Progress::from_bytes(&checkpoint.progress).expect("a checkpoint is written as a whole");
                let frames = host.disk.read_frames(&self.network);
                let restored = Buffer::restore(cfg, &progress, &checkpoint.versions, &frames);
                let (buffer, idle) = restored.map_or_else(|error| (Err(error), Vec::new()), |(b, idle)| (Ok(b), idle));
                (buffer, idle, checkpoint.versions.clone())
            }
        };
        let buffer = buffer.expect("a scenario's settings are checked when it is read");
        let (resume, checkpoint) = (host.disk.resume(), host.disk.checkpoint.clone());
        let held = buffer.fill().2;
        let role = Role::Trainer(Box::new(Trainer { buffer, hiring: self.new_hiring(), versions }));
        let broadcast = broadcast(&self.network, &self.policy, host.id);
        self.hosts[0].process = Some(Process { broadcast, role, wake: None });
        for (manifest, chunks) in resume {
            self.broadcast(0, Some(BroadcastInput::Resume { manifest, chunks }));
        }
        match checkpoint {
            None => self.save(0, Progress::default()),
            Some(checkpoint) => {
                let kept = self.monitor.restored(self.now, held, &self.hosts[0].disk);
                self.stats.kept_over_crash += kept;
                self.monitor.forgotten(self.now, &idle);
                self.ask_disk(0, Op::Delete(idle));
                self.announce(&checkpoint);
                self.want();
            }
        }
        self.read_offers();
        self.contacts(0).into_iter().for_each(|place| self.dial(pair(0, place)));
    }

    pub(super) fn trainer_died(&mut self) {
        let step = self.hosts[0].disk.checkpoint.as_ref().map_or(0, |checkpoint| checkpoint.step);
        self.stats.idle_until(self.now);
        if self.mutant == Mutant::LosesFrames {
            self.hosts[0].disk.frames.clear();
        }
        self.monitor.trainer_died(step);
    }

    fn want(&mut self) {
        self.stats.idle_from(self.now);
        self.buffer(Some(BufferInput::Want));
    }

    /// Lets the buffer take a turn, and carries out what it wants.
    pub(super) fn buffer(&mut self, input: Option<BufferInput>) {
        let came = match &input {
            Some(BufferInput::Frame { frame, .. }) => Some(frame.clone()),
            _ => None,
        };
        let effects = self.turn(0, machine, input);
        let refused: BTreeSet<_> = effects.iter().filter_map(refused).collect();
        for effect in effects {
            match effect {
                BufferEffect::Send { to, message } => {
                    let came = came.as_ref().map(|frame| (frame, !refused.is_empty()));
                    self.answer(self.places[&to], &message, came);
                }
                BufferEffect::Persist { key, frame } => {
                    self.monitor.judged(&frame, key, &refused);
                    self.ask_disk(0, Op::Frame { key, frame });
                    if self.mutant == Mutant::AcknowledgesEarly {
                        self.buffer(Some(BufferInput::Persisted(key)));
                    }
                }
                BufferEffect::Forget(keys) => {
                    self.monitor.forgotten(self.now, &keys);
                    self.ask_disk(0, Op::Delete(keys));
                }
                BufferEffect::Batch(batch) => self.learn(&batch),
                BufferEffect::Refused { group, member, reason: Refusal::Stale, .. } if came.is_none() => {
                    self.monitor.went_stale((group, member));
                }
                BufferEffect::Refused { .. } => {}
            }
        }
        self.plan_wake(0);
    }

    fn answer(&mut self, to: Place, message: &Bulk, came: Option<(&Verified<RolloutFrame>, bool)>) {
        let sampler = self.hosts[to as usize].id;
        match message {
            Bulk::Ack { sequence, taken, refused } => {
                let key = FrameKey { sampler, sequence: *sequence };
                let disk = &self.hosts[0].disk;
                self.monitor.acknowledged(self.now, key, (*taken, refused), came, disk);
            }
            Bulk::Assign { work, .. } if !work.is_empty() => self.check_lease(to),
            Bulk::Nack { reason, .. } => *self.monitor.tally.nacks.entry(*reason).or_default() += 1,
            _ => {}
        }
        self.send(0, to, message);
    }

    fn learn(&mut self, batch: &Batch) {
        self.stats.idle_until(self.now);
        let plan = self.buffer_config().plan;
        let tokens = self.scenario.sampling.tokens;
        for _ in 0..if self.mutant == Mutant::LearnsTwice { 2 } else { 1 } {
            self.monitor.batch(self.now, batch, |(group, member), version| {
                completion(version, plan.task(group).1, member, tokens)
            });
        }
        self.stats.learned(batch);
        let host = &mut self.hosts[0];
        let after = draw_ms(self.scenario.learner.step_ms, &mut host.rng);
        self.queue.push(self.now + after, Event::Learned { life: host.life, step: batch.step + 1 });
    }

    pub(super) fn learned(&mut self, life: u32, step: u64) {
        if !self.is_alive(0, life) {
            return;
        }
        self.buffer(Some(BufferInput::Stepped(step)));
        if step.is_multiple_of(self.scenario.learner.publish_every)
            && let Some(trainer) = self.hosts[0].trainer()
        {
            let progress = trainer.buffer.progress();
            self.save(step, progress);
        }
        self.want();
    }

    /// Writes a checkpoint with the version that is made of it.
    fn save(&mut self, step: u64, progress: Progress) {
        let (manifest, chunks) = self.make_version(step);
        let Some(trainer) = self.hosts[0].trainer() else { return };
        trainer.versions.push((manifest.version, step));
        let versions = trainer.versions.clone();
        let checkpoint = Checkpoint { step, progress: progress.to_bytes(), versions, manifest, chunks };
        if self.mutant == Mutant::PublishesEarly {
            self.announce(&checkpoint);
        }
        // The weights take their time before the disk has all of them.
        let after = draw_ms(self.scenario.learner.checkpoint_ms, &mut self.hosts[0].rng);
        let (at, life) = (self.now + after, self.hosts[0].life);
        self.queue.push(at, Event::Saved { life, checkpoint: Box::new(checkpoint) });
    }

    pub(super) fn saved(&mut self, life: u32, checkpoint: Box<Checkpoint>) {
        if self.is_alive(0, life) {
            self.ask_disk(0, Op::Checkpoint(checkpoint));
        }
    }

    /// Makes the files of a version: other ones in another life, as the weights would be.
    fn make_version(&mut self, step: u64) -> (Verified<Manifest>, Vec<Vec<u8>>) {
        let host = &mut self.hosts[0];
        let mut builder = ManifestBuilder::new(CHUNK_BYTES);
        builder.file("model.safetensors").expect("a plain name");
        let mut chunks = Vec::new();
        for _ in 0..self.scenario.weights.chunks {
            let mut bytes = vec![0; CHUNK_BYTES as usize];
            bytes[..32].copy_from_slice(&host.rng.bytes::<32>());
            chunks.extend(builder.write(&bytes));
        }
        let made = WallTime::from_millis(self.now.as_nanos() / 1_000_000);
        let (manifest, last) = builder.finish(self.policy.clone(), None, step, made).expect("chunks of one size");
        chunks.extend(last);
        (Verified::sign(&host.key, &self.network, manifest).expect("a manifest of a few chunks is small"), chunks)
    }

    pub(super) fn checkpointed(&mut self, checkpoint: &Checkpoint) {
        self.monitor.checkpointed(checkpoint.step);
        let progress = Progress::from_bytes(&checkpoint.progress).expect("written a moment ago");
        self.buffer(Some(BufferInput::Checkpointed(progress)));
        if self.mutant != Mutant::PublishesEarly {
            self.announce(checkpoint);
        }
        if checkpoint.step == 0 {
            self.want();
        }
    }

    /// Publishes the version of a checkpoint.
    fn announce(&mut self, checkpoint: &Checkpoint) {
        let (version, step) = (checkpoint.manifest.version, checkpoint.step);
        let running = self.hosts[1..].iter().filter(|host| host.process.is_some()).count() as u64;
        self.monitor.published(version, step);
        self.stats.published(step, self.now, running);
        self.broadcast(0, Some(BroadcastInput::Publish(checkpoint.manifest.clone())));
        self.buffer(Some(BufferInput::Published { version, step }));
    }

    pub(super) fn frame_stored(&mut self, key: FrameKey, taken: bool) {
        let input = if taken { BufferInput::Persisted(key) } else { BufferInput::PersistFailed(key) };
        if !taken {
            self.monitor.not_written(&key);
        }
        self.buffer(Some(input));
    }

    pub(super) fn trainer_hears(&mut self, from: Place, message: Bulk) {
        let from = self.hosts[from as usize].id;
        let input = match message {
            Bulk::Hello(hello) => BufferInput::Hello { from, hello },
            Bulk::Frame(frame) => {
                let frame = frame.verify(&self.network).expect("a sampler signs its frames");
                BufferInput::Frame { from, frame }
            }
            message => BufferInput::Message { from, message },
        };
        self.buffer(Some(input));
    }

    pub(super) fn sampler_gone(&mut self, sampler: Place) {
        let id = self.hosts[sampler as usize].id;
        self.buffer(Some(BufferInput::Gone(id)));
    }

    /// Returns how far the learner is, whether it runs or not.
    pub(super) fn steps(&self) -> u64 {
        let saved = self.hosts[0].disk.checkpoint.as_ref().map_or(0, |checkpoint| checkpoint.step);
        match self.hosts[0].process.as_ref().map(|process| &process.role) {
            Some(Role::Trainer(trainer)) => trainer.buffer.progress().step,
            _ => saved,
        }
    }

    /// Returns the trainer's own count of members that went to another, as far as its process remembers.
    pub(super) fn reissued(&self) -> u64 {
        match self.hosts[0].process.as_ref().map(|process| &process.role) {
            Some(Role::Trainer(trainer)) => trainer.buffer.tally().reissued,
            _ => 0,
        }
    }
}

fn refused(effect: &BufferEffect) -> Option<(GroupId, u16)> {
    match effect {
        BufferEffect::Refused { group, member, .. } => Some((*group, *member)),
        _ => None,
    }
}
