//! The ledger's entries, and the proof that somebody wrote two where one belongs.

use std::sync::Arc;

use bincode::{Decode, Encode};
use serde::Serialize;

use crate::beacon::Receipt;
use crate::capability::Capability;
use crate::id::{Hash, NetworkId};
use crate::key::NodeId;
use crate::limits::MAX_ENTRY_BYTES;
use crate::misbehaviour::Misbehaviour;
use crate::policy::PolicyNotice;
use crate::signed::{Received, Signable, Verified, VerifyError};
use crate::wall::WallTime;

/// One link of its author's chain. The author is the envelope's.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct Entry {
    /// Position in the author's chain, from 1.
    pub seq: u64,
    /// Hash of the author's entry before this one; [`Hash::ZERO`] before the first.
    pub prev: Hash,
    /// When the author wrote it.
    pub wall_time: WallTime,
    /// When it stops to count.
    pub expires: WallTime,
    /// What it says.
    pub body: Body,
}

/// What an entry says. New kinds are appended, never inserted.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Body {
    /// "This is what I can do", in place of every capability before it.
    Capability(#[serde(serialize_with = "shared")] Arc<Capability>),
    /// "I am leaving": takes back the capability.
    Retire,
    /// "This is how a job that I asked for went", countersigning the executor's half.
    Receipt(Box<Receipt>),
    /// "This is a policy that I train", in place of every notice of that name before it.
    Policy(Box<PolicyNotice>),
    /// "That node did this, and I hold the evidence." A statement of the author's, and no more.
    Misbehaviour(Box<Misbehaviour>),
}

/// Serde by itself does not look through an `Arc`.
fn shared<S: serde::Serializer>(capability: &Capability, serializer: S) -> Result<S::Ok, S::Error> {
    capability.serialize(serializer)
}

impl Body {
    /// The names of all kinds, in the order of their tags.
    pub const KINDS: [&'static str; 5] = ["capability", "retire", "receipt", "policy", "misbehaviour"];

    /// Returns the name by which tables and metrics call this kind.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Capability(_) => "capability",
            Self::Retire => "retire",
            Self::Receipt(_) => "receipt",
            Self::Policy(_) => "policy",
            Self::Misbehaviour(_) => "misbehaviour",
        }
    }
}

impl Signable for Entry {
    const KIND: &'static str = "entry";
    const VERSION: u16 = 1;
    const MAX_BYTES: usize = MAX_ENTRY_BYTES;
}

/// Two entries of one author that cannot both be in one chain. The pair proves itself: nobody needs to vouch for it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Equivocation {
    /// The one.
    pub first: Received<Entry>,
    /// The other.
    pub second: Received<Entry>,
}

/// Why a pair of entries proves nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NoProof {
    /// One of the two is not what its envelope says.
    #[error("an entry of the pair does not hold: {0}")]
    Invalid(#[from] VerifyError),
    /// Both fit into one honest chain, or they are of two authors.
    #[error("the two entries can stand in one honest chain; this pair proves nothing")]
    Compatible,
}

impl Equivocation {
    /// Makes the proof from two entries, if they are one.
    ///
    /// # Errors
    /// [`NoProof::Compatible`] when one honest chain can hold both.
    pub fn new(first: &Verified<Entry>, second: &Verified<Entry>) -> Result<Self, NoProof> {
        if !contradict(first, second) && !contradict(second, first) {
            return Err(NoProof::Compatible);
        }
        Ok(Self { first: first.to_wire(), second: second.to_wire() })
    }

    /// Checks the proof from nothing but itself, and returns the author it convicts.
    ///
    /// # Errors
    /// [`NoProof`] when it convicts nobody.
    pub fn verify(&self, network: &NetworkId) -> Result<NodeId, NoProof> {
        let first = self.first.clone().verify(network)?;
        let second = self.second.clone().verify(network)?;
        Self::new(&first, &second)?;
        Ok(first.author())
    }
}

/// Two entries with one number, or a successor that links to another predecessor than the one at hand.
fn contradict(a: &Verified<Entry>, b: &Verified<Entry>) -> bool {
    let one_author = a.author() == b.author() && a.hash() != b.hash();
    let same_seq = a.seq == b.seq;
    let broken_link = a.seq.checked_add(1) == Some(b.seq) && b.prev != a.hash();
    one_author && (same_seq || broken_link)
}
