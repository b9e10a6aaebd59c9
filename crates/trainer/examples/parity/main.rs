//! Whether decoupling costs reward, and what it gains in speed: co-located, sequential and asynchronous training, side by side.
//!
//! ```text
//! cargo run --release -p chorus-trainer --example parity -- [--environments arithmetic-2,knights-4] [--modes sequential,1,2,4,11]
//!                                                           [--steps 600] [--seeds 3] [--samplers N] [--rate 0.0004]
//! ```
//!
//! Unless they are counted out, samplers are as many as keep the learner fed: sampling's time over learning's in the first co-located run,
//! and no more than there are processors.
//!
//! A mode is `sequential` or a bound on staleness; co-located is always run. Every mode gets the same policy, the same number of steps of
//! the same size, and the same held-out tasks. Each run is a process of its own. Co-located sampling and learning take turns, with one
//! thread and with two in candle's arithmetic, of which the faster counts; in the other modes each of the swarm's threads computes alone.
#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a program for the terminal that stops at the first surprise"
)]

mod swarm;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use chorus_rollout::buffer::Mode;
use chorus_trainer::env::{Environment, by_name};
use chorus_trainer::policy::{Policy, PolicyConfig, load, save};
use chorus_trainer::train::{
    AdamW, AdamWConfig, Learner, LearnerConfig, Round, WarmStart, evaluate, imitate, roll_out,
};
use serde::{Deserialize, Serialize};

/// The node's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Held-out tasks that are answered at the end.
const HELD_OUT: u64 = 2_048;
/// Share of tasks that a policy made for this answers rightly when it begins to learn by reward. Knights of four: guesses are right
/// once in sixteen times, and puzzles are too many to be learned by heart.
const WARM: f32 = 0.2;
/// Groups in a step and answers in a group.
const ROUND: (usize, usize) = (16, 8);

/// One run.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Task {
    environment: String,
    policy: PathBuf,
    /// `colocated`, `sequential`, or a bound on staleness.
    mode: String,
    steps: u64,
    seed: u64,
    /// 0 for as many as keep the learner fed.
    samplers: usize,
    rate: f64,
}

/// What came of it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Outcome {
    reward: f32,
    steps_per_minute: f64,
    /// Share of the time in which the learner learned.
    busy: f64,
    /// Mean lag of the rollouts that were used, in steps.
    lag: f64,
    /// Rollouts that were sampled in vain.
    wasted: u64,
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let [word, task] = &words[..]
        && word == "run"
    {
        let outcome = run(&serde_json::from_str(task).expect("a task"));
        println!("{}", serde_json::to_string(&outcome).expect("plain numbers"));
        return;
    }
    let option = |name: &str, usual: &str| {
        let at = words.iter().position(|word| word == name);
        at.and_then(|at| words.get(at + 1)).map_or(usual, String::as_str).to_owned()
    };
    let number = |name: &str, usual: &str| option(name, usual).parse::<u64>().expect("a number");
    let list = |name: &str, usual: &str| option(name, usual).split(',').map(str::to_owned).collect::<Vec<_>>();
    let seeds = number("--seeds", "3");
    for environment in list("--environments", "arithmetic-2,knights-4") {
        let task = Task {
            policy: beginning(&environment),
            environment,
            mode: "colocated".to_owned(),
            steps: number("--steps", "600"),
            seed: 0,
            samplers: usize::try_from(number("--samplers", "0")).expect("a few"),
            rate: option("--rate", "0.0004").parse().expect("a number"),
        };
        compare(&task, &list("--modes", "sequential,1,2,4,11"), seeds);
    }
}

/// Runs every mode with every seed and prints the table.
fn compare(task: &Task, modes: &[String], seeds: u64) {
    let start = load(&task.policy).expect("a policy");
    let environment = by_name(&task.environment).expect("an environment");
    let before = evaluate(&start, &*environment, HELD_OUT, 1.0).expect("an evaluation");
    println!("{}: {seeds} seeds, {} steps of {} rollouts each", task.environment, task.steps, ROUND.0 * ROUND.1);
    println!("held-out reward before: {before:.3}");
    let all: Vec<String> = std::iter::once("colocated".to_owned()).chain(modes.iter().cloned()).collect();
    let mut outcomes: Vec<Vec<Outcome>> = vec![Vec::new(); all.len()];
    let mut samplers = task.samplers;
    for seed in 1..=seeds {
        for (mode, outcomes) in all.iter().zip(&mut outcomes) {
            let task = Task { mode: mode.clone(), seed, samplers, ..task.clone() };
            let mut outcome = in_a_process(&task, 1);
            if mode == "colocated" {
                if samplers == 0 {
                    samplers = that_keep_fed(outcome.busy);
                    println!(
                        "samplers: {samplers}, for sampling takes {:.1} times as long as learning",
                        1.0 / outcome.busy - 1.0
                    );
                }
                let wide = in_a_process(&task, 2);
                outcome.steps_per_minute = outcome.steps_per_minute.max(wide.steps_per_minute);
            }
            eprintln!("  seed {seed}, {mode}: {outcome:?}");
            outcomes.push(outcome);
        }
    }
    let colocated = outcomes[0].clone();
    println!(
        "{:>12} {:>22} {:>22} {:>11} {:>13} {:>12} {:>9} {:>8}",
        "mode",
        "reward: median (range)",
        "less colocated, range",
        "steps/min",
        "x colocated",
        "learner busy",
        "mean lag",
        "in vain"
    );
    for (mode, outcomes) in all.iter().zip(&outcomes) {
        row(mode, outcomes, &colocated);
    }
}

/// How many samplers keep a learner fed that learns for this share of the time when it samples for itself.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a small number")]
fn that_keep_fed(busy: f64) -> usize {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    ((1.0 / busy - 1.0).round() as usize).clamp(1, processors)
}

