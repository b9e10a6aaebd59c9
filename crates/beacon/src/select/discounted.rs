//! The bandit that forgets: per-agent estimates, a small fixed exploration, and a discount on everything seen.
//!
//! What Symphony-Coord's bandit lacks, point by point: an estimate per agent and kind of job instead of one model for all; an
//! exploration that is fixed and small instead of about 7; forgetting, so that an agent that changed is noticed and one that
//! recovered is found again; and no normalisation that bends the features.
//!
//! A cell is one agent at one kind of job. All cells fade by γ at each observation of anybody, the observed agent's own cell by
//! δ besides, so that a cell never weighs more than 1/(1 − δ) observations. With `N` and `R` a cell's discounted count and sum of
//! rewards:
//!
//! ```text
//!   ρ = (k · reputation + R) / (k + N)                   what of its promise the agent keeps at this kind of job
//!   rank by  φ · (ρ + α / √(k + N)) − ½ · 0.2 · √latency
//! ```
//!
//! The reputation, which the agent earned at all kinds of jobs, is the prior and worth `k` observations: an agent new to a kind of
//! job is judged by what it did elsewhere, a new agent by its capability. Half of the latency's penalty stands outside, because
//! the rewards in `R` already carry what it cost on average.
//!
//! Measured (`tests/shock.rs`, 60 fresh seeds, both shocks, reward shaped by latency): reward 0.576 against 0.574 for φ × reputation,
//! 0.555 for φ alone, 0.539 for LinUCB as published and 0.479 at random. The lead over φ × reputation is small; it lies in the first
//! hundred tasks after a shock (solved 0.390 and 0.493 against 0.376 and 0.469) and in cost per solved task (0.77 and 0.72 against
//! 0.79 and 0.74). One model, whose φ is a good guide to success: indicative, no more.

use std::collections::BTreeMap;

use chorus_machine::Rng;
use chorus_protocol::NodeId;

use super::{Candidate, LATENCY_PENALTY, Selector, by_value};

/// Cells that are remembered.
const MAX_CELLS: usize = 16_384;

/// The numbers of [`Discounted`]. The defaults did best, of those that explore at all, over both shocks and both rewards of
/// `tests/shock.rs` in a grid of 120 with 24 seeds; their neighbours differ by less than the noise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DiscountedParams {
    /// α: exploration.
    pub alpha: f64,
    /// γ: what an observation keeps of its weight at each further one of anybody.
    pub gamma: f64,
    /// δ: what an observation keeps of its weight at each further one of the same agent at the same kind of job.
    pub own_gamma: f64,
    /// k: what the prior is worth, in observations.
    pub k: f64,
}

impl Default for DiscountedParams {
    fn default() -> Self {
        Self { alpha: 0.1, gamma: 0.99, own_gamma: 0.95, k: 4.0 }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Cell {
    n: f64,
    sum: f64,
    at: u64,
}

impl Cell {
    fn faded(self, step: u64, gamma: f64) -> Self {
        #[allow(clippy::cast_precision_loss, reason = "an age in observations")]
        let keep = gamma.powf(step.saturating_sub(self.at) as f64);
        Self { n: self.n * keep, sum: self.sum * keep, at: step }
    }
}

/// The discounted per-agent bandit.
#[derive(Clone, Debug, Default)]
pub struct Discounted {
    params: DiscountedParams,
    cells: BTreeMap<(NodeId, u64), Cell>,
    /// Observations so far.
    step: u64,
}

impl Discounted {
    /// Makes one with other numbers than the default.
    #[must_use]
    pub fn new(params: DiscountedParams) -> Self {
        Self { params, ..Self::default() }
    }

    fn value(&self, c: &Candidate) -> f64 {
        let DiscountedParams { alpha, gamma, k, .. } = self.params;
        let cell = self.cells.get(&(c.node, c.bucket)).copied().unwrap_or_default().faded(self.step, gamma);
        let kept = (k * c.reputation + cell.sum) / (k + cell.n);
        let penalty = LATENCY_PENALTY * c.latency_norm.clamp(0.0, 1.0).sqrt();
        c.score * (kept + alpha / (k + cell.n).sqrt()) - penalty / 2.0
    }

    fn make_room(&mut self) {
        if self.cells.len() >= MAX_CELLS {
            let oldest = self.cells.iter().min_by_key(|(_, cell)| cell.at).map(|(key, _)| *key);
            oldest.and_then(|key| self.cells.remove(&key));
        }
    }
}

impl Selector for Discounted {
    fn rank(&mut self, candidates: &[Candidate], rng: &mut Rng) -> Vec<usize> {
        by_value(candidates, rng, |c| self.value(c))
    }

    fn learn(&mut self, candidate: &Candidate, reward: f64) {
        if !reward.is_finite() {
            return;
        }
        self.step += 1;
        let (step, params, key) = (self.step, self.params, (candidate.node, candidate.bucket));
        if !self.cells.contains_key(&key) {
            self.make_room();
        }
        let cell = self.cells.entry(key).or_default();
        let old = cell.faded(step, params.gamma);
        *cell = Cell {
            n: old.n * params.own_gamma + 1.0,
            sum: old.sum * params.own_gamma + reward.clamp(0.0, 1.0),
            at: step,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::candidate;
    use super::*;

    #[test]
    fn a_fall_is_noticed_within_a_dozen_jobs_and_forgiven_later() {
        let mut rng = Rng::from_u64(1);
        let mut bandit = Discounted::default();
        let all = [candidate(1, 0.9, 0.7), candidate(2, 0.8, 0.7)];
        for _ in 0..500 {
            let first = bandit.rank(&all, &mut rng)[0];
            bandit.learn(&all[first], 0.9);
        }
        assert_eq!(bandit.rank(&all, &mut rng)[0], 0);
        let mut lost = 0;
        while bandit.rank(&all, &mut rng)[0] == 0 {
            bandit.learn(&all[0], 0.0);
            lost += 1;
        }
        assert!(lost <= 12, "it took {lost} failures");
        for _ in 0..1_500 {
            let first = bandit.rank(&all, &mut rng)[0];
            bandit.learn(&all[first], [0.9, 0.7][first]);
        }
        assert_eq!(bandit.rank(&all, &mut rng)[0], 0, "whoever recovered is found again");
    }

    #[test]
    fn kinds_of_jobs_are_told_apart() {
        let mut rng = Rng::from_u64(1);
        let mut bandit = Discounted::default();
        let of = |bucket| [1, 2].map(|n| Candidate { bucket, ..candidate(n, 0.9, 0.7) });
        for _ in 0..40 {
            bandit.learn(&of(1)[0], 0.9);
            bandit.learn(&of(1)[1], 0.1);
            bandit.learn(&of(2)[0], 0.1);
            bandit.learn(&of(2)[1], 0.9);
        }
        assert_eq!(bandit.rank(&of(1), &mut rng)[0], 0);
        assert_eq!(bandit.rank(&of(2), &mut rng)[0], 1);
    }

    #[test]
    fn memory_is_bounded() {
        let mut bandit = Discounted::default();
        for bucket in 0..(MAX_CELLS as u64 + 50) {
            bandit.learn(&Candidate { bucket, ..candidate(1, 0.5, 0.5) }, 0.5);
        }
        assert_eq!(bandit.cells.len(), MAX_CELLS);
    }
}
