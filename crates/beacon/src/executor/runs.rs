//! Leases in, results out.

use std::time::Duration;

use chorus_machine::{Ctx, Outbox, Time};
use chorus_protocol::beacon::{Lease, Work};
use chorus_protocol::bounded::Text;
use chorus_protocol::job::{Failure, JobKind, Output, Payload};
use chorus_protocol::message::Direct;
use chorus_protocol::{Hash, JobId, NodeId, Received, Verified};

use super::{Executor, ExecutorEffect, ExecutorEvent};
use crate::lease::{Fault, RunId};

/// The longest that a run may take, whatever its lease says.
pub(super) const MAX_JOB_LIFE: Duration = Duration::from_secs(24 * 3_600);
/// Bytes of text in one `Progress`.
const PROGRESS_BYTES: usize = 16_384;
/// Share of the newest run in the moving average of run times.
const USUAL_SHARE: f64 = 0.2;

/// A job under way.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) id: RunId,
    pub(super) kind: JobKind,
    requirement: Hash,
    salt: [u8; 16],
    stream: bool,
    pub(super) started: Time,
    pub(super) deadline: Time,
    /// When the last sign of life went out.
    pub(super) sent: Time,
    index: u32,
    tokens: u32,
}

impl Executor {
    pub(super) fn on_grant(
        &mut self,
        cx: &mut Ctx<'_>,
        from: NodeId,
        lease: Received<Lease>,
        payload: Box<Payload>,
        out: &mut Outbox<ExecutorEffect>,
    ) {
        let Some(lease) = self.check_lease(from, lease, out) else { return };
        let run = RunId { job: lease.job, fence: lease.fence, requester: from };
        if self.repeat(run, out) {
            return;
        }
        let deadline = self.local_deadline(cx, from, &lease);
        if let Err(failure) = self.admit(cx.now, run, &lease, deadline, out) {
            out.push(ExecutorEffect::Event(ExecutorEvent::Refused { run, failure: failure.clone() }));
            let message = Direct::Refuse { job: run.job, fence: run.fence, failure };
            out.push(ExecutorEffect::Send { to: from, message });
            // A refusal may have given up a reservation.
            self.serve_waiting(cx, out);
            return;
        }
        let state = Run {
            id: run,
            kind: lease.kind,
            requirement: lease.requirement,
            salt: payload.salt,
            stream: payload.stream,
            started: cx.now,
            deadline,
            sent: cx.now,
            index: 0,
            tokens: 0,
        };
        self.runs.insert((from, run.job), state);
        out.push(ExecutorEffect::Event(ExecutorEvent::Started { run }));
        out.push(ExecutorEffect::Send { to: from, message: Direct::Accept { job: run.job, fence: run.fence } });
        out.push(ExecutorEffect::Run { run, kind: lease.kind, payload, deadline });
    }

    fn check_lease(
        &self,
        from: NodeId,
        lease: Received<Lease>,
        out: &mut Outbox<ExecutorEffect>,
    ) -> Option<Verified<Lease>> {
        let fault = match lease.verify(&self.network) {
            Err(_) => Fault::BadSignature("lease"),
            Ok(lease) if lease.author() != from || lease.executor != self.me => Fault::WrongParty("lease"),
            Ok(lease) => return Some(lease),
        };
        out.push(ExecutorEffect::Penalise { peer: from, reason: fault });
        None
    }

    /// Answers a grant that came before with where its run stands.
    fn repeat(&self, run: RunId, out: &mut Outbox<ExecutorEffect>) -> bool {
        let running = self.runs.get(&(run.requester, run.job)).is_some_and(|state| state.id == run);
        let message = if running {
            Some(Direct::Accept { job: run.job, fence: run.fence })
        } else {
            self.memory.outcome(run.requester, run.job, run.fence).cloned()
        };
        let known = message.is_some();
        out_send(out, run.requester, message);
        known
    }

    /// The lease's deadline on this node's clock: relative to the beacon's arrival when it is remembered, so that a difference
    /// between the wall clocks does not matter; else by the wall clock.
    fn local_deadline(&self, cx: &Ctx<'_>, from: NodeId, lease: &Lease) -> Time {
        let deadline = match self.memory.heard(lease.beacon, from) {
            Some(heard) => heard.arrived + lease.deadline.since(heard.made),
            None => cx.now + lease.deadline.since(cx.wall),
        };
        deadline.min(cx.now + MAX_JOB_LIFE)
    }

    /// Takes a slot for the lease, or says why not. The reservation is used up either way.
    fn admit(
        &mut self,
        now: Time,
        run: RunId,
        lease: &Lease,
        deadline: Time,
        out: &mut Outbox<ExecutorEffect>,
    ) -> Result<(), Failure> {
        let reserved = self.reservations.remove(&(run.requester, lease.beacon)).is_some();
        if reserved {
            self.memory.answered(run.requester);
        }
        if self.draining {
            return Err(Failure::Leaving);
        }
        if run.fence == super::WITHDRAWN || self.memory.is_stale(run.requester, run.job, run.fence) {
            return Err(Failure::StaleLease);
        }
        if deadline <= now {
            return Err(Failure::Deadline);
        }
        // A newer lease on the same job takes the older one's slot.
        let older = self.runs.get(&(run.requester, run.job)).map(|older| older.id);
        if !reserved && older.is_none() && self.free_of(lease.kind.pool()) == 0 {
            return Err(Failure::Busy);
        }
        if !self.memory.see(run.requester, run.job, run.fence, now, deadline) {
            return Err(Failure::Busy);
        }
        if let Some(older) = older {
            self.stop(older, "a newer lease on the same job", out);
        }
        Ok(())
    }

