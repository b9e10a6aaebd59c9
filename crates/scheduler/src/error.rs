//! How a task, or one of its chains, ends badly.

use std::time::Duration;

use chorus_beacon::job::JobError;
use serde::{Serialize, Serializer, ser::SerializeStruct};

/// Why one chain brought no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChainError {
    /// A job that the chain could not do without failed.
    #[error("{0}")]
    Job(#[from] JobError),
    /// The task's budget cannot pay for the next job.
    #[error("the task's budget of {what} is spent; raise it, or ask for fewer chains")]
    Budget {
        /// What ran out.
        what: &'static str,
    },
    /// The answer was empty.
    #[error("the answer was empty; ask for more tokens, or for another model")]
    Empty,
}

impl ChainError {
    /// Returns whether the same task may well succeed later.
    #[must_use]
    pub const fn is_retryable(&self) -> bool {
        match self {
            Self::Job(error) => error.is_retryable(),
            Self::Budget { .. } => false,
            Self::Empty => true,
        }
    }
}

/// Why a task has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TaskError {
    /// The task makes no sense as it stands.
    #[error("the task cannot be run: {reason}")]
    Invalid {
        /// What is wrong, and what to change.
        reason: String,
    },
    /// Question and context are too long for any payload.
    #[error("question and context have {len} bytes and {max} fit; shorten them")]
    TooLong {
        /// Their length in bytes.
        len: usize,
        /// The most that fits.
        max: usize,
    },
    /// This node runs as many tasks as it may.
    #[error("this node already runs {limit} tasks; wait for one to end, or ask another node")]
    Overloaded {
        /// How many it runs at a time.
        limit: usize,
    },
    /// The one chain of the task failed.
    #[error("{0}")]
    Failed(ChainError),
    /// Every chain of the task failed.
    #[error("all {} chains failed; the first: {}", causes.len(), first(causes))]
    AllChainsFailed {
        /// How, one after the other.
        causes: Vec<ChainError>,
    },
    /// The deadline passed before any chain had an answer.
    #[error(
        "no answer after {elapsed:.1?}, while {waiting_for}; allow more time, fewer tokens, or use the strategy `direct`"
    )]
    Deadline {
        /// How long it was tried.
        elapsed: Duration,
        /// What was waited for.
        waiting_for: String,
    },
    /// The node was restarted in the middle of the task, and cannot run it again.
    #[error("the node was restarted in the middle of the task, and {reason}; ask again")]
    Interrupted {
        /// Why it was not run again.
        reason: String,
    },
    /// The user took it back.
    #[error("the task was cancelled")]
    Cancelled,
}

fn first(causes: &[ChainError]) -> String {
    causes.first().map_or_else(|| "no cause is known".to_owned(), ToString::to_string)
}

impl TaskError {
    /// Returns whether asking again later, unchanged, may help.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Overloaded { .. } | Self::Interrupted { .. } => true,
            Self::Failed(error) => error.is_retryable(),
            Self::AllChainsFailed { causes } => causes.iter().any(ChainError::is_retryable),
            Self::Invalid { .. } | Self::TooLong { .. } | Self::Deadline { .. } | Self::Cancelled => false,
        }
    }

    /// Returns a word for the kind of error, stable across releases.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Invalid { .. } => "invalid",
            Self::TooLong { .. } => "too_long",
            Self::Overloaded { .. } => "overloaded",
            Self::Failed(_) => "failed",
            Self::AllChainsFailed { .. } => "all_chains_failed",
            Self::Deadline { .. } => "deadline",
            Self::Interrupted { .. } => "interrupted",
            Self::Cancelled => "cancelled",
        }
    }
}

impl Serialize for TaskError {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut out = serializer.serialize_struct("TaskError", 3)?;
        out.serialize_field("kind", self.kind())?;
        out.serialize_field("message", &self.to_string())?;
        out.serialize_field("retryable", &self.is_retryable())?;
        out.end()
    }
}
