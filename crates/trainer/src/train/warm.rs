//! The supervised warm start: imitate solutions until a policy knows what an answer looks like.

use chorus_machine::Rng;

use super::{AdamW, Batch, StepError};
use crate::env::{Environment, training_task};
use crate::policy::{END, Policy, Tokenizer};

/// How long to imitate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WarmStart {
    /// Steps.
    pub steps: u32,
    /// Tasks in a step.
    pub tasks: usize,
    /// Decides which tasks.
    pub seed: u64,
}

/// Imitates solutions of training tasks, and returns the last step's loss in nats a token.
///
/// # Errors
/// [`StepError`]'s.
pub fn imitate(
    policy: &Policy,
    environment: &dyn Environment,
    how: WarmStart,
    optimizer: &mut AdamW,
) -> Result<f32, StepError> {
    let mut rng = Rng::from_u64(how.seed);
    let mut last = f32::NAN;
    for _ in 0..how.steps {
        let rows: Vec<(Vec<u32>, Vec<u32>)> = (0..how.tasks)
            .map(|_| {
                let task = training_task(environment, &mut rng);
                let mut answer = Tokenizer.encode(&task.solution);
                answer.push(END);
                (Tokenizer.encode(&task.prompt), answer)
            })
            .collect();
        let rows: Vec<(&[u32], &[u32])> = rows.iter().map(|(prompt, answer)| (&prompt[..], &answer[..])).collect();
        let batch = Batch::new(&rows)?;
        let loss = batch.logprobs(policy)?.mean_all()?.neg()?;
        optimizer.step(policy.weights(), &loss.backward()?)?;
        last = loss.to_scalar()?;
    }
    Ok(last)
}
