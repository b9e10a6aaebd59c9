//! Who does this job, now: requirement, bids, selection, leases, receipts, reputation.
//!
//! Two machines, one on each side of a job. A node runs both: its own node is a candidate like any other, and what a machine sends
//! to its own node is looped back by the router.
//!
//! ```text
//!  customer        Requester                                   Executor            engine
//!     │ Submit        │                                           │                   │
//!     │──────────────▶│ 1 Publish(Beacon) ─────────gossip────────▶│ can I? a slot?    │
//!     │               │◀───────────────────────────── Bid (signed)│ 2 reserve         │
//!     │ Event…        │ 3 recompute φ, close early, rank          │                   │
//!     │◀──────────────│ 4 Grant (lease, fence, payload) ─────────▶│ Run               │
//!     │               │   Release ──▶ the other bidders           │──────────────────▶│
//!     │               │◀──────────────────── Accept, Progress …   │◀── Progress, Done │
//!     │               │◀──────── Outcome (result, signed Work)    │                   │
//!     │ Done          │ 5 check lease, digest; countersign        │                   │
//!     │◀──────────────│ 6 Append(Receipt) ──▶ ledger              │                   │
//! ```
//!
//! 1. The requester announces what is needed, never what is asked. In a large swarm it invites those who match best.
//! 2. Who can and has a slot bids, and keeps the slot for a moment. Who has none says so, and remembers the beacon while it is open.
//! 3. The window closes when enough have bid, when all who can have answered, or at its end. Scores come from the ledger
//!    ([`phi::phi`]).
//! 4. The winner gets the lease ([`lease`] says what makes it valid) and only then the payload; the losers' slots are free.
//! 5. Refusal, silence, a broken connection, a crash: the next bidder, then a new beacon. A straggler gets a rival.
//! 6. Both signatures make a receipt; receipts make a [`reputation`], which every node computes for itself.
//!
//! A job always ends, once, in [`RequesterEffect::Done`], at its deadline at the latest. Every message may be lost, doubled, late or
//! false: a repeated grant is answered with where the run stands, and nothing counts but what the valid lease's holder says.
//!
//! What this crate does not do: check an answer's text or its JSON Schema (its customer does), queue jobs beyond
//! [`config::BeaconConfig::max_jobs`], or store anything (jobs die with their requester; receipts are the ledger's).

pub mod audit;
pub mod config;
pub mod executor;
pub mod job;
pub mod lease;
pub mod phi;
pub mod reputation;
pub mod requester;
pub mod select;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use config::{BeaconConfig, HedgePolicy, ReputationConfig};
pub use executor::{Executor, ExecutorEffect, ExecutorEvent, ExecutorInput};
pub use job::{JobDone, JobError, JobEvent, JobEventKind, JobSpec};
pub use lease::{Fault, LeaseView, RunId, hedge_id};
pub use phi::phi;
pub use reputation::{Reputation, Standing};
pub use requester::{JobView, Requester, RequesterEffect, RequesterInput};
pub use select::SelectionRule;
