//! Whether cheaters are found, honest samplers left alone, and what the looking costs.
//!
//! ```text
//! cargo run --release -p chorus-trainer --example cheaters -- [rollouts of each kind] [steps between versions]
//! ```
//!
//! mistral.rs samples, as nodes do; candle computes again, as trainers do. Honest rollouts that nothing else uses calibrate the
//! tolerance. Then honest ones and forgeries of each kind are examined: all of them, to see what an examination finds, and as a trainer
//! does by default, to see how much each cheater gets through before it is caught.
#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a program for the terminal that stops at the first surprise"
)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use chorus_engine::{Finish as Ended, Order, SampleRequest, Sampling, VersionedConfig, VersionedEngine};
use chorus_machine::Rng;
use chorus_protocol::job::Finish;
use chorus_protocol::policy::Version;
use chorus_protocol::rollout::{GroupId, Rollout, Segment};
use chorus_protocol::{Hash, NodeId, SecretKey, Text};
use chorus_trainer::env::{DEFAULT_LIMIT, Environment, Judge, by_name, training_task_of};
use chorus_trainer::policy::{END, Policy, Tokenizer, load, save};
use chorus_trainer::train::{AdamWConfig, Learner, LearnerConfig, Round, Trajectory, roll_out};
use chorus_trainer::trust::{AuditConfig, Auditor, Distance, Tolerance, Verdict, recompute};
use tokio_util::sync::CancellationToken;

/// The node's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const ENVIRONMENT: &str = "arithmetic-2";
const MEMBERS: u16 = 8;
/// How many steps before the claimed version the forgeries' weights are.
const BACK: [usize; 3] = [1, 2, 4];
/// Rollouts that a cheater delivers honestly before it begins.
const NEW: usize = 64;
/// How far an edited log-probability is from the truth, in nats.
const EDIT: f32 = 0.05;

/// Versions of a policy, each a few steps after the one before.
struct Versions {
    directory: tempfile::TempDir,
    policies: Vec<Policy>,
    learner: Learner,
}

fn name(n: usize) -> Version {
    Version::from_hash(Hash::derive("chorus cheaters version v1", &[&n.to_le_bytes()]))
}

fn environment() -> Arc<dyn Environment> {
    by_name(ENVIRONMENT).expect("an environment").into()
}

impl Versions {
    fn learn(count: usize, steps: u64) -> Self {
        let ready = Path::new(env!("CARGO_MANIFEST_DIR")).join("policies").join(ENVIRONMENT);
        let optimizer = AdamWConfig { rate: 3e-4, ..AdamWConfig::default() };
        let config = LearnerConfig { optimizer, ..LearnerConfig::default() };
        let mut learner = Learner::new(load(&ready).expect("a policy"), config);
        let (directory, mut policies) = (tempfile::tempdir().expect("a directory"), Vec::new());
        for n in 0..count {
            save(learner.policy(), &directory.path().join(n.to_string())).expect("a directory");
            policies.push(learner.policy().copy().expect("a copy"));
            for _ in 0..steps {
                let round = Round { groups: 16, members: usize::from(MEMBERS), seed: 5 };
                let rollouts = roll_out(learner.policy(), &*environment(), round, learner.steps()).expect("rollouts");
                learner.step(&rollouts).expect("a step");
            }
        }
        Self { directory, policies, learner }
    }

    fn path(&self, n: usize) -> PathBuf {
        self.directory.path().join(n.to_string())
    }
}

/// A node's engine that draws the rollouts of groups.
struct Sampler {
    engine: VersionedEngine,
    runtime: tokio::runtime::Runtime,
}

