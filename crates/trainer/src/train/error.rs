//! Why a step was not taken.

/// See the module.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StepError {
    /// Something that is learned from, or what came of it, is infinite or no number at all.
    #[error(
        "the {0} is no number; the step was not taken, and the weights are what they were: go on with the next batch"
    )]
    NotANumber(&'static str),
    /// The arithmetic itself failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl StepError {
    /// Returns whether only this batch is at fault, so that training can go on with the next one.
    #[must_use]
    pub const fn is_skippable(&self) -> bool {
        matches!(self, Self::NotANumber(_))
    }
}
