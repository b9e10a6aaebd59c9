//! The trainer's role in a room: what `chorus_rollout::buffer` wants done is done here, and the learner is kept busy.
//!
//! ```text
//!  Frame ─▶ verify ─▶ Buffer ──Batch──▶ learner ──Stepped──▶ Buffer::progress ──Save──▶ learner ──Saved──▶ publish ─▶ Want
//! ```

use std::collections::{BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use chorus_core::{JobError, JobEvent};
use chorus_machine::{Machine, Outbox};
use chorus_protocol::capability::SamplingOffer;
use chorus_protocol::entry::Body;
use chorus_protocol::misbehaviour::Misbehaviour;
use chorus_protocol::policy::{Manifest, PolicyNotice, Version};
use chorus_protocol::rollout::Bulk;
use chorus_protocol::{JobId, List, NodeId, Text};
use chorus_rollout::buffer::{Buffer, BufferEffect, BufferInput, LearnerAwaits, Progress};
use chorus_rollout::capacity::Load;
use chorus_rollout::hiring::{HiringInput, Track};
use chorus_trainer::train::{Curve, Point};
use chorus_trainer::trust::{AuditTally, Finding};
use serde_json::{Value, json};

use super::commons::Commons;
use super::disk::{Done, Job};
use super::external::Desk;
use super::hires::Hires;
use super::learning::{Audit, Learned, Lesson, Teacher};
use super::notice::Notices;
use crate::config::TrainerSection;
use crate::driver::wall;

/// How long a checkpoint that was not written is left alone.
const SAVE_AGAIN: std::time::Duration = std::time::Duration::from_secs(1);
/// How often hiring hears what was measured.
const MEASURE_EVERY: std::time::Duration = std::time::Duration::from_secs(1);
/// Updates in a row that may come to nothing before the run stops and says so.
const MAX_SKIPPED: u32 = 10;
/// Accusations that may wait for the node's loop.
const MAX_ACCUSATIONS: usize = 256;

/// Why a run has ended, if it has.
#[derive(Clone, Debug, PartialEq, Eq)]
enum End {
    Steps,
    Reward,
    Trouble(String),
}

/// See the module.
pub(super) struct TrainerRole {
    section: TrainerSection,
    buffer: Buffer,
    hires: Hires,
    /// When hiring last heard what was measured.
    measured: Instant,
    teacher: Teacher,
    directory: PathBuf,
    curve: Curve,
    /// Updates done.
    step: u64,
    published: Option<(Version, u64)>,
    saving: bool,
    /// Why the last checkpoint was not written, and when that was tried.
    unsaved: Option<(String, Instant)>,
    end: Option<End>,
    skipped: u32,
    audit: (AuditTally, f64),
    /// Samplers that were convicted: nothing of theirs is taken any more.
    struck: BTreeSet<NodeId>,
    /// What the ledger is still to be told against them.
    accusations: VecDeque<Misbehaviour>,
    notices: Notices,
    unsigned: u64,
    frame_bytes: u64,
    tokens: u64,
    began: Instant,
    learning_since: Option<Instant>,
    learned_for: std::time::Duration,
}

impl TrainerRole {
    pub(super) fn new(
        section: TrainerSection,
        buffer: Buffer,
        hires: Hires,
        teacher: Teacher,
        directory: PathBuf,
        curve: Curve,
        step: u64,
    ) -> Self {
        Self {
            section,
            buffer,
            hires,
            measured: Instant::now(),
            teacher,
            directory,
            curve,
            step,
            published: None,
            saving: false,
            unsaved: None,
            end: None,
            skipped: 0,
            audit: (AuditTally::default(), 0.0),
            struck: BTreeSet::new(),
            accusations: VecDeque::new(),
            notices: Notices::default(),
            unsigned: 0,
            frame_bytes: 0,
            tokens: 0,
            began: Instant::now(),
            learning_since: None,
            learned_for: std::time::Duration::ZERO,
        }
    }

    /// Returns where somebody outside learns, if nobody in here does.
    pub(super) fn desk(&self) -> Option<Arc<Desk>> {
        self.teacher.desk().cloned()
    }

    /// Publishes the weights that the run begins with, or goes on from.
    pub(super) fn begin(&mut self, room: &mut Commons) {
        let progress = self.buffer.progress();
        self.save(progress);
        self.want(room);
    }

    pub(super) fn deadline(&self) -> Option<chorus_machine::Time> {
        chorus_machine::earliest(self.buffer.deadline(), self.hires.deadline())
    }

    pub(super) fn expire(&mut self, room: &mut Commons) {
        let told = self.hires.expire(room);
        self.tell_all(room, told);
        let mut out = Outbox::new();
        room.with(|cx| self.buffer.expire(cx, &mut out));
        self.carry_out(room, out);
    }

    pub(super) fn tell(&mut self, room: &mut Commons, input: BufferInput) {
        let mut out = Outbox::new();
        room.with(|cx| self.buffer.handle(cx, input, &mut out));
        self.carry_out(room, out);
    }

    fn tell_all(&mut self, room: &mut Commons, inputs: Vec<BufferInput>) {
        for input in inputs {
            self.tell(room, input);
        }
    }

    fn hire(&mut self, room: &mut Commons, input: HiringInput) {
        let told = self.hires.tell(room, input);
        self.tell_all(room, told);
    }

    /// A node's offer to sample, by the ledger.
    pub(super) fn offered(&mut self, room: &mut Commons, node: NodeId, offer: Option<SamplingOffer>) {
        self.hire(room, HiringInput::Offer { node, offer });
    }

    /// Something happened to a job by which a sampler is hired.
    pub(super) fn job(&mut self, room: &mut Commons, event: &JobEvent) {
        let told = self.hires.job(room, event);
        self.tell_all(room, told);
    }

    /// Such a job has ended.
    pub(super) fn job_ended(&mut self, room: &mut Commons, job: JobId, error: Option<JobError>) {
        let told = self.hires.ended(room, job, error);
        self.tell_all(room, told);
    }

    fn carry_out(&mut self, room: &mut Commons, mut out: Outbox<BufferEffect>) {
        let mut effects: VecDeque<BufferEffect> = out.drain().collect();
        while let Some(effect) = effects.pop_front() {
            match effect {
                BufferEffect::Send { to, message } => {
                    if matches!(message, Bulk::Hello(_)) {
                        room.sessions.must_greet(to);
                    }
                    room.sessions.send(to, &message, None);
                }
                BufferEffect::Persist { key, frame } => {
                    if room.disk.submit(Job::Persist { key, frame }).is_err() {
                        let mut out = Outbox::new();
                        room.with(|cx| self.buffer.handle(cx, BufferInput::PersistFailed(key), &mut out));
                        effects.extend(out.drain());
                    }
                }
                BufferEffect::Forget(keys) => {
                    let _ = room.disk.submit(Job::Delete(keys));
                }
                BufferEffect::Batch(batch) => {
                    self.learning_since = Some(Instant::now());
                    if !self.teacher.teach(Lesson::Learn(batch)) {
                        self.stop(room, End::Trouble("the learner's thread is gone; restart the node".to_owned()));
                    }
                }
                BufferEffect::Refused { sampler, group, member, reason } => {
                    tracing::debug!(sampler = %sampler.fmt_short(), group = group.0, member, ?reason, "does not count");
                }
            }
        }
    }

    /// A sampler said something.
    pub(super) fn message(&mut self, room: &mut Commons, from: NodeId, message: Bulk) {
        if self.struck.contains(&from) {
            return room.sessions.close(from);
        }
        match message {
            Bulk::Frame(frame) => {
                self.frame_bytes += frame.len() as u64;
                match frame.verify(&room.network) {
                    Ok(frame) => {
                        self.tokens += frame.completion_tokens() as u64;
                        self.tell(room, BufferInput::Frame { from, frame });
                    }
                    Err(error) => {
                        self.unsigned += 1;
                        tracing::warn!(from = %from.fmt_short(), %error, "a frame that is not signed");
                        room.sessions.close(from);
                    }
                }
            }
            Bulk::Hello(hello) => self.tell(room, BufferInput::Hello { from, hello }),
            message => self.tell(room, BufferInput::Message { from, message }),
        }
    }

    pub(super) fn disk_done(&mut self, room: &mut Commons, done: Done) {
        match done {
            Done::Persisted { key, ok: true } => self.tell(room, BufferInput::Persisted(key)),
            Done::Persisted { key, ok: false } => self.tell(room, BufferInput::PersistFailed(key)),
            Done::Evidence(accusation) if self.accusations.len() < MAX_ACCUSATIONS => {
                self.accusations.push_back(*accusation);
            }
            Done::Evidence(_)
            | Done::EvidenceRead(_)
            | Done::EvidenceLoaded { .. }
            | Done::Loaded { .. }
            | Done::Unread(_)
            | Done::Stored { .. }
            | Done::Read { .. } => {}
        }
    }

    /// The learner did something.
    pub(super) fn learned(&mut self, room: &mut Commons, learned: Learned) {
        match learned {
            Learned::Stepped { point, audit } => {
                self.examined(room, audit);
                self.stepped(room, point);
            }
            Learned::Skipped { step, why, audit } => {
                self.examined(room, audit);
                self.skip(room, step, &why);
            }
            Learned::Saved { progress, manifest } => self.saved(room, progress, *manifest),
            Learned::NotSaved { why } => {
                self.saving = false;
                tracing::error!(%why, "no checkpoint could be written; samplers go on with the version they have");
                self.unsaved = Some((why, Instant::now()));
            }
        }
    }

    /// Takes in what the examination of a batch found. Who is at fault beyond doubt samples no more.
    fn examined(&mut self, room: &mut Commons, audit: Audit) {
        for Finding { sampler, group, member, verdict } in &audit.findings {
            tracing::warn!(sampler = %sampler.fmt_short(), group = group.0, member, ?verdict, "not learned from");
            if let Some(charge) = verdict.charge()
                && self.struck.insert(*sampler)
            {
                let _ = room.disk.submit(Job::Evidence { sampler: *sampler, group: *group, member: *member, charge });
                room.sessions.close(*sampler);
                self.hire(room, HiringInput::Bar(*sampler));
            }
        }
        self.audit = (audit.tally, audit.seconds);
    }

    fn stepped(&mut self, room: &mut Commons, point: Point) {
        self.note_learning();
        self.skipped = 0;
        self.step = point.step + 1;
        if let Some(reward) = point.held_out {
            tracing::info!(step = point.step, reward = point.reward, held_out = reward, "learned");
        }
        self.write(&point);
        self.curve.0.push(point);
        self.tell(room, BufferInput::Stepped(self.step));
        self.judge_end(room, &point);
        self.publish_if_due();
        self.want(room);
    }

    fn skip(&mut self, room: &mut Commons, step: u64, why: &str) {
        self.note_learning();
        self.skipped += 1;
        tracing::warn!(step, why, "nothing was learned from a batch; the weights are what they were");
        self.tell(room, BufferInput::Stepped(step));
        if self.skipped >= MAX_SKIPPED {
            let why =
                format!("{MAX_SKIPPED} batches in a row taught nothing: {why}; lower trainer.rate and start again");
            self.stop(room, End::Trouble(why));
        }
        self.want(room);
    }

    fn note_learning(&mut self) {
        if let Some(since) = self.learning_since.take() {
            self.learned_for += since.elapsed();
        }
    }

    /// Appends to the curve on disk, from which a restart and a spreadsheet read.
    fn write(&self, point: &Point) {
        use std::io::Write as _;
        let line = serde_json::to_string(point).unwrap_or_default();
        let file = std::fs::OpenOptions::new().create(true).append(true).open(self.directory.join("curve.jsonl"));
        if let Err(error) = file.and_then(|mut file| writeln!(file, "{line}")) {
            tracing::warn!(%error, "the curve was not written");
        }
    }

    fn judge_end(&mut self, room: &mut Commons, point: &Point) {
        let target = self.section.until;
        if target > 0.0 && point.held_out.is_some_and(|reward| f64::from(reward) >= target) {
            self.stop(room, End::Reward);
        } else if self.section.steps > 0 && self.step >= self.section.steps {
            self.stop(room, End::Steps);
        }
    }

    fn stop(&mut self, room: &mut Commons, end: End) {
        tracing::info!(step = self.step, ?end, "the run has ended");
        self.end = Some(end);
        self.hire(room, HiringInput::Close);
    }

    fn publish_if_due(&mut self) {
        let every = self.section.publish_every.max(1);
        if !self.saving && (self.step.is_multiple_of(every) || self.end.is_some()) {
            let progress = self.buffer.progress();
            self.save(progress);
        }
    }

    /// Does what is due now and then.
    pub(super) fn tick(&mut self, room: &mut Commons) {
        self.save_again();
        self.measure(room);
        self.notify(room);
        while let Some(accusation) = self.accusations.pop_front() {
            if !room.append(Body::Misbehaviour(Box::new(accusation.clone()))) {
                self.accusations.push_front(accusation);
                break;
            }
        }
    }

    /// Tells hiring what was measured.
    fn measure(&mut self, room: &mut Commons) {
        if self.measured.elapsed() < MEASURE_EVERY {
            return;
        }
        self.measured = Instant::now();
        let needed = self.load().map(|load| load.verdict(false).needed);
        let tracks = self.buffer.tracks().collect();
        self.hire(room, HiringInput::Measured { needed, tracks });
    }

    /// Says in the ledger how far the policy is, when that is due. The last word waits for the last version.
    fn notify(&mut self, room: &Commons) {
        let Some((version, step)) = self.published else { return };
        let (now, running) = (Instant::now(), self.end.is_none() || self.saving);
        if !self.notices.is_due(now, version, running) {
            return;
        }
        let environments = self.section.environments.iter().map(|name| Text::truncated(name));
        let environments = List::truncated(environments);
        let notice = PolicyNotice { name: room.policy.name.clone(), version, step, environments, running };
        if room.append(Body::Policy(Box::new(notice))) {
            self.notices.said(now, version, running);
        }
    }

    /// Tries again to write a checkpoint that the disk did not take. Only while no batch is out: then weights and buffer are of one
    /// moment. The learner comes to that point by itself, since nothing newer than the last checkpoint is published.
    fn save_again(&mut self) {
        let due = self.unsaved.as_ref().is_some_and(|(_, since)| since.elapsed() >= SAVE_AGAIN);
        if due && !self.saving && self.learning_since.is_none() {
            let progress = self.buffer.progress();
            self.save(progress);
        }
    }

    fn save(&mut self, progress: Progress) {
        let parent = self.published.map(|(version, _)| version);
        self.saving = self.teacher.teach(Lesson::Save { progress, parent, made: wall() });
    }

    fn saved(&mut self, room: &mut Commons, progress: Progress, manifest: Manifest) {
        (self.saving, self.unsaved) = (false, None);
        let (version, step) = (manifest.version, manifest.step);
        if let Err(why) = room.publish(manifest) {
            tracing::error!(why, step, "the version was not published; the next one will be");
            return;
        }
        self.published = Some((version, step));
        tracing::debug!(?version, step, "published");
        self.tell(room, BufferInput::Checkpointed(progress));
        self.tell(room, BufferInput::Published { version, step });
    }

    fn want(&mut self, room: &mut Commons) {
        if self.end.is_none() && self.learning_since.is_none() {
            self.tell(room, BufferInput::Want);
        }
    }

    pub(super) fn curve(&self) -> &Curve {
        &self.curve
    }

    /// Returns where it stands.
    #[allow(clippy::cast_precision_loss, reason = "figures for people")]
    pub(super) fn status(&self, room: &Commons) -> Value {
        let tally = self.buffer.tally();
        let (open, ready, held) = self.buffer.fill();
        let learning = self.learning_since.map_or(std::time::Duration::ZERO, |since| since.elapsed());
        let elapsed = self.began.elapsed().as_secs_f64().max(1e-9);
        let track = |track: Track| json!({ "node": track.node, "rollouts_per_s": track.rate, "reliability": track.reliability });
        json!({
            "role": "trainer",
            "state": match &self.end {
                None => "training".to_owned(),
                Some(End::Steps) => "done: all steps are taken".to_owned(),
                Some(End::Reward) => "done: the held-out reward is reached".to_owned(),
                Some(End::Trouble(why)) => format!("stopped: {why}"),
            },
            "step": self.step,
            "published": self.published.map(|(version, step)| json!({ "version": version, "step": step })),
            "mode": if self.section.sequential { "sequential".to_owned() } else { format!("streaming, S = {}", self.section.staleness) },
            "learner": {
                "waits_for": self.waits_for(),
                "utilisation": (self.learned_for + learning).as_secs_f64() / elapsed,
                "skipped": self.skipped,
            },
            "samplers": self.buffer.tracks().map(track).collect::<Vec<_>>(),
            "hiring": self.hires.status(room),
            "capacity": self.capacity(),
            "reach_s": self.buffer.reach(),
            "groups_open": open,
            "groups_ready": ready,
            "rollouts_held": held,
            "taken": tally.taken,
            "used": tally.used,
            "reissued": tally.reissued,
            "refused": tally.refused.iter().map(|(reason, many)| json!({ "reason": reason, "rollouts": many })).collect::<Vec<_>>(),
            "lags": tally.lags,
            "audit": {
                "examined": self.audit.0.examined,
                "recomputed": self.audit.0.recomputed,
                "struck": self.audit.0.struck,
                "share_of_learning": self.audit.1 / self.learned_for.as_secs_f64().max(1e-9),
                "convicted": self.struck,
            },
            "unsigned_frames": self.unsigned,
            "bytes_per_token": if self.tokens == 0 { 0.0 } else { self.frame_bytes as f64 / self.tokens as f64 },
            "tokens": self.tokens,
            "tokens_per_s": self.tokens as f64 / elapsed,
            "reward": self.curve.0.last().map(|point| point.reward),
            "held_out": self.curve.0.iter().rev().find_map(|point| point.held_out),
        })
    }

    /// Returns what was measured of the run, once all of it was.
    #[allow(clippy::cast_precision_loss, reason = "small numbers")]
    fn load(&self) -> Option<Load> {
        let pacing = self.buffer.pacing();
        let (step, sample) = (pacing.step.get()?, pacing.sample.get()?);
        Some(Load {
            rollouts: (self.section.batch * usize::from(self.section.members)) as f64,
            step,
            spread: pacing.spread.get().unwrap_or_default(),
            sample,
            swap: 0.0,
            period: self.section.publish_every.max(1) as f64,
            staleness: if self.section.sequential { 0 } else { self.section.staleness },
            queued: self.buffer.fill().2 as f64,
        })
    }

    /// Returns what the capacity rule says of it.
    #[allow(clippy::cast_precision_loss, reason = "figures for people")]
    fn capacity(&self) -> Value {
        let Some(load) = self.load() else { return Value::Null };
        let rates: Vec<f64> = self.buffer.tracks().filter_map(|track| track.rate).collect();
        let delivered: f64 = rates.iter().sum();
        let verdict = load.verdict(false);
        json!({
            "needed_per_s": verdict.needed.is_finite().then_some(verdict.needed),
            "delivered_per_s": delivered,
            "samplers_needed": load.samplers_needed(delivered / rates.len().max(1) as f64, false),
            "expected_lag": verdict.lag,
            "step_s": load.step,
            "sample_s": load.sample,
            "spread_s": load.spread,
        })
    }

    fn waits_for(&self) -> String {
        if self.end.is_some() {
            return "nothing: the run has ended".to_owned();
        }
        if let Some((why, _)) = &self.unsaved {
            return format!("the disk to take a checkpoint: {why}");
        }
        match self.buffer.awaits() {
            LearnerAwaits::Nothing => {
                let outside = self.teacher.desk().and_then(|desk| desk.waits_for());
                outside.unwrap_or_else(|| "nothing: it learns".to_owned())
            }
            LearnerAwaits::Version { step } => format!("a version of step {step} or later to be published"),
            LearnerAwaits::Sampler => "a sampler: start one with  chorus node run --sample <policy>".to_owned(),
            LearnerAwaits::Rollouts { ready, batch, longest } => {
                let whose = longest.map_or_else(String::new, |node| format!("; longest from {}", node.fmt_short()));
                format!("rollouts: {ready} of {batch} groups are complete{whose}")
            }
            LearnerAwaits::LastCall(group) => format!("group {}, which could not be used later", group.0),
            LearnerAwaits::Disk => "the disk to take frames; is it full?".to_owned(),
        }
    }
}
