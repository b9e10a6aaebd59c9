//! The learner's thread: batches in, better weights out. Nothing else in the process waits for it.
//!
//! ```text
//!  Room ──Learn(batch)──▶ Auditor::admit ─▶ Learner::step, or Outside::learn ──Stepped, findings──▶ Room
//!       ──Save(progress)─▶ checkpoint on disk ─▶ a new version's files ──Saved──▶ Room: sign, publish
//! ```
//!
//! A version is published only after the checkpoint that it was made from is on disk, so no rollout is ever newer than what a restarted
//! trainer knows. The checkpoint names its step, and what the buffer needs to go on from that step lies beside it under that name.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Instant;

use chorus_protocol::policy::{Manifest, PolicyId, Version};
use chorus_protocol::{Hash, WallTime};
use chorus_rollout::buffer::{Batch, Progress};
use chorus_trainer::env::{DEFAULT_LIMIT, Environment, Judge, by_name};
use chorus_trainer::policy;
use chorus_trainer::train::{AdamWConfig, Curve, GrpoConfig, Learner, LearnerConfig, Point, StepReport, evaluate};
use chorus_trainer::trust::{AuditConfig, AuditTally, Auditor, Finding};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::external::{Desk, Outside};
use super::library::{Library, write_whole};
use crate::config::TrainerSection;
use crate::error::CommandError;

/// Lessons that may wait: a batch, and the checkpoint that follows it.
const QUEUE: usize = 4;
/// Held-out tasks that are answered at each look.
const HELD_OUT_TASKS: u64 = 256;
/// Chunks of a version: small enough that several neighbours share the work also for a tiny policy.
const CHUNK_BYTES: [(u64, u32); 3] = [(1 << 20, 64 << 10), (64 << 20, 256 << 10), (u64::MAX, 4 << 20)];

/// What the learner is told.
pub(super) enum Lesson {
    /// Learn from this.
    Learn(Batch),
    /// Write a checkpoint, and make a version of it.
    Save { progress: Progress, parent: Option<Version>, made: WallTime },
}

/// What came of it.
pub(super) enum Learned {
    /// An update is done.
    Stepped { point: Point, audit: Audit },
    /// A batch taught nothing because something was no number; the weights are what they were.
    Skipped { step: u64, why: String, audit: Audit },
    /// The checkpoint is on disk, and so are the files of the version that was made of it.
    Saved { progress: Progress, manifest: Box<Manifest> },
    /// Nothing can be written.
    NotSaved { why: String },
}

/// What the examination of a batch came to.
#[derive(Default)]
pub(super) struct Audit {
    /// Rollouts that were not learned from, and why.
    pub(super) findings: Vec<Finding>,
    /// What was examined so far.
    pub(super) tally: AuditTally,
    /// Seconds that examining took so far.
    pub(super) seconds: f64,
}

/// What a run goes on from.
pub(super) struct Resumed {
    pub(super) progress: Progress,
    pub(super) versions: Vec<(Version, u64)>,
    pub(super) curve: Curve,
}

/// What the buffer needs to go on from a checkpoint.
#[derive(Serialize, Deserialize)]
struct Beside {
    progress: String,
    versions: Vec<(String, u64)>,
}

/// The way to the learner's thread.
pub(super) struct Teacher {
    queue: SyncSender<Lesson>,
    /// Where somebody outside learns instead of the thread.
    desk: Option<Arc<Desk>>,
}

impl Drop for Teacher {
    /// A thread that waits for somebody outside ends too.
    fn drop(&mut self) {
        if let Some(desk) = &self.desk {
            desk.close();
        }
    }
}

impl Teacher {
    /// Opens the run that is in a directory, or begins one there, and starts the thread.
    pub(super) fn start(
        section: &TrainerSection,
        directory: &Path,
        library: Library,
        policy: PolicyId,
        secret: [u8; 32],
    ) -> Result<(Self, mpsc::Receiver<Learned>, Option<Resumed>), CommandError> {
        fs::create_dir_all(directory).map_err(CommandError::machine)?;
        let environments = environments(&section.environments)?;
        let checkpoint = directory.join("checkpoint");
        let (learner, resumed) = if checkpoint.exists() || directory.join("checkpoint.old").exists() {
            let learner = Learner::resume(&checkpoint).map_err(|error| {
                CommandError::machine(format!("the checkpoint in {} cannot be read: {error}", checkpoint.display()))
                    .hint("put a backup in its place, or move it away to begin anew")
            })?;
            let resumed = resume(directory, learner.steps())?;
            (learner, Some(resumed))
        } else {
            (begin(section)?, None)
        };
        let outside = section.external.then(|| Outside::open(directory, &learner)).transpose();
        let outside = outside.map_err(CommandError::machine)?;
        let desk = outside.as_ref().map(Outside::desk);
        let (queue, lessons) = sync_channel(QUEUE);
        let (learned_tx, learned) = mpsc::channel(QUEUE * 2);
        let curve = resumed.as_ref().map_or_else(Curve::default, |resumed| resumed.curve.clone());
        let before = curve.0.last().map_or(0.0, |point| point.seconds);
        let mut auditor = Auditor::new(AuditConfig::default(), secret);
        hold_known(&mut auditor, &library);
        let pupil = Pupil {
            learner,
            outside,
            judge: Judge::new(environments.clone(), DEFAULT_LIMIT),
            environments,
            auditor,
            audited: 0.0,
            library,
            policy,
            directory: directory.to_owned(),
            look: section.evaluate_every,
            versions: resumed.as_ref().map(|resumed| resumed.versions.clone()).unwrap_or_default(),
            began: Instant::now(),
            before,
            learned: learned_tx,
        };
        std::thread::Builder::new()
            .name("chorus-learner".to_owned())
            .spawn(move || pupil.run(&lessons))
            .map_err(CommandError::machine)?;
        Ok((Self { queue, desk }, learned, resumed))
    }

