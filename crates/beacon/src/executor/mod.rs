//! The side that does the work: bids, reserves, runs, reports.
//!
//! Slots are the only resource. They come in pools ([`Pool`]), so that a job that lasts for minutes does not keep others waiting,
//! and each slot is in one of three states:
//!
//! ```text
//!            bid                      grant
//!   free ───────────▶ reserved ─────────────────▶ running
//!     ▲                  │  release, hold lapsed,    │  done, cancel, deadline,
//!     └──────────────────┴──peer down, drain ────────┘  peer down, newer lease, drain
//! ```
//!
//! * `running + reserved ≤ slots` in each pool, always. A beacon that finds no free slot is answered with `Busy`, waits in a bounded queue while
//!   it is open, and gets its bid the moment a slot comes free.
//! * A grant with a live reservation always finds its slot. One without gets a slot if one is free, else `Busy`.
//! * A grant is idempotent: repeated, it is answered with where the run stands: `Accept` while it runs, the `Outcome` once it is done.
//!   One under an older token, a cancelled one, or one whose run is forgotten is refused as stale.
//! * A run ends at its deadline, and when its requester is gone.
//! * Deadlines are taken relative to the beacon's own clock reading, so two nodes whose clocks differ agree on how long is left.

mod bids;
mod memory;
mod runs;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use chorus_machine::{Ctx, Machine, Outbox, Time, earliest};
use chorus_protocol::beacon::Beacon;
use chorus_protocol::capability::Capability;
use chorus_protocol::job::{Failure, JobKind, Output, Payload, Pool};
use chorus_protocol::message::Direct;
use chorus_protocol::{BeaconId, JobId, NetworkId, NodeId, SecretKey, Verified};

use crate::config::BeaconConfig;
use crate::lease::{Fault, RunId};
use bids::{Reservation, Waiting};
use memory::Memory;
use runs::Run;

/// What an executor is told.
#[derive(Debug)]
pub enum ExecutorInput {
    /// This is what the node can do from now on, and how many jobs at a time. Until the first one it does nothing.
    Offer {
        /// What it can do.
        capability: Arc<Capability>,
        /// Answers at a time.
        slots: u16,
    },
    /// Somebody announced a job.
    Beacon(Verified<Beacon>),
    /// A requester sent a `Release`, a `Grant` or a `Cancel`.
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
    /// The engine made more text.
    Progress {
        /// For which run.
        run: RunId,
        /// Tokens made so far.
        tokens: u32,
        /// Text since the last one.
        text: String,
    },
    /// The engine is done.
    Done {
        /// With which run.
        run: RunId,
        /// What came of it.
        result: Result<Output, Failure>,
    },
    /// The node is shutting down: running jobs are handed back as `Leaving`, so that they are elected anew at once, bids are taken
    /// back, and nothing new is taken.
    Drain,
}

/// What an executor wants done.
#[derive(Debug)]
pub enum ExecutorEffect {
    /// Send this.
    Send {
        /// To whom; may be this node itself.
        to: NodeId,
        /// What.
        message: Direct,
    },
    /// Have the engine do this.
    Run {
        /// The name to report under.
        run: RunId,
        /// What kind of work it is.
        kind: JobKind,
        /// The work.
        payload: Box<Payload>,
        /// When it must be done.
        deadline: Time,
    },
    /// Have the engine stop this. No report is needed, and a late one is ignored.
    Stop {
        /// Which run.
        run: RunId,
    },
    /// Tell whoever watches.
    Event(ExecutorEvent),
    /// A peer did what no honest node does.
    Penalise {
        /// Who.
        peer: NodeId,
        /// What it did.
        reason: Fault,
    },
}

