//! Rollouts without a swarm: the learner's own process samples, judges, and then learns. The baseline that every other mode is held
//! against, and the way to try an environment.

use candle_core::Result;
use chorus_machine::Rng;

use super::Trajectory;
use crate::env::{Environment, held_out_task, training_task};
use crate::policy::{Policy, Sampler, Tokenizer};

/// How much is sampled for a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// Tasks in a step.
    pub groups: usize,
    /// Answers to each.
    pub members: usize,
    /// Decides, with the step's number, which tasks and which answers.
    pub seed: u64,
}

/// Draws a step's rollouts from the policy as it is, and judges them.
///
/// # Errors
/// candle's.
pub fn roll_out(
    policy: &Policy,
    environment: &dyn Environment,
    round: Round,
    step: u64,
) -> Result<Vec<Vec<Trajectory>>> {
    let mut rng = Rng::from_u64(round.seed ^ step.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let tasks: Vec<_> = (0..round.groups).map(|_| training_task(environment, &mut rng)).collect();
    let prompts = tasks.iter().flat_map(|task| std::iter::repeat_n(Tokenizer.encode(&task.prompt), round.members));
    let prompts: Vec<Vec<u32>> = prompts.collect();
    let sampler = Sampler { max_tokens: environment.max_tokens(), temperature: 1.0 };
    let mut drawn = sampler.draw(policy, &prompts, &mut rng)?.into_iter().zip(prompts);
    let judge = |task, (sample, prompt): (crate::policy::Sample, Vec<u32>)| {
        let reward = environment.reward(task, &Tokenizer.decode(&sample.tokens));
        Trajectory { prompt, tokens: sample.tokens, logprobs: sample.logprobs, reward, lag: 0 }
    };
    Ok(tasks.iter().map(|task| drawn.by_ref().take(round.members).map(|drawn| judge(task, drawn)).collect()).collect())
}

/// Returns the mean reward over the first `tasks` held-out tasks, one answer to each: drawn at `temperature` 1, likeliest at 0.
///
/// # Errors
/// candle's.
#[allow(clippy::cast_precision_loss, reason = "tasks are few")]
pub fn evaluate(policy: &Policy, environment: &dyn Environment, tasks: u64, temperature: f32) -> Result<f32> {
    let tasks: Vec<_> = (0..tasks).map(|n| held_out_task(environment, n)).collect();
    let prompts: Vec<_> = tasks.iter().map(|task| Tokenizer.encode(&task.prompt)).collect();
    let sampler = Sampler { max_tokens: environment.max_tokens(), temperature };
    let answers = sampler.draw(policy, &prompts, &mut Rng::from_u64(0))?;
    let rewards =
        tasks.iter().zip(&answers).map(|(task, answer)| environment.reward(task, &Tokenizer.decode(&answer.tokens)));
    Ok(rewards.sum::<f32>() / tasks.len().max(1) as f32)
}
