//! The trainer's examiner: what of a batch is learned from, and what is found against whom.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use candle_core::Result;
use chorus_protocol::policy::Version;
use chorus_protocol::rollout::{GroupId, Rollout};
use chorus_protocol::{Hash, NodeId};
use chorus_rollout::buffer::Batch;

use super::{CopyWatch, Distance, Finding, Tolerance, Verdict, recompute};
use crate::env::{Claim, Judge, JudgeError, Judgement};
use crate::policy::Policy;
use crate::train::Trajectory;

/// Versions whose weights are held.
pub const MAX_VERSIONS: usize = 24;
/// Samplers that are remembered.
const MAX_SAMPLERS: usize = 4_096;
/// Members that are remembered, so that one is not taken twice.
const MAX_SEEN: usize = 65_536;
/// How far a reward may be from the one computed again.
const REWARD: f32 = 1e-6;

/// How closely is looked.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AuditConfig {
    /// Share of rollouts whose log-probabilities are computed again.
    pub share: f64,
    /// A sampler's first rollouts, all of which are.
    pub newcomer: u32,
    /// How far log-probabilities may be off.
    pub tolerance: Tolerance,
}

impl Default for AuditConfig {
    fn default() -> Self {
        Self { share: 0.05, newcomer: 32, tolerance: Tolerance::default() }
    }
}

/// What was looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AuditTally {
    /// Rollouts that were examined.
    pub examined: u64,
    /// Those of them whose log-probabilities were computed again.
    pub recomputed: u64,
    /// Those that are not learned from.
    pub struck: u64,
    /// Groups that lost a rollout.
    pub groups_failed: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Record {
    examined: u32,
    caught: bool,
}

/// What of a batch is learned from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Admission {
    /// Groups, without what was struck.
    pub groups: Vec<Vec<Trajectory>>,
    /// What was struck, and why.
    pub findings: Vec<Finding>,
}

/// See the module.
#[derive(Debug)]
pub struct Auditor {
    config: AuditConfig,
    /// What nobody else knows: decides which rollouts are computed again.
    secret: [u8; 32],
    versions: VecDeque<(Version, Policy)>,
    records: BTreeMap<NodeId, Record>,
    seen: BTreeSet<(NodeId, GroupId, u16)>,
    seen_order: VecDeque<(NodeId, GroupId, u16)>,
    copies: CopyWatch,
    tally: AuditTally,
}

impl Auditor {
    /// Makes an examiner that knows no version yet. The secret must be the trainer's own.
    #[must_use]
    pub fn new(config: AuditConfig, secret: [u8; 32]) -> Self {
        Self {
            config,
            secret,
            versions: VecDeque::new(),
            records: BTreeMap::new(),
            seen: BTreeSet::new(),
            seen_order: VecDeque::new(),
            copies: CopyWatch::default(),
            tally: AuditTally::default(),
        }
    }

    /// Holds the weights of a version that was published. The oldest goes when there are [`MAX_VERSIONS`].
    pub fn hold(&mut self, version: Version, policy: Policy) {
        if self.weights(&version).is_none() {
            if self.versions.len() >= MAX_VERSIONS {
                self.versions.pop_front();
            }
            self.versions.push_back((version, policy));
        }
    }

    /// Returns the weights of a version, if they are held.
    #[must_use]
    pub fn weights(&self, version: &Version) -> Option<&Policy> {
        self.versions.iter().find(|(held, _)| held == version).map(|(_, policy)| policy)
    }

    /// Returns what was looked at so far.
    #[must_use]
    pub const fn tally(&self) -> AuditTally {
        self.tally
    }

    /// Returns whether a sampler was caught before.
    #[must_use]
    pub fn has_caught(&self, sampler: &NodeId) -> bool {
        self.records.get(sampler).is_some_and(|record| record.caught)
    }

    /// Turns a batch into what is learned from: rewards are computed again, and what does not match is struck.
    ///
    /// # Errors
    /// candle's.
    pub fn admit(&mut self, batch: &Batch, judge: &mut Judge) -> Result<Admission> {
        let rollouts: Vec<(NodeId, &Rollout)> = batch
            .groups
            .iter()
            .flat_map(|group| &group.rollouts)
            .map(|(sampler, _, rollout)| (*sampler, &**rollout))
            .collect();
        let mut verdicts = self.examine(&rollouts, judge)?.into_iter();
        let mut admission = Admission::default();
        for group in &batch.groups {
            let mut usable = Vec::with_capacity(group.rollouts.len());
            for (sampler, lag, rollout) in &group.rollouts {
                let Some(verdict) = verdicts.next() else { break };
                if verdict.is_usable() {
                    usable.push(trajectory(rollout, *lag));
                } else {
                    let (group, member) = (rollout.group, rollout.member);
                    admission.findings.push(Finding { sampler: *sampler, group, member, verdict });
                }
            }
            self.tally.groups_failed += u64::from(usable.len() < group.rollouts.len());
            admission.groups.push(usable);
        }
        Ok(admission)
    }