impl Sampler {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let engine = VersionedEngine::new(VersionedConfig::new("cheaters"));
        Self { engine, runtime: runtime.expect("a runtime") }
    }

    /// Draws with version `n`, and says it was `claimed`.
    fn draw(&self, versions: &Versions, n: usize, claimed: usize, groups: std::ops::Range<u64>) -> Vec<Rollout> {
        let path = versions.path(n);
        let loaded = self.engine.load(name(n), n as u64, &path, Order::Exactly);
        self.runtime.block_on(loaded).expect("a version");
        let each = groups.flat_map(|group| (0..MEMBERS).map(move |member| (group, member)));
        each.map(|(group, member)| self.one(group, member, name(claimed))).collect()
    }

    fn one(&self, group: u64, member: u16, version: Version) -> Rollout {
        let environment = environment();
        let task = training_task_of(&*environment, group);
        let prompt = Tokenizer.encode(&task.prompt);
        let request = SampleRequest {
            prompt: prompt.clone(),
            max_tokens: u32::try_from(environment.max_tokens()).expect("short answers"),
            sampling: Sampling::seeded(group << 8 | u64::from(member), 1.0),
            exactly: None,
        };
        let drawn = self.runtime.block_on(self.engine.sample(request, CancellationToken::new())).expect("a sample");
        Rollout {
            group: GroupId(group),
            member,
            environment: Text::truncated(ENVIRONMENT),
            seed: group,
            prompt: prompt.into(),
            reward: environment.reward(&task, &Tokenizer.decode(&drawn.tokens)),
            completion: drawn.tokens,
            log_probs: drawn.logprobs.into_iter().map(|logprob| logprob.min(0.0)).collect(),
            finish: if drawn.finish == Ended::Stop { Finish::Stop } else { Finish::Length },
            segments: vec![Segment { version, from: 0 }],
        }
    }
}

/// Rollouts of one kind, and which of them are forged.
struct Kind {
    name: String,
    rollouts: Vec<Rollout>,
    forged: Vec<bool>,
    /// What another sampler delivered before.
    before: Vec<Rollout>,
}

impl Kind {
    fn all(name: impl Into<String>, rollouts: Vec<Rollout>) -> Self {
        Self { name: name.into(), forged: vec![true; rollouts.len()], rollouts, before: Vec::new() }
    }
}

fn who(n: usize) -> NodeId {
    SecretKey::from_bytes(&[u8::try_from(n + 1).expect("few samplers"); 32]).node_id()
}

fn judged(rollout: &Rollout) -> f32 {
    let environment = environment();
    let task = training_task_of(&*environment, rollout.seed);
    environment.reward(&task, &Tokenizer.decode(&rollout.completion))
}

/// Makes every kind of forgery, each of at least `many` rollouts.
fn forgeries(sampler: &Sampler, versions: &Versions, many: usize) -> Vec<Kind> {
    let last = versions.policies.len() - 1;
    let groups = (many as u64).div_ceil(u64::from(MEMBERS));
    let mut first = 1_000_000;
    let mut fresh = |from: usize, groups: u64| {
        first += groups;
        sampler.draw(versions, from, last, first - groups..first)
    };
    let mut rng = Rng::from_u64(11);
    let mut kinds = Vec::new();
    let mut rewards = fresh(last, groups);
    rewards.iter_mut().for_each(|rollout| rollout.reward = 1.0 - rollout.reward);
    kinds.push(Kind::all("wrong reward", rewards));
    for back in BACK {
        kinds.push(Kind::all(format!("wrong version, {back} back"), fresh(last - back, groups)));
    }
    let mut tokens = fresh(last, groups);
    tokens.iter_mut().for_each(edit_tokens);
    kinds.push(Kind::all("edited tokens", tokens));
    let mut logprobs = fresh(last, groups);
    for rollout in &mut logprobs {
        let at = usize::try_from(rng.below(rollout.log_probs.len() as u64)).expect("a place");
        rollout.log_probs[at] -= EDIT;
    }
    kinds.push(Kind::all("edited log-probability", logprobs));
    let copies = (many as u64).div_ceil(u64::from(MEMBERS) - 1);
    let mut own = fresh(last, copies);
    for group in own.chunks_mut(usize::from(MEMBERS)) {
        let one = group[0].clone();
        group.iter_mut().for_each(|rollout| *rollout = Rollout { member: rollout.member, ..one.clone() });
    }
    let forged = own.iter().map(|rollout| rollout.member > 0).collect();
    kinds.push(Kind { name: "copied from itself".to_owned(), rollouts: own, forged, before: Vec::new() });
    // Two nodes of one owner: half of each group is drawn, and delivered by both.
    let half = MEMBERS / 2;
    let drawn = fresh(last, groups * 2);
    let theirs: Vec<Rollout> = drawn.iter().filter(|rollout| rollout.member < half).cloned().collect();
    let again = theirs.iter().map(|rollout| Rollout { member: rollout.member + half, ..rollout.clone() }).collect();
    kinds.push(Kind { before: theirs, ..Kind::all("copied from another", again) });
    let once = fresh(last, groups);
    kinds.push(Kind {
        before: Vec::new(),
        ..Kind::all("repeated, same place", once.iter().chain(&once).cloned().collect())
    });
    if let Some(kind) = kinds.last_mut() {
        (0..once.len()).for_each(|at| kind.forged[at] = false);
    }
    let mut elsewhere = fresh(last, groups);
    for (rollout, old) in elsewhere.iter_mut().zip(&once) {
        (rollout.completion, rollout.log_probs) = (old.completion.clone(), old.log_probs.clone());
        rollout.reward = judged(rollout);
    }
    kinds.push(Kind::all("repeated for another task", elsewhere));
    kinds
}

