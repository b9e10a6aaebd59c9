//! Copies: answers that agree with known ones more often than chance allows.
//!
//! Honest samplers give one answer to one prompt all the time: an answer has a few tokens, and a policy that has learned is nearly sure
//! of them. So no single agreement proves anything, not even to the last bit of its log-probabilities, since equal tokens under equal
//! weights have equal ones. What proves is how often it happens, and how unlikely each time.
//!
//! For each rollout let `n` be the answers known so far for its prompt and version, `c` those that are equal to it, and `p` its own
//! probability, as its sampler claims it. Then
//!
//! ```text
//!  W ← max(W, 1) · (½ + ½ · (c/n) / p)
//! ```
//!
//! and a sampler is caught when its `W` reaches `1 / CHANCE`. For an honest one the factor's mean is 1 whatever is known, since it agrees
//! with each known answer with exactly that answer's probability. So no choice of answers by others can put an honest sampler under
//! suspicion, and it takes at least `1 / CHANCE` rollouts on average until chance does it (Lorden 1971 for such sums; Shin, Ramdas and
//! Rinaldo 2023 for e-detectors). Who copies half of its answers gains `ln(½ + ½ / p)` by each copy and loses `ln 2` by each other
//! answer. Who claims a greater `p` to gain less has edited its log-probabilities, which is found in its own way.

use std::collections::{BTreeMap, VecDeque};

use chorus_protocol::NodeId;
use chorus_protocol::policy::Version;
use chorus_protocol::rollout::Rollout;

/// One honest rollout in so many is struck as a copy at most: a billion.
pub const CHANCE: f64 = 1e-9;
/// Prompts whose answers are remembered.
const MAX_PROMPTS: usize = 1_024;
/// Answers that are remembered of a prompt.
const MAX_ANSWERS: u32 = 256;
/// Samplers that are watched.
const MAX_WATCHED: usize = 4_096;

/// A prompt under a version.
type Asked = (Version, Vec<u32>);

/// Answers that are known for a prompt, and how many they are.
#[derive(Debug, Default)]
struct Known {
    answers: BTreeMap<Vec<u32>, u32>,
    count: u32,
}

/// See the module.
#[derive(Debug, Default)]
pub struct CopyWatch {
    known: BTreeMap<Asked, Known>,
    /// The prompts in the order in which they came.
    order: VecDeque<Asked>,
    /// The logarithm of each sampler's `W`.
    suspicion: BTreeMap<NodeId, f64>,
}

impl CopyWatch {
    /// Takes note of a rollout. Returns whether its sampler's answers agree with known ones too often for chance, and this one does.
    pub fn see(&mut self, sampler: NodeId, rollout: &Rollout) -> bool {
        let [segment] = &rollout.segments[..] else { return false };
        let asked = (segment.version, rollout.prompt.to_vec());
        if !self.known.contains_key(&asked) {
            while self.order.len() >= MAX_PROMPTS {
                let oldest = self.order.pop_front();
                oldest.map(|oldest| self.known.remove(&oldest));
            }
            self.order.push_back(asked.clone());
        }
        let known = self.known.entry(asked).or_default();
        let equal = known.answers.get(&rollout.completion).copied().unwrap_or(0);
        let share = f64::from(equal) / f64::from(known.count.max(1));
        let first = known.count == 0;
        if known.count < MAX_ANSWERS {
            *known.answers.entry(rollout.completion.clone()).or_default() += 1;
            known.count += 1;
        }
        if first || (self.suspicion.len() >= MAX_WATCHED && !self.suspicion.contains_key(&sampler)) {
            return false;
        }
        let logprob: f64 = rollout.log_probs.iter().map(|logprob| f64::from(*logprob)).sum();
        let suspicion = self.suspicion.entry(sampler).or_default();
        // Capped where a single token of probability 0 would make the sum infinite for good.
        let factor = (0.5 + 0.5 * share / logprob.exp().max(f64::MIN_POSITIVE)).ln();
        *suspicion = suspicion.max(0.0) + factor;
        equal > 0 && *suspicion >= -CHANCE.ln()
    }
}
