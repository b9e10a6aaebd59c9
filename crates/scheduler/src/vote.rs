//! The weighted vote, and what a chain weighs in it.
//!
//! As published: `a* = argmax_a Σ_i w_i · 1[a_i = a]` with `w_i = (1/K_i) Σ_k s_k`, the mean match score of chain *i*'s executors.
//! A ballot that is not of the kind that was asked for (a number where an option was wanted) weighs nothing beside one that is: such
//! ballots are heard only if there is no other. The result does not depend on the order of the ballots. Ties are broken by the number of chains, then by the heaviest single
//! chain, then by the answer itself; they are reported all the same.

use std::collections::BTreeMap;

use chorus_protocol::job::{Finish, Risk};
use serde::Serialize;

use crate::answer::{Answer, Judged};
use crate::report::StepReport;
use crate::spec::Weighting;

/// What a chain weighs at least. A chain whose executors have no match at all, or a record worse than chance, still has a voice
/// when nobody else speaks.
pub const MIN_WEIGHT: f64 = 0.01;
/// The success probabilities that the calibrated weight believes in. A node with a perfect record of a few jobs is not infallible.
pub const CALIBRATED_RANGE: (f64, f64) = (0.02, 0.98);
/// The margin below which a vote is reported as too close to trust.
pub const LOW_MARGIN: f64 = 0.2;
/// The margin below which a vote at high risk is not accepted without more chains.
pub const LOW_MARGIN_AT_HIGH_RISK: f64 = 0.4;
/// Weights closer than this are the same.
const EPSILON: f64 = 1e-9;

/// One chain's vote.
#[derive(Clone, Debug, PartialEq)]
pub struct Ballot {
    /// The chain.
    pub chain: u8,
    /// Its answer.
    pub answer: Judged,
    /// The text the answer was taken from.
    pub text: String,
    /// Why that text ended.
    pub finish: Finish,
    /// Its weight.
    pub weight: f64,
}

/// The votes of one answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct VoteShare {
    /// The answer, as its heaviest chain writes it.
    pub answer: String,
    /// The sum of its chains' weights; 0 where it is not of the kind that was asked for and another answer is.
    pub weight: f64,
    /// Its chains, in order.
    pub chains: Vec<u8>,
}

/// The outcome of a vote.
#[derive(Clone, Debug, PartialEq)]
pub struct Tally {
    /// The answer that won.
    pub answer: String,
    /// The text it was taken from.
    pub text: String,
    /// Why that text ended.
    pub finish: Finish,
    /// The winner's lead over the next answer, as a share of all weight, in [0, 1].
    pub margin: f64,
    /// Whether the next answer weighs the same.
    pub tie: bool,
    /// Whether the margin is below [`LOW_MARGIN`], or below [`LOW_MARGIN_AT_HIGH_RISK`] at high risk.
    pub low_margin: bool,
    /// Every answer, the winner first.
    pub votes: Vec<VoteShare>,
}

/// Returns what a chain weighs, by the executors of its steps.
#[must_use]
pub fn weigh(steps: &[StepReport], weighting: Weighting) -> f64 {
    let values = steps.iter().map(|step| match weighting {
        Weighting::MatchScore => step.score.clamp(0.0, 1.0),
        Weighting::Calibrated => log_odds(step.reputation),
    });
    #[allow(clippy::cast_precision_loss, reason = "a handful of steps")]
    let mean = values.sum::<f64>() / steps.len().max(1) as f64;
    // A NaN from outside must not decide a vote; `max` drops it.
    mean.max(MIN_WEIGHT)
}

/// Returns the most that one chain can weigh.
#[must_use]
pub fn heaviest(weighting: Weighting) -> f64 {
    match weighting {
        Weighting::MatchScore => 1.0,
        Weighting::Calibrated => log_odds(1.0),
    }
}

fn log_odds(probability: f64) -> f64 {
    let p = if probability.is_nan() { 0.5 } else { probability.clamp(CALIBRATED_RANGE.0, CALIBRATED_RANGE.1) };
    (p / (1.0 - p)).ln()
}

