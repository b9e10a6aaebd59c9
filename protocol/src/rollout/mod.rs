//! What the bulk plane carries: rollouts towards a trainer, weights away from it.
//!
//! ```text
//!  sampler                                              trainer
//!     │ Hello { serving, slots, first unacknowledged } ───▶ │
//!     │ ◀──────────────────────── Assign { credit, work } │  groups of seeds, and how many may be begun
//!     │ Frame { rollouts, signed once } ──────────────────▶ │  buffer, disk
//!     │ ◀────────── Ack { sequence, what counted, what not } │  only now does the sampler forget it
//!     │ ◀──────────────────────────── Announce { manifest } │  a new version
//!     │ Have, Want, Chunk … with the trainer *and every other sampler*
//!     │ Serving { version } ──────────────────────────────▶ │
//! ```

mod columns;
mod frame;
mod message;
mod parts;

pub use frame::{FrameError, RolloutFrame, RolloutView};
pub use message::{Assignment, Bulk, Credit, Hello, MAX_BITMAP_BYTES, Refusal, Want, WorkReport};
pub use parts::{GroupId, Rollout, Segment};
