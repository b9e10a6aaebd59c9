//! The side that wants work done: announces, elects, leases, watches, countersigns.
//!
//! ```text
//!              ┌────────── nobody bid: back off, new beacon ─────────┐
//!              ▼                                                     │
//!  Submit ─▶ election ──K bids, all who can, or window──▶ lease ──lost, bench empty
//!              ▲                                            │ ▲      │
//!              └── overdue: elect a rival (hedge) ──────────┤ └──────┘ lost: next of the bench
//!                                                           ▼
//!                                            result ─▶ receipt ─▶ Done
//! ```
//!
//! One function decides what a job needs next (`advance`): a lease when it has none, a rival when its only lease is
//! overdue and the deadline in danger, else nothing. It takes the next bidder of the bench, or announces the job again. Everything
//! else is bookkeeping for it. Each job has one timer, and all timers stand in one ordered set.
//!
//! * A node whose lease failed is passed over while anybody else can do the job, and gets one more chance if nobody else can.
//! * One node's word does not end a job: a payload is unusable when two executors say so, or the only one.
//! * Valid leases live in one map keyed by the id on the lease, so two on one id cannot exist ([`crate::lease`]).

mod election;
mod leases;
mod outcome;
mod pace;
mod state;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use chorus_machine::{Ctx, Machine, Outbox, Time};
use chorus_protocol::beacon::Beacon;
use chorus_protocol::capability::Capability;
use chorus_protocol::codec;
use chorus_protocol::entry::{Body, Entry};
use chorus_protocol::job::{Failure, Pool};
use chorus_protocol::limits::MAX_PAYLOAD_BYTES;
use chorus_protocol::message::Direct;
use chorus_protocol::{BeaconId, Hash, JobId, NetworkId, NodeId, SecretKey, TaskId, Verified, WallTime};

use crate::config::BeaconConfig;
use crate::job::{JobDone, JobError, JobEvent, JobEventKind, JobSpec};
use crate::lease::{Fault, FenceClock, LeaseView, hedge_id};
use crate::reputation::{Reputation, Standing};
use crate::select::{Selector, reward};
use leases::{Lost, Revoked};
use pace::Pace;
use state::{Held, Job};

/// Nodes whose capabilities are kept.
const MAX_NODES: usize = 65_536;

/// What a requester is told.
#[derive(Debug)]
pub enum RequesterInput {
    /// The ledger's latest capability of a node, or that it has none any more.
    Capability {
        /// Whose.
        node: NodeId,
        /// What it can do.
        capability: Option<Arc<Capability>>,
    },
    /// A receipt that the ledger admitted: anybody's, this node's own included.
    Receipt {
        /// The entry that carries it.
        entry: Verified<Entry>,
    },
    /// An accusation that the ledger admitted: anybody's, this node's own included.
    Accusation {
        /// The entry that carries it.
        entry: Verified<Entry>,
    },
    /// A node is proven to have equivocated: nothing is asked of it any more.
    Quarantined {
        /// Who.
        node: NodeId,
    },
    /// A customer hands in a job. A second one with the id of a job under way is ignored: the first one's end is its end.
    Submit(Box<JobSpec>),
    /// A customer takes a job back.
    Cancel(JobId),
    /// An executor sent a `Bid`, `Busy`, `Accept`, `Refuse`, `Progress` or `Outcome`.
    Direct {
        /// Who, as its connection proves.
        from: NodeId,
        /// What.
        message: Direct,
    },
    /// The connection to a node is gone.
    PeerDown(NodeId),
    /// A message to a node could not be sent.
    SendFailed {
        /// To whom.
        to: NodeId,
    },
}

/// What a requester wants done.
#[derive(Debug)]
pub enum RequesterEffect {
    /// Gossip this, and show it to this node's own executor.
    Publish(Verified<Beacon>),
    /// Send this.
    Send {
        /// To whom; may be this node itself.
        to: NodeId,
        /// What.
        message: Direct,
    },
    /// Append this receipt to this node's own chain.
    Append(Body),
    /// Tell whoever watches.
    Event(JobEvent),
    /// The job has ended. Comes exactly once per job, and nothing about the job comes after it.
    Done {
        /// Which.
        job: JobId,
        /// How.
        result: Result<Box<JobDone>, JobError>,
    },
    /// A peer did what no honest node does.
    Penalise {
        /// Who.
        peer: NodeId,
        /// What it did.
        reason: Fault,
    },
}

/// A job under way, for `status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobView {
    /// Which.
    pub job: JobId,
    /// The task it serves.
    pub task: TaskId,
    /// When it was handed in.
    pub submitted: Time,
    /// When it must be done.
    pub deadline: Time,
    /// What it waits for, in words.
    pub waiting_for: String,
}

