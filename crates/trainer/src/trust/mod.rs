//! Trust: what a sampler says of its rollouts is believed as far as it can be computed again.
//!
//! ```text
//!  Batch ──▶ Auditor::admit ── every reward and prompt, from (environment, seed, tokens)
//!                 │           ── every answer against those known, for copies
//!                 │           ── log-probabilities of a sample, under the version that is claimed
//!                 ├──▶ groups of Trajectory: what is learned from
//!                 └──▶ Finding ──with the signed frame──▶ Evidence::check, by anybody who has the weights
//! ```
//!
//! 1. **Rewards and prompts** cost next to nothing, so every one is computed again ([`crate::env::Judge`]).
//! 2. **Log-probabilities** cost a forward pass, so a sample is computed again. Which ones follows from a secret of the trainer's, so
//!    nobody can know before. A sampler's first rollouts are all checked, and everything of one that was caught once.
//! 3. The **tolerance** is what honest samplers' arithmetic differs by, measured ([`Tolerance::calibrate`]), with a margin.
//! 4. **Copies**: that two draws give one answer proves nothing by itself, for short answers do so all the time. So the improbability is
//!    added up over a sampler's rollouts ([`CopyWatch`]) until chance is ruled out.
//!
//! A rollout that is struck is not learned from. What an honest sampler may do after a crash (deliver a member twice) strikes the
//! rollout and accuses nobody.
//!
//! What this cannot see: a sampler that draws many answers and delivers those it likes. And of edited tokens or log-probabilities that
//! differ from the truth by less than the tolerance nothing is seen, and nothing needs to be: the importance weight moves by no more.

mod auditor;
mod copies;
mod evidence;
mod fit;

#[cfg(test)]
mod tests;

use chorus_protocol::NodeId;
use chorus_protocol::misbehaviour::Charge;
use chorus_protocol::policy::Version;
use chorus_protocol::rollout::GroupId;

use crate::env::JudgeError;

pub use auditor::{Admission, AuditConfig, AuditTally, Auditor, MAX_VERSIONS};
pub use copies::{CHANCE, CopyWatch};
pub use evidence::{Evidence, EvidenceError};
pub use fit::{Distance, Tolerance, recompute};

/// What an examination of one rollout came to.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Verdict {
    /// Nothing that was looked at is wrong.
    Honest,
    /// The environment gives another reward.
    WrongReward {
        /// What it gives.
        recomputed: f32,
    },
    /// The prompt is not the one of the group's task.
    WrongPrompt,
    /// The log-probabilities are those of another version.
    WrongVersion {
        /// Which.
        fits: Version,
    },
    /// The log-probabilities are those of no version that is known: the tokens, or the log-probabilities, were edited. Which of the
    /// two cannot be told from outside.
    Edited(Distance),
    /// Its sampler's answers agree with known ones too often for chance.
    Copied,
    /// The same sampler delivered the same member before. Accuses nobody: a crash may do that.
    Repeated,
    /// The environment gave no reward; the sampler is not at fault.
    Unjudged(JudgeError),
    /// The claimed version is not held any more, so that nothing can be computed under it.
    UnknownVersion,
}

impl Verdict {
    /// Returns whether a rollout with this verdict is learned from.
    #[must_use]
    pub const fn is_usable(&self) -> bool {
        matches!(self, Self::Honest)
    }

    /// Returns whether the sampler is at fault beyond doubt.
    #[must_use]
    pub const fn accuses(&self) -> bool {
        self.charge().is_some()
    }

    /// Returns what the sampler is accused of, if it is at fault beyond doubt.
    #[must_use]
    pub const fn charge(&self) -> Option<Charge> {
        match self {
            Self::WrongReward { .. } => Some(Charge::WrongReward),
            Self::WrongPrompt => Some(Charge::WrongPrompt),
            Self::WrongVersion { .. } => Some(Charge::WrongVersion),
            Self::Edited(_) => Some(Charge::Edited),
            Self::Copied => Some(Charge::Copied),
            Self::Honest | Self::Repeated | Self::Unjudged(_) | Self::UnknownVersion => None,
        }
    }
}

/// A rollout that is not learned from, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Finding {
    /// Who sampled it.
    pub sampler: NodeId,
    /// Its group.
    pub group: GroupId,
    /// Its number in the group.
    pub member: u16,
    /// What was found.
    pub verdict: Verdict,
}
