//! One rollout, as its sampler makes it and its trainer uses it.

use std::fmt;
use std::sync::Arc;

use bincode::{Decode, Encode};
use serde::Serialize;

use crate::bounded::Text;
use crate::job::Finish;
use crate::policy::Version;

/// The rollouts of one prompt. The trainer of a policy counts its groups from 1, in the order in which it hands them out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize)]
#[serde(transparent)]
pub struct GroupId(pub u64);

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "g{}", self.0)
    }
}

/// Which version wrote a rollout's tokens, from one position on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct Segment {
    /// The version.
    pub version: Version,
    /// The first token of the completion that it wrote.
    pub from: u32,
}

/// One sampled trajectory.
#[derive(Clone, Debug, PartialEq)]
pub struct Rollout {
    /// The group it belongs to.
    pub group: GroupId,
    /// Its number in the group, from 0.
    pub member: u16,
    /// The environment that made the prompt and gave the reward.
    pub environment: Text<96>,
    /// The seed from which the environment made the task.
    pub seed: u64,
    /// The prompt's tokens; all members of a group share them.
    pub prompt: Arc<[u32]>,
    /// The tokens that were sampled.
    pub completion: Vec<u32>,
    /// Natural-log probability of each sampled token, under the version that wrote it.
    pub log_probs: Vec<f32>,
    /// The reward, as the sampler computed it. The trainer computes it again.
    pub reward: f32,
    /// Why it ended.
    pub finish: Finish,
    /// Which version wrote what: the first segment begins at 0, each next one later.
    pub segments: Vec<Segment>,
}

impl Rollout {
    /// Returns about how many bytes it takes in memory and in a frame.
    #[must_use]
    pub fn weight(&self) -> usize {
        64 + 4 * self.prompt.len() + 8 * self.completion.len() + 8 * self.segments.len()
    }
}
