//! A sampler's side of its lease: a job of the kind `Sample`, from the grant to the signed account of what was sampled.

use std::time::{Duration, Instant};

use chorus_core::{EngineInput, Input, RunId};
use chorus_protocol::Text;
use chorus_protocol::job::{Failure, Finish, Output};
use chorus_protocol::policy::{PolicyId, Version};
use tokio::sync::mpsc;

/// How long before its deadline a lease is accounted for, so that the account arrives in time: a tenth of it, and at most this.
const EARLY: Duration = Duration::from_secs(2);

/// What a node was asked to do.
#[derive(Clone, Debug)]
pub(crate) struct Grant {
    pub(crate) run: RunId,
    pub(crate) policy: Option<PolicyId>,
    /// When its term ends.
    pub(crate) until: Instant,
}

/// The lease that a sampler holds.
#[derive(Debug)]
struct Held {
    run: RunId,
    until: Instant,
    account_at: Instant,
    /// Tokens that had been sampled when it began.
    from: u64,
}

/// See the module.
pub(super) struct Lease {
    inputs: mpsc::Sender<Input>,
    held: Option<Held>,
}

impl Lease {
    pub(super) fn new(inputs: mpsc::Sender<Input>) -> Self {
        Self { inputs, held: None }
    }

    /// Takes a lease, or says why not. `tokens` were sampled up to now.
    pub(super) fn take(&mut self, grant: Grant, policy: &PolicyId, tokens: u64) {
        let Grant { run, until, .. } = grant;
        let why = match &grant.policy {
            Some(asked) if asked != policy => Some(format!("this node samples for {policy} alone")),
            None => Some("it names no policy".to_owned()),
            Some(_) if run.requester != policy.owner => {
                Some("only a policy's trainer hires samplers for it".to_owned())
            }
            Some(_) => None,
        };
        if let Some(why) = why {
            return refuse(&self.inputs, run, &why);
        }
        let now = Instant::now();
        let early = (until.saturating_duration_since(now) / 10).min(EARLY);
        // A newer lease takes an older one's place; the node's executor has one slot for both.
        self.held = Some(Held { run, until, account_at: until - early, from: tokens });
        tracing::info!(run = %run.job, "hired");
    }

    /// The lease is taken back.
    pub(super) fn stop(&mut self, run: RunId) {
        if self.held.as_ref().is_some_and(|held| held.run == run) {
            self.held = None;
        }
    }

    /// When there is something to do.
    pub(super) fn wakes_at(&self) -> Option<Instant> {
        self.held.as_ref().map(|held| held.account_at)
    }

    /// Accounts for a term that is over.
    pub(super) fn tick(&mut self, tokens: u64, serving: Option<Version>) {
        let Some(held) = self.held.as_ref().filter(|held| held.account_at <= Instant::now()) else { return };
        let output = Output {
            text: Text::default(),
            prompt_tokens: 0,
            completion_tokens: u32::try_from(tokens.saturating_sub(held.from)).unwrap_or(u32::MAX),
            finish: Finish::Stop,
            model: serving.map(|version| *version.as_hash()).unwrap_or_default(),
        };
        let done = EngineInput::Done { run: held.run, result: Ok(output) };
        // A driver with a full queue is told a moment later.
        if !matches!(self.inputs.try_send(Input::Engine(done)), Err(mpsc::error::TrySendError::Full(_))) {
            self.held = None;
        }
    }

    /// How long it still lasts, if there is one.
    pub(super) fn left(&self) -> Option<Duration> {
        self.held.as_ref().map(|held| held.until.saturating_duration_since(Instant::now()))
    }
}

/// Ends a run that this node will not do.
pub(super) fn refuse(inputs: &mpsc::Sender<Input>, run: RunId, why: &str) {
    let failure = Failure::InvalidPayload(Text::truncated(why));
    tracing::warn!(run = %run.job, why, "a lease to sample was not taken");
    // Should the queue be full, the lease ends at its deadline.
    let _ = inputs.try_send(Input::Engine(EngineInput::Done { run, result: Err(failure) }));
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use chorus_protocol::{JobId, SecretKey};

    use super::*;

    fn node(n: u8) -> chorus_protocol::NodeId {
        SecretKey::from_bytes(&[n; 32]).node_id()
    }

    fn policy() -> PolicyId {
        PolicyId { owner: node(1), name: Text::truncated("p") }
    }

    fn grant(requester: u8, policy: Option<PolicyId>, lasts: Duration) -> Grant {
        let run = RunId { job: JobId::from_bytes([7; 16]), fence: 1, requester: node(requester) };
        Grant { run, policy, until: Instant::now() + lasts }
    }

    fn result(inputs: &mut mpsc::Receiver<Input>) -> Option<Result<Output, Failure>> {
        match inputs.try_recv().ok()? {
            Input::Engine(EngineInput::Done { result, .. }) => Some(result),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_term_is_accounted_for_before_it_ends() {
        let (tx, mut inputs) = mpsc::channel(4);
        let mut lease = Lease::new(tx);
        lease.take(grant(1, Some(policy()), Duration::ZERO), &policy(), 100);
        assert_eq!(lease.left(), Some(Duration::ZERO));
        lease.tick(150, None);
        assert_eq!(result(&mut inputs).unwrap().unwrap().completion_tokens, 50);
        assert!(lease.left().is_none() && lease.wakes_at().is_none());
        lease.take(grant(1, Some(policy()), Duration::from_secs(60)), &policy(), 150);
        lease.tick(200, None);
        assert!(result(&mut inputs).is_none(), "it still runs");
        let early = lease.held.as_ref().map(|held| held.until - held.account_at);
        assert_eq!(early, Some(EARLY));
    }

    #[test]
    fn nobody_but_a_policys_trainer_hires_for_it() {
        let (tx, mut inputs) = mpsc::channel(4);
        let mut lease = Lease::new(tx);
        let other = PolicyId { owner: node(1), name: Text::truncated("q") };
        for (requester, asked) in [(2, Some(policy())), (1, Some(other)), (1, None)] {
            lease.take(grant(requester, asked, Duration::from_secs(9)), &policy(), 0);
            assert!(matches!(result(&mut inputs), Some(Err(Failure::InvalidPayload(_)))));
            assert!(lease.left().is_none());
        }
    }

    #[test]
    fn a_full_queue_is_tried_again() {
        let (tx, mut inputs) = mpsc::channel(1);
        refuse(&tx, grant(1, None, Duration::ZERO).run, "first");
        let mut lease = Lease::new(tx);
        lease.take(grant(1, Some(policy()), Duration::ZERO), &policy(), 0);
        lease.tick(9, None);
        assert!(lease.left().is_some());
        assert!(result(&mut inputs).unwrap().is_err());
        lease.tick(9, None);
        assert_eq!(result(&mut inputs).unwrap().unwrap().completion_tokens, 9);
    }
}
