//! The trainer's leases on samplers: what `chorus_rollout::hiring` wants done is handed to the node's job counter here.
//!
//! ```text
//!  ledger ─News::Offer─▶ Hires ──Command::Submit──▶ node: beacon, bid, lease
//!                          │  ◀─News::Job, JobDone──────┘
//!                          └─Hired, Dismissed─▶ Buffer
//! ```

use std::collections::BTreeSet;

use chorus_core::{Command, JobError, JobEvent, JobEventKind, JobSpec};
use chorus_machine::{Machine, Outbox, Time};
use chorus_protocol::capability::SamplingOffer;
use chorus_protocol::job::{JobKind, Payload, Requirement, Risk};
use chorus_protocol::{JobId, NodeId, TaskId};
use chorus_rollout::buffer::BufferInput;
use chorus_rollout::hiring::{Hiring, HiringConfig, HiringEffect, HiringInput};
use serde_json::{Value, json};

use super::commons::Commons;
use crate::config::TrainerSection;
use crate::driver::NodeHandle;

/// See the module.
pub(super) struct Hires {
    hiring: Hiring,
    node: NodeHandle,
    /// The task that all of a run's jobs stand for in logs.
    task: TaskId,
    /// Why the last job brought nothing, if it did not.
    trouble: Option<String>,
}

impl Hires {
    pub(super) fn new(section: &TrainerSection, node: NodeHandle, room: &mut Commons) -> Self {
        let cfg = HiringConfig {
            term: std::time::Duration::from_secs(section.term_s.max(MIN_TERM_S)),
            most: section.samplers,
            ..HiringConfig::default()
        };
        let task = TaskId::from_bytes(room.with(|cx| cx.rng.bytes()));
        Self { hiring: Hiring::new(cfg, room.policy.clone()), node, task, trouble: None }
    }

    /// Returns every sampling offer that the ledger holds.
    pub(super) async fn offers(node: &NodeHandle) -> Vec<(NodeId, SamplingOffer)> {
        let offers = node.read(|node, _| {
            let offers = node.ledger().capabilities();
            offers.filter_map(|(id, capability)| Some((id, capability.sampling.clone()?))).collect()
        });
        // A node that is shutting down hires nobody.
        offers.await.unwrap_or_default()
    }

    pub(super) fn deadline(&self) -> Option<Time> {
        self.hiring.deadline()
    }

    /// Does what is due. Returns what the buffer has to hear.
    #[must_use]
    pub(super) fn expire(&mut self, room: &mut Commons) -> Vec<BufferInput> {
        let mut out = Outbox::new();
        room.with(|cx| self.hiring.expire(cx, &mut out));
        self.carry_out(room, out)
    }

    /// Tells hiring something. Returns what the buffer has to hear.
    #[must_use]
    pub(super) fn tell(&mut self, room: &mut Commons, input: HiringInput) -> Vec<BufferInput> {
        let mut out = Outbox::new();
        room.with(|cx| self.hiring.handle(cx, input, &mut out));
        self.carry_out(room, out)
    }

    /// Something happened to a job.
    #[must_use]
    pub(super) fn job(&mut self, room: &mut Commons, event: &JobEvent) -> Vec<BufferInput> {
        match event.kind {
            JobEventKind::Started { .. } => self.tell(room, HiringInput::Started(event.job)),
            _ => Vec::new(),
        }
    }

    /// A job has ended.
    #[must_use]
    pub(super) fn ended(&mut self, room: &mut Commons, job: JobId, error: Option<JobError>) -> Vec<BufferInput> {
        let served = error.is_none();
        match error {
            None => self.trouble = None,
            // What this side took back is nobody's trouble.
            Some(JobError::Cancelled) => {}
            Some(error) => {
                tracing::debug!(%job, %error, "no lease");
                self.trouble = Some(error.to_string());
            }
        }
        self.tell(room, HiringInput::Ended { job, served })
    }

    fn carry_out(&mut self, room: &mut Commons, mut out: Outbox<HiringEffect>) -> Vec<BufferInput> {
        let mut told = Vec::new();
        for effect in out.drain().collect::<Vec<_>>() {
            match effect {
                HiringEffect::Submit { job, node, deadline } => self.submit(room, job, node, deadline),
                HiringEffect::Withdraw(job) => {
                    self.node.try_command(Command::Withdraw(job));
                }
                HiringEffect::Hired(node) => {
                    tracing::info!(sampler = %node.fmt_short(), "hired");
                    told.push(BufferInput::Hired(node));
                }
                HiringEffect::Dismissed(node) => told.push(BufferInput::Dismissed(node)),
            }
        }
        told
    }

    /// Hands a job in. One that finds the node's queue full is given up by hiring when its answer is due.
    fn submit(&self, room: &Commons, job: JobId, node: NodeId, deadline: Time) {
        let spec = JobSpec {
            job,
            task: self.task,
            kind: JobKind::Sample,
            requirement: Requirement { policy: Some(room.policy.clone()), ..Requirement::default() },
            payload: Payload::sampling(room.policy.clone()),
            deadline,
            risk: Risk::Low,
            // A lease that is lost is hiring's to think about: somebody else may be wanted now. And nobody is a sampler's rival.
            max_leases: 1,
            avoid: Vec::new(),
            only: BTreeSet::from([node]),
        };
        if !self.node.try_command(Command::Submit(Box::new(spec))) {
            tracing::warn!(%job, "the node has too much to do to hand in a job");
        }
    }

    /// Returns where it stands.
    pub(super) fn status(&self, room: &Commons) -> Value {
        let views = self.hiring.view().map(|view| {
            json!({
                "node": view.node,
                "price_per_hour": view.price,
                "wanted": view.wanted,
                "hired_for_s": view.until.map(|until| room.until(until).as_secs()),
            })
        });
        let hired: Vec<f64> = self.hiring.view().filter(|view| view.until.is_some()).map(|view| view.price).collect();
        json!({
            "offers": views.collect::<Vec<_>>(),
            "hired": hired.len(),
            "price_per_hour": hired.iter().sum::<f64>(),
            "trouble": self.trouble,
        })
    }
}

/// The shortest lease that is worth an election.
const MIN_TERM_S: u64 = 2;
