//! AdamW (Loshchilov and Hutter 2019) with gradients clipped by their global norm.
//!
//! candle has one, but keeps its moments to itself; a run that is resumed must go on with the moments that it had.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use serde::{Deserialize, Serialize};

use super::StepError;

/// How large the steps are.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamWConfig {
    /// Learning rate after the warm-up.
    pub rate: f64,
    /// Steps over which the rate rises from zero.
    pub warm_up: u32,
    /// Steps over which the rate falls to a tenth, where it stays; 0 lets it be.
    pub anneal: u32,
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of their squares.
    pub beta2: f64,
    /// Keeps the division sound.
    pub epsilon: f64,
    /// Decay of the weights, times the rate. Vectors (norms) do not decay.
    pub decay: f64,
    /// Longest gradient, all weights together; longer ones are scaled down.
    pub clip: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { rate: 1e-3, warm_up: 10, anneal: 0, beta1: 0.9, beta2: 0.99, epsilon: 1e-8, decay: 0.0, clip: 1.0 }
    }
}

impl AdamWConfig {
    /// Returns the learning rate of a step, the first of which is 1.
    fn rate_at(&self, step: u32) -> f64 {
        let rise = (f64::from(step) / f64::from(self.warm_up.max(1))).min(1.0);
        let passed = if self.anneal == 0 { 0.0 } else { (f64::from(step) / f64::from(self.anneal)).min(1.0) };
        self.rate * rise * 0.1_f64.powf(passed)
    }
}

/// Names of the tensors on disk.
const STEP: &str = "step";
const MEAN: &str = "mean/";
const SQUARE: &str = "square/";

/// See the module.
#[derive(Clone, Debug)]
pub struct AdamW {
    config: AdamWConfig,
    step: u32,
    moments: BTreeMap<String, (Tensor, Tensor)>,
}

impl AdamW {
    /// Makes an optimizer that has not moved yet.
    #[must_use]
    pub const fn new(config: AdamWConfig) -> Self {
        Self { config, step: 0, moments: BTreeMap::new() }
    }

    /// Writes the moments and the number of steps.
    ///
    /// # Errors
    /// candle's, or those of the file system.
    pub(super) fn save(&self, file: &Path) -> candle_core::Result<()> {
        let mut tensors = HashMap::from([(STEP.to_owned(), Tensor::new(self.step, &Device::Cpu)?)]);
        for (name, (mean, square)) in &self.moments {
            tensors.insert(format!("{MEAN}{name}"), mean.clone());
            tensors.insert(format!("{SQUARE}{name}"), square.clone());
        }
        candle_core::safetensors::save(&tensors, file)
    }

    /// Reads what [`AdamW::save`] wrote.
    ///
    /// # Errors
    /// candle's, when the file is missing or damaged.
    pub(super) fn load(config: AdamWConfig, file: &Path) -> candle_core::Result<Self> {
        let mut tensors = candle_core::safetensors::load(file, &Device::Cpu)?;
        let Some(step) = tensors.remove(STEP) else { candle_core::bail!("{} has no step", file.display()) };
        let mut moments = BTreeMap::new();
        let names: Vec<String> = tensors.keys().filter_map(|key| key.strip_prefix(MEAN)).map(str::to_owned).collect();
        for name in names {
            let pair = (tensors.remove(&format!("{MEAN}{name}")), tensors.remove(&format!("{SQUARE}{name}")));
            let (Some(mean), Some(square)) = pair else { candle_core::bail!("{} lacks {name}", file.display()) };
            moments.insert(name, (mean, square));
        }
        Ok(Self { config, step: step.to_scalar()?, moments })
    }

    /// Moves the weights against their gradients. Returns the gradient's length before it was clipped.
    ///
    /// # Errors
    /// [`StepError`], also when the gradient is no number, in which case nothing has moved.
    pub fn step(&mut self, weights: &BTreeMap<String, Var>, gradients: &GradStore) -> Result<f64, StepError> {
        let mut squares = 0.0;
        for weight in weights.values() {
            if let Some(gradient) = gradients.get(weight) {
                squares += f64::from(gradient.sqr()?.sum_all()?.to_scalar::<f32>()?);
            }
        }
        let norm = squares.sqrt();
        if !norm.is_finite() {
            return Err(StepError::NotANumber("gradient"));
        }
        self.step += 1;
        let config = self.config;
        let scale = if norm > config.clip { config.clip / norm } else { 1.0 };
        let rate = config.rate_at(self.step);
        let exponent = i32::try_from(self.step).unwrap_or(i32::MAX);
        let (bias1, bias2) = (1.0 - config.beta1.powi(exponent), 1.0 - config.beta2.powi(exponent));
        for (name, weight) in weights {
            let Some(gradient) = gradients.get(weight) else { continue };
            let gradient = (gradient * scale)?;
            let (mean, square) = match self.moments.get(name) {
                Some((mean, square)) => (
                    ((mean * config.beta1)? + (&gradient * (1.0 - config.beta1))?)?,
                    ((square * config.beta2)? + (gradient.sqr()? * (1.0 - config.beta2))?)?,
                ),
                None => ((&gradient * (1.0 - config.beta1))?, (gradient.sqr()? * (1.0 - config.beta2))?),
            };
            let direction = ((&mean / bias1)? / ((&square / bias2)?.sqrt()? + config.epsilon)?)?;
            let decay = if weight.rank() > 1 { rate * config.decay } else { 0.0 };
            weight.set(&((weight.as_tensor() * (1.0 - decay))? - (direction * rate)?)?)?;
            self.moments.insert(name.clone(), (mean.detach(), square.detach()));
        }
        Ok(norm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_rises_and_falls_as_it_was_told() {
        let config = AdamWConfig { rate: 1.0, warm_up: 10, anneal: 1_000, ..AdamWConfig::default() };
        let rates = [1, 10, 500, 1_000, 9_000].map(|step| (config.rate_at(step) * 100.0).round());
        assert_eq!(rates, [10.0, 98.0, 32.0, 10.0, 10.0]);
        let steady = AdamWConfig { anneal: 0, ..config };
        assert_eq!(steady.rate_at(9_000).to_bits(), 1.0_f64.to_bits());
    }
}