    /// Returns where somebody outside learns, if nobody in here does.
    pub(super) fn desk(&self) -> Option<&Arc<Desk>> {
        self.desk.as_ref()
    }

    /// Hands a lesson over. The room never has more than one batch and one checkpoint under way, so there is always a place.
    pub(super) fn teach(&self, lesson: Lesson) -> bool {
        self.queue.try_send(lesson).is_ok()
    }
}

/// Rollouts of versions before a restart are examined after it, as far as those versions are still on disk.
fn hold_known(auditor: &mut Auditor, library: &Library) {
    let mut manifests = library.manifests();
    manifests.sort_by_key(|manifest| manifest.step);
    for manifest in manifests {
        if let Ok(weights) = policy::load(&library.directory(manifest.version)) {
            auditor.hold(manifest.version, weights);
        }
    }
}

fn environments(names: &[String]) -> Result<Vec<Arc<dyn Environment>>, CommandError> {
    let known = |name: &String| {
        let environment = by_name(name).ok_or_else(|| {
            CommandError::usage(format!("there is no environment '{name}'"))
                .hint("arithmetic-1 to -4, knights-2 to -4 and sokoban-1 to -2 are built in")
        })?;
        Ok(Arc::from(environment))
    };
    names.iter().map(known).collect()
}

fn begin(section: &TrainerSection) -> Result<Learner, CommandError> {
    let policy = policy::load(Path::new(&section.from)).map_err(|error| {
        CommandError::usage(format!("no policy to begin with in '{}': {error}", section.from))
            .hint("name the directory of a checkpoint with --from, e.g. crates/trainer/policies/arithmetic-2")
    })?;
    let optimizer = AdamWConfig { rate: section.rate, anneal: section.anneal, ..AdamWConfig::default() };
    let grpo = GrpoConfig { kl: section.kl, micro_batch: section.micro_batch, ..GrpoConfig::default() };
    Ok(Learner::new(policy, LearnerConfig { grpo, optimizer }))
}

fn beside(directory: &Path, step: u64) -> PathBuf {
    directory.join(format!("progress-{step}.json"))
}

fn resume(directory: &Path, step: u64) -> Result<Resumed, CommandError> {
    let path = beside(directory, step);
    let damaged = |error: String| {
        CommandError::machine(format!("{} cannot be read: {error}", path.display())).hint(
            "it belongs to the checkpoint beside it; put both back from a backup, or move both away to begin anew",
        )
    };
    let bytes = fs::read(&path).map_err(|error| damaged(error.to_string()))?;
    let found: Beside = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
    let progress = hex::decode(&found.progress).ok().and_then(|bytes| Progress::from_bytes(&bytes));
    let progress = progress.ok_or_else(|| damaged("its progress is none".to_owned()))?;
    let version = |(hex, step): &(String, u64)| Some((Version::from_hash(hex.parse::<Hash>().ok()?), *step));
    let versions = found.versions.iter().filter_map(version).collect();
    let lines = fs::read_to_string(directory.join("curve.jsonl")).unwrap_or_default();
    let points = lines.lines().filter_map(|line| serde_json::from_str::<Point>(line).ok());
    let curve = Curve(points.filter(|point| point.step < step).collect());
    Ok(Resumed { progress, versions, curve })
}

/// The thread's side.
struct Pupil {
    learner: Learner,
    /// Who makes the updates, if it is not the learner itself.
    outside: Option<Outside>,
    environments: Vec<Arc<dyn Environment>>,
    judge: Judge,
    auditor: Auditor,
    /// Seconds that examining rollouts took.
    audited: f64,
    library: Library,
    policy: PolicyId,
    directory: PathBuf,
    /// Steps between two looks at held-out tasks.
    look: u64,
    versions: Vec<(Version, u64)>,
    began: Instant,
    /// Seconds that the run took before this process began.
    before: f64,
    learned: mpsc::Sender<Learned>,
}

