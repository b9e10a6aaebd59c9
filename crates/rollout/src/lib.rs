//! The swarm trains: rollouts stream to a trainer, new weights stream back.
//!
//! ```text
//!            ┌───────────── Broadcast (chunks, peer to peer) ──────────────┐
//!            │ Ready                                                Publish│
//!            ▼                                                             │
//!  engine ◀─ Sampler ──Frame──▶ Buffer ──Batch──▶ learner ──Stepped, Published
//!            ▲   └──── spool      │  ▲  └── disk
//!            └──────Assign────────┘  └── Hired ── Hiring ◀── leases, by the beacon
//! ```
//!
//! | module | subject |
//! |---|---|
//! | [`buffer`] | the trainer's side: groups, staleness, exactly once, batches, who samples what |
//! | [`sampler`] | the sampler's side: the right weights, frames, the spool |
//! | [`broadcast`] | versions to all nodes, chunk by chunk, at about one copy from their owner |
//! | [`evidence`] | evidence from whoever holds it, piece by piece |
//! | [`pacing`] | how much may be begun so that nothing is made to be thrown away |
//! | [`capacity`] | how many samplers a learner needs, and which are worth their price |
//! | [`hiring`] | who samples, by leases that the beacon grants |
//! | [`plan`] | which task a group has |
//!
//! The messages are `protocol::rollout`'s; `protocol/spec/rollout.md` says them in words.
//!
//! # Rules for the shell
//!
//! The machines keep their promises to a shell that keeps these. `chorus_sim::training` keeps them over 500 samplers with crashes,
//! partitions and broken sessions, and checks the promises while it runs.
//!
//! | the shell | or else |
//! |---|---|
//! | publishes a version ([`buffer::BufferInput::Published`], [`broadcast::BroadcastInput::Publish`]) only when the trainer can restore it: its checkpoint is on disk | after a crash rollouts are of a version that nobody knows, and what was acknowledged is lost |
//! | asks for [`buffer::Buffer::progress`] after [`buffer::BufferInput::Stepped`] and before the next [`buffer::BufferInput::Want`] | the checkpoint leaves out groups that its weights did not learn from |
//! | publishes step 0 before any sampler works | nobody can begin, and the learner waits for a version ([`buffer::LearnerAwaits::Version`]) |
//! | publishes each step with `S = 0` and in the sequential mode, and at least every `S + 1` steps otherwise | the same |
//! | answers each [`broadcast::BroadcastEffect::SendChunk`] with [`broadcast::BroadcastInput::Sent`], or with [`broadcast::BroadcastInput::NotSent`] when the chunk or the session is gone | the slot stays taken, and in the end nothing is sent |
//! | tells of the end of a session ([`buffer::BufferInput::Gone`], [`sampler::SamplerInput::Disconnected`], [`broadcast::BroadcastInput::PeerDown`]) before it tells of the next one with the same node | the end of the old one ends the new one |
//! | delivers the messages of one session in order, and none of an earlier session | credits and answers are of another connection |
//! | verifies chunks on disk against the manifest before [`broadcast::BroadcastInput::Resume`] | a torn write is served |
//! | begins with a version only after [`broadcast::BroadcastEffect::Ready`], and says [`sampler::SamplerInput::Serving`] when it is loaded | the wrong weights are named |
//! | does what the disk is asked in order, and says [`buffer::BufferInput::Persisted`] when it would survive a crash | what was acknowledged is lost |
//! | gives [`buffer::Buffer::restore`] all frames that the disk has, and deletes those that it returns | what was acknowledged is lost, or the disk fills |
//!
//! What this crate does not do: move bytes, write disks, sample, learn, or judge whether a reward or a log-probability is true.

pub mod broadcast;
pub mod buffer;
pub mod capacity;
pub mod evidence;
pub mod hiring;
pub mod pacing;
pub mod plan;
pub mod sampler;
