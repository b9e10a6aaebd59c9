//! Sampling without an engine: for the co-located baseline, for evaluation and for tests.

use candle_core::{Device, Result, Tensor};
use chorus_machine::Rng;

use super::model::{Cache, MASKED, Policy};
use super::tokenizer::END;

/// One answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    /// Its tokens, the end included if it came.
    pub tokens: Vec<u32>,
    /// The natural logarithm of each token's probability when it was drawn.
    pub logprobs: Vec<f32>,
}

/// Draws answers from a policy, many prompts at a time.
#[derive(Clone, Copy, Debug)]
pub struct Sampler {
    /// Tokens of an answer at most.
    pub max_tokens: usize,
    /// 1 draws from the policy itself; 0 takes the likeliest token.
    pub temperature: f32,
}

impl Sampler {
    /// Draws one answer to each prompt.
    ///
    /// # Errors
    /// candle's, when prompt and answer are longer than the policy's longest sequence.
    #[allow(clippy::cast_possible_truncation, reason = "places are below the longest sequence, which is a few hundred")]
    pub fn draw(&self, policy: &Policy, prompts: &[Vec<u32>], rng: &mut Rng) -> Result<Vec<Sample>> {
        let rows = prompts.len();
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let pads: Vec<usize> = prompts.iter().map(|prompt| longest - prompt.len()).collect();
        let padded = prompts
            .iter()
            .zip(&pads)
            .flat_map(|(prompt, pad)| std::iter::repeat_n(END, *pad).chain(prompt.iter().copied()));
        let mut tokens = Tensor::from_iter(padded, &Device::Cpu)?.reshape((rows, longest))?;
        let places = pads.iter().flat_map(|pad| (0..longest).map(move |at| at.saturating_sub(*pad) as u32));
        let mut positions = Tensor::from_iter(places, &Device::Cpu)?.reshape((rows, longest))?;
        let mut mask = mask(&pads, 0..longest, longest)?;
        let (mut samples, mut cache) = (vec![Sample::default(); rows], Cache::default());
        let mut running = rows;
        for step in 0..self.max_tokens {
            let width = positions.dim(1)?;
            let read = policy.read(&tokens, &positions, &mask, Some(&mut cache))?.reshape((rows, width, ()))?;
            let logits: Vec<Vec<f32>> =
                policy.logits(&read.narrow(1, width - 1, 1)?.squeeze(1)?.contiguous()?)?.to_vec2()?;
            let mut next = Vec::with_capacity(rows);
            for (sample, logits) in samples.iter_mut().zip(&logits) {
                if sample.tokens.last() == Some(&END) {
                    next.push(END);
                    continue;
                }
                let (token, logprob) = self.pick(logits, rng);
                sample.tokens.push(token);
                sample.logprobs.push(logprob);
                running -= usize::from(token == END);
                next.push(token);
            }
            if running == 0 {
                break;
            }
            let at = longest + step;
            tokens = Tensor::from_vec(next, (rows, 1), &Device::Cpu)?;
            let now = pads.iter().map(|pad| (at - pad) as u32);
            positions = Tensor::from_iter(now, &Device::Cpu)?.reshape((rows, 1))?;
            mask = self::mask(&pads, at..at + 1, at + 1)?;
        }
        Ok(samples)
    }

    /// Draws a token, and returns it with the logarithm of its probability.
    fn pick(&self, logits: &[f32], rng: &mut Rng) -> (u32, f32) {
        let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let powers: Vec<f64> = logits.iter().map(|logit| f64::from(logit - top).exp()).collect();
        let total: f64 = powers.iter().sum();
        let at = if self.temperature == 0.0 {
            logits.iter().position(|logit| *logit == top).unwrap_or(0)
        } else {
            let sharpened: Vec<f64> =
                powers.iter().map(|power| power.powf(1.0 / f64::from(self.temperature))).collect();
            let mut left = rng.unit() * sharpened.iter().sum::<f64>();
            let hit = sharpened.iter().position(|power| {
                left -= power;
                left < 0.0
            });
            hit.unwrap_or(logits.len() - 1)
        };
        #[allow(clippy::cast_possible_truncation, reason = "a vocabulary fits u32, a logarithm single precision")]
        let drawn = (at as u32, (powers[at] / total).ln() as f32);
        drawn
    }
}

/// A causal mask for `places` of left-padded rows over `width` places of keys.
fn mask(pads: &[usize], places: std::ops::Range<usize>, width: usize) -> Result<Tensor> {
    let (rows, count) = (pads.len(), places.len());
    let values = pads.iter().flat_map(|pad| {
        places
            .clone()
            .flat_map(move |at| (0..width).map(move |key| if key <= at && key >= *pad { 0.0 } else { MASKED }))
    });
    Tensor::from_iter(values, &Device::Cpu)?.reshape((rows, 1, count, width))
}
