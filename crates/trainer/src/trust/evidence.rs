//! Evidence: signed frames that convict their sampler before anybody who has the weights and the environment.

use candle_core::Result as CandleResult;
use chorus_protocol::policy::Version;
use chorus_protocol::rollout::{GroupId, Rollout, RolloutFrame};
use chorus_protocol::{NetworkId, NodeId, Received, Verified, VerifyError};

use super::auditor::{claim, judged};
use super::{CopyWatch, Distance, Tolerance, Verdict, recompute};
use crate::env::Judge;
use crate::policy::Policy;

/// Frames that one piece of evidence may hold.
const MAX_FRAMES: usize = 256;

/// A sampler's own signed words against it.
#[derive(Debug)]
pub struct Evidence {
    /// Who is accused.
    pub accused: NodeId,
    /// The rollout that convicts: its group and its number there. Of copies, the last one.
    pub place: (GroupId, u16),
    /// The frame that holds it. Of copies: all frames of the accused in a row, without a gap in their numbers, and among them those of
    /// others that it copied, in the order in which they came.
    pub frames: Vec<Received<RolloutFrame>>,
}

/// Why evidence convicts nobody.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvidenceError {
    /// It holds too much or nothing.
    #[error("evidence has 1 to {MAX_FRAMES} frames; this has {0}")]
    Frames(usize),
    /// A frame is not what its signer signed.
    #[error(transparent)]
    Frame(#[from] VerifyError),
    /// The frames leave something out that might speak for the accused.
    #[error("the frames of {0:?} are not in a row; evidence of copies may leave none out")]
    Gap(NodeId),
    /// The rollout is not in a frame of the accused.
    #[error("no frame of {0:?} holds the rollout in question")]
    Missing(NodeId),
    /// Everything in it is as it should be, or cannot be computed here.
    #[error("nothing is found against {accused:?}: {verdict:?}")]
    Nothing {
        /// Who was accused.
        accused: NodeId,
        /// What was found.
        verdict: Box<Verdict>,
    },
    /// The arithmetic failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Evidence {
    /// Makes evidence of the frames in question.
    #[must_use]
    pub fn new(accused: NodeId, place: (GroupId, u16), frames: &[Verified<RolloutFrame>]) -> Self {
        Self { accused, place, frames: frames.iter().map(Verified::to_wire).collect() }
    }

    /// Computes everything again, and returns what convicts the accused. `weights` gives a version's weights, which the checker took
    /// from a manifest signed by the policy's owner.
    ///
    /// # Errors
    /// [`EvidenceError`] when it does not convict.
    pub fn check<'a>(
        &self,
        network: &NetworkId,
        judge: &mut Judge,
        weights: impl Fn(&Version) -> Option<&'a Policy>,
        tolerance: Tolerance,
    ) -> Result<Verdict, EvidenceError> {
        if !(1..=MAX_FRAMES).contains(&self.frames.len()) {
            return Err(EvidenceError::Frames(self.frames.len()));
        }
        let frames: Vec<Verified<RolloutFrame>> =
            self.frames.iter().map(|frame| frame.clone().verify(network)).collect::<Result<_, _>>()?;
        let own = frames.iter().filter(|frame| frame.author() == self.accused);
        let found = own.flat_map(|frame| frame.rollouts()).find(|view| (view.group(), view.member()) == self.place);
        let rollout = found.ok_or(EvidenceError::Missing(self.accused))?.to_rollout();
        let mut verdict = alone(&rollout, judge, &weights, tolerance)?;
        if verdict.is_usable() && frames.len() > 1 {
            verdict = self.copied(&frames, &weights, tolerance)?;
        }
        let accused = self.accused;
        if verdict.accuses() {
            Ok(verdict)
        } else {
            Err(EvidenceError::Nothing { accused, verdict: Box::new(verdict) })
        }
    }

    /// Whether the accused's answers, none left out, agree with known ones too often.
    fn copied<'a>(
        &self,
        frames: &[Verified<RolloutFrame>],
        weights: &impl Fn(&Version) -> Option<&'a Policy>,
        tolerance: Tolerance,
    ) -> Result<Verdict, EvidenceError> {
        let own: Vec<u64> =
            frames.iter().filter(|frame| frame.author() == self.accused).map(|frame| frame.sequence()).collect();
        if own.windows(2).any(|pair| pair[0].checked_add(1) != Some(pair[1])) {
            return Err(EvidenceError::Gap(self.accused));
        }
        let mut watch = CopyWatch::default();
        let mut convicted = false;
        for frame in frames {
            let rollouts: Vec<Rollout> = frame.rollouts().map(|view| view.to_rollout()).collect();
            let computed = recompute(&rollouts.iter().collect::<Vec<_>>(), weights)?;
            for (rollout, computed) in rollouts.iter().zip(computed) {
                // Made-up log-probabilities would make an agreement look less likely than it is.
                let fits =
                    computed.is_some_and(|computed| tolerance.holds(Distance::between(&rollout.log_probs, &computed)));
                convicted |= fits && watch.see(frame.author(), rollout) && frame.author() == self.accused;
            }
        }
        Ok(if convicted { Verdict::Copied } else { Verdict::Honest })
    }
}

/// What is found against a rollout without a look at others.
fn alone<'a>(
    rollout: &Rollout,
    judge: &mut Judge,
    weights: &impl Fn(&Version) -> Option<&'a Policy>,
    tolerance: Tolerance,
) -> CandleResult<Verdict> {
    let (environment, seed, answer) = claim(rollout);
    let verdict = judged(rollout, judge.judge(environment, seed, answer));
    if !verdict.is_usable() {
        return Ok(verdict);
    }
    let Some(computed) = recompute(&[rollout], weights)?.pop().flatten() else { return Ok(Verdict::UnknownVersion) };
    let distance = Distance::between(&rollout.log_probs, &computed);
    Ok(if tolerance.holds(distance) { Verdict::Honest } else { Verdict::Edited(distance) })
}