impl Pupil {
    fn run(mut self, lessons: &Receiver<Lesson>) {
        while let Ok(lesson) = lessons.recv() {
            let learned = match lesson {
                Lesson::Learn(batch) => match self.learn(&batch) {
                    Some(learned) => learned,
                    None => break,
                },
                Lesson::Save { progress, parent, made } => match self.save(&progress, parent, made) {
                    Ok(manifest) => Learned::Saved { progress, manifest: Box::new(manifest) },
                    Err(why) => Learned::NotSaved { why },
                },
            };
            if self.learned.blocking_send(learned).is_err() {
                break;
            }
        }
    }

    /// Learns from a batch. Nothing when somebody outside should have, and the room has ended.
    fn learn(&mut self, batch: &Batch) -> Option<Learned> {
        let step = self.learner.steps();
        let held_out = step.is_multiple_of(self.look.max(1)).then(|| self.held_out()).flatten();
        let begun = Instant::now();
        let admitted = self.auditor.admit(batch, &mut self.judge);
        self.audited += begun.elapsed().as_secs_f64();
        let mut audit = Audit { tally: self.auditor.tally(), seconds: self.audited, ..Audit::default() };
        let admission = match admitted {
            Ok(admission) => admission,
            Err(error) => return Some(Learned::Skipped { step, why: error.to_string(), audit }),
        };
        audit.findings = admission.findings;
        let report = match &self.outside {
            None => self.learner.step(&admission.groups).map_err(|error| error.to_string()),
            Some(outside) => outside.learn(&mut self.learner, batch, &admission.groups)?,
        };
        Some(match report {
            Ok(report) => Learned::Stepped { point: self.point(step, &report, held_out), audit },
            Err(why) => Learned::Skipped { step, why, audit },
        })
    }

    fn point(&self, step: u64, report: &StepReport, held_out: Option<f32>) -> Point {
        Point {
            step,
            seconds: self.before + self.began.elapsed().as_secs_f64(),
            reward: report.reward,
            held_out,
            useful: report.useful,
            gradient: report.gradient,
            importance: report.importance,
        }
    }

    /// Returns the mean reward over held-out tasks of all environments.
    #[allow(clippy::cast_precision_loss, reason = "environments are few")]
    fn held_out(&self) -> Option<f32> {
        let rewards: Vec<f32> = self
            .environments
            .iter()
            .filter_map(|environment| evaluate(self.learner.policy(), &**environment, HELD_OUT_TASKS, 1.0).ok())
            .collect();
        (!rewards.is_empty()).then(|| rewards.iter().sum::<f32>() / rewards.len() as f32)
    }

    fn save(&mut self, progress: &Progress, parent: Option<Version>, made: WallTime) -> Result<Manifest, String> {
        let step = self.learner.steps();
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let staging = self.directory.join("publishing");
        if staging.exists() {
            fs::remove_dir_all(&staging).map_err(|error| text(&error))?;
        }
        policy::save(self.learner.policy(), &staging).map_err(|error| text(&error))?;
        let chunk = chunk_bytes(&staging);
        let manifest =
            self.library.import(&staging, &self.policy, chunk, (parent, step, made)).map_err(|error| text(&error))?;
        let weights = self.learner.policy().copy().map_err(|error| text(&error))?;
        self.auditor.hold(manifest.version, weights);
        self.versions.push((manifest.version, step));
        let excess = self.versions.len().saturating_sub(chorus_rollout::buffer::MAX_VERSIONS);
        self.versions.drain(..excess);
        let known = self.versions.iter().map(|(version, step)| (version.to_string(), *step)).collect();
        let found = Beside { progress: hex::encode(progress.to_bytes()), versions: known };
        let bytes = serde_json::to_vec(&found).map_err(|error| text(&error))?;
        write_whole(&beside(&self.directory, step), &bytes).map_err(|error| text(&error))?;
        self.learner.save(&self.directory.join("checkpoint")).map_err(|error| text(&error))?;
        self.sweep(step);
        Ok(manifest)
    }

    /// Deletes what belongs to older checkpoints, and the files that were only on their way.
    fn sweep(&self, step: u64) {
        let keep = beside(&self.directory, step);
        let Ok(entries) = fs::read_dir(&self.directory) else { return };
        for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if name.starts_with("progress-") && path != keep {
                let _ = fs::remove_file(&path);
            }
        }
        let _ = fs::remove_dir_all(self.directory.join("publishing"));
    }
}

fn chunk_bytes(directory: &Path) -> u32 {
    let entries = fs::read_dir(directory).into_iter().flatten();
    let total: u64 = entries.filter_map(|entry| Some(entry.ok()?.metadata().ok()?.len())).sum();
    CHUNK_BYTES.iter().find(|(up_to, _)| total <= *up_to).map_or(4 << 20, |(_, chunk)| *chunk)
}
