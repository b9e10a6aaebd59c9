//! Makes the checkpoint that learning begins with: a tiny policy that has imitated solutions until it answers some tasks rightly.
//!
//! ```text
//! cargo run --release -p chorus-trainer --example warm_start [environment] [directory] [layers] [width] [until]
//! cargo run --release -p chorus-trainer --example warm_start arithmetic-2 crates/trainer/policies/arithmetic-2 2 96 0.3
//! ```
//!
//! It stops at the first look at which so large a share of held-out tasks is answered rightly. The same arguments make the same
//! checkpoint.
#![allow(clippy::expect_used, reason = "a program for the terminal that stops at the first surprise")]

use std::path::PathBuf;
use std::time::Instant;

use chorus_trainer::env::by_name;
use chorus_trainer::policy::{Policy, PolicyConfig, save};
use chorus_trainer::train::{AdamW, AdamWConfig, WarmStart, evaluate, imitate};

const LOOKS: u64 = 400;
const STEPS_BETWEEN: u32 = 25;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let word = |at: usize, usual: &'static str| words.get(at).map_or(usual, String::as_str).to_owned();
    let number = |at: usize, usual: &'static str| word(at, usual).parse::<f64>().expect("a number");
    let environment = by_name(&word(0, "arithmetic-2")).expect("arithmetic-N, knights-N or sokoban-N");
    let directory = PathBuf::from(word(1, "policy"));
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a few layers of a few hundred")]
    let shape = PolicyConfig::tiny(number(2, "2") as usize, number(3, "96") as usize);
    let policy = Policy::random(shape, 1).expect("a policy of this shape");
    println!("{}: {} weights", environment.name(), policy.size());
    let mut optimizer = AdamW::new(AdamWConfig { rate: 2e-3, ..AdamWConfig::default() });
    let start = Instant::now();
    for look in 1..=LOOKS {
        let how = WarmStart { steps: STEPS_BETWEEN, tasks: 64, seed: look };
        let loss = imitate(&policy, &*environment, how, &mut optimizer).expect("a step");
        let right = evaluate(&policy, &*environment, 512, 1.0).expect("an evaluation");
        let (step, seconds) = (look * u64::from(STEPS_BETWEEN), start.elapsed().as_secs_f64());
        println!("step {step:>5}  {seconds:>6.1} s  loss {loss:.3} nats a token  held out {right:.3}");
        if f64::from(right) >= number(4, "0.3") {
            break;
        }
    }
    save(&policy, &directory).expect("a directory that can be written");
    println!("written to {}", directory.display());
}
