//! An environment of one's own: answer with the letters in reverse. Prints a task, and what some answers to it earn.
//!
//! ```text
//! cargo run --release -p chorus-trainer --example environment
//! ```

use chorus_machine::Rng;
use chorus_trainer::env::{Environment, Task};

/// Words of four letters, to be reversed.
#[derive(Debug)]
struct Reverse;

impl Environment for Reverse {
    fn name(&self) -> String {
        "reverse-4".to_owned()
    }

    fn task(&self, seed: u64) -> Task {
        let mut rng = Rng::from_u64(seed);
        let letters: Vec<char> = (0..4).filter_map(|_| rng.pick(&['a', 'b', 'c', 'd', 'e']).copied()).collect();
        let solution = letters.iter().rev().collect();
        Task { seed, prompt: format!("{}>", String::from_iter(letters)), solution }
    }

    fn reward(&self, task: &Task, answer: &str) -> f32 {
        f32::from(u8::from(answer == task.solution))
    }

    fn max_tokens(&self) -> usize {
        5
    }
}

fn main() {
    let task = Reverse.task(7);
    println!("{}: {task:?}", Reverse.name());
    for answer in [task.solution.as_str(), &task.prompt, ""] {
        println!("{answer:?} earns {}", Reverse.reward(&task, answer));
    }
}
