//! Environments: where tasks come from and what an answer is worth.
//!
//! A task follows from its environment and a seed alone, and so does the reward from the task and the answer's text: whoever holds a
//! rollout can compute its reward again, and a trainer does so for every one ([`Environment::reward`] is that judge). Nothing of a
//! task has to travel but its seed.
//!
//! To add one, implement [`Environment`]; `examples/environment.rs` does it in fewer than fifty lines.

mod arithmetic;
mod judge;
mod knights;
mod sokoban;

use chorus_machine::Rng;

pub use arithmetic::Arithmetic;
pub use judge::{Claim, DEFAULT_LIMIT, Judge, JudgeError, Judgement, MAX_STUCK};
pub use knights::Knights;
pub use sokoban::Sokoban;

/// One prompt in so many is held out: it is never trained on, and evaluation uses no other. The prompt decides and not the seed, since
/// two seeds may make the same task.
const HELD_OUT: u64 = 16;
/// Seeds that are tried for a task of the wanted kind.
const MAX_DRAWS: usize = 1_000;

/// One task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// The seed it came from.
    pub seed: u64,
    /// What the policy reads, in printable ASCII.
    pub prompt: String,
    /// An answer that earns the full reward: what a supervised warm start imitates.
    pub solution: String,
}

/// Where tasks come from and what an answer is worth.
pub trait Environment: Send + Sync + std::fmt::Debug {
    /// Returns the environment's name with its difficulty, e.g. `arithmetic-2`. Equal names mean equal tasks for equal seeds.
    fn name(&self) -> String;

    /// Makes the task of a seed. Equal seeds make equal tasks, on every machine.
    fn task(&self, seed: u64) -> Task;

    /// Judges an answer: 0 (wrong) to 1 (right). Must return for any text whatsoever.
    fn reward(&self, task: &Task, answer: &str) -> f32;

    /// Returns the most tokens (bytes) that an answer needs, its end included.
    fn max_tokens(&self) -> usize;
}

/// Returns the environment of a name as [`Environment::name`] gives it.
#[must_use]
pub fn by_name(name: &str) -> Option<Box<dyn Environment>> {
    let (kind, level) = name.rsplit_once('-')?;
    let level: u32 = level.parse().ok()?;
    let environment: Box<dyn Environment> = match kind {
        "arithmetic" => Box::new(Arithmetic::new(level)?),
        "knights" => Box::new(Knights::new(level)?),
        "sokoban" => Box::new(Sokoban::new(level)?),
        _ => return None,
    };
    Some(environment)
}

/// Returns whether a task is held out for evaluation.
#[must_use]
pub fn is_held_out(task: &Task) -> bool {
    // FNV-1a: any fixed function that spreads prompts evenly will do.
    let spread = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    let hash = task.prompt.bytes().fold(0xcbf2_9ce4_8422_2325, spread);
    (hash >> 32) % HELD_OUT == 0
}

/// Draws a task for training.
pub fn training_task(environment: &dyn Environment, rng: &mut Rng) -> Task {
    draw(environment, false, std::iter::from_fn(|| Some(rng.next_u64())))
}

/// Returns the training task of a seed, as a group's number gives one: whoever samples a rollout and whoever judges it come to the same
/// task, and it is never one that is held out.
#[must_use]
pub fn training_task_of(environment: &dyn Environment, seed: u64) -> Task {
    let mut rng = Rng::from_u64(seed);
    draw(environment, false, std::iter::once(seed).chain(std::iter::from_fn(|| Some(rng.next_u64()))))
}

/// Returns the `n`-th task for evaluation.
#[must_use]
pub fn held_out_task(environment: &dyn Environment, n: u64) -> Task {
    let mut rng = Rng::from_u64(n);
    draw(environment, true, std::iter::from_fn(|| Some(rng.next_u64())))
}

/// Returns the first task of the wanted kind. An environment with so few tasks that none is of it gives the last one tried.
fn draw(environment: &dyn Environment, held_out: bool, seeds: impl Iterator<Item = u64>) -> Task {
    let mut last = environment.task(0);
    for seed in seeds.take(MAX_DRAWS) {
        last = environment.task(seed);
        if is_held_out(&last) == held_out {
            break;
        }
    }
    last
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn training_and_evaluation_never_share_a_prompt() {
        let environment = by_name("arithmetic-2").unwrap();
        let mut rng = Rng::from_u64(1);
        let trained: std::collections::BTreeSet<_> =
            (0..20_000).map(|_| training_task(&*environment, &mut rng).prompt).collect();
        let held_out: std::collections::BTreeSet<_> =
            (0..2_000).map(|n| held_out_task(&*environment, n).prompt).collect();
        assert!(held_out.len() > 500 && trained.len() > 5_000, "{} {}", held_out.len(), trained.len());
        assert!(trained.is_disjoint(&held_out));
    }

    #[test]
    fn every_seed_has_one_training_task() {
        let environment = by_name("arithmetic-2").unwrap();
        for seed in 0..2_000 {
            let task = training_task_of(&*environment, seed);
            assert_eq!(task, training_task_of(&*environment, seed));
            assert!(!is_held_out(&task));
            let own = environment.task(seed);
            assert!(is_held_out(&own) || own == task, "a seed whose own task may be trained on keeps it");
        }
    }

    #[test]
    fn every_environment_keeps_its_word() {
        for name in ["arithmetic-1", "arithmetic-2", "knights-2", "knights-3", "sokoban-1", "sokoban-2"] {
            let environment = by_name(name).unwrap();
            assert_eq!(environment.name(), name);
            for seed in 0..50 {
                let task = environment.task(seed);
                assert_eq!(task, environment.task(seed), "{name}: the same seed, the same task");
                assert!(task.prompt.bytes().chain(task.solution.bytes()).all(|b| (32..127).contains(&b)), "{task:?}");
                assert!(task.solution.len() < environment.max_tokens(), "{name}: the end needs a token too");
                assert!((environment.reward(&task, &task.solution) - 1.0).abs() < f32::EPSILON, "{name} {task:?}");
                for rubbish in ["", " ", "\u{0}", "-", "99999999999999999999999", &"U".repeat(10_000)] {
                    let reward = environment.reward(&task, rubbish);
                    assert!((0.0..1.0).contains(&reward), "{name}: {rubbish:.9} earns {reward}");
                }
            }
        }
        assert!(by_name("chess-1").is_none() && by_name("arithmetic").is_none() && by_name("arithmetic-99").is_none());
    }
}
