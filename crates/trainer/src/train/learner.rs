//! A policy under training: its weights, the optimizer's moments, and how many steps it took. On disk it is a directory that mistral.rs
//! loads as a model and that a later run goes on from as if nothing had happened.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{AdamW, AdamWConfig, Grpo, GrpoConfig, StepError, StepReport, Trajectory};
use crate::policy::{self, Policy};

/// The optimizer's moments, beside the weights.
const MOMENTS: &str = "optimizer.safetensors";
/// The policy that learning began with, where the objective knows it.
const REFERENCE: &str = "reference";
/// Everything else that a later run needs.
const STATE: &str = "trainer.json";

/// How a policy is trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LearnerConfig {
    /// The objective.
    pub grpo: GrpoConfig,
    /// The steps.
    pub optimizer: AdamWConfig,
}

/// What is on disk beside weights and moments.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    step: u64,
    #[serde(default)]
    skipped: u64,
    config: LearnerConfig,
}

/// See the module.
#[derive(Debug)]
pub struct Learner {
    policy: Policy,
    grpo: Grpo,
    config: LearnerConfig,
    step: u64,
    skipped: u64,
}

impl Learner {
    /// Begins to train a policy.
    #[must_use]
    pub const fn new(policy: Policy, config: LearnerConfig) -> Self {
        let grpo = Grpo::new(config.grpo, AdamW::new(config.optimizer), None);
        Self { policy, grpo, config, step: 0, skipped: 0 }
    }

    /// Returns the policy as it is now.
    #[must_use]
    pub const fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Returns how many steps were taken.
    #[must_use]
    pub const fn steps(&self) -> u64 {
        self.step
    }

    /// Returns how many batches taught nothing because something in them was no number.
    #[must_use]
    pub const fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Learns from groups of rollouts.
    ///
    /// # Errors
    /// [`StepError`]. The policy is unchanged; after one that [is skippable](StepError::is_skippable), training goes on with the next
    /// batch.
    pub fn step(&mut self, groups: &[Vec<Trajectory>]) -> Result<StepReport, StepError> {
        let report = self.grpo.step(&self.policy, groups);
        match &report {
            Ok(_) => self.step += 1,
            Err(error) => self.skipped += u64::from(error.is_skippable()),
        }
        report
    }

    /// Takes over weights that somebody else made of a batch, as one step. The optimizer's moments stay what they were.
    ///
    /// # Errors
    /// candle's, when their shapes are others.
    pub fn adopt(&mut self, weights: &Policy) -> candle_core::Result<()> {
        self.policy.set(weights)?;
        self.step += 1;
        Ok(())
    }

    /// Writes a checkpoint: whole or not at all, since it is written beside the old one and then put in its place.
    ///
    /// # Errors
    /// candle's, or those of the file system.
    pub fn save(&self, directory: &Path) -> candle_core::Result<()> {
        let (fresh, old) = (sibling(directory, "new"), sibling(directory, "old"));
        for leftover in [&fresh, &old] {
            if leftover.exists() {
                fs::remove_dir_all(leftover)?;
            }
        }
        policy::save(&self.policy, &fresh)?;
        self.grpo.optimizer().save(&fresh.join(MOMENTS))?;
        if let Some(reference) = self.grpo.reference() {
            policy::save(reference, &fresh.join(REFERENCE))?;
        }
        let state = State { step: self.step, skipped: self.skipped, config: self.config };
        let state = serde_json::to_vec_pretty(&state).map_err(|error| candle_core::Error::Msg(error.to_string()))?;
        fs::write(fresh.join(STATE), state)?;
        if directory.exists() {
            fs::rename(directory, &old)?;
        }
        fs::rename(&fresh, directory)?;
        if old.exists() {
            fs::remove_dir_all(&old)?;
        }
        Ok(())
    }

    /// Goes on from a checkpoint, also from one whose replacement was cut short.
    ///
    /// # Errors
    /// candle's, when a file is missing or damaged.
    pub fn resume(directory: &Path) -> candle_core::Result<Self> {
        let old = sibling(directory, "old");
        let directory = if directory.exists() { directory } else { &old };
        let state = fs::read(directory.join(STATE))?;
        let state: State =
            serde_json::from_slice(&state).map_err(|error| candle_core::Error::Msg(format!("{STATE}: {error}")))?;
        let optimizer = AdamW::load(state.config.optimizer, &directory.join(MOMENTS))?;
        let reference = directory.join(REFERENCE);
        let reference = if reference.exists() { Some(policy::load(&reference)?) } else { None };
        let grpo = Grpo::new(state.config.grpo, optimizer, reference);
        let State { step, skipped, config } = state;
        Ok(Self { policy: policy::load(directory)?, grpo, config, step, skipped })
    }
}

fn sibling(directory: &Path, suffix: &str) -> PathBuf {
    let mut name = directory.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{suffix}"));
    directory.with_file_name(name)
}
