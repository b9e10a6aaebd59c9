//! Learns by reinforcement in one process, sampling and learning in turn: the co-located baseline.
//!
//! ```text
//! cargo run --release -p chorus-trainer --example learn [environment] [policy] [seconds] [until] [seed] [directory]
//! ```
//!
//! Stops when the held-out reward has reached `until` or the time is over. With a directory it writes the policy, `curve.csv` and
//! `curve.svg` there.
#![allow(clippy::expect_used, reason = "a program for the terminal that stops at the first surprise")]

use std::path::{Path, PathBuf};
use std::time::Instant;

use chorus_trainer::env::{Environment, by_name};
use chorus_trainer::policy::load;
use chorus_trainer::train::{AdamWConfig, Curve, Learner, LearnerConfig, Point, Round, evaluate, roll_out};

/// The node's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Steps between two looks at the held-out tasks, and how many of those are answered at each.
const LOOK: (u64, u64) = (50, 512);

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let word = |at: usize, usual: &str| words.get(at).map_or(usual, String::as_str).to_owned();
    let number = |at: usize, usual: &str| word(at, usual).parse::<f64>().expect("a number");
    let environment = by_name(&word(0, "arithmetic-2")).expect("arithmetic-N, knights-N or sokoban-N");
    let ready = Path::new(env!("CARGO_MANIFEST_DIR")).join("policies/arithmetic-2");
    let from = words.get(1).map_or(ready, PathBuf::from);
    let (seconds, until) = (number(2, "600"), number(3, "0.95"));
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "seeds are small")]
    let round = Round { groups: 16, members: 8, seed: number(4, "1") as u64 };
    let optimizer = AdamWConfig { rate: 6e-4, anneal: 4_000, ..AdamWConfig::default() };
    let config = LearnerConfig { optimizer, ..LearnerConfig::default() };
    let mut learner = Learner::new(load(&from).expect("a policy"), config);
    let curve = learn(&mut learner, &*environment, round, seconds, until);
    println!("{}", curve.to_text());
    if let Some(directory) = words.get(5).map(Path::new) {
        learner.save(directory).expect("a directory that can be written");
        std::fs::write(directory.join("curve.csv"), curve.to_csv()).expect("a file that can be written");
        std::fs::write(directory.join("curve.svg"), curve.to_svg(&environment.name())).expect("the same");
    }
}

fn learn(learner: &mut Learner, environment: &dyn Environment, round: Round, seconds: f64, until: f64) -> Curve {
    let (start, mut curve) = (Instant::now(), Curve::default());
    let (mut sampling, mut learning) = (0.0, 0.0);
    loop {
        let step = learner.steps();
        let held_out = step
            .is_multiple_of(LOOK.0)
            .then(|| evaluate(learner.policy(), environment, LOOK.1, 1.0).expect("an evaluation"));
        let begun = Instant::now();
        let rollouts = roll_out(learner.policy(), environment, round, step).expect("rollouts");
        sampling += begun.elapsed().as_secs_f64();
        let begun = Instant::now();
        let report = learner.step(&rollouts).expect("a step");
        learning += begun.elapsed().as_secs_f64();
        let now = start.elapsed().as_secs_f64();
        if let Some(right) = held_out {
            println!(
                "step {step:>5}  {now:>6.1} s (sampling {sampling:.1}, learning {learning:.1})  rollouts {:.3}  held out {right:.3}  useful groups {:.2}",
                report.reward, report.useful
            );
        }
        curve.0.push(Point {
            step,
            seconds: now,
            reward: report.reward,
            held_out,
            useful: report.useful,
            gradient: report.gradient,
            importance: report.importance,
        });
        if now > seconds || held_out.is_some_and(|right| f64::from(right) >= until) {
            return curve;
        }
    }
}
