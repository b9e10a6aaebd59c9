//! GRPO (Shao et al. 2024) for rollouts of any age: group advantages, a clipped ratio, and truncated importance weights.
//!
//! For each token of an answer, with `μ` the sampler's probability when it was drawn, `π₀` the policy's before the step, `π` now and
//! `ρ` a frozen reference's:
//!
//! ```text
//!  A = (R − mean R of its group) / (std R of its group + ε)
//!  w = min(π₀ / μ, cap)                       truncated importance weight: staleness and the sampler's numerics
//!  r = π / π₀                                 1 at a batch's first pass, so the clip acts from its second
//!  k = ρ/π − ln ρ/π − 1                       an estimate of KL(π ‖ ρ) that is never negative (Schulman 2020, "k3")
//!  L = − Σ w · (min(r·A, clip(r, 1 − low, 1 + high)·A) − kl · k) / tokens
//! ```
//!
//! Splitting `π/μ` at `π₀` keeps the clip around where the step began, however old the rollout is (decoupled PPO, Hilton et al. 2022;
//! AReaL 2025). `μ` is a token's own: where the weights changed in the middle of an answer, each token's weight corrects for the version
//! that drew it. Groups whose members all earned the same teach nothing and are left out of the batch.
//!
//! A batch that does not fit into memory is learned from in micro-batches, whose gradients add up to the whole one's.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use super::{AdamW, Batch, StepError};
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
    /// Weight of the divergence from the reference policy, which is the one that learning began with; 0 for none.
    pub kl: f64,
    /// Rollouts that are learned from at a time; 0 for all of a batch. Changes memory and not what is learned.
    pub micro_batch: usize,
}

impl Default for GrpoConfig {
    fn default() -> Self {
        Self { clip_low: 0.2, clip_high: 0.28, importance_cap: 2.0, passes: 1, kl: 0.0, micro_batch: 0 }
    }
}

/// One rollout as the learner sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Trajectory {
    /// The prompt's tokens.
    pub prompt: Vec<u32>,
    /// The answer's tokens.
    pub tokens: Vec<u32>,
    /// The natural logarithm of each one's probability when it was drawn, under the version that drew it.
    pub logprobs: Vec<f32>,
    /// What the answer earned.
    pub reward: f32,
    /// Steps that the oldest weights in it are behind those that it updates; 0 when it is fresh.
    pub lag: u64,
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
    /// Mean lag of all rollouts, in steps.
    pub lag: f32,
    /// Mean estimate of the divergence from the reference before the step, in nats a token; 0 when none is asked for.
    pub kl: f32,
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
    reference: Option<Policy>,
}

impl Grpo {
    /// Makes a learner. Without a reference, and if the divergence from one has a weight, the policy of the first step is it.
    #[must_use]
    pub const fn new(config: GrpoConfig, optimizer: AdamW, reference: Option<Policy>) -> Self {
        Self { config, optimizer, reference }
    }

    pub(super) const fn optimizer(&self) -> &AdamW {
        &self.optimizer
    }

    pub(super) const fn reference(&self) -> Option<&Policy> {
        self.reference.as_ref()
    }

    /// Learns from groups of rollouts, each group the answers to one prompt.
    ///
    /// # Errors
    /// [`StepError`]; policy and optimizer are then what they were.
    #[allow(clippy::cast_precision_loss, reason = "counts of rollouts are small")]
    pub fn step(&mut self, policy: &Policy, groups: &[Vec<Trajectory>]) -> Result<StepReport, StepError> {
        let all = || groups.iter().flatten();
        if all().any(|rollout| !rollout.reward.is_finite()) {
            return Err(StepError::NotANumber("reward"));
        }
        if all().flat_map(|rollout| &rollout.logprobs).any(|logprob| !logprob.is_finite()) {
            return Err(StepError::NotANumber("sampler's log-probability"));
        }
        let count = all().count().max(1) as f32;
        let mut report = StepReport {
            reward: all().map(|rollout| rollout.reward).sum::<f32>() / count,
            lag: all().map(|rollout| rollout.lag as f32).sum::<f32>() / count,
            ..StepReport::default()
        };
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
        if self.config.kl > 0.0 && self.reference.is_none() {
            self.reference = Some(policy.copy()?);
        }
        // A first pass that fails has moved nothing; a later one comes after others that have.
        let before = if self.config.passes > 1 { Some((policy.copy()?, self.optimizer.clone())) } else { None };
        let learned = self.learn(policy, &rows, &mut report);
        if learned.is_err()
            && let Some((weights, optimizer)) = before
        {
            policy.set(&weights)?;
            self.optimizer = optimizer;
        }
        learned.map(|()| report)
    }

