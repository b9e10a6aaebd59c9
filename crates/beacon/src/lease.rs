//! Leases: who may do a job, under which fencing token, and what makes a lease valid.
//!
//! **Validity.** Every lease names a job id. Of the leases on one job id at most one is valid: the one that its requester
//! granted last and has not taken back. A requester holds its valid leases in one map keyed by that id, so two valid leases on
//! one id cannot be written down. The token grows with every lease, and a result counts only under the token of the valid one.
//!
//! **Hedges.** A hedge is a second lease on purpose, so it gets an id of its own: [`hedge_id`] of the job. On the wire it is a
//! lease like any other, and the rule above holds for it word for word. The requester alone knows that the two ids are one job;
//! it takes the first valid result of either and takes the other back.
//!
//! **Tokens.** `FenceClock` draws them: at least the wall clock's milliseconds × 2²⁰, and always above the last one drawn. One
//! requester's tokens grow strictly while it runs. A restarted requester cannot meet its former tokens: jobs are not carried over
//! a restart and job ids are random, so no executor compares old with new; and should an id come back all the same, the
//! token lies above the old one as long as the clock was not set back. If it was, executors refuse the lower token as stale:
//! what is lost is an attempt, not the exclusion.

use chorus_machine::Time;
use chorus_protocol::job::JobKind;
use chorus_protocol::{Hash, JobId, NodeId, WallTime};

/// Tokens that one millisecond has room for, as a power of two.
const FENCES_PER_MS_LOG2: u32 = 20;

/// Returns the job id under which a job's hedging lease is granted.
#[must_use]
pub fn hedge_id(job: JobId) -> JobId {
    let hash = Hash::derive("chorus hedge lease v1", &[job.as_bytes()]);
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hash.as_bytes()[..16]);
    JobId::from_bytes(bytes)
}

/// Draws fencing tokens, each above the one before.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct FenceClock {
    last: u64,
}

impl FenceClock {
    pub(crate) fn draw(&mut self, wall: WallTime) -> u64 {
        let from_wall = wall.as_millis().min(u64::MAX >> FENCES_PER_MS_LOG2) << FENCES_PER_MS_LOG2;
        self.last = from_wall.max(self.last.saturating_add(1));
        self.last
    }
}

/// A run at an executor: one lease of one requester.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RunId {
    /// The id on the lease: the job's, or its [`hedge_id`].
    pub job: JobId,
    /// The lease's token.
    pub fence: u64,
    /// Who granted it.
    pub requester: NodeId,
}

/// A valid lease as its requester sees it, for `status`, tests and the simulator's invariants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseView {
    /// The job it serves.
    pub job: JobId,
    /// The id on the lease: `job`, or [`hedge_id`] of it.
    pub lease: JobId,
    /// Whether it is a hedge.
    pub hedge: bool,
    /// Who holds it.
    pub executor: NodeId,
    /// Its token.
    pub fence: u64,
    /// What kind of work it is.
    pub kind: JobKind,
    /// When it was granted.
    pub granted: Time,
    /// Whether the executor has given a sign of life.
    pub confirmed: bool,
}

/// What a remote did that an honest node does not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// A signed record whose signature does not hold.
    #[error("sent a {0} whose signature does not hold")]
    BadSignature(&'static str),
    /// A record of somebody else's, or meant for somebody else.
    #[error("sent a {0} that is not its own, or not meant for this node")]
    WrongParty(&'static str),
    /// A result that does not fit the receipt that came with it.
    #[error("sent a result that contradicts its own receipt")]
    InvalidResult,
    /// A message that only the other role sends.
    #[error("sent a {0} to a node that never takes one")]
    OutOfRole(&'static str),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_grow_through_a_stopped_clock_a_clock_set_back_and_a_restart() {
        let mut clock = FenceClock::default();
        let mut last = 0;
        for wall in [5_000, 5_000, 4_000, 5_001, 0, u64::MAX] {
            let fence = clock.draw(WallTime::from_millis(wall));
            assert!(fence > last, "at wall {wall}");
            last = fence;
        }
        let mut before = FenceClock::default();
        let old = (0..1000).map(|_| before.draw(WallTime::from_millis(7_000))).max().unwrap();
        let mut restarted = FenceClock::default();
        assert!(restarted.draw(WallTime::from_millis(7_001)) > old);
    }

    #[test]
    fn a_hedge_has_an_id_of_its_own() {
        let job = JobId::from_bytes([1; 16]);
        assert_ne!(hedge_id(job), job);
        assert_eq!(hedge_id(job), hedge_id(job));
    }
}