/// The asking side of the beacon.
#[derive(Debug)]
pub struct Requester {
    config: BeaconConfig,
    network: NetworkId,
    key: SecretKey,
    me: NodeId,
    capabilities: BTreeMap<NodeId, Arc<Capability>>,
    quarantined: BTreeSet<NodeId>,
    reputation: Reputation,
    pace: Pace,
    selector: Box<dyn Selector>,
    jobs: BTreeMap<JobId, Job>,
    /// Beacons of jobs under way, open or decided.
    beacons: BTreeMap<BeaconId, JobId>,
    /// Valid leases by the id that stands on them.
    leases: BTreeMap<JobId, Held>,
    /// Leases taken back, whose late results still get a receipt.
    revoked: Revoked,
    timers: BTreeSet<(Time, JobId)>,
    fences: FenceClock,
    /// The wall clock at the first input: own receipts written before come from before a restart.
    started: Option<WallTime>,
}

impl Requester {
    /// Makes a requester that knows nobody yet.
    #[must_use]
    pub fn new(config: BeaconConfig, network: NetworkId, key: SecretKey) -> Self {
        let me = key.node_id();
        Self {
            reputation: Reputation::new(config.reputation, network.clone(), me),
            pace: Pace::default(),
            selector: config.selection.selector(),
            config,
            network,
            key,
            me,
            capabilities: BTreeMap::new(),
            quarantined: BTreeSet::new(),
            jobs: BTreeMap::new(),
            beacons: BTreeMap::new(),
            leases: BTreeMap::new(),
            revoked: Revoked::default(),
            timers: BTreeSet::new(),
            fences: FenceClock::default(),
            started: None,
        }
    }