/// The ballots for one answer.
struct Camp<'a> {
    key: &'a Answer,
    ballots: Vec<&'a Ballot>,
    weight: f64,
    heaviest: &'a Ballot,
}

/// Counts the vote. `None` without ballots.
#[must_use]
pub fn tally(ballots: &[Ballot], risk: Risk) -> Option<Tally> {
    let mut groups: BTreeMap<&Answer, Vec<&Ballot>> = BTreeMap::new();
    for ballot in ballots {
        groups.entry(&ballot.answer.key).or_default().push(ballot);
    }
    let any_fits = ballots.iter().any(|ballot| ballot.answer.fits);
    let mut camps: Vec<Camp<'_>> =
        groups.into_iter().filter_map(|(key, ballots)| camp(key, ballots, any_fits)).collect();
    camps.sort_by(|a, b| rank(b, a).then_with(|| a.key.cmp(b.key)));
    let winner = camps.first()?;
    let total: f64 = camps.iter().map(|camp| camp.weight).sum();
    let next = camps.get(1).map_or(0.0, |camp| camp.weight);
    let tie = camps.len() > 1 && winner.weight - next < EPSILON;
    let margin = if tie { 0.0 } else { ((winner.weight - next) / total).clamp(0.0, 1.0) };
    let least = if risk == Risk::High { LOW_MARGIN_AT_HIGH_RISK } else { LOW_MARGIN };
    Some(Tally {
        answer: winner.heaviest.answer.shown.clone(),
        text: winner.heaviest.text.clone(),
        finish: winner.heaviest.finish,
        margin,
        tie,
        low_margin: margin < least,
        votes: camps.iter().map(share).collect(),
    })
}

/// Returns whether chains that are still out cannot change the winner, if each weighs at most `most`.
#[must_use]
pub fn is_decided(ballots: &[Ballot], out: usize, most: f64) -> bool {
    let mut sums: BTreeMap<&Answer, f64> = BTreeMap::new();
    // While chains are out, one may still come that fits.
    for ballot in ballots.iter().filter(|ballot| ballot.answer.fits) {
        *sums.entry(&ballot.answer.key).or_default() += ballot.weight;
    }
    let mut sums: Vec<f64> = sums.into_values().collect();
    sums.sort_by(|a, b| b.total_cmp(a));
    #[allow(clippy::cast_precision_loss, reason = "a handful of chains")]
    let could = sums.get(1).copied().unwrap_or_default() + out as f64 * most;
    sums.first().is_some_and(|lead| *lead > could + EPSILON)
}

fn camp<'a>(key: &'a Answer, mut ballots: Vec<&'a Ballot>, any_fits: bool) -> Option<Camp<'a>> {
    // Sums of floats depend on their order, so the order is fixed: by weight, then by text, then by chain.
    ballots.sort_by(|a, b| b.weight.total_cmp(&a.weight).then_with(|| a.text.cmp(&b.text)).then(a.chain.cmp(&b.chain)));
    let heard = ballots.iter().filter(|ballot| ballot.answer.fits || !any_fits);
    // Not `sum`, which makes minus zero of nothing.
    let weight = heard.fold(0.0, |weight, ballot| weight + ballot.weight);
    Some(Camp { key, heaviest: *ballots.first()?, ballots, weight })
}

fn rank(a: &Camp<'_>, b: &Camp<'_>) -> std::cmp::Ordering {
    let by_weight =
        if (a.weight - b.weight).abs() < EPSILON { std::cmp::Ordering::Equal } else { a.weight.total_cmp(&b.weight) };
    by_weight
        .then_with(|| a.ballots.len().cmp(&b.ballots.len()))
        .then_with(|| a.heaviest.weight.total_cmp(&b.heaviest.weight))
}