    pub(super) fn on_cancel(
        &mut self,
        cx: &mut Ctx<'_>,
        from: NodeId,
        job: JobId,
        fence: u64,
        out: &mut Outbox<ExecutorEffect>,
    ) {
        self.memory.cancel(from, job, fence, cx.now);
        let cancelled = self.runs.get(&(from, job)).map(|run| run.id).filter(|run| run.fence <= fence);
        if let Some(run) = cancelled {
            self.stop(run, "its requester took it back", out);
            self.serve_waiting(cx, out);
        }
    }

    /// Ends a run without a report; its slot is free at once.
    pub(super) fn stop(&mut self, run: RunId, reason: &'static str, out: &mut Outbox<ExecutorEffect>) {
        if self.runs.remove(&(run.requester, run.job)).is_some() {
            out.push(ExecutorEffect::Stop { run });
            out.push(ExecutorEffect::Event(ExecutorEvent::Stopped { run, reason }));
        }
    }

    pub(super) fn on_progress(
        &mut self,
        cx: &mut Ctx<'_>,
        run: RunId,
        tokens: u32,
        text: &str,
        out: &mut Outbox<ExecutorEffect>,
    ) {
        let Some(state) = self.runs.get_mut(&(run.requester, run.job)).filter(|state| state.id == run) else { return };
        state.tokens = tokens;
        let mut rest = if state.stream { text } else { "" };
        while !rest.is_empty() {
            let (piece, tail) = rest.split_at(rest.floor_char_boundary(PROGRESS_BYTES));
            state.send_progress(cx.now, piece, out);
            rest = tail;
        }
    }

    pub(super) fn send_signs_of_life(&mut self, now: Time, out: &mut Outbox<ExecutorEffect>) {
        let heartbeat = self.config.heartbeat;
        for run in self.runs.values_mut().filter(|run| run.sent + heartbeat <= now) {
            run.send_progress(now, "", out);
        }
    }

    /// Ends a run with a report.
    pub(super) fn finish(
        &mut self,
        cx: &mut Ctx<'_>,
        run: RunId,
        result: Result<Output, Failure>,
        out: &mut Outbox<ExecutorEffect>,
    ) {
        let key = (run.requester, run.job);
        if self.runs.get(&key).is_none_or(|state| state.id != run) {
            return;
        }
        let Some(state) = self.runs.remove(&key) else { return };
        let elapsed = cx.now.since(state.started);
        if let Ok(output) = &result {
            let seconds = elapsed.as_secs_f64();
            let usual = self.usual.entry(state.kind.pool()).or_insert(seconds);
            *usual += USUAL_SHARE * (seconds - *usual);
            let tokens = output.completion_tokens;
            out.push(ExecutorEffect::Event(ExecutorEvent::Finished { run, tokens, elapsed }));
        } else if let Err(failure) = &result {
            out.push(ExecutorEffect::Event(ExecutorEvent::Failed { run, failure: failure.clone() }));
        }
        let work = state.work(&result, elapsed);
        let work = Verified::sign(&self.key, &self.network, work).expect("a work record stays below its limit");
        let message =
            Direct::Outcome { job: run.job, fence: run.fence, result: result.map(Box::new), work: work.to_wire() };
        self.memory.keep(run.requester, run.job, run.fence, cx.now, message.clone());
        out.push(ExecutorEffect::Send { to: run.requester, message });
    }
}

impl Run {
    fn send_progress(&mut self, now: Time, text: &str, out: &mut Outbox<ExecutorEffect>) {
        let RunId { job, fence, requester } = self.id;
        let text = Text::truncated(text);
        let message = Direct::Progress { job, fence, index: self.index, tokens: self.tokens, text };
        self.index = self.index.saturating_add(1);
        self.sent = now;
        out.push(ExecutorEffect::Send { to: requester, message });
    }

    /// The executor's half of the receipt.
    fn work(&self, result: &Result<Output, Failure>, elapsed: Duration) -> Work {
        let output = result.as_ref().ok();
        Work {
            job: self.id.job,
            requester: self.id.requester,
            fence: self.id.fence,
            kind: self.kind,
            requirement: self.requirement,
            output: output.map_or(Hash::ZERO, |output| output.digest(&self.salt)),
            model: output.map_or(Hash::ZERO, |output| output.model),
            prompt_tokens: output.map_or(0, |output| output.prompt_tokens),
            completion_tokens: output.map_or(0, |output| output.completion_tokens),
            elapsed_ms: u32::try_from(elapsed.as_millis()).unwrap_or(u32::MAX),
            failure: result.as_ref().err().cloned(),
        }
    }
}

fn out_send(out: &mut Outbox<ExecutorEffect>, to: NodeId, message: Option<Direct>) {
    if let Some(message) = message {
        out.push(ExecutorEffect::Send { to, message });
    }
}
