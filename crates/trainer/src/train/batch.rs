//! Prompts with answers as one right-padded tensor, and the logarithms of the answers' probabilities under a policy.

use candle_core::{Device, Result, Tensor};

use crate::policy::{END, MASKED, Policy, logprobs_of};

/// Rows of prompt and answer. Everything that is said of answers is in one line, `[tokens]`: token by token, row by row.
#[derive(Debug)]
pub struct Batch {
    /// What is read, `[rows, places]`.
    tokens: Tensor,
    /// The places that each answer's token follows, counted through all rows.
    places: Tensor,
    /// The answers' tokens.
    targets: Tensor,
}

impl Batch {
    /// Puts rows of (prompt, answer) together. A prompt has at least one token.
    ///
    /// # Errors
    /// candle's.
    #[allow(clippy::cast_possible_truncation, reason = "rows and places are a few thousand")]
    pub fn new(rows: &[(&[u32], &[u32])]) -> Result<Self> {
        let width = rows.iter().map(|(prompt, answer)| prompt.len() + answer.len()).max().unwrap_or(0).max(2) - 1;
        let (mut tokens, mut places, mut targets) = (Vec::new(), Vec::new(), Vec::new());
        for (row, (prompt, answer)) in rows.iter().enumerate() {
            let read = prompt.iter().chain(answer.iter()).copied();
            tokens.extend(read.chain(std::iter::repeat(END)).take(width));
            let begin = row * width + prompt.len().saturating_sub(1);
            places.extend((begin..begin + answer.len()).map(|place| place as u32));
            targets.extend_from_slice(answer);
        }
        let count = targets.len();
        Ok(Self {
            tokens: Tensor::from_vec(tokens, (rows.len(), width), &Device::Cpu)?,
            places: Tensor::from_vec(places, count, &Device::Cpu)?,
            targets: Tensor::from_vec(targets, count, &Device::Cpu)?,
        })
    }

    /// Returns the natural logarithm of the probability of each answer's token, `[tokens]`.
    ///
    /// # Errors
    /// candle's, also when a row is longer than the policy's longest sequence.
    pub fn logprobs(&self, policy: &Policy) -> Result<Tensor> {
        let (rows, width) = self.tokens.dims2()?;
        #[allow(clippy::cast_possible_truncation, reason = "places are below the longest sequence")]
        let positions = Tensor::arange(0, width as u32, &Device::Cpu)?.repeat((rows, 1))?;
        let causal = (0..width).flat_map(|at| (0..width).map(move |key| if key <= at { 0.0 } else { MASKED }));
        let mask = Tensor::from_iter(causal, &Device::Cpu)?.reshape((1, 1, width, width))?;
        let read = policy.read(&self.tokens, &positions, &mask, None)?.index_select(&self.places, 0)?;
        logprobs_of(&policy.logits(&read)?, &self.targets)
    }
}
