//! Log-probabilities computed again, and how far from the sampler's they may be.

use candle_core::Result;
use chorus_protocol::policy::Version;
use chorus_protocol::rollout::Rollout;

use crate::policy::Policy;
use crate::train::Batch;

/// Rollouts that are computed again at a time.
const MAX_ROWS: usize = 256;
/// Share of honest rollouts that the calibration takes for what arithmetic does; the rest are the margin's.
const QUANTILE: f64 = 0.999;
/// How far beyond that the bounds are set.
const MARGIN: f32 = 8.0;
/// No bound is tighter than this: single precision itself does not hold a sum of a few hundred terms closer.
const FLOOR: f32 = 2e-5;

/// How far log-probabilities are from those that were computed again, in nats.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Distance {
    /// The farthest token's.
    pub token: f32,
    /// The mean over tokens.
    pub mean: f32,
}

impl Distance {
    /// Measures it.
    #[must_use]
    #[allow(clippy::cast_precision_loss, reason = "answers are short")]
    pub fn between(claimed: &[f32], computed: &[f32]) -> Self {
        let apart = || claimed.iter().zip(computed).map(|(a, b)| (a - b).abs());
        // What is no number is infinitely far.
        let sound = |apart: f32| if apart.is_nan() { f32::INFINITY } else { apart };
        let mean = apart().sum::<f32>() / claimed.len().max(1) as f32;
        Self { token: apart().map(sound).fold(0.0, f32::max), mean: sound(mean) }
    }
}

/// How far honest arithmetic may be off, in nats.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// At one token.
    pub token: f32,
    /// In the mean over an answer.
    pub mean: f32,
}

impl Default for Tolerance {
    /// Three times what [`Tolerance::calibrate`] gives for tiny policies that mistral.rs samples and candle computes again, both in
    /// single precision on one processor (`scripts/bench cheaters` measures it): another processor adds in another order.
    fn default() -> Self {
        Self { token: 2e-4, mean: 1e-4 }
    }
}

impl Tolerance {
    /// Returns bounds for arithmetic of which honest rollouts were measured: what all but one in a thousand keep to, times eight.
    #[must_use]
    pub fn calibrate(honest: &[Distance]) -> Self {
        let bound = |of: fn(&Distance) -> f32| {
            let mut all: Vec<f32> = honest.iter().map(of).collect();
            all.sort_unstable_by(f32::total_cmp);
            #[allow(
                clippy::cast_precision_loss,
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a rank"
            )]
            let rank = (all.len().saturating_sub(1) as f64 * QUANTILE).ceil() as usize;
            (all.get(rank).copied().unwrap_or(0.0) * MARGIN).max(FLOOR)
        };
        Self { token: bound(|distance| distance.token), mean: bound(|distance| distance.mean) }
    }

    /// Returns whether a distance is within the bounds.
    #[must_use]
    pub fn holds(&self, distance: Distance) -> bool {
        distance.token <= self.token && distance.mean <= self.mean
    }
}

/// Computes the log-probabilities of rollouts again, each token's under the version that is claimed for it. `None` for a rollout that
/// claims a version whose weights are not at hand, or that is longer than the policy reads.
///
/// After a change of version in the middle of an answer the new weights are taken to have read the prompt and the answer so far again.
///
/// # Errors
/// candle's.
pub fn recompute<'a>(
    rollouts: &[&Rollout],
    weights: impl Fn(&Version) -> Option<&'a Policy>,
) -> Result<Vec<Option<Vec<f32>>>> {
    let mut computed: Vec<Option<Vec<f32>>> =
        rollouts.iter().map(|rollout| Some(vec![0.0; rollout.completion.len()])).collect();
    let mut versions: Vec<Version> = Vec::new();
    for segment in rollouts.iter().flat_map(|rollout| &rollout.segments) {
        if !versions.contains(&segment.version) {
            versions.push(segment.version);
        }
    }
    for version in versions {
        let claims = |at: &usize| rollouts[*at].segments.iter().any(|segment| segment.version == version);
        let rows: Vec<usize> = (0..rollouts.len()).filter(claims).collect();
        let policy = weights(&version);
        let fits = |at: &usize| {
            let places = rollouts[*at].prompt.len() + rollouts[*at].completion.len();
            policy.is_some_and(|policy| {
                places <= policy.config().max_position_embeddings && is_readable(policy, rollouts[*at])
            })
        };
        let (rows, not): (Vec<usize>, Vec<usize>) = rows.into_iter().partition(fits);
        not.into_iter().for_each(|at| computed[at] = None);
        let Some(policy) = policy else { continue };
        for rows in rows.chunks(MAX_ROWS) {
            let texts: Vec<(&[u32], &[u32])> =
                rows.iter().map(|at| (&*rollouts[*at].prompt, &rollouts[*at].completion[..])).collect();
            let all: Vec<f32> = Batch::new(&texts)?.logprobs(policy)?.to_vec1()?;
            let mut rest = &all[..];
            for at in rows {
                let (own, after) = rest.split_at(rollouts[*at].completion.len());
                rest = after;
                let Some(computed) = &mut computed[*at] else { continue };
                for range in spans(rollouts[*at], version) {
                    computed[range.clone()].copy_from_slice(&own[range]);
                }
            }
        }
    }
    Ok(computed)
}

/// Whether all tokens are in the policy's vocabulary.
fn is_readable(policy: &Policy, rollout: &Rollout) -> bool {
    let known = |token: &u32| (*token as usize) < policy.config().vocab_size;
    !rollout.prompt.is_empty() && rollout.prompt.iter().chain(&rollout.completion).all(known)
}

/// The tokens that a version is claimed to have written.
fn spans(rollout: &Rollout, version: Version) -> impl Iterator<Item = std::ops::Range<usize>> + '_ {
    let starts = rollout.segments.iter().map(|segment| segment.from as usize);
    let ends = starts.clone().skip(1).chain(std::iter::once(rollout.completion.len()));
    let written = rollout.segments.iter().zip(starts.zip(ends)).filter(move |(segment, _)| segment.version == version);
    let len = rollout.completion.len();
    written.map(move |(_, (from, to))| from.min(len)..to.min(len)).filter(|range| range.start <= range.end)
}
