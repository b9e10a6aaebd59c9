//! The replicated set of signed entries: who can do what, and what they did.
//!
//! Every node is the only writer of its own hash-linked chain, and every node holds the chains of all. There is no leader and no
//! order between authors: the state is a pure function of the *set* of entries, so that merging is commutative, associative and
//! idempotent, and two nodes that hold the same set hold the same state, whatever came first.
//!
//! ```text
//!              Gossip (push)                         Append
//!   neighbours ─────────────┐                          │  sign, Persist
//!                           ▼                          ▼
//!              Sync (pull) ─▶ verify ─▶ rules ─▶   ┌───────┐ ◀── Persisted: only now merged,
//!                                                  │ State │     Published and Appended
//!        Judged, Penalise ◀── refusals             └───────┘
//!                                                   │ │ └──▶ Event: capability, policy, receipt, accusation, quarantine
//!                            Persist (puts, deletes)◀ └────▶ Send: reconciliation
//! ```
//!
//! 1. *Push.* A new entry is gossiped. Each node checks it once and judges it for the gossip layer.
//! 2. *Pull.* Every few seconds, and when a neighbour appears, two nodes reconcile their sets by ranges (Negentropy), so that
//!    whoever was away catches up with bytes in proportion to what was missed. Equal sets cost one small round trip.
//! 3. *The latest capability wins*, and of each policy the latest notice. What it supersedes leaves the set at once; its bytes, and later only its hash, are kept for a
//!    while, so that an author who writes a second version of it is still found out.
//! 4. *Leases.* Every entry expires, at most 30 days after it was written.
//! 5. *Two entries where one belongs* prove themselves a fraud. The pair is gossiped and kept, the author's entries leave the
//!    state everywhere, and in the set stands one item derived from the author's id alone: nodes agree whichever pair they hold.
//!
//! Own entries are on disk before anybody hears of them. A run of the node numbers its entries from the wall clock in
//! milliseconds (or from its last entry, if that is later): numbers may leave gaps, but a node that lost its disk, or was restored
//! from an old copy, never uses a number twice, which would look like fraud and be punished as such.
//!
//! What it does not do: it does not decide when to renew a capability (whoever measures it does), it does not weigh receipts
//! (reputation is each node's own business), and set digests are sums modulo 2^256. A rich adversary may craft entries *of its
//! own* whose sums collide; what it gains is that two nodes hold different parts of its own chain for a while.

mod author;
mod config;
mod delta;
mod expiry;
mod io;
mod item_set;
mod ledger;
mod own;
mod refusal;
mod rules;
mod state;
mod sync;

#[cfg(test)]
mod tests;

pub use author::{Topic, topic};
pub use config::{ConfigError, LedgerConfig};
pub use delta::{EntryKey, MarkUpdate};
pub use io::{LedgerEffect, LedgerEvent, LedgerInput, PersistBatch, Stats};
pub use ledger::Ledger;
pub use refusal::{Acceptance, AppendError, Misconduct, Refusal};
pub use rules::receipt_work;
