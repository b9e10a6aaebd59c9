//! Honest nodes broken on purpose, to see whether the invariants notice.
//!
//! A check that has never failed has not been shown to check anything. Each mutant here breaks one rule in one way, and a test
//! expects the invariant of that rule to stop the run.

use chorus_core::{Effect, PersistBatch};
use chorus_machine::Rng;
use chorus_protocol::beacon::{Lease, Receipt, Verdict, Work};
use chorus_protocol::entry::{Body, Entry};
use chorus_protocol::message::{Direct, Frame};
use chorus_protocol::{Hash, NetworkId, NodeId, Received, SecretKey, Verified, WallTime};

use crate::disk::DiskBug;

/// What is broken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mutant {
    /// Nothing.
    #[default]
    None,
    /// Every honest node's disk.
    Disk(DiskBug),
    /// Requesters accept whatever result comes, under whatever token.
    IgnoresFences,
    /// Requesters grant each lease to a second node as well.
    GrantsTwice,
    /// Tasks end twice.
    EndsTwice,
    /// Tasks never end.
    NeverEnds,
    /// Executors run every grant they see, whoever it is for, and run repeated ones again.
    RunsAnything,
}

/// Signs a receipt that accepts a result, as a requester would that does not look at the token.
pub(crate) fn accept_anyway(
    key: &SecretKey,
    network: &NetworkId,
    wall: WallTime,
    work: Received<Work>,
) -> Option<Effect> {
    let receipt = Receipt { work, verdict: Verdict::Accepted, observed_ms: 1 };
    let entry = Entry {
        seq: u64::MAX / 2,
        prev: Hash::ZERO,
        wall_time: wall,
        expires: wall.plus(std::time::Duration::from_secs(3_600)),
        body: Body::Receipt(Box::new(receipt)),
    };
    let entry = Verified::sign(key, network, entry).ok()?;
    Some(Effect::Persist(PersistBatch {
        batch: u64::MAX,
        puts: vec![entry],
        deletes: Vec::new(),
        marks: Vec::new(),
        proofs: Vec::new(),
        pardons: Vec::new(),
        durable: true,
    }))
}

/// Makes a second grant out of one, for another node.
pub(crate) fn grant_again(
    key: &SecretKey,
    network: &NetworkId,
    bytes: &[u8],
    others: &[NodeId],
    rng: &mut Rng,
) -> Option<Effect> {
    let Ok(Direct::Grant { lease, payload }) = Direct::from_bytes(bytes) else { return None };
    let lease = lease.verify(network).ok()?;
    let other = *rng.pick(others)?;
    let second = Lease { executor: other, fence: lease.fence + 1, ..(*lease).clone() };
    let second = Verified::sign(key, network, second).ok()?;
    let bytes = Direct::Grant { lease: second.to_wire(), payload }.to_bytes().ok()?;
    Some(Effect::Send { to: other, bytes })
}
