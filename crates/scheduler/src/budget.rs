//! What a task may still spend, and how its time is split over its stages.

use std::time::Duration;

use chorus_machine::Time;

use crate::spec::{MAX_JOBS, TaskSpec};

/// Tokens of a plan. Enough for four steps; a small model that wants more is rambling.
pub(crate) const PLAN_MAX_TOKENS: u32 = 200;
/// Tokens of a step in the middle.
pub(crate) const STEP_MAX_TOKENS: u32 = 192;
/// The fewest tokens that are worth a job.
pub(crate) const MIN_JOB_TOKENS: u32 = 8;
/// Jobs a chain needs at least: a plan and an answer.
const MIN_CHAIN_JOBS: u32 = 2;
/// The part of a chain's time that planning may take, the repair included.
const PLAN_SHARE: f64 = 0.35;
/// The least time in which planning makes sense.
pub(crate) const MIN_TIME_FOR_CHAINS: Duration = Duration::from_secs(1);
/// The part of its time that a task must have left for more chains to be added.
pub(crate) const MIN_SHARE_FOR_MORE: f64 = 0.25;

/// Tokens and jobs that are left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Purse {
    pub(crate) tokens: u32,
    pub(crate) jobs: u32,
}

impl Purse {
    pub(crate) fn of(spec: &TaskSpec) -> Self {
        Self { tokens: spec.budget.tokens, jobs: spec.budget.jobs.min(MAX_JOBS) }
    }

    /// Pays for one job that wants `want` tokens, leaving `keep` behind. Returns the tokens that it gets, or what ran out.
    pub(crate) fn pay(&mut self, want: u32, keep: u32) -> Result<u32, &'static str> {
        if self.jobs == 0 {
            return Err("jobs");
        }
        let tokens = want.min(self.tokens.saturating_sub(keep));
        if tokens < MIN_JOB_TOKENS.min(want) {
            return Err("tokens");
        }
        self.jobs -= 1;
        self.tokens -= tokens;
        Ok(tokens)
    }

    /// Takes back tokens that were paid and not used.
    pub(crate) fn refund(&mut self, tokens: u32) {
        self.tokens = self.tokens.saturating_add(tokens);
    }

    /// Moves everything from `other` here.
    pub(crate) fn collect(&mut self, other: &mut Self) {
        let other = std::mem::take(other);
        self.tokens = self.tokens.saturating_add(other.tokens);
        self.jobs = self.jobs.saturating_add(other.jobs);
    }

    /// Returns how many chains, at most `wanted`, this purse can feed.
    pub(crate) fn chains(&self, wanted: u8, max_tokens: u32) -> u8 {
        let tokens = PLAN_MAX_TOKENS.saturating_add(max_tokens.max(1));
        let chains = (self.tokens / tokens).min(self.jobs / MIN_CHAIN_JOBS);
        u8::try_from(chains).unwrap_or(u8::MAX).min(wanted)
    }

    /// Takes an equal share of `parts` out.
    pub(crate) fn split(&mut self, parts: u8) -> Self {
        let parts = u32::from(parts.max(1));
        let share = Self { tokens: self.tokens / parts, jobs: self.jobs / parts };
        self.tokens -= share.tokens;
        self.jobs -= share.jobs;
        share
    }
}

/// Returns until when a chain that began at `began` and must end at `end` may plan.
pub(crate) fn plan_until(began: Time, end: Time) -> Time {
    began + end.since(began).mul_f64(PLAN_SHARE)
}

/// Returns until when a step may take that has `rounds` rounds of steps ahead of it, itself included: time is split evenly.
pub(crate) fn step_until(now: Time, end: Time, rounds: u32) -> Time {
    now + end.since(now) / rounds.max(1)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_job_gets_what_is_left_beside_what_is_kept() {
        let mut purse = Purse { tokens: 300, jobs: 3 };
        assert_eq!(purse.pay(200, 100), Ok(200));
        assert_eq!(purse.pay(200, 60), Ok(40));
        assert_eq!(purse.pay(200, 60), Err("tokens"));
        assert_eq!(purse.pay(200, 0), Ok(60));
        assert_eq!(purse.pay(1, 0), Err("jobs"));
        purse.refund(50);
        assert_eq!(purse, Purse { tokens: 50, jobs: 0 });
    }

    #[test]
    fn a_small_budget_feeds_fewer_chains() {
        let purse = |tokens, jobs| Purse { tokens, jobs };
        assert_eq!(purse(32_768, 96).chains(3, 256), 3);
        assert_eq!(purse(1_000, 96).chains(3, 256), 2);
        assert_eq!(purse(1_000, 3).chains(3, 256), 1);
        assert_eq!(purse(300, 96).chains(3, 256), 0);
    }

    #[test]
    fn time_is_split_over_what_lies_ahead() {
        let (begin, end) = (Time::ZERO, Time::from_millis(10_000));
        assert_eq!(plan_until(begin, end), Time::from_millis(3_500));
        assert_eq!(step_until(Time::from_millis(4_000), end, 3), Time::from_millis(6_000));
        assert_eq!(step_until(end, begin, 0), end, "what is past is past");
    }

    proptest! {
        #[test]
        fn nothing_is_made_or_lost(tokens in 0u32..100_000, jobs in 0u32..300, parts in 1u8..9) {
            let mut pool = Purse { tokens, jobs };
            let mut shares: Vec<Purse> = (0..parts).map(|i| pool.split(parts - i)).collect();
            shares.iter_mut().for_each(|share| pool.collect(share));
            prop_assert_eq!(pool, Purse { tokens, jobs });
        }
    }
}