/// Turns a rollout into one that earns the full reward, and leaves its log-probabilities. One that does already gets another answer.
fn edit_tokens(rollout: &mut Rollout) {
    let task = training_task_of(&*environment(), rollout.seed);
    let mut right = Tokenizer.encode(&task.solution);
    right.push(END);
    if right == rollout.completion {
        right[0] = if right[0] == u32::from(b'1') { u32::from(b'2') } else { u32::from(b'1') };
    }
    rollout.log_probs.resize(right.len(), -0.1);
    rollout.completion = right;
    rollout.reward = judged(rollout);
}

fn auditor(versions: &Versions, config: AuditConfig) -> Auditor {
    let mut auditor = Auditor::new(config, [7; 32]);
    for (n, policy) in versions.policies.iter().enumerate() {
        auditor.hold(name(n), policy.copy().expect("a copy"));
    }
    auditor
}

fn judge() -> Judge {
    Judge::new([environment()], DEFAULT_LIMIT)
}

/// Examines a sampler's rollouts in batches as a trainer gets them.
fn examine(auditor: &mut Auditor, sampler: NodeId, rollouts: &[Rollout]) -> Vec<Verdict> {
    let (mut judge, mut verdicts) = (judge(), Vec::new());
    for part in rollouts.chunks(128) {
        let part: Vec<(NodeId, &Rollout)> = part.iter().map(|rollout| (sampler, rollout)).collect();
        verdicts.extend(auditor.examine(&part, &mut judge).expect("an examination"));
    }
    verdicts
}

fn main() {
    let words: Vec<usize> = std::env::args().skip(1).map(|word| word.parse().expect("a number")).collect();
    let (many, between) = (words.first().copied().unwrap_or(1_000), words.get(1).copied().unwrap_or(1));
    let mut versions = Versions::learn(6, between as u64);
    let last = versions.policies.len() - 1;
    let sampler = Sampler::new();
    let groups = (many as u64).div_ceil(u64::from(MEMBERS));
    let distances = calibrate(&sampler, &versions, groups);
    let (measured, used) = (Tolerance::calibrate(&distances), Tolerance::default());
    let farthest = distances.iter().map(|distance| distance.token).fold(0.0, f32::max);
    println!("{} honest rollouts for the calibration: farthest token {farthest:.1e} nats", distances.len());
    println!(
        "bounds (token, mean): calibrated {:.1e} {:.1e}, used {:.1e} {:.1e}",
        measured.token, measured.mean, used.token, used.mean
    );

    let honest = sampler.draw(&versions, last, last, 0..groups);
    let full = AuditConfig { share: 1.0, newcomer: 0, tolerance: used };
    let mut all = auditor(&versions, full);
    let verdicts = examine(&mut all, who(0), &honest);
    let alarms = verdicts.iter().filter(|verdict| !verdict.is_usable()).count();
    let mut usual = auditor(&versions, AuditConfig::default());
    let by_usual = examine(&mut usual, who(0), &honest).iter().filter(|verdict| !verdict.is_usable()).count();
    println!(
        "{} honest rollouts: {alarms} false alarms when all are computed again, {by_usual} by default",
        honest.len()
    );
    println!(
        "{:>26} {:>8} {:>8} {:>8}   {:<28} {:>24}",
        "forged", "rollouts", "struck", "missed", "as", "accused after, by default"
    );
    for kind in forgeries(&sampler, &versions, many) {
        row(&kind, &versions, full, &honest[..honest.len().min(NEW)]);
    }
    costs(&mut versions, &honest);
}

