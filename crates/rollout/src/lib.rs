//! The swarm trains: rollouts stream to a trainer, new weights stream back.
//!
//! ```text
//!            ┌───────────── Broadcast (chunks, peer to peer) ──────────────┐
//!            │ Ready                                                Publish│
//!            ▼                                                             │
//!  engine ◀─ Sampler ──Frame──▶ Buffer ──Batch──▶ learner ──Stepped, Published
//!            ▲   └──── spool      │  └──── disk
//!            └──────Assign────────┘
//! ```
//!
//! | module | subject |
//! |---|---|
//! | [`buffer`] | the trainer's side: groups, staleness, exactly once, batches, who samples what |
//! | [`sampler`] | the sampler's side: the right weights, frames, the spool |
//! | [`broadcast`] | versions to all nodes, chunk by chunk, at about one copy from their owner |
//! | [`pacing`] | how much may be begun so that nothing is made to be thrown away |
//! | [`capacity`] | how many samplers a learner needs, and which are worth their price |
//! | [`plan`] | which task a group has |
//!
//! The messages are `protocol::rollout`'s; `protocol/spec/rollout.md` says them in words.
//!
//! What this crate does not do: move bytes, write disks, sample, learn, or judge whether a reward or a log-probability is true.

pub mod broadcast;
pub mod buffer;
pub mod capacity;
pub mod pacing;
pub mod plan;
pub mod sampler;
