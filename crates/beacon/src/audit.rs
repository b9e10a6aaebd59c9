//! The invariants of leases, checked from the outside: what a requester was told and what it wants done, never its own state.
//!
//! A simulator keeps one [`LeaseAudit`] per requester, shows it every input before and every effect after it is handled, and stops
//! at the first [`Violation`]. What is checked:
//!
//! 1. No job id is under two valid leases: a job has at most one lease and one hedge at a time, on two nodes.
//! 2. Fencing tokens grow strictly, over all leases of a job.
//! 3. A result is accepted only if the holder of a valid lease sent it, under exactly that lease's token.
//! 4. A job ends exactly once, not after its deadline (the moment of the deadline included).

use std::collections::BTreeMap;

use chorus_machine::Time;
use chorus_protocol::message::Direct;
use chorus_protocol::{JobId, NodeId};

use crate::job::{JobEvent, JobEventKind};
use crate::lease::hedge_id;
use crate::requester::{RequesterEffect, RequesterInput};

/// Something that must never happen.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("job {job}: {what}")]
pub struct Violation {
    /// On which job.
    pub job: JobId,
    /// What happened.
    pub what: String,
}

#[derive(Clone, Copy, Debug)]
struct Open {
    node: NodeId,
    fence: u64,
    /// Whether this node has sent a good result under this token.
    reported: bool,
}

#[derive(Debug)]
struct Watched {
    deadline: Time,
    highest: u64,
    /// The lease and the hedge.
    open: [Option<Open>; 2],
    finished: Option<NodeId>,
}

/// The watcher of one requester.
#[derive(Debug, Default)]
pub struct LeaseAudit {
    jobs: BTreeMap<JobId, Watched>,
    /// Jobs that ended, so that none ends twice or comes back.
    ended: BTreeMap<JobId, bool>,
}

impl LeaseAudit {
    /// Takes note of an input, before the requester handles it.
    pub fn input(&mut self, input: &RequesterInput) {
        match input {
            RequesterInput::Submit(spec) if !self.ended.contains_key(&spec.job) => {
                let watched = Watched { deadline: spec.deadline, highest: 0, open: [None; 2], finished: None };
                self.jobs.entry(spec.job).or_insert(watched);
            }
            RequesterInput::Direct { from, message: Direct::Outcome { job, fence, result: Ok(_), .. } } => {
                for (id, watched) in &mut self.jobs {
                    let ids = [*id, hedge_id(*id)];
                    for (lease, open) in ids.iter().zip(&mut watched.open) {
                        let holds = |open: &&mut Open| lease == job && open.node == *from && open.fence == *fence;
                        if let Some(open) = open.as_mut().filter(holds) {
                            open.reported = true;
                        }
                    }
                }
            }
            _ => {}
        }
    }

    /// Checks an effect of the requester at `now`.
    ///
    /// # Errors
    /// [`Violation`] when it breaks an invariant.
    pub fn effect(&mut self, effect: &RequesterEffect, now: Time) -> Result<(), Violation> {
        match effect {
            RequesterEffect::Event(event) => self.event(event),
            RequesterEffect::Done { job, result } => {
                self.done(*job, result.as_ref().ok().map(|done| done.executor), now)
            }
            _ => Ok(()),
        }
    }

    /// Returns the jobs that have not ended.
    #[must_use]
    pub fn open_jobs(&self) -> usize {
        self.jobs.len()
    }

    fn event(&mut self, event: &JobEvent) -> Result<(), Violation> {
        let violation = |what: String| Err(Violation { job: event.job, what });
        let Some(watched) = self.jobs.get_mut(&event.job) else {
            return violation(format!("an event after its end: {:?}", event.kind));
        };
        match &event.kind {
            JobEventKind::Elected { node, fence, hedge, .. } => {
                if *fence <= watched.highest {
                    return violation(format!("token {fence} follows token {}", watched.highest));
                }
                watched.highest = *fence;
                if watched.open.iter().flatten().any(|open| open.node == *node) {
                    return violation(format!("{node:?} holds two leases"));
                }
                let slot = &mut watched.open[usize::from(*hedge)];
                if let Some(open) = slot {
                    return violation(format!("leased to {node:?} while {:?} holds it", open.node));
                }
                *slot = Some(Open { node: *node, fence: *fence, reported: false });
            }
            JobEventKind::Lost { node, .. } => {
                let held = watched.open.iter_mut().find(|open| open.is_some_and(|open| open.node == *node));
                match held {
                    Some(slot) => *slot = None,
                    None => return violation(format!("{node:?} lost a lease that it did not hold")),
                }
            }
            JobEventKind::Finished { node, .. } => {
                let good = watched.open.iter().flatten().any(|open| open.node == *node && open.reported);
                if !good || watched.finished.is_some() {
                    return violation(format!("a result of {node:?} was accepted without a valid lease"));
                }
                watched.finished = Some(*node);
            }
            JobEventKind::Started { node } | JobEventKind::Progress { node, .. } => {
                if !watched.open.iter().flatten().any(|open| open.node == *node) {
                    return violation(format!("{node:?} works without a lease"));
                }
            }
            JobEventKind::Announced { .. } | JobEventKind::Bid { .. } => {}
        }
        Ok(())
    }

    fn done(&mut self, job: JobId, executor: Option<NodeId>, now: Time) -> Result<(), Violation> {
        let violation = |what: String| Err(Violation { job, what });
        let Some(watched) = self.jobs.remove(&job) else {
            return violation("it ended, but was not under way".to_owned());
        };
        self.ended.insert(job, executor.is_some());
        if now > watched.deadline {
            return violation(format!("it ended at {now}, after its deadline at {}", watched.deadline));
        }
        if executor != watched.finished {
            return violation(format!("{executor:?} is named as executor, {:?} finished", watched.finished));
        }
        Ok(())
    }
}
