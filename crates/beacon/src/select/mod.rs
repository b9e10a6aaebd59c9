//! Which of the bidders gets the lease: five rules behind one trait.
//!
//! | rule | what it ranks by | from |
//! |---|---|---|
//! | `random` | nothing | the ablation |
//! | `score` | φ | Symphony |
//! | `score_reputation` | φ × reputation | the baseline that every bandit must beat |
//! | `linucb` | one global linear bandit behind a Top-L screen | Symphony-Coord, constants as published |
//! | `discounted` | per-agent estimates that forget, with a small fixed exploration | this house; the default |
//!
//! A rule sees [`Candidate`]s: the score that the requester recomputed, never the one that was bid. Ties go to the requester's own
//! node if it is among the best (as in Symphony), then to the less loaded, then to the faster; what is left is drawn.
//!
//! `tests/shock.rs` measures all five in the shock model of Symphony-Coord's second experiment and prints the table.

mod discounted;
mod linucb;

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use chorus_machine::Rng;
use chorus_protocol::NodeId;

pub use discounted::{Discounted, DiscountedParams};
pub use linucb::LinUcb;

/// Penalty on the square root of the latency, as published.
pub const LATENCY_PENALTY: f64 = 0.2;
/// Penalty on the cost, as published.
pub const COST_PENALTY: f64 = 0.15;

/// A bidder as a rule sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Who.
    pub node: NodeId,
    /// φ, recomputed from the ledger, in [0, 1].
    pub score: f64,
    /// Slots in use over slots, in [0, 1]; at least what this requester itself keeps busy there.
    pub load: f64,
    /// Expected time for this job: the capability's claim, corrected by what was observed.
    pub latency: Duration,
    /// `latency` over the latency that counts as slow, clipped to [0, 1].
    pub latency_norm: f64,
    /// Mean of the success probability, in (0, 1).
    pub reputation: f64,
    /// Whether it is the requester itself.
    pub is_self: bool,
    /// What kind of job this is: jobs of one kind and the same tags share it.
    pub bucket: u64,
}

/// Returns the reward of one lease: `clip(1[ok] − 0.2·√latency_norm − 0.15·cost_norm)` in [0, 1], as published. The beacon has no
/// prices, so it passes a cost of 0.
#[must_use]
pub fn reward(ok: bool, latency_norm: f64, cost_norm: f64) -> f64 {
    let latency = LATENCY_PENALTY * latency_norm.clamp(0.0, 1.0).sqrt();
    (f64::from(u8::from(ok)) - latency - COST_PENALTY * cost_norm.clamp(0.0, 1.0)).clamp(0.0, 1.0)
}

/// A rule for choosing an executor.
pub trait Selector: fmt::Debug + Send {
    /// Returns the indices of `candidates`, best first. Each appears once.
    fn rank(&mut self, candidates: &[Candidate], rng: &mut Rng) -> Vec<usize>;

    /// Learns what came of a lease: `candidate` as it was when it was chosen, and its [`reward`].
    fn learn(&mut self, candidate: &Candidate, reward: f64);
}

/// The name of a rule, as it stands in a configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum SelectionRule {
    /// Any bidder.
    Random,
    /// The best match.
    Score,
    /// The best match, weighed by track record.
    ScoreReputation,
    /// Symphony-Coord's bandit, as published.
    LinUcb,
    /// The bandit that forgets.
    #[default]
    Discounted,
}

impl SelectionRule {
    /// All rules, in the order of the table above.
    pub const ALL: [Self; 5] = [Self::Random, Self::Score, Self::ScoreReputation, Self::LinUcb, Self::Discounted];

    /// Returns the rule's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::Score => "score",
            Self::ScoreReputation => "score_reputation",
            Self::LinUcb => "linucb",
            Self::Discounted => "discounted",
        }
    }

    /// Makes a selector that follows the rule, knowing nothing yet.
    #[must_use]
    pub fn selector(self) -> Box<dyn Selector> {
        match self {
            Self::Random => Box::new(Random),
            Self::Score => Box::new(Score),
            Self::ScoreReputation => Box::new(ScoreReputation),
            Self::LinUcb => Box::new(LinUcb::default()),
            Self::Discounted => Box::new(Discounted::default()),
        }
    }
}

impl fmt::Display for SelectionRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that no rule has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no selection rule; use random, score, score_reputation, linucb or discounted")]
pub struct UnknownRule(pub String);

impl FromStr for SelectionRule {
    type Err = UnknownRule;

    fn from_str(text: &str) -> Result<Self, UnknownRule> {
        Self::ALL
            .into_iter()
            .find(|rule| rule.name() == text)
            .ok_or_else(|| UnknownRule(text.chars().take(40).collect()))
    }
}