/// Measures how far mistral.rs and candle are apart, on rollouts of the first version and of the last.
fn calibrate(sampler: &Sampler, versions: &Versions, groups: u64) -> Vec<Distance> {
    let mut distances = Vec::new();
    for n in [0, versions.policies.len() - 1] {
        let rollouts = sampler.draw(versions, n, n, 500_000..500_000 + groups);
        let computed = recompute(&rollouts.iter().collect::<Vec<_>>(), |_| versions.policies.get(n)).expect("numbers");
        let each = rollouts.iter().zip(computed);
        distances.extend(
            each.map(|(rollout, computed)| Distance::between(&rollout.log_probs, &computed.expect("known weights"))),
        );
    }
    distances
}

fn row(kind: &Kind, versions: &Versions, full: AuditConfig, honest: &[Rollout]) {
    let mut all = auditor(versions, full);
    examine(&mut all, who(1), &kind.before);
    let verdicts = examine(&mut all, who(2), &kind.rollouts);
    let forged: Vec<&Verdict> =
        verdicts.iter().zip(&kind.forged).filter(|(_, forged)| **forged).map(|(verdict, _)| verdict).collect();
    let missed = forged.iter().filter(|verdict| verdict.is_usable()).count();
    let mut names: Vec<(&str, usize)> = Vec::new();
    for verdict in forged.iter().filter(|verdict| !verdict.is_usable()) {
        let word = word(verdict);
        match names.iter_mut().find(|(known, _)| *known == word) {
            Some((_, many)) => *many += 1,
            None => names.push((word, 1)),
        }
    }
    let names: Vec<String> = names.iter().map(|(word, many)| format!("{word} {many}")).collect();
    let mut usual = auditor(versions, AuditConfig::default());
    // It was honest while it was new.
    examine(&mut usual, who(2), honest);
    examine(&mut usual, who(1), &kind.before);
    let caught = (0..kind.rollouts.len()).find(|at| {
        examine(&mut usual, who(2), &kind.rollouts[*at..=*at]);
        usual.has_caught(&who(2))
    });
    let caught = caught.map_or("never accused".to_owned(), |at| format!("{} rollouts", at + 1));
    println!(
        "{:>26} {:>8} {:>8} {:>8}   {:<28} {:>24}",
        kind.name,
        forged.len(),
        forged.len() - missed,
        missed,
        names.join(", "),
        caught
    );
}

fn word(verdict: &Verdict) -> &'static str {
    match verdict {
        Verdict::WrongReward { .. } => "reward",
        Verdict::WrongPrompt => "prompt",
        Verdict::WrongVersion { .. } => "version",
        Verdict::Edited(_) => "edited",
        Verdict::Copied => "copied",
        Verdict::Repeated => "repeated",
        _ => "other",
    }
}

/// Compares the time of looking with that of learning from the same rollouts.
#[allow(clippy::cast_precision_loss, reason = "counts are small")]
fn costs(versions: &mut Versions, honest: &[Rollout]) {
    let groups: Vec<Vec<Trajectory>> =
        honest.chunks(usize::from(MEMBERS)).map(|group| group.iter().map(trajectory).collect()).collect();
    let begun = Instant::now();
    for batch in groups.chunks(16) {
        versions.learner.step(batch).expect("a step");
    }
    let learning = begun.elapsed().as_secs_f64();
    println!("learning from {} rollouts takes {:.0} ms; looking at them", honest.len(), learning * 1e3);
    for (name, share) in [
        ("at rewards, prompts and copies alone", 0.0),
        ("as by default, newcomers aside", AuditConfig::default().share),
        ("at all log-probabilities", 1.0),
    ] {
        let mut auditor = auditor(versions, AuditConfig { share, newcomer: 0, ..AuditConfig::default() });
        let begun = Instant::now();
        examine(&mut auditor, who(0), honest);
        let looking = begun.elapsed().as_secs_f64();
        println!("  {name}: {:.1} ms, {:.1} % of it", looking * 1e3, 100.0 * looking / learning);
    }
}

fn trajectory(rollout: &Rollout) -> Trajectory {
    Trajectory {
        prompt: rollout.prompt.to_vec(),
        tokens: rollout.completion.clone(),
        logprobs: rollout.log_probs.clone(),
        reward: rollout.reward,
        lag: 0,
    }
}
