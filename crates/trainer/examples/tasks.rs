//! Prints an environment's tasks, so that programs in other languages have the very same.
//!
//! ```text
//! cargo run --release -p chorus-trainer --example tasks [environment] [training tasks] [held-out tasks] [seed]
//! ```
//!
//! One line a task, with tabs between: `train` or `held-out`, the prompt, a solution.
#![allow(clippy::expect_used, reason = "a program for the terminal that stops at the first surprise")]

use std::io::{BufWriter, Write};

use chorus_machine::Rng;
use chorus_trainer::env::{by_name, held_out_task, training_task};

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, usual: u64| words.get(at).map_or(usual, |word| word.parse().expect("a number"));
    let environment =
        by_name(words.first().map_or("arithmetic-2", String::as_str)).expect("arithmetic-N, knights-N or sokoban-N");
    let mut rng = Rng::from_u64(number(3, 1));
    let mut out = BufWriter::new(std::io::stdout().lock());
    let training = (0..number(1, 1_000)).map(|_| ("train", training_task(&*environment, &mut rng)));
    let held_out = (0..number(2, 512)).map(|n| ("held-out", held_out_task(&*environment, n)));
    for (kind, task) in training.chain(held_out) {
        writeln!(out, "{kind}\t{}\t{}", task.prompt, task.solution).expect("an open pipe");
    }
}
