//! Range-based set reconciliation between two ledgers (the Negentropy protocol's frames, carried in direct messages).
//!
//! ```text
//!  initiator                                   responder
//!     │ Open { digest, frame } ─────────────────▶ │  equal digests: Same, and that was all
//!     │ ◀───────────────────────── Reply { frame } │
//!     │ Reply { frame } ──────────────────────────▶ │  … until the initiator knows both differences
//!     │ Want { ids } ─────────────────────────────▶ │  what it lacks
//!     │ ◀──────────────────────────────── Items { } │
//!     │ Items { } ────────────────────────────────▶ │  what the other lacks
//! ```

use bincode::{Decode, Encode};

use crate::bounded::List;
use crate::entry::{Entry, Equivocation};
use crate::id::Hash;
use crate::limits::{MAX_RECONCILE_BYTES, MAX_SYNC_ENTRIES};
use crate::signed::Received;

/// One message of a reconciliation. `session` is the initiator's number for it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum SyncMessage {
    /// "This is my set's digest, and the first frame if yours differs."
    Open {
        /// The initiator's number for this reconciliation.
        session: u64,
        /// Digest of the initiator's whole set.
        digest: Hash,
        /// Negentropy's first frame.
        frame: List<u8, MAX_RECONCILE_BYTES>,
    },
    /// "My set is the same."
    Same {
        /// The reconciliation.
        session: u64,
    },
    /// The next frame, in either direction.
    Reply {
        /// The reconciliation.
        session: u64,
        /// Negentropy's frame.
        frame: List<u8, MAX_RECONCILE_BYTES>,
    },
    /// "Send me these."
    Want {
        /// The reconciliation.
        session: u64,
        /// What is wanted.
        ids: List<Hash, MAX_SYNC_ENTRIES>,
    },
    /// "Here they are": entries, and proofs that convict authors.
    Items {
        /// The reconciliation.
        session: u64,
        /// Entries in the order of their authors' chains.
        entries: List<Received<Entry>, MAX_SYNC_ENTRIES>,
        /// Proofs of equivocation.
        proofs: List<Equivocation, 16>,
    },
    /// "I cannot go on with this now."
    Abort {
        /// The reconciliation.
        session: u64,
    },
}
