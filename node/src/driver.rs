//! The one loop around the node: an input comes, the node says what it wants, the effects go out. The only `.await` is the
//! `select!`.
//!
//! ```text
//!   NodeHandle ──requests──▶ ┌────────┐ ──publish, send──▶ net
//!   net ────────events─────▶ │ Driver │ ──batches────────▶ store writer (a thread)
//!   store writer ─inputs───▶ │  Node  │ ──runs───────────▶ engine (tasks)
//!   engine ──────inputs────▶ └────────┘ ──task events────▶ TaskLog ──▶ API streams
//! ```
//!
//! Every queue is bounded. An effect that finds its queue full goes back to the node as `Input::Overloaded`, which treats it as
//! the failure that it is; the loop itself never waits for a consumer.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use chorus_api::TaskLog;
use chorus_core::{
    Acceptance, Command, Effect, EngineInput, Input, JobEvent, JobEventKind, LedgerEvent, NetInput, Node, NodeEvent,
    Restored, RunId, Topic,
};
use chorus_machine::{Ctx, Machine, Outbox, Rng, Time};
use chorus_net::{GossipToken, NetEvent, NetHandle, Verdict};
use chorus_protocol::job::{JobKind, Payload};
use chorus_protocol::{NodeId, WallTime};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::executor::{EngineShell, Engines};
use crate::metrics::Metrics;
use crate::net_log;
use crate::spans::JobSpans;
use crate::storage::Disk;
use crate::training::{Grant, News, is_trained};

/// Requests of the API and the commands that may wait.
const REQUEST_QUEUE: usize = 256;
/// Inputs of the engine and the disk that may wait; the engine's tasks wait for room, the disk's writer too.
pub(crate) const INPUT_QUEUE: usize = 1_024;
/// Gossiped frames whose verdict is outstanding. The node answers each in the same turn, so this never fills.
const MAX_UNJUDGED: usize = 1_024;
/// How long the node may sleep when nothing is due: a guard against a deadline that was forgotten.
const MAX_SLEEP: Duration = Duration::from_secs(1);

/// What others may ask of the driver.
enum Request {
    Command(Box<Command>),
    Engines(Box<Engines>),
    Read(Box<dyn FnOnce(&Node, Time) + Send>),
}

/// The driver is gone, because the process is ending.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the node is shutting down")]
pub(crate) struct Stopped;

/// The way to the node from anywhere in the process.
#[derive(Clone)]
pub(crate) struct NodeHandle {
    requests: mpsc::Sender<Request>,
}

/// Where the driver takes requests from.
pub(crate) struct Requests(mpsc::Receiver<Request>);

impl NodeHandle {
    /// Makes the way to a driver that does not run yet.
    pub(crate) fn channel() -> (Self, Requests) {
        let (requests, queue) = mpsc::channel(REQUEST_QUEUE);
        (Self { requests }, Requests(queue))
    }

    /// Hands a command in if there is room. Returns whether there was.
    pub(crate) fn try_command(&self, command: Command) -> bool {
        self.requests.try_send(Request::Command(Box::new(command))).is_ok()
    }

    /// Hands a command in.
    pub(crate) async fn command(&self, command: Command) -> Result<(), Stopped> {
        self.requests.send(Request::Command(Box::new(command))).await.map_err(|_| Stopped)
    }

    /// Takes engines into service.
    pub(crate) async fn install(&self, engines: Engines) -> Result<(), Stopped> {
        self.requests.send(Request::Engines(Box::new(engines))).await.map_err(|_| Stopped)
    }

    /// Reads something of the node's state, between two inputs.
    pub(crate) async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Node, Time) -> T + Send + 'static,
    ) -> Result<T, Stopped> {
        let (tx, rx) = oneshot::channel();
        let request = Request::Read(Box::new(move |node, now| {
            let _ = tx.send(read(node, now));
        }));
        self.requests.send(request).await.map_err(|_| Stopped)?;
        rx.await.map_err(|_| Stopped)
    }
}

