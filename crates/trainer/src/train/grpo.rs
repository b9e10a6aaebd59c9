//! GRPO (Shao et al. 2024) for rollouts of any age: group advantages, a clipped ratio, and truncated importance weights.
//!
//! For each token of an answer, with `μ` the sampler's probability when it was drawn, `π₀` the policy's before the step and `π` now:
//!
//! ```text
//!  A = (R − mean R of its group) / (std R of its group + ε)
//!  w = min(π₀ / μ, cap)                       truncated importance weight: staleness and the sampler's numerics
//!  r = π / π₀                                 1 at a batch's first pass, so the clip acts from its second
//!  L = − Σ w · min(r·A, clip(r, 1 − low, 1 + high)·A) / tokens  + kl · KL(π ‖ reference)
//! ```
//!
//! Splitting `π/μ` at `π₀` keeps the clip around where the step began, however old the rollout is (decoupled PPO, Hilton et al. 2022;
//! AReaL 2025). Groups whose members all earned the same teach nothing and are left out of the batch.

use candle_core::{DType, Result, Tensor};
use serde::{Deserialize, Serialize};

use super::{AdamW, Batch};
use crate::policy::Policy;

/// Added to a group's deviation.
const EPSILON: f32 = 1e-4;

/// The numbers of GRPO.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GrpoConfig {
    /// How far the ratio may fall below 1.
    pub clip_low: f64,
    /// How far it may rise above 1.
    pub clip_high: f64,
    /// Cap of the importance weight.
    pub importance_cap: f64,
    /// Passes over a batch.
    pub passes: u32,
}

impl Default for GrpoConfig {
    fn default() -> Self {
        Self { clip_low: 0.2, clip_high: 0.28, importance_cap: 2.0, passes: 1 }
    }
}

/// One rollout as the learner sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Trajectory {
    /// The prompt's tokens.
    pub prompt: Vec<u32>,
    /// The answer's tokens.
    pub tokens: Vec<u32>,
    /// The natural logarithm of each one's probability when it was drawn.
    pub logprobs: Vec<f32>,
    /// What the answer earned.
    pub reward: f32,
}

/// What a step did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepReport {
    /// Mean reward of all rollouts.
    pub reward: f32,
    /// Share of groups from which something can be learned.
    pub useful: f32,
    /// The gradient's length before it was clipped.
    pub gradient: f64,
    /// Mean importance weight, before it was truncated.
    pub importance: f32,
    /// Share of tokens whose weight was truncated.
    pub truncated: f32,
}

/// Returns each member's advantage; all zero when all earned the same.
#[must_use]
#[allow(clippy::cast_precision_loss, reason = "groups are small")]
pub fn advantages(rewards: &[f32]) -> Vec<f32> {
    let count = rewards.len().max(1) as f32;
    let mean = rewards.iter().sum::<f32>() / count;
    let variance = rewards.iter().map(|reward| (reward - mean).powi(2)).sum::<f32>() / count;
    rewards.iter().map(|reward| (reward - mean) / (variance.sqrt() + EPSILON)).collect()
}

/// See the module.
#[derive(Debug)]
pub struct Grpo {
    config: GrpoConfig,
    optimizer: AdamW,
}

impl Grpo {
    /// Makes a learner.
    #[must_use]
    pub const fn new(config: GrpoConfig, optimizer: AdamW) -> Self {
        Self { config, optimizer }
    }

    pub(super) const fn optimizer(&self) -> &AdamW {
        &self.optimizer
    }

    /// Learns from groups of rollouts, each group the answers to one prompt.
    ///
    /// # Errors
    /// candle's; the policy is unchanged when the gradient is no number.
    #[allow(clippy::cast_precision_loss, reason = "counts of rollouts are small")]
    pub fn step(&mut self, policy: &Policy, groups: &[Vec<Trajectory>]) -> Result<StepReport> {
        let all: Vec<f32> = groups.iter().flatten().map(|rollout| rollout.reward).collect();
        let mut report =
            StepReport { reward: all.iter().sum::<f32>() / all.len().max(1) as f32, ..StepReport::default() };
        let mut rows: Vec<(&Trajectory, f32)> = Vec::new();
        let mut useful = 0;
        for group in groups {
            let advantages = advantages(&group.iter().map(|rollout| rollout.reward).collect::<Vec<_>>());
            if advantages.iter().all(|advantage| advantage.abs() < f32::EPSILON) {
                continue;
            }
            useful += 1;
            rows.extend(group.iter().zip(advantages));
        }
        report.useful = useful as f32 / groups.len().max(1) as f32;
        if rows.is_empty() {
            return Ok(report);
        }
        self.learn(policy, &rows, &mut report)?;
        Ok(report)
    }

    fn learn(&mut self, policy: &Policy, rows: &[(&Trajectory, f32)], report: &mut StepReport) -> Result<()> {
        let texts: Vec<(&[u32], &[u32])> = rows.iter().map(|(row, _)| (&row.prompt[..], &row.tokens[..])).collect();
        let batch = Batch::new(&texts)?;
        let drawn = batch.spread(&rows.iter().map(|(row, _)| &row.logprobs[..]).collect::<Vec<_>>())?;
        let each: Vec<Vec<f32>> = rows.iter().map(|(row, advantage)| vec![*advantage; row.tokens.len()]).collect();
        let advantage = batch.spread(&each.iter().map(|row| &row[..]).collect::<Vec<_>>())?;
        let tokens = batch.answers().sum_all()?;
        let mut before: Option<(Tensor, Tensor)> = None;
        for _ in 0..self.config.passes {
            let now = batch.logprobs(policy)?;
            if before.is_none() {
                let start = now.detach();
                let weight = ((&start - &drawn)?.exp()? * batch.answers())?;
                let cut = weight.minimum(self.config.importance_cap)?;
                report.importance = (weight.sum_all()? / &tokens)?.to_scalar()?;
                let capped = weight.gt(self.config.importance_cap)?.to_dtype(DType::F32)?;
                report.truncated = (capped.sum_all()? / &tokens)?.to_scalar()?;
                before = Some((start, cut));
            }
            let Some((start, weight)) = &before else { break };
            let ratio = (now - start)?.exp()?;
            let clipped = ratio.clamp(1.0 - self.config.clip_low, 1.0 + self.config.clip_high)?;
            let gain = (ratio * &advantage)?.minimum(&(clipped * &advantage)?)?;
            let loss = ((gain * weight)?.sum_all()? / &tokens)?.neg()?;
            report.gradient = self.optimizer.step(policy.weights(), &loss.backward()?)?;
        }
        Ok(())
    }
}