    /// Returns the jobs under way and what each waits for.
    pub fn jobs(&self) -> impl Iterator<Item = JobView> + '_ {
        self.jobs.values().map(|job| JobView {
            job: job.spec.job,
            task: job.spec.task,
            submitted: job.submitted,
            deadline: job.spec.deadline,
            waiting_for: self.waiting_for(job),
        })
    }

    /// Returns the valid leases.
    pub fn leases(&self) -> impl Iterator<Item = LeaseView> + '_ {
        self.leases.iter().map(|(lease, held)| LeaseView {
            job: held.job,
            lease: *lease,
            hedge: held.hedge,
            executor: held.executor(),
            fence: held.fence,
            kind: held.kind,
            granted: held.granted,
            confirmed: held.confirmed,
        })
    }

    /// Returns what is known of a node's track record at `now`.
    pub fn standing(&mut self, node: NodeId, now: Time) -> Standing {
        let capability = self.capabilities.get(&node).map(Arc::as_ref);
        self.reputation.standing(node, capability, now)
    }

    fn waiting_for(&self, job: &Job) -> String {
        let holders: Vec<String> = self.held(job).iter().map(|held| held.executor().fmt_short()).collect();
        if !holders.is_empty() {
            format!("{} worked on it", holders.join(" and "))
        } else if let Some(election) = &job.election {
            format!("{} nodes that can do it were asked, {} said that they are busy", election.capable, election.busy)
        } else if job.nobody_since.is_some() {
            "no node could do it".to_owned()
        } else {
            "every node that can do it was busy or had failed".to_owned()
        }
    }

    /// The valid leases of a job, at most two.
    fn held(&self, job: &Job) -> Vec<&Held> {
        job.lease_ids().iter().filter_map(|id| self.leases.get(id)).collect()
    }

    fn submit(&mut self, cx: &mut Ctx<'_>, mut spec: Box<JobSpec>, out: &mut Outbox<RequesterEffect>) {
        let id = spec.job;
        if self.jobs.contains_key(&id) {
            return;
        }
        let refusal = if self.jobs.len() >= self.config.max_jobs {
            Some(JobError::Overloaded { limit: self.config.max_jobs })
        } else if spec.deadline <= cx.now {
            Some(JobError::Deadline { elapsed: Default::default(), waiting_for: "it was handed in".to_owned() })
        } else {
            self.payload_fault(&spec).map(JobError::Refused)
        };
        if let Some(error) = refusal {
            out.push(RequesterEffect::Done { job: id, result: Err(error) });
            return;
        }
        if spec.payload.salt == [0; 16] {
            spec.payload.salt = cx.rng.bytes();
        }
        let job = Job {
            requirement: spec.requirement.digest(),
            bucket: bucket(&spec),
            hedge: hedge_id(id),
            spec,
            submitted: cx.now,
            election: None,
            decided: None,
            beacons: Vec::new(),
            barren: 0,
            bench: Vec::new(),
            bids: 0,
            resume_at: None,
            nobody_since: None,
            strikes: BTreeMap::new(),
            lenient: false,
            unusable: 0,
            leases: 0,
            last_failure: None,
            election_took: None,
            timer: None,
        };
        self.jobs.insert(id, job);
        self.advance(cx, id, out);
    }

    fn payload_fault(&self, spec: &JobSpec) -> Option<Failure> {
        let len = codec::encoded_len(&spec.payload);
        let problem = if len > MAX_PAYLOAD_BYTES {
            format!("it has {len} bytes and {MAX_PAYLOAD_BYTES} fit; shorten the prompt or its context")
        } else if spec.payload.turns.is_empty() && spec.kind.pool() == Pool::Answers {
            "it has no turns; ask something".to_owned()
        } else {
            return None;
        };
        Some(Failure::InvalidPayload(chorus_protocol::Text::truncated(&problem)))
    }

    /// Ends a job: takes back what is out, frees who was kept, says so once.
    fn finish(
        &mut self,
        cx: &mut Ctx<'_>,
        id: JobId,
        result: Result<Box<JobDone>, JobError>,
        out: &mut Outbox<RequesterEffect>,
    ) {
        let Some(mut job) = self.jobs.remove(&id) else { return };
        if let Some(timer) = job.timer {
            self.timers.remove(&(timer, id));
        }
        for lease in job.lease_ids() {
            let Some(held) = self.leases.remove(&lease) else { continue };
            let message = Direct::Cancel { job: lease, fence: held.fence };
            out.push(RequesterEffect::Send { to: held.executor(), message });
            self.judge_unfinished(cx, &held, result.as_deref());
            self.revoked.push(lease, held, cx.now);
        }
        if let Some(election) = job.election.take() {
            for bidder in &election.bids {
                release(bidder.node, election.call.beacon, out);
            }
        }
        for beacon in &job.beacons {
            self.beacons.remove(beacon);
        }
        out.push(RequesterEffect::Done { job: id, result });
    }

    /// What it says about an executor that its job ended without it.
    fn judge_unfinished(&mut self, cx: &Ctx<'_>, held: &Held, result: Result<&JobDone, &JobError>) {
        let elapsed = cx.now.since(held.granted);
        let overdue = elapsed > held.candidate.latency;
        match result {
            // A rival was faster, and this one was late.
            Ok(_) if overdue && !held.candidate.latency.is_zero() => {
                let slowdown = self.standing(held.executor(), cx.now).slowdown;
                let ratio = elapsed.as_secs_f64() / held.candidate.latency.as_secs_f64();
                self.reputation.overtaken(held.executor(), cx.now, slowdown * ratio);
                self.selector.learn(&held.candidate, reward(true, 1.0, 0.0) / 2.0);
            }
            Err(JobError::Deadline { .. }) if overdue => {
                self.reputation.failed(held.executor(), cx.now);
                self.selector.learn(&held.candidate, reward(false, 1.0, 0.0));
            }
            _ => {}
        }
    }

    /// Enters in the timers when a job needs attention next.
    fn reschedule(&mut self, id: JobId) {
        let Some(job) = self.jobs.get(&id) else { return };
        let held = self.held(job);
        let idle = job.election.is_none() && job.resume_at.is_none();
        let may_hedge = idle && job.leases < job.spec.max_leases.max(1);
        let next = state::next_timer(job, &held, &self.config, may_hedge);
        let Some(job) = self.jobs.get_mut(&id) else { return };
        if let Some(old) = job.timer.replace(next) {
            self.timers.remove(&(old, id));
        }
        self.timers.insert((next, id));
    }

    /// Looks after one job whose timer has run out.
    fn on_timer(&mut self, cx: &mut Ctx<'_>, id: JobId, out: &mut Outbox<RequesterEffect>) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        if job.spec.deadline <= cx.now {
            let elapsed = cx.now.since(job.submitted);
            let waiting_for = self.jobs.get(&id).map(|job| self.waiting_for(job)).unwrap_or_default();
            self.finish(cx, id, Err(JobError::Deadline { elapsed, waiting_for }), out);
            return;
        }
        if job.resume_at.is_some_and(|at| at <= cx.now) {
            job.resume_at = None;
        }
        for lease in job.lease_ids() {
            self.check_silence(cx, lease, out);
        }
        self.check_election(cx, id, out);
        self.advance(cx, id, out);
    }

    fn on_capability(
        &mut self,
        cx: &mut Ctx<'_>,
        node: NodeId,
        capability: Option<Arc<Capability>>,
        out: &mut Outbox<RequesterEffect>,
    ) {
        let Some(capability) = capability else {
            self.capabilities.remove(&node);
            return;
        };
        if self.capabilities.len() >= MAX_NODES && !self.capabilities.contains_key(&node) {
            return;
        }
        self.capabilities.insert(node, capability);
        let waiting: Vec<JobId> = self.jobs.values().filter(|j| j.nobody_since.is_some()).map(|j| j.spec.job).collect();
        for job in waiting {
            self.advance(cx, job, out);
        }
    }

    fn on_receipt(&mut self, cx: &Ctx<'_>, entry: &Verified<Entry>) {
        // What this process asked for was counted when it happened.
        let counted = entry.author() == self.me && self.started.is_some_and(|started| entry.wall_time >= started);
        if !counted {
            self.reputation.witness(entry, cx.now, cx.wall);
        }
    }

    fn on_direct(&mut self, cx: &mut Ctx<'_>, from: NodeId, message: Direct, out: &mut Outbox<RequesterEffect>) {
        match message {
            Direct::Bid(bid) => self.on_bid(cx, from, bid, out),
            Direct::Busy { beacon, free_in_ms } => {
                self.on_busy(cx, from, beacon, Duration::from_millis(u64::from(free_in_ms)), out);
            }
            Direct::Accept { job, fence } => self.on_accept(cx, from, job, fence, out),
            Direct::Refuse { job, fence, failure } => self.on_refuse(cx, from, job, fence, failure, out),
            Direct::Progress { job, fence, index, tokens, text } => {
                let progress = leases::ProgressMessage { index, tokens, text: text.into_string() };
                self.on_progress(cx, from, job, fence, progress, out);
            }
            Direct::Outcome { job, fence, result, work } => self.on_outcome(cx, from, (job, fence), result, work, out),
            other => out.push(RequesterEffect::Penalise { peer: from, reason: Fault::OutOfRole(other.kind()) }),
        }
    }
}

