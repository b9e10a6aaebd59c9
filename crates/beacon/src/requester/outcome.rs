//! Results in: checked against the lease and the digest, countersigned, counted.

use chorus_machine::{Ctx, Outbox};
use chorus_protocol::beacon::{Receipt, Verdict, Work};
use chorus_protocol::entry::Body;
use chorus_protocol::job::{Failure, Output, Payload};
use chorus_protocol::{Hash, JobId, NodeId, Received, Verified};

use super::leases::Lost;
use super::state::Held;
use super::{Requester, RequesterEffect, event};
use crate::job::{JobDone, JobEventKind};
use crate::lease::Fault;
use crate::reputation::{pace, promised};
use crate::select::reward;

impl Requester {
    pub(super) fn on_outcome(
        &mut self,
        cx: &mut Ctx<'_>,
        from: NodeId,
        (lease, fence): (JobId, u64),
        result: Result<Box<Output>, Failure>,
        work: Received<Work>,
        out: &mut Outbox<RequesterEffect>,
    ) {
        let valid = self.leases.get(&lease).is_some_and(|held| held.fence == fence && held.executor() == from);
        if !valid {
            self.on_late_outcome(cx, from, (lease, fence), result.is_ok(), work, out);
            return;
        }
        let Some(work) = self.check_work(from, work, out) else {
            self.lose(cx, lease, Lost::Invalid, out);
            return;
        };
        let Some(held) = self.leases.get(&lease) else { return };
        let Some(job) = self.jobs.get(&held.job) else { return };
        let honest = covers(&work, lease, held) && matches_result(&work, &result, &job.spec.payload);
        match result {
            _ if !honest => {
                out.push(RequesterEffect::Penalise { peer: from, reason: Fault::InvalidResult });
                if covers(&work, lease, held) {
                    self.countersign(cx, held, &work, Verdict::Invalid, out);
                }
                self.lose(cx, lease, Lost::Invalid, out);
            }
            Ok(output) => {
                self.countersign(cx, held, &work, Verdict::Accepted, out);
                self.accept(cx, lease, *output, &work, out);
            }
            Err(failure) => {
                self.countersign(cx, held, &work, Verdict::Failed, out);
                self.lose(cx, lease, Lost::Failed(failure), out);
            }
        }
    }

    /// A result under a lease that no longer holds changes nothing, but its work is acknowledged, once.
    fn on_late_outcome(
        &mut self,
        cx: &mut Ctx<'_>,
        from: NodeId,
        (lease, fence): (JobId, u64),
        good: bool,
        work: Received<Work>,
        out: &mut Outbox<RequesterEffect>,
    ) {
        let Some(held) = self.revoked.take(lease, fence, from).filter(|_| good) else { return };
        let Some(work) = self.check_work(from, work, out) else { return };
        if covers(&work, lease, &held) && work.failure.is_none() {
            self.countersign(cx, &held, &work, Verdict::Superseded, out);
        }
    }

    fn check_work(
        &self,
        from: NodeId,
        work: Received<Work>,
        out: &mut Outbox<RequesterEffect>,
    ) -> Option<Verified<Work>> {
        let fault = match work.verify(&self.network) {
            Err(_) => Fault::BadSignature("work record"),
            Ok(work) if work.author() != from || work.requester != self.me => Fault::WrongParty("work record"),
            Ok(work) => return Some(work),
        };
        out.push(RequesterEffect::Penalise { peer: from, reason: fault });
        None
    }

    fn countersign(
        &self,
        cx: &Ctx<'_>,
        held: &Held,
        work: &Verified<Work>,
        verdict: Verdict,
        out: &mut Outbox<RequesterEffect>,
    ) {
        let observed_ms = u32::try_from(cx.now.since(held.granted).as_millis()).unwrap_or(u32::MAX);
        let receipt = Receipt { work: work.to_wire(), verdict, observed_ms };
        out.push(RequesterEffect::Append(Body::Receipt(Box::new(receipt))));
    }

    /// Takes the result, learns from it, and ends the job.
    fn accept(
        &mut self,
        cx: &mut Ctx<'_>,
        lease: JobId,
        output: Output,
        work: &Work,
        out: &mut Outbox<RequesterEffect>,
    ) {
        let Some(held) = self.leases.remove(&lease) else { return };
        let node = held.executor();
        let observed = cx.now.since(held.granted);
        let promised = self.capabilities.get(&node).and_then(|capability| promised(capability, work));
        self.reputation.succeeded(node, cx.now, promised.and_then(|promised| pace(observed, promised)));
        let slow = observed.as_secs_f64() / self.config.latency_scale.as_secs_f64();
        self.selector.learn(&held.candidate, reward(true, slow, 0.0));
        let reputation = self.standing(node, cx.now).mean();
        let Some(job) = self.jobs.get(&held.job) else { return };
        let elapsed = cx.now.since(job.submitted);
        event(job, JobEventKind::Finished { node, tokens: output.completion_tokens, elapsed }, out);
        let done = JobDone {
            output,
            executor: node,
            score: held.candidate.score,
            reputation,
            leases: job.leases,
            election: job.election_took.unwrap_or_default(),
            elapsed,
        };
        self.finish(cx, held.job, Ok(Box::new(done)), out);
    }
}

/// Whether the executor's record is about this lease.
fn covers(work: &Work, lease: JobId, held: &Held) -> bool {
    work.job == lease && work.fence == held.fence && work.kind == held.kind && work.requirement == held.requirement
}

/// Whether the executor's record says of the result what the result is.
fn matches_result(work: &Work, result: &Result<Box<Output>, Failure>, payload: &Payload) -> bool {
    match result {
        Ok(output) => {
            work.failure.is_none()
                && work.output == output.digest(&payload.salt)
                && work.model == output.model
                && work.prompt_tokens == output.prompt_tokens
                && work.completion_tokens == output.completion_tokens
                // Some engines count the token that ends the answer, some do not.
                && (payload.max_tokens == 0 || output.completion_tokens <= payload.max_tokens.saturating_add(1))
        }
        Err(failure) => work.output == Hash::ZERO && work.failure.as_ref() == Some(failure),
    }
}