/// Ranks by `value`, best first, and breaks ties as the module says.
fn by_value(candidates: &[Candidate], rng: &mut Rng, mut value: impl FnMut(&Candidate) -> f64) -> Vec<usize> {
    let values: Vec<f64> = candidates.iter().map(&mut value).collect();
    let mut order: Vec<usize> = (0..candidates.len()).collect();
    rng.shuffle(&mut order);
    order.sort_by(|&a, &b| {
        let better = |a: f64, b: f64| b.partial_cmp(&a).unwrap_or(Ordering::Equal);
        let (x, y) = (&candidates[a], &candidates[b]);
        better(values[a], values[b])
            .then_with(|| y.is_self.cmp(&x.is_self))
            .then_with(|| better(-x.load, -y.load))
            .then_with(|| x.latency.cmp(&y.latency))
    });
    order
}

/// Any bidder: the ablation.
#[derive(Clone, Copy, Debug, Default)]
pub struct Random;

impl Selector for Random {
    fn rank(&mut self, candidates: &[Candidate], rng: &mut Rng) -> Vec<usize> {
        let mut order: Vec<usize> = (0..candidates.len()).collect();
        rng.shuffle(&mut order);
        order
    }

    fn learn(&mut self, _candidate: &Candidate, _reward: f64) {}
}

/// The best match: Symphony.
#[derive(Clone, Copy, Debug, Default)]
pub struct Score;

impl Selector for Score {
    fn rank(&mut self, candidates: &[Candidate], rng: &mut Rng) -> Vec<usize> {
        by_value(candidates, rng, |c| c.score)
    }

    fn learn(&mut self, _candidate: &Candidate, _reward: f64) {}
}

/// The best match, weighed by track record. What it learns lives in the reputation.
#[derive(Clone, Copy, Debug, Default)]
pub struct ScoreReputation;

impl Selector for ScoreReputation {
    fn rank(&mut self, candidates: &[Candidate], rng: &mut Rng) -> Vec<usize> {
        by_value(candidates, rng, |c| c.score * c.reputation)
    }

    fn learn(&mut self, _candidate: &Candidate, _reward: f64) {}
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use chorus_machine::Rng;

    use super::*;
    use crate::testing::id;

    pub(super) fn candidate(n: u8, score: f64, reputation: f64) -> Candidate {
        Candidate {
            node: id(n),
            score,
            load: 0.0,
            latency: Duration::from_secs(1),
            latency_norm: 0.5,
            reputation,
            is_self: false,
            bucket: 0,
        }
    }

    #[test]
    fn names_round_trip() {
        for rule in SelectionRule::ALL {
            assert_eq!(rule.name().parse(), Ok(rule));
        }
        assert!("best".parse::<SelectionRule>().is_err());
    }

    #[test]
    fn ties_go_to_self_then_to_the_idle_then_to_the_fast() {
        let mut rng = Rng::from_u64(1);
        let mut all =
            vec![candidate(1, 0.9, 0.5), candidate(2, 0.9, 0.5), candidate(3, 0.9, 0.5), candidate(4, 0.8, 0.5)];
        all[0].load = 0.5;
        all[1].latency = Duration::from_secs(2);
        assert_eq!(Score.rank(&all, &mut rng), [2, 1, 0, 3]);
        all[0].is_self = true;
        assert_eq!(Score.rank(&all, &mut rng), [0, 2, 1, 3]);
        all[0].score = 0.89;
        assert_eq!(Score.rank(&all, &mut rng), [2, 1, 0, 3], "self wins ties, nothing else");
    }

    #[test]
    fn reputation_turns_the_order_of_near_equals() {
        let mut rng = Rng::from_u64(1);
        let all = [candidate(1, 0.9, 0.4), candidate(2, 0.8, 0.9)];
        assert_eq!(Score.rank(&all, &mut rng), [0, 1]);
        assert_eq!(ScoreReputation.rank(&all, &mut rng), [1, 0]);
    }

    #[test]
    fn reward_is_the_published_one() {
        assert!((reward(true, 0.25, 0.0) - 0.9).abs() < 1e-12);
        assert!((reward(true, 1.0, 1.0) - 0.65).abs() < 1e-12);
        assert_eq!(reward(false, 1.0, 0.0), 0.0);
    }

    proptest! {
        #[test]
        fn every_rule_ranks_every_candidate_once_whatever_the_numbers(
            numbers in prop::collection::vec((any::<f64>(), any::<f64>(), any::<f64>(), any::<f64>()), 0..20),
            rewards in prop::collection::vec(any::<f64>(), 1..20),
            seed in any::<u64>(),
        ) {
            let mut rng = Rng::from_u64(seed);
            let all: Vec<Candidate> = (1u8..).zip(&numbers).map(|(n, &(score, load, latency_norm, reputation))| Candidate {
                load, latency_norm, ..candidate(n, score, reputation)
            }).collect();
            for rule in SelectionRule::ALL {
                let mut selector = rule.selector();
                for (i, &reward) in rewards.iter().enumerate() {
                    let mut order = selector.rank(&all, &mut rng);
                    if let Some(&first) = order.get(i % all.len().max(1)) {
                        selector.learn(&all[first], reward);
                    }
                    order.sort_unstable();
                    prop_assert!(order.into_iter().eq(0..all.len()), "{}", rule);
                }
            }
        }
    }
}