/// Something that happened at an executor, for logs and metrics.
#[derive(Clone, Debug, PartialEq)]
pub enum ExecutorEvent {
    /// A slot is kept for a requester.
    Bid {
        /// Whose job.
        requester: NodeId,
        /// The job.
        job: JobId,
        /// φ of this node's capability.
        score: f64,
    },
    /// No slot was free, and its requester was told; the beacon waits.
    Waiting {
        /// Whose job.
        requester: NodeId,
        /// The job.
        job: JobId,
    },
    /// A reservation lapsed: its requester neither took it nor gave it back.
    Lapsed {
        /// Who.
        requester: NodeId,
        /// For which announcement.
        beacon: BeaconId,
    },
    /// A run began.
    Started {
        /// Which.
        run: RunId,
    },
    /// A lease was refused.
    Refused {
        /// Which.
        run: RunId,
        /// Why.
        failure: Failure,
    },
    /// A run ended with a result.
    Finished {
        /// Which.
        run: RunId,
        /// Tokens written.
        tokens: u32,
        /// From lease to result.
        elapsed: Duration,
    },
    /// A run failed.
    Failed {
        /// Which.
        run: RunId,
        /// Why.
        failure: Failure,
    },
    /// A run was stopped, without a report.
    Stopped {
        /// Which.
        run: RunId,
        /// Why.
        reason: &'static str,
    },
}

/// The executing side of the beacon.
#[derive(Debug)]
pub struct Executor {
    config: BeaconConfig,
    network: NetworkId,
    key: SecretKey,
    me: NodeId,
    offer: Option<Arc<Capability>>,
    /// Answers at a time. Every other pool has what the capability says.
    slots: usize,
    draining: bool,
    reservations: BTreeMap<(NodeId, BeaconId), Reservation>,
    waiting: Vec<Waiting>,
    /// At most one run per requester and job id.
    runs: BTreeMap<(NodeId, JobId), Run>,
    memory: Memory,
    /// Moving average of the time that runs of each pool took, in seconds.
    usual: BTreeMap<Pool, f64>,
}

impl Executor {
    /// Makes an executor that offers nothing yet.
    #[must_use]
    pub fn new(config: BeaconConfig, network: NetworkId, key: SecretKey) -> Self {
        let me = key.node_id();
        Self {
            config,
            network,
            key,
            me,
            offer: None,
            slots: 0,
            draining: false,
            reservations: BTreeMap::new(),
            waiting: Vec::new(),
            runs: BTreeMap::new(),
            memory: Memory::default(),
            usual: BTreeMap::new(),
        }
    }

    /// Returns how many jobs it runs at a time.
    #[must_use]
    pub fn slots(&self) -> usize {
        Pool::ALL.into_iter().map(|pool| self.slots_of(pool)).sum()
    }

    /// Returns the slots that are neither running nor reserved.
    #[must_use]
    pub fn free(&self) -> usize {
        Pool::ALL.into_iter().map(|pool| self.free_of(pool)).sum()
    }

    fn slots_of(&self, pool: Pool) -> usize {
        match pool {
            Pool::Answers => self.slots,
            Pool::Sampling => self.offer.as_ref().map_or(0, |offer| usize::from(offer.slots_of(pool))),
        }
    }

    fn taken_of(&self, pool: Pool) -> usize {
        let runs = self.runs.values().filter(|run| run.kind.pool() == pool).count();
        runs + self.reservations.values().filter(|reservation| reservation.pool == pool).count()
    }

    fn free_of(&self, pool: Pool) -> usize {
        self.slots_of(pool).saturating_sub(self.taken_of(pool))
    }

    /// Returns the slots that are kept for requesters.
    #[must_use]
    pub fn reserved(&self) -> usize {
        self.reservations.len()
    }