    /// Examines rollouts in the order in which they came. A rollout that is [usable](Verdict::is_usable) has the reward that the
    /// environment gives.
    ///
    /// # Errors
    /// candle's.
    pub fn examine(&mut self, rollouts: &[(NodeId, &Rollout)], judge: &mut Judge) -> Result<Vec<Verdict>> {
        let mut verdicts = self.at_first_sight(rollouts, judge);
        let looked_at = |at: &usize| verdicts[*at].is_usable() && self.is_drawn(rollouts[*at].0, rollouts[*at].1);
        let drawn: Vec<usize> = (0..rollouts.len()).filter(looked_at).collect();
        self.tally.recomputed += drawn.len() as u64;
        let chosen: Vec<&Rollout> = drawn.iter().map(|at| rollouts[*at].1).collect();
        let computed = recompute(&chosen, |version| self.weights(version))?;
        for (at, computed) in drawn.into_iter().zip(computed) {
            let rollout = rollouts[at].1;
            let Some(computed) = computed else {
                verdicts[at] = Verdict::UnknownVersion;
                continue;
            };
            let distance = Distance::between(&rollout.log_probs, &computed);
            if !self.config.tolerance.holds(distance) {
                verdicts[at] = self.misfit(rollout, distance)?;
            }
        }
        for ((sampler, rollout), verdict) in rollouts.iter().zip(&mut verdicts) {
            if verdict.is_usable() && self.copies.see(*sampler, rollout) {
                *verdict = Verdict::Copied;
            }
            self.remember(*sampler, verdict);
        }
        Ok(verdicts)
    }

    /// What came before, and what needs no weights.
    fn at_first_sight(&mut self, rollouts: &[(NodeId, &Rollout)], judge: &mut Judge) -> Vec<Verdict> {
        let fresh: Vec<bool> = rollouts.iter().map(|(sampler, rollout)| self.is_new(*sampler, rollout)).collect();
        let asked = rollouts.iter().zip(&fresh).filter(|(_, fresh)| **fresh);
        let claims: Vec<Claim<'_>> = asked.map(|((_, rollout), _)| claim(rollout)).collect();
        let mut said = judge.judge_all(&claims).into_iter();
        let verdict = |((_, rollout), fresh): (&(NodeId, &Rollout), bool)| {
            let said = if fresh { said.next() } else { None };
            said.map_or(Verdict::Repeated, |said| judged(rollout, said))
        };
        rollouts.iter().zip(fresh).map(verdict).collect()
    }

    fn is_new(&mut self, sampler: NodeId, rollout: &Rollout) -> bool {
        let place = (sampler, rollout.group, rollout.member);
        if !self.seen.insert(place) {
            return false;
        }
        self.seen_order.push_back(place);
        if self.seen_order.len() > MAX_SEEN {
            let oldest = self.seen_order.pop_front();
            oldest.map(|oldest| self.seen.remove(&oldest));
        }
        true
    }

    /// Decides whether a rollout's log-probabilities are computed again. Who does not know the secret cannot tell before.
    fn is_drawn(&self, sampler: NodeId, rollout: &Rollout) -> bool {
        let record = self.records.get(&sampler).copied().unwrap_or_default();
        if record.caught || record.examined < self.config.newcomer {
            return true;
        }
        let parts: [&[u8]; 4] =
            [&self.secret, sampler.as_bytes(), &rollout.group.0.to_le_bytes(), &rollout.member.to_le_bytes()];
        let hash = Hash::derive("chorus rollout audit v1", &parts);
        let word = hash.as_bytes().iter().take(4).fold(0_u32, |word, byte| word << 8 | u32::from(*byte));
        f64::from(word) < self.config.share * f64::from(u32::MAX)
    }

    /// Log-probabilities do not fit the version that is claimed: perhaps they fit another one.
    fn misfit(&self, rollout: &Rollout, distance: Distance) -> Result<Verdict> {
        for (version, policy) in self.versions.iter().rev() {
            let computed = recompute(&[rollout], |_| Some(policy))?.pop().flatten();
            let fits = computed
                .is_some_and(|computed| self.config.tolerance.holds(Distance::between(&rollout.log_probs, &computed)));
            if fits {
                return Ok(Verdict::WrongVersion { fits: *version });
            }
        }
        Ok(Verdict::Edited(distance))
    }

    fn remember(&mut self, sampler: NodeId, verdict: &Verdict) {
        self.tally.examined += 1;
        self.tally.struck += u64::from(!verdict.is_usable());
        if self.records.len() >= MAX_SAMPLERS && !self.records.contains_key(&sampler) {
            return;
        }
        let record = self.records.entry(sampler).or_default();
        record.examined = record.examined.saturating_add(1);
        record.caught |= verdict.accuses();
    }
}

/// What a rollout claims to have earned, to be judged.
pub(super) fn claim(rollout: &Rollout) -> Claim<'_> {
    (rollout.environment.as_str(), rollout.seed, &rollout.completion)
}

/// Holds a rollout against what its environment says.
pub(super) fn judged(rollout: &Rollout, said: std::result::Result<Judgement, JudgeError>) -> Verdict {
    match said {
        Err(error) => Verdict::Unjudged(error),
        Ok(judgement) if judgement.prompt != rollout.prompt => Verdict::WrongPrompt,
        Ok(judgement) if (judgement.reward - rollout.reward).abs() > REWARD || !rollout.reward.is_finite() => {
            Verdict::WrongReward { recomputed: judgement.reward }
        }
        Ok(_) => Verdict::Honest,
    }
}

fn trajectory(rollout: &Rollout, lag: u64) -> Trajectory {
    Trajectory {
        prompt: rollout.prompt.to_vec(),
        tokens: rollout.completion.clone(),
        logprobs: rollout.log_probs.clone(),
        reward: rollout.reward,
        lag,
    }
}