    fn learn(
        &mut self,
        policy: &Policy,
        rows: &[(&Trajectory, f32)],
        report: &mut StepReport,
    ) -> Result<(), StepError> {
        #[allow(clippy::cast_precision_loss, reason = "a batch has fewer tokens than 2^52")]
        let tokens = rows.iter().map(|(row, _)| row.tokens.len()).sum::<usize>() as f64;
        let size = if self.config.micro_batch == 0 { rows.len() } else { self.config.micro_batch };
        let mut parts = rows.chunks(size).map(Part::new).collect::<candle_core::Result<Vec<_>>>()?;
        for _ in 0..self.config.passes {
            let mut gradients: Option<GradStore> = None;
            for part in &mut parts {
                let loss = part.loss(policy, self.reference.as_ref(), &self.config, tokens, report)?;
                if !loss.to_scalar::<f32>()?.is_finite() {
                    return Err(StepError::NotANumber("loss"));
                }
                gradients = Some(add(policy, gradients, loss.backward()?)?);
            }
            let Some(gradients) = gradients else { break };
            report.gradient = self.optimizer.step(policy.weights(), &gradients)?;
        }
        Ok(())
    }
}

/// Adds the gradients of a policy's weights.
fn add(policy: &Policy, sum: Option<GradStore>, mut more: GradStore) -> candle_core::Result<GradStore> {
    let Some(mut sum) = sum else { return Ok(more) };
    for weight in policy.weights().values() {
        let Some(gradient) = more.remove(weight) else { continue };
        let gradient = match sum.get(weight) {
            Some(so_far) => (so_far + gradient)?,
            None => gradient,
        };
        sum.insert(weight, gradient);
    }
    Ok(sum)
}

/// Rollouts that are learned from at a time, token by token in one line.
struct Part {
    batch: Batch,
    drawn: Tensor,
    advantage: Tensor,
    before: Option<Before>,
}

/// What is fixed at a batch's first pass.
struct Before {
    logprobs: Tensor,
    weight: Tensor,
    reference: Option<Tensor>,
}

impl Part {
    fn new(rows: &[(&Trajectory, f32)]) -> candle_core::Result<Self> {
        let texts: Vec<(&[u32], &[u32])> = rows.iter().map(|(row, _)| (&row.prompt[..], &row.tokens[..])).collect();
        let drawn = rows.iter().flat_map(|(row, _)| row.logprobs.iter().copied());
        let advantage = rows.iter().flat_map(|(row, advantage)| std::iter::repeat_n(*advantage, row.tokens.len()));
        Ok(Self {
            batch: Batch::new(&texts)?,
            drawn: Tensor::from_iter(drawn, &Device::Cpu)?,
            advantage: Tensor::from_iter(advantage, &Device::Cpu)?,
            before: None,
        })
    }

    /// Returns this part's share of the loss over all of a batch's `tokens`.
    fn loss(
        &mut self,
        policy: &Policy,
        reference: Option<&Policy>,
        config: &GrpoConfig,
        tokens: f64,
        report: &mut StepReport,
    ) -> candle_core::Result<Tensor> {
        let now = self.batch.logprobs(policy)?;
        let reference = reference.filter(|_| config.kl > 0.0);
        let before = match self.before.take() {
            Some(before) => before,
            None => self.begin(now.detach(), reference, config, tokens, report)?,
        };
        let ratio = (&now - &before.logprobs)?.exp()?;
        let clipped = ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)?;
        let mut gain = (ratio * &self.advantage)?.minimum(&(clipped * &self.advantage)?)?;
        if let Some(reference) = &before.reference {
            gain = (gain - (divergence(reference, &now)? * config.kl)?)?;
        }
        let loss = ((gain * &before.weight)?.sum_all()? / tokens)?.neg()?;
        self.before = Some(before);
        Ok(loss)
    }

    /// Fixes what the step begins with, and reports on it.
    #[allow(clippy::cast_possible_truncation, reason = "reports are single precision")]
    fn begin(
        &self,
        logprobs: Tensor,
        reference: Option<&Policy>,
        config: &GrpoConfig,
        tokens: f64,
        report: &mut StepReport,
    ) -> candle_core::Result<Before> {
        let share = |sum: Tensor| (sum.sum_all()? / tokens)?.to_scalar::<f32>();
        let weight = (&logprobs - &self.drawn)?.exp()?;
        report.truncated += share(weight.gt(config.importance_cap)?.to_dtype(DType::F32)?)?;
        let cut = weight.minimum(config.importance_cap)?;
        report.importance += share(weight)?;
        let reference =
            reference.map(|policy| self.batch.logprobs(policy)).transpose()?.map(|logprobs| logprobs.detach());
        if let Some(reference) = &reference {
            report.kl += share((divergence(reference, &logprobs)? * &cut)?)?;
        }
        Ok(Before { logprobs, weight: cut, reference })
    }
}

/// Schulman's third estimator of the divergence, token by token, from logarithms of probabilities.
fn divergence(reference: &Tensor, now: &Tensor) -> candle_core::Result<Tensor> {
    let log = (reference - now)?;
    (log.exp()? - &log)? - 1.0
}