/// What the loop needs to run.
pub(crate) struct Parts {
    pub node: Node,
    /// The zero of the node's clock, and of the training room's.
    pub epoch: Instant,
    pub rng: Rng,
    pub net: NetHandle,
    pub net_events: mpsc::Receiver<NetEvent>,
    pub disk: Disk,
    pub inputs_tx: mpsc::Sender<Input>,
    pub inputs_rx: mpsc::Receiver<Input>,
    pub requests: Requests,
    pub tasks: Arc<TaskLog>,
    pub metrics: Arc<Metrics>,
    /// Where what a training room wants to know goes.
    pub news: mpsc::Sender<News>,
    pub shutdown: CancellationToken,
}

/// The loop's own state.
pub(crate) struct Driver {
    node: Node,
    rng: Rng,
    epoch: Instant,
    net: NetHandle,
    net_events: mpsc::Receiver<NetEvent>,
    disk: Disk,
    inputs: mpsc::Receiver<Input>,
    requests: mpsc::Receiver<Request>,
    engine: EngineShell,
    jobs: JobSpans,
    tasks: Arc<TaskLog>,
    metrics: Arc<Metrics>,
    news: mpsc::Sender<News>,
    shutdown: CancellationToken,
    unjudged: BTreeMap<u64, GossipToken>,
    next_token: u64,
    out: Outbox<Effect>,
}

impl Driver {
    pub(crate) fn new(parts: Parts) -> Self {
        Self {
            node: parts.node,
            rng: parts.rng,
            epoch: parts.epoch,
            net: parts.net,
            net_events: parts.net_events,
            disk: parts.disk,
            engine: EngineShell::new(parts.inputs_tx),
            jobs: JobSpans::default(),
            inputs: parts.inputs_rx,
            requests: parts.requests.0,
            tasks: parts.tasks,
            metrics: parts.metrics,
            news: parts.news,
            shutdown: parts.shutdown,
            unjudged: BTreeMap::new(),
            next_token: 0,
            out: Outbox::new(),
        }
    }

    /// Gives the node back what it had on disk.
    pub(crate) fn restore(&mut self, disk: Restored) {
        let mut cx = Ctx { now: self.now(), wall: wall(), rng: &mut self.rng };
        self.node.restore(&mut cx, disk, &mut self.out);
        self.flush();
    }

    /// Runs until the shutdown token fires.
    pub(crate) async fn run(mut self) {
        loop {
            let wake = self.sleep();
            tokio::select! {
                biased;
                () = self.shutdown.cancelled() => break,
                Some(request) = self.requests.recv() => self.on_request(request),
                Some(input) = self.inputs.recv() => self.on_input(input),
                Some(event) = self.net_events.recv() => self.on_net(event),
                () = tokio::time::sleep(wake) => self.on_wake(),
            }
        }
        self.leave().await;
    }