fn row(mode: &str, outcomes: &[Outcome], colocated: &[Outcome]) {
    let mode = if mode.parse::<u32>().is_ok() { format!("S = {mode}") } else { mode.to_owned() };
    let rewards = sorted(outcomes.iter().map(|outcome| f64::from(outcome.reward)));
    let apart = sorted(outcomes.iter().zip(colocated).map(|(a, b)| f64::from(a.reward - b.reward)));
    let ratios = sorted(outcomes.iter().zip(colocated).map(|(a, b)| a.steps_per_minute / b.steps_per_minute));
    let of = |value: fn(&Outcome) -> f64| median(&sorted(outcomes.iter().map(value)));
    let (first, last) = (|values: &[f64]| values[0], |values: &[f64]| values[values.len() - 1]);
    println!(
        "{mode:>12} {:>22} {:>22} {:>11.0} {:>13} {:>12.2} {:>9.2} {:>8}",
        format!("{:.3} ({:.3}..{:.3})", median(&rewards), first(&rewards), last(&rewards)),
        format!("{:+.3} ({:+.3}..{:+.3})", median(&apart), first(&apart), last(&apart)),
        of(|outcome| outcome.steps_per_minute),
        format!("{:.2} ({:.2}..{:.2})", median(&ratios), first(&ratios), last(&ratios)),
        of(|outcome| outcome.busy),
        of(|outcome| outcome.lag),
        outcomes.iter().map(|outcome| outcome.wasted).sum::<u64>(),
    );
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

fn median(sorted: &[f64]) -> f64 {
    (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0
}

fn in_a_process(task: &Task, threads: usize) -> Outcome {
    let task = serde_json::to_string(task).expect("plain words and numbers");
    let output = Command::new(std::env::current_exe().expect("this program"))
        .args(["run", &task])
        .env("RAYON_NUM_THREADS", threads.to_string())
        .output()
        .expect("a process");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("an outcome")
}

fn run(task: &Task) -> Outcome {
    let environment: Arc<dyn Environment> = by_name(&task.environment).expect("an environment").into();
    // Falling to a tenth, so that the end says what was learned and not how far the last step went.
    let anneal = u32::try_from(task.steps).expect("a few thousand");
    let optimizer = AdamWConfig { rate: task.rate, anneal, ..AdamWConfig::default() };
    let config = LearnerConfig { optimizer, ..LearnerConfig::default() };
    let mut learner = Learner::new(load(&task.policy).expect("a policy"), config);
    let round = Round { groups: ROUND.0, members: ROUND.1, seed: task.seed };
    let mut outcome = Outcome { reward: 0.0, steps_per_minute: 0.0, busy: 0.0, lag: 0.0, wasted: 0 };
    if task.mode == "colocated" {
        let (begun, mut learning) = (Instant::now(), 0.0);
        for step in 0..task.steps {
            let rollouts = roll_out(learner.policy(), &*environment, round, step).expect("rollouts");
            let before = Instant::now();
            learner.step(&rollouts).expect("a step");
            learning += before.elapsed().as_secs_f64();
        }
        let seconds = begun.elapsed().as_secs_f64();
        (outcome.steps_per_minute, outcome.busy) = (per_minute(task.steps, seconds), learning / seconds);
    } else {
        let staleness = task.mode.parse().ok();
        let mode = staleness.map_or(Mode::Sequential, |staleness| Mode::Streaming { staleness });
        let (environment, steps, samplers) = (Arc::clone(&environment), task.steps, task.samplers);
        let ran = swarm::run(learner, &swarm::Setup { environment, mode, round, steps, samplers });
        learner = ran.0;
        let tally = &ran.1.tally;
        (outcome.steps_per_minute, outcome.busy) = (per_minute(task.steps, ran.1.seconds), ran.1.busy);
        outcome.lag = mean_lag(&tally.lags);
        outcome.wasted = tally.refused.values().sum();
    }
    outcome.reward = evaluate(learner.policy(), &*environment, HELD_OUT, 1.0).expect("an evaluation");
    outcome
}

#[allow(clippy::cast_precision_loss, reason = "counts are small")]
fn per_minute(steps: u64, seconds: f64) -> f64 {
    steps as f64 / seconds * 60.0
}

#[allow(clippy::cast_precision_loss, reason = "counts are small")]
fn mean_lag(lags: &[u64]) -> f64 {
    let all: u64 = lags.iter().sum();
    lags.iter().zip(0_u32..).map(|(many, lag)| *many as f64 * f64::from(lag)).sum::<f64>() / all.max(1) as f64
}

/// Returns the policy that every run of an environment begins with: the ready one, or one that imitates until it answers some tasks
/// rightly, which is kept for the next time.
fn beginning(environment: &str) -> PathBuf {
    let ready = Path::new(env!("CARGO_MANIFEST_DIR")).join("policies").join(environment);
    let made = std::env::temp_dir().join("chorus-parity").join(environment);
    if let Some(found) = [ready, made.clone()].into_iter().find(|directory| directory.join("config.json").exists()) {
        return found;
    }
    let played = by_name(environment).expect("arithmetic-N, knights-N or sokoban-N");
    let policy = Policy::random(PolicyConfig::tiny(2, 96), 1).expect("a policy");
    let mut optimizer = AdamW::new(AdamWConfig { rate: 2e-3, ..AdamWConfig::default() });
    for seed in 1..400 {
        imitate(&policy, &*played, WarmStart { steps: 25, tasks: 64, seed }, &mut optimizer).expect("a step");
        if evaluate(&policy, &*played, 512, 1.0).expect("an evaluation") >= WARM {
            break;
        }
    }
    save(&policy, &made).expect("a directory that can be written");
    made
}