    /// Returns the runs under way.
    pub fn runs(&self) -> impl Iterator<Item = RunId> + '_ {
        self.runs.values().map(|run| run.id)
    }

    fn drain(&mut self, cx: &mut Ctx<'_>, out: &mut Outbox<ExecutorEffect>) {
        self.draining = true;
        self.waiting.clear();
        for ((requester, _), reservation) in std::mem::take(&mut self.reservations) {
            let message = Direct::Refuse { job: reservation.job, fence: WITHDRAWN, failure: Failure::Leaving };
            out.push(ExecutorEffect::Send { to: requester, message });
        }
        let runs: Vec<RunId> = self.runs().collect();
        for run in runs {
            out.push(ExecutorEffect::Stop { run });
            self.finish(cx, run, Err(Failure::Leaving), out);
        }
    }

    /// A bid may not have arrived, so no slot is kept for its requester; a grant that comes all the same finds one that is free. A
    /// run goes on: its requester asks for what it missed.
    fn send_failed(&mut self, cx: &mut Ctx<'_>, to: NodeId, out: &mut Outbox<ExecutorEffect>) {
        let before = self.reservations.len();
        self.reservations.retain(|(requester, _), _| *requester != to);
        if self.reservations.len() < before {
            self.serve_waiting(cx, out);
        }
    }

    fn peer_down(&mut self, cx: &mut Ctx<'_>, peer: NodeId, out: &mut Outbox<ExecutorEffect>) {
        self.reservations.retain(|(requester, _), _| *requester != peer);
        self.waiting.retain(|waiting| waiting.beacon.author() != peer);
        let orphans: Vec<RunId> = self.runs().filter(|run| run.requester == peer).collect();
        for run in orphans {
            self.stop(run, "its requester is gone", out);
        }
        self.serve_waiting(cx, out);
    }
}

/// The token in a `Refuse` that takes back a bid: no lease has it.
pub(crate) const WITHDRAWN: u64 = 0;

impl Machine for Executor {
    type Input = ExecutorInput;
    type Effect = ExecutorEffect;

    fn handle(&mut self, cx: &mut Ctx<'_>, input: ExecutorInput, out: &mut Outbox<ExecutorEffect>) {
        match input {
            ExecutorInput::Offer { capability, slots } => {
                self.offer = Some(capability);
                self.slots = usize::from(slots);
                self.serve_waiting(cx, out);
            }
            ExecutorInput::Beacon(beacon) => self.on_beacon(cx, beacon, out),
            ExecutorInput::Direct { from, message } => match message {
                Direct::Grant { lease, payload } => self.on_grant(cx, from, lease, payload, out),
                Direct::Release { beacon } => self.on_release(cx, from, beacon, out),
                Direct::Cancel { job, fence } => self.on_cancel(cx, from, job, fence, out),
                other => out.push(ExecutorEffect::Penalise { peer: from, reason: Fault::OutOfRole(other.kind()) }),
            },
            ExecutorInput::PeerDown(peer) => self.peer_down(cx, peer, out),
            ExecutorInput::SendFailed { to } => self.send_failed(cx, to, out),
            ExecutorInput::Progress { run, tokens, text } => self.on_progress(cx, run, tokens, &text, out),
            ExecutorInput::Done { run, result } => {
                self.finish(cx, run, result, out);
                self.serve_waiting(cx, out);
            }
            ExecutorInput::Drain => self.drain(cx, out),
        }
    }

    fn deadline(&self) -> Option<Time> {
        let reserved = self.reservations.values().map(|reservation| reservation.until).min();
        let waiting = self.waiting.iter().map(|waiting| waiting.closes).min();
        let running = self.runs.values().map(|run| run.deadline.min(run.sent + self.config.heartbeat)).min();
        earliest(earliest(reserved, waiting), running)
    }

    fn expire(&mut self, cx: &mut Ctx<'_>, out: &mut Outbox<ExecutorEffect>) {
        let now = cx.now;
        let overdue: Vec<RunId> = self.runs.values().filter(|run| run.deadline <= now).map(|run| run.id).collect();
        for run in overdue {
            out.push(ExecutorEffect::Stop { run });
            self.finish(cx, run, Err(Failure::Deadline), out);
        }
        self.send_signs_of_life(now, out);
        self.lapse(now, out);
        self.waiting.retain(|waiting| waiting.closes > now);
        self.memory.purge(now);
        self.serve_waiting(cx, out);
    }
}
