//! Prompts with answers as one right-padded tensor, and the logarithms of the answers' probabilities under a policy.

use candle_core::{D, Device, Result, Tensor};

use crate::policy::{END, MASKED, Policy, log_softmax};

/// Rows of prompt and answer, `[rows, places]`.
#[derive(Debug)]
pub struct Batch {
    tokens: Tensor,
    /// What follows each place.
    targets: Tensor,
    /// 1 where an answer's token follows, else 0.
    answers: Tensor,
    /// For each row where its answer begins and how long it is.
    spans: Vec<(usize, usize)>,
}

impl Batch {
    /// Puts rows of (prompt, answer) together.
    ///
    /// # Errors
    /// candle's.
    pub fn new(rows: &[(&[u32], &[u32])]) -> Result<Self> {
        let places = rows.iter().map(|(prompt, answer)| prompt.len() + answer.len()).max().unwrap_or(0).max(2) - 1;
        let (mut tokens, mut targets, mut answers) = (Vec::new(), Vec::new(), Vec::new());
        for (prompt, answer) in rows {
            let row = || prompt.iter().chain(answer.iter()).copied();
            let pad = std::iter::repeat(END);
            tokens.extend(row().chain(pad.clone()).take(places));
            targets.extend(row().skip(1).chain(pad).take(places));
            let begin = prompt.len().saturating_sub(1);
            answers.extend((0..places).map(|at| f32::from(u8::from(at >= begin && at < begin + answer.len()))));
        }
        let shape = (rows.len(), places);
        Ok(Self {
            tokens: Tensor::from_vec(tokens, shape, &Device::Cpu)?,
            targets: Tensor::from_vec(targets, shape, &Device::Cpu)?,
            answers: Tensor::from_vec(answers, shape, &Device::Cpu)?,
            spans: rows.iter().map(|(prompt, answer)| (prompt.len().saturating_sub(1), answer.len())).collect(),
        })
    }

    /// Returns where answers are, 1 or 0, `[rows, places]`.
    #[must_use]
    pub const fn answers(&self) -> &Tensor {
        &self.answers
    }

    /// Spreads a value for each answer's token over `[rows, places]`, with zeros elsewhere.
    ///
    /// # Errors
    /// candle's.
    pub fn spread(&self, values: &[&[f32]]) -> Result<Tensor> {
        let (rows, places) = self.tokens.dims2()?;
        let mut flat = vec![0.0; rows * places];
        for (row, (values, (begin, len))) in values.iter().zip(&self.spans).enumerate() {
            let start = row * places + begin;
            flat[start..start + len].copy_from_slice(&values[..*len]);
        }
        Tensor::from_vec(flat, (rows, places), &Device::Cpu)
    }

    /// Returns the natural logarithm of the probability of what follows each place, `[rows, places]`, and the entropy there.
    ///
    /// # Errors
    /// candle's.
    pub fn logprobs(&self, policy: &Policy) -> Result<Tensor> {
        let (rows, places) = self.tokens.dims2()?;
        #[allow(clippy::cast_possible_truncation, reason = "places are below the longest sequence")]
        let positions = Tensor::arange(0, places as u32, &Device::Cpu)?.repeat((rows, 1))?;
        let causal = (0..places).flat_map(|at| (0..places).map(move |key| if key <= at { 0.0 } else { MASKED }));
        let mask = Tensor::from_iter(causal, &Device::Cpu)?.reshape((1, 1, places, places))?;
        let logits = policy.forward(&self.tokens, &positions, &mask, None)?;
        log_softmax(&logits)?.gather(&self.targets.unsqueeze(2)?, D::Minus1)?.squeeze(2)
    }
}
