//! Reinforcement learning on candle: environments with verifiable rewards, tiny policies, GRPO.
//!
//! ```text
//!  env      tasks from seeds, rewards from answers          anybody can judge a rollout again
//!  policy   a llama of 0.2 to 5 million weights             every operation has a backward pass; its directory loads in mistral.rs
//!  train    AdamW, warm start, GRPO, checkpoints, curves    the learner takes rollouts of any age and from any sampler
//!  trust    rewards and log-probabilities computed again      what does not match is struck, with evidence
//! ```
//!
//! Nothing here knows of a network: who sampled a rollout, and where, is the caller's. [`train::roll_out`] samples in this process,
//! which is the baseline that every other way is measured against.

pub mod env;
pub mod policy;
pub mod train;
pub mod trust;