fn release(to: NodeId, beacon: BeaconId, out: &mut Outbox<RequesterEffect>) {
    out.push(RequesterEffect::Send { to, message: Direct::Release { beacon } });
}

fn event(job: &Job, kind: JobEventKind, out: &mut Outbox<RequesterEffect>) {
    out.push(RequesterEffect::Event(JobEvent { job: job.spec.job, task: job.spec.task, kind }));
}

/// What learning rules call a kind of job: its kind and its tags, in whatever order they stand.
fn bucket(spec: &JobSpec) -> u64 {
    let mut tags: Vec<&str> = spec.requirement.tags.iter().map(|tag| tag.as_str()).collect();
    tags.sort_unstable();
    let kind = codec::encode(&spec.kind);
    let hash = Hash::derive("chorus kind of job v1", &[&kind, tags.join(" ").as_bytes()]);
    hash.as_bytes().first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

impl Machine for Requester {
    type Input = RequesterInput;
    type Effect = RequesterEffect;

    fn handle(&mut self, cx: &mut Ctx<'_>, input: RequesterInput, out: &mut Outbox<RequesterEffect>) {
        self.started.get_or_insert(cx.wall);
        match input {
            RequesterInput::Capability { node, capability } => self.on_capability(cx, node, capability, out),
            RequesterInput::Receipt { entry } => self.on_receipt(cx, &entry),
            RequesterInput::Accusation { entry } => self.reputation.accused(&entry, cx.now, cx.wall),
            RequesterInput::Quarantined { node } => {
                if self.quarantined.len() < MAX_NODES {
                    self.quarantined.insert(node);
                }
                self.node_gone(cx, node, Lost::Quarantined, out);
            }
            RequesterInput::Submit(spec) => self.submit(cx, spec, out),
            RequesterInput::Cancel(job) => self.finish(cx, job, Err(JobError::Cancelled), out),
            RequesterInput::Direct { from, message } => self.on_direct(cx, from, message, out),
            RequesterInput::PeerDown(node) => self.node_gone(cx, node, Lost::PeerDown, out),
            RequesterInput::SendFailed { to } => self.send_failed(cx, to, out),
        }
    }

    fn deadline(&self) -> Option<Time> {
        self.timers.first().map(|(at, _)| *at)
    }

    fn expire(&mut self, cx: &mut Ctx<'_>, out: &mut Outbox<RequesterEffect>) {
        let due: Vec<JobId> = self.timers.iter().take_while(|(at, _)| *at <= cx.now).map(|(_, job)| *job).collect();
        for job in due {
            self.on_timer(cx, job, out);
        }
        self.revoked.purge(cx.now);
    }
}