    fn now(&self) -> Time {
        Time::from_nanos(u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    fn sleep(&self) -> Duration {
        self.node.deadline().map_or(MAX_SLEEP, |deadline| deadline.since(self.now()).min(MAX_SLEEP))
    }

    fn on_request(&mut self, request: Request) {
        match request {
            Request::Command(command) => self.handle(Input::Command(*command)),
            Request::Engines(engines) => self.engine.install(*engines),
            Request::Read(read) => read(&self.node, self.now()),
        }
    }

    fn on_input(&mut self, input: Input) {
        if let Input::Engine(EngineInput::Done { run, .. }) = &input {
            self.engine.forget(run);
        }
        self.handle(input);
    }

    fn on_net(&mut self, event: NetEvent) {
        self.metrics.on_net(&event);
        let input = match event {
            NetEvent::PeerUp { node, .. } => {
                self.tell(News::PeerUp(node));
                NetInput::PeerUp(node)
            }
            NetEvent::PeerDown { node, .. } => NetInput::PeerDown(node),
            NetEvent::Gossip { topic, from, token, bytes } => self.gossip(topic, from, token, bytes),
            NetEvent::Message { from, bytes } => NetInput::Direct { from, bytes },
            NetEvent::SendFailed { to, error, .. } => {
                tracing::debug!(to = %to.fmt_short(), %error, "not delivered");
                NetInput::SendFailed { to }
            }
            NetEvent::Banned { node, .. } => {
                self.tell(News::Banned(node));
                return net_log::write(&event);
            }
            NetEvent::Providers { key, nodes } => return self.tell(News::Providers(key, nodes)),
            event => return net_log::write(&event),
        };
        self.handle(Input::Net(input));
    }

    /// Tells the training room. One that has enough to do finds out by itself, later; where there is none, nobody listens.
    fn tell(&self, news: News) {
        if let Err(mpsc::error::TrySendError::Full(_)) = self.news.try_send(news) {
            tracing::debug!("the training room has enough to do");
        }
    }

    fn gossip(&mut self, topic: chorus_net::Topic, from: NodeId, token: GossipToken, bytes: Vec<u8>) -> NetInput {
        self.next_token += 1;
        if self.unjudged.len() >= MAX_UNJUDGED {
            self.unjudged.pop_first();
        }
        self.unjudged.insert(self.next_token, token);
        let topic = match topic {
            chorus_net::Topic::Ledger => Topic::Ledger,
            chorus_net::Topic::Beacon => Topic::Beacon,
        };
        NetInput::Gossip { token: self.next_token, from, topic, bytes }
    }

    fn on_wake(&mut self) {
        let mut cx = Ctx { now: self.now(), wall: wall(), rng: &mut self.rng };
        self.node.expire(&mut cx, &mut self.out);
        self.flush();
    }

    fn handle(&mut self, input: Input) {
        let mut cx = Ctx { now: self.now(), wall: wall(), rng: &mut self.rng };
        self.node.handle(&mut cx, input, &mut self.out);
        self.flush();
    }

    /// Sends every effect on its way. What a full queue refuses goes back to the node, whose answer is carried out in turn.
    fn flush(&mut self) {
        let mut pending: VecDeque<Effect> = self.out.drain().collect();
        while let Some(effect) = pending.pop_front() {
            let Err(refused) = self.carry_out(effect) else { continue };
            self.metrics.overloaded();
            let mut cx = Ctx { now: self.now(), wall: wall(), rng: &mut self.rng };
            self.node.handle(&mut cx, Input::Overloaded(refused), &mut self.out);
            pending.extend(self.out.drain());
        }
    }

    fn carry_out(&mut self, effect: Effect) -> Result<(), Box<Effect>> {
        match effect {
            Effect::Publish { topic, bytes } => {
                let to = match topic {
                    Topic::Ledger => chorus_net::Topic::Ledger,
                    Topic::Beacon => chorus_net::Topic::Beacon,
                };
                if let Err(error) = self.net.publish(to, bytes) {
                    tracing::warn!(%error, ?topic, "not published");
                }
            }
            Effect::Send { to, bytes } => {
                self.metrics.sent(bytes.len());
                if let Err(error) = self.net.send(to, 0, bytes) {
                    tracing::debug!(to = %to.fmt_short(), %error, "not sent");
                    return Err(Box::new(Effect::Send { to, bytes: Vec::new() }));
                }
            }
            Effect::Validate { token, acceptance } => self.validate(token, &acceptance),
            Effect::Penalise { peer, reason } => {
                self.metrics.penalised();
                tracing::warn!(peer = %peer.fmt_short(), reason, "a peer broke the rules");
            }
            Effect::Persist(batch) => self.disk.submit(batch).map_err(|batch| Box::new(Effect::Persist(*batch)))?,
            Effect::Run { run, kind: JobKind::Sample, payload, deadline } => self.sample(run, payload, deadline)?,
            Effect::Run { run, kind, payload, deadline } => {
                let limit = deadline.since(self.now());
                self.engine.run(run, kind, *payload, limit);
            }
            Effect::Stop { run } => {
                self.engine.stop(&run);
                self.tell(News::Stop(run));
            }
            Effect::Embed { request, text } => {
                if !self.engine.embed(request, text) {
                    return Err(Box::new(Effect::Embed { request, text: String::new() }));
                }
            }
            Effect::Task(event) => self.tasks.push(event),
            Effect::TaskDone { task, result } => {
                self.metrics.task_done(&result);
                self.tasks.finish(task, result.map(|answer| *answer));
            }
            // The training room is the only customer that hands jobs in by itself.
            Effect::Job(JobEvent { kind: JobEventKind::Progress { .. }, .. }) => {}
            Effect::Job(event) => self.tell(News::Job(event)),
            Effect::JobDone { job, result } => self.tell(News::JobDone { job, result }),
            Effect::Event(event) => self.on_event(&event),
        }
        Ok(())
    }

    /// Gives a lease to sample to the training room. One that cannot take it is as good as busy.
    fn sample(&self, run: RunId, payload: Box<Payload>, deadline: Time) -> Result<(), Box<Effect>> {
        let until = Instant::now() + deadline.since(self.now());
        let grant = Grant { run, policy: payload.policy.clone(), until };
        let refused = self.news.try_send(News::Granted(grant)).is_err();
        if refused {
            return Err(Box::new(Effect::Run { run, kind: JobKind::Sample, payload, deadline }));
        }
        Ok(())
    }

    fn validate(&mut self, token: u64, acceptance: &Acceptance) {
        let Some(gossip) = self.unjudged.remove(&token) else { return };
        let verdict = match acceptance {
            Acceptance::Accept => Verdict::Accept,
            Acceptance::Ignore => Verdict::Ignore,
            Acceptance::Reject { reason } => {
                tracing::warn!(reason, "a gossiped frame was rejected");
                Verdict::Reject
            }
        };
        if let Err(error) = self.net.validated(gossip, verdict) {
            tracing::debug!(%error, "a verdict was lost; the frame is not passed on");
        }
    }

    fn on_event(&mut self, event: &NodeEvent) {
        self.metrics.on_event(event);
        if let NodeEvent::Ledger(LedgerEvent::Capability { node, capability }) = event {
            let offer = capability.as_ref().and_then(|capability| capability.sampling.clone());
            self.tell(News::Offer { node: *node, offer });
        }
        if let NodeEvent::Ledger(LedgerEvent::Policy { policy, stands }) = event {
            self.tell(News::Policy { policy: policy.clone(), running: stands.as_ref().and_then(is_trained) });
        }
        match event {
            NodeEvent::JobSubmitted { job, task, kind } => self.jobs.submitted(*job, *task, *kind),
            NodeEvent::Job(event) => self.jobs.on_event(event),
            NodeEvent::JobEnded { job, error } => self.jobs.ended(job, error.as_ref()),
            NodeEvent::AppendFailed { reason } => {
                tracing::error!(reason, "an entry of this node was not written; free the disk, or look at its log");
            }
            NodeEvent::FrameTooLarge { what, len } => tracing::warn!(what, len, "too large to send"),
            event => tracing::debug!(?event, "node"),
        }
    }

    /// Takes back the capability and lets the runs end, before the sockets close.
    async fn leave(mut self) {
        self.handle(Input::Command(Command::Drain));
        self.engine.stop_all();
        let until = tokio::time::Instant::now() + Duration::from_millis(500);
        while let Ok(Some(input)) = tokio::time::timeout_at(until, self.inputs.recv()).await {
            self.on_input(input);
        }
        self.net.shutdown().await;
        // The writer may be waiting for room among the inputs; with nobody left to take them, it goes on.
        drop(self.inputs);
        self.disk.close();
    }
}

/// The wall clock, for records that others will read.
pub(crate) fn wall() -> WallTime {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    WallTime::from_millis(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