fn share(camp: &Camp<'_>) -> VoteShare {
    let mut chains: Vec<u8> = camp.ballots.iter().map(|ballot| ballot.chain).collect();
    chains.sort_unstable();
    VoteShare { answer: camp.heaviest.answer.shown.clone(), weight: camp.weight, chains }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use std::time::Duration;

    use chorus_protocol::SecretKey;
    use proptest::prelude::*;

    use super::*;
    use crate::answer::{AnswerFormat, judge};

    fn ballot(chain: u8, text: &str, weight: f64) -> Ballot {
        let answer = judge(text, &AnswerFormat::Auto).unwrap();
        Ballot { chain, answer, text: text.to_owned(), finish: Finish::Stop, weight }
    }

    fn step(score: f64, reputation: f64) -> StepReport {
        StepReport {
            subtask: String::new(),
            requirement: String::new(),
            executor: SecretKey::from_bytes(&[1; 32]).node_id(),
            score,
            reputation,
            tokens: 1,
            election: Duration::ZERO,
            elapsed: Duration::ZERO,
        }
    }

    #[test]
    fn the_heavier_answer_wins_not_the_more_frequent_one() {
        let tally =
            tally(&[ballot(0, "12", 0.9), ballot(1, "7", 0.3), ballot(2, "\\boxed{7}", 0.4)], Risk::Low).unwrap();
        assert_eq!(tally.answer, "12");
        assert_eq!(tally.votes[1].chains, [1, 2]);
        assert!((tally.margin - 0.2 / 1.6).abs() < 1e-9);
        assert!(tally.low_margin && !tally.tie);
    }

    #[test]
    fn ways_of_writing_are_one_answer() {
        let ballots = [ballot(0, "Answer: 12.0", 0.5), ballot(1, "twelve", 0.6), ballot(2, "13", 0.9)];
        let tally = tally(&ballots, Risk::Low).unwrap();
        assert_eq!((tally.answer.as_str(), tally.votes.len()), ("12", 2));
        assert_eq!(tally.text, "twelve", "the heaviest chain of the camp speaks for it");
    }

    #[test]
    fn ties_are_reported_and_broken_by_chains_then_weight_then_answer() {
        let tie = tally(&[ballot(0, "red fox", 0.5), ballot(1, "blue fox", 0.5)], Risk::Low).unwrap();
        assert_eq!((tie.answer.as_str(), tie.tie, tie.low_margin, tie.margin), ("blue fox", true, true, 0.0));
        let more = tally(&[ballot(0, "9", 0.5), ballot(1, "4", 0.25), ballot(2, "4", 0.25)], Risk::Low).unwrap();
        assert!(more.tie);
        assert_eq!(more.answer, "4");
    }

    #[test]
    fn one_ballot_wins_whole_and_none_wins_nothing() {
        let tally_one = tally(&[ballot(0, "9", MIN_WEIGHT)], Risk::High).unwrap();
        assert_eq!((tally_one.margin, tally_one.low_margin), (1.0, false));
        assert!(tally(&[], Risk::Low).is_none());
    }

    #[test]
    fn high_risk_wants_a_wider_margin() {
        let ballots = [ballot(0, "9", 0.6), ballot(1, "8", 0.3)];
        assert!(!tally(&ballots, Risk::Medium).unwrap().low_margin);
        assert!(tally(&ballots, Risk::High).unwrap().low_margin);
    }

    #[test]
    fn weights_are_the_published_mean_or_the_log_odds() {
        assert!((weigh(&[step(0.4, 0.5), step(0.8, 0.5)], Weighting::MatchScore) - 0.6).abs() < 1e-12);
        let calibrated = weigh(&[step(0.0, 0.9)], Weighting::Calibrated);
        assert!((calibrated - 9f64.ln()).abs() < 1e-9);
        assert_eq!(weigh(&[step(0.0, 0.1)], Weighting::Calibrated), MIN_WEIGHT, "worse than chance is next to nothing");
        assert_eq!(weigh(&[step(0.0, 0.5)], Weighting::MatchScore), MIN_WEIGHT);
        assert_eq!(weigh(&[], Weighting::MatchScore), MIN_WEIGHT);
        assert_eq!(weigh(&[step(f64::NAN, f64::NAN)], Weighting::MatchScore), MIN_WEIGHT);
        assert_eq!(weigh(&[step(f64::NAN, f64::NAN)], Weighting::Calibrated), MIN_WEIGHT);
        for weighting in [Weighting::MatchScore, Weighting::Calibrated] {
            assert!(weigh(&[step(1.0, 1.0)], weighting) <= heaviest(weighting));
        }
    }

    #[test]
    fn what_is_not_of_the_kind_asked_for_is_heard_only_if_there_is_no_other() {
        let options = AnswerFormat::Options(vec!["yes".into(), "no".into()]);
        let cast =
            |chain, text, weight| Ballot { answer: judge(text, &options).unwrap(), ..ballot(chain, text, weight) };
        let (a, b) = (cast(0, "15 * 15 = 225", 0.9), cast(1, "225", 0.9));
        let unheard = [a.clone(), b.clone(), cast(2, "(B) no", MIN_WEIGHT)];
        let tally_all = tally(&unheard, Risk::Low).unwrap();
        assert_eq!((tally_all.answer.as_str(), tally_all.margin, tally_all.tie), ("(B) no", 1.0, false));
        assert_eq!((tally_all.votes[1].weight, tally_all.votes[1].chains.as_slice()), (0.0, [0, 1].as_slice()));
        assert!(!is_decided(&[a.clone(), b.clone()], 1, MIN_WEIGHT), "the third may be an option");
        assert_eq!(tally(&[a, b], Risk::Low).unwrap().answer, "225");
    }

    #[test]
    fn who_says_the_question_back_does_not_vote() {
        let cast = |chain, text, weight| Ballot {
            answer: judge(text, &AnswerFormat::YesNo).unwrap(),
            ..ballot(chain, text, weight)
        };
        let tally = tally(&[cast(0, "yes or no", 0.9), cast(1, "No.", 0.1)], Risk::Low).unwrap();
        assert_eq!((tally.answer.as_str(), tally.margin), ("No", 1.0));
        assert_eq!(tally.votes[1].weight.to_string(), "0");
    }

    #[test]
    fn a_vote_is_decided_only_when_nobody_can_change_it() {
        let two = [ballot(0, "9", 0.6), ballot(1, "9", 0.5)];
        assert!(is_decided(&two, 1, 1.0));
        assert!(!is_decided(&two, 2, 1.0));
        assert!(!is_decided(&[ballot(0, "9", 0.5), ballot(1, "9", 0.5)], 1, 1.0), "the third could draw level");
        assert!(!is_decided(&[], 0, 1.0));
    }

    proptest! {
        #[test]
        fn order_does_not_matter(
            (ballots, shuffled) in prop::collection::vec(("[0-3]|(the )?(red|blue) fox", 0.01f64..5.0), 1..8)
                .prop_map(|raw| raw.iter().zip(0u8..).map(|((text, weight), i)| ballot(i, text, *weight)).collect::<Vec<_>>())
                .prop_flat_map(|ballots| (Just(ballots.clone()), Just(ballots).prop_shuffle()))
        ) {
            prop_assert_eq!(tally(&ballots, Risk::Low), tally(&shuffled, Risk::Low));
        }

        #[test]
        fn a_decided_vote_stays_decided(
            texts in prop::collection::vec(("[0-2]", 0.01f64..1.0), 1..7), late in prop::collection::vec(("[0-2]", 0.01f64..1.0), 0..3)
        ) {
            let early: Vec<_> = texts.iter().zip(0u8..).map(|((text, weight), i)| ballot(i, text, *weight)).collect();
            prop_assume!(is_decided(&early, late.len(), 1.0));
            let mut all = early.clone();
            all.extend(late.iter().zip(20u8..).map(|((text, weight), i)| ballot(i, text, *weight)));
            prop_assert_eq!(tally(&early, Risk::Low).unwrap().answer, tally(&all, Risk::Low).unwrap().answer);
        }
    }
}
