//! The router: one input in, and everything that follows from it.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use chorus_beacon::{
    Executor, ExecutorEffect, ExecutorInput, JobEventKind, JobSpec, Requester, RequesterEffect, RequesterInput,
};
use chorus_ledger::{Ledger, LedgerEffect, LedgerEvent, LedgerInput, PersistBatch};
use chorus_machine::{Ctx, Machine, Outbox, Time, earliest};
use chorus_protocol::capability::{Capability, Skill};
use chorus_protocol::entry::{Body, Entry};
use chorus_protocol::message::{Direct, LedgerGossip};
use chorus_protocol::{JobId, NodeId, SecretKey, Verified};
use chorus_scheduler::spec::MAX_SKILLS;
use chorus_scheduler::{Scheduler, SchedulerEffect, SchedulerInput};

use crate::config::NodeConfig;
use crate::io::{Command, Effect, EngineInput, Input, NetInput, NodeEvent, Restored, StoreInput};

/// Routes that one input may set off before the rest waits for the next turn of the shell: a guard against two machines that
/// answer each other for ever.
const MAX_ROUTES_PER_TURN: usize = 10_000;

/// An effect of one machine on its way to another.
#[derive(Debug)]
pub(crate) enum Route {
    Ledger(LedgerInput),
    Requester(RequesterInput),
    Executor(ExecutorInput),
    Scheduler(SchedulerInput),
}

/// A whole node, but for its sockets, its disk and its engine.
#[derive(Debug)]
pub struct Node {
    pub(crate) config: NodeConfig,
    pub(crate) me: NodeId,
    pub(crate) ledger: Ledger,
    pub(crate) requester: Requester,
    pub(crate) executor: Executor,
    pub(crate) scheduler: Scheduler,
    /// What the node offers; said again before it expires.
    offer: Option<Arc<Capability>>,
    announce_at: Option<Time>,
    /// Nodes that it is connected to.
    peers: usize,
    /// Jobs that the shell handed in, and not the scheduler.
    shells: BTreeSet<JobId>,
    /// Numbers the appends, so that their failures can be told apart in the log.
    appends: u64,
    /// Routes not yet taken. Empty between turns, unless a turn hit its limit.
    routes: VecDeque<Route>,
}

impl Node {
    /// Makes a node that knows nothing yet.
    #[must_use]
    pub fn new(config: NodeConfig, key: SecretKey) -> Self {
        let network = config.network.clone();
        Self {
            me: key.node_id(),
            ledger: Ledger::new(config.ledger.clone(), network.clone(), key.clone()),
            requester: Requester::new(config.beacon.clone(), network.clone(), key.clone()),
            executor: Executor::new(config.beacon.clone(), network, key),
            scheduler: Scheduler::new(config.scheduler.clone()),
            offer: None,
            announce_at: None,
            peers: 0,
            shells: BTreeSet::new(),
            appends: 0,
            routes: VecDeque::new(),
            config,
        }
    }

    /// Gives the node back what it had on disk. Call once, before the first input.
    pub fn restore(&mut self, cx: &mut Ctx<'_>, disk: Restored, out: &mut Outbox<Effect>) {
        self.ledger.restore(cx.wall, disk.entries, disk.proofs, disk.marks);
        let known: Vec<_> =
            self.ledger.capabilities().map(|(node, capability)| (node, Arc::clone(capability))).collect();
        for (node, capability) in known {
            self.route(Route::Requester(RequesterInput::Capability { node, capability: Some(capability) }));
        }
        for entry in self.ledger.entries().cloned().collect::<Vec<_>>() {
            match entry.body {
                Body::Receipt(_) => self.route(Route::Requester(RequesterInput::Receipt { entry })),
                Body::Misbehaviour(_) => self.route(Route::Requester(RequesterInput::Accusation { entry })),
                Body::Capability(_) | Body::Retire | Body::Policy(_) => {}
            }
        }
        for node in self.ledger.quarantined().collect::<Vec<_>>() {
            self.route(Route::Requester(RequesterInput::Quarantined { node }));
        }
        self.run(cx, out);
    }

    /// Returns this node's id.
    #[must_use]
    pub fn id(&self) -> NodeId {
        self.me
    }

    /// Returns the ledger, to be read.
    #[must_use]
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Returns the requester's half of the beacon, to be read.
    #[must_use]
    pub fn requester(&self) -> &Requester {
        &self.requester
    }

    /// Returns the executor's half of the beacon, to be read.
    #[must_use]
    pub fn executor(&self) -> &Executor {
        &self.executor
    }

    pub(crate) fn route(&mut self, route: Route) {
        self.routes.push_back(route);
    }

    /// Takes routes until none is left, or the turn's limit is reached.
    fn run(&mut self, cx: &mut Ctx<'_>, out: &mut Outbox<Effect>) {
        for _ in 0..MAX_ROUTES_PER_TURN {
            let Some(route) = self.routes.pop_front() else { return };
            self.take(cx, route, out);
        }
    }

    fn take(&mut self, cx: &mut Ctx<'_>, route: Route, out: &mut Outbox<Effect>) {
        match route {
            Route::Ledger(input) => {
                let mut effects = Outbox::new();
                self.ledger.handle(cx, input, &mut effects);
                self.on_ledger(&mut effects, None, out);
            }
            Route::Requester(input) => {
                let mut effects = Outbox::new();
                self.requester.handle(cx, input, &mut effects);
                self.on_requester(&mut effects, out);
            }
            Route::Executor(input) => {
                let mut effects = Outbox::new();
                self.executor.handle(cx, input, &mut effects);
                self.on_executor(&mut effects, out);
            }
            Route::Scheduler(input) => {
                let mut effects = Outbox::new();
                self.scheduler.handle(cx, input, &mut effects);
                self.on_scheduler(&mut effects, out);
            }
        }
    }

    /// Hands a gossiped entry to the ledger at once, because its verdict belongs to the frame's token.
    pub(crate) fn judge(&mut self, cx: &mut Ctx<'_>, input: LedgerInput, token: u64, out: &mut Outbox<Effect>) {
        let mut effects = Outbox::new();
        self.ledger.handle(cx, input, &mut effects);
        self.on_ledger(&mut effects, Some(token), out);
    }

    fn on_ledger(&mut self, effects: &mut Outbox<LedgerEffect>, token: Option<u64>, out: &mut Outbox<Effect>) {
        for effect in effects.drain() {
            match effect {
                LedgerEffect::Publish(frame) => self.publish_ledger(&frame, out),
                LedgerEffect::Send { to, message } => self.send(to, Direct::Sync(message), out),
                LedgerEffect::Persist(batch) => out.push(Effect::Persist(batch)),
                LedgerEffect::Judged(acceptance) => {
                    if let Some(token) = token {
                        out.push(Effect::Validate { token, acceptance: acceptance.into() });
                    }
                }
                LedgerEffect::Penalise { peer, reason } => {
                    out.push(Effect::Penalise { peer, reason: reason.to_string() });
                }
                LedgerEffect::Appended { .. } => {}
                LedgerEffect::AppendFailed { error, .. } => {
                    out.push(Effect::Event(NodeEvent::AppendFailed { reason: error.to_string() }));
                }
                LedgerEffect::Event(event) => self.on_ledger_event(event, out),
            }
        }
    }

    /// What the ledger learns, the requester's directory and reputation learn too.
    fn on_ledger_event(&mut self, event: LedgerEvent, out: &mut Outbox<Effect>) {
        let input = match &event {
            LedgerEvent::Capability { node, capability } => {
                Some(RequesterInput::Capability { node: *node, capability: capability.clone() })
            }
            LedgerEvent::Receipt { entry } => Some(RequesterInput::Receipt { entry: entry.clone() }),
            LedgerEvent::Misbehaviour { entry } => Some(RequesterInput::Accusation { entry: entry.clone() }),
            LedgerEvent::Quarantined { node } => Some(RequesterInput::Quarantined { node: *node }),
            _ => None,
        };
        if let Some(input) = input {
            self.route(Route::Requester(input));
        }
        out.push(Effect::Event(NodeEvent::Ledger(event)));
    }

    fn on_requester(&mut self, effects: &mut Outbox<RequesterEffect>, out: &mut Outbox<Effect>) {
        for effect in effects.drain() {
            match effect {
                RequesterEffect::Publish(beacon) => {
                    self.publish_beacon(&beacon, out);
                    self.route(Route::Executor(ExecutorInput::Beacon(beacon)));
                }
                RequesterEffect::Send { to, message } => self.send(to, message, out),
                RequesterEffect::Append(body) => self.append(body),
                RequesterEffect::Event(event) => {
                    if !matches!(event.kind, JobEventKind::Progress { .. }) {
                        out.push(Effect::Event(NodeEvent::Job(event.clone())));
                    }
                    if self.shells.contains(&event.job) {
                        out.push(Effect::Job(event));
                    } else {
                        self.route(Route::Scheduler(SchedulerInput::Job(event)));
                    }
                }
                RequesterEffect::Done { job, result } => {
                    out.push(Effect::Event(NodeEvent::JobEnded { job, error: result.as_ref().err().cloned() }));
                    if self.shells.remove(&job) {
                        out.push(Effect::JobDone { job, result });
                    } else {
                        self.route(Route::Scheduler(SchedulerInput::JobDone { job, result }));
                    }
                }
                RequesterEffect::Penalise { peer, reason } => {
                    out.push(Effect::Penalise { peer, reason: reason.to_string() });
                }
            }
        }
    }

    fn on_executor(&mut self, effects: &mut Outbox<ExecutorEffect>, out: &mut Outbox<Effect>) {
        for effect in effects.drain() {
            match effect {
                ExecutorEffect::Send { to, message } => self.send(to, message, out),
                ExecutorEffect::Run { run, kind, payload, deadline } => {
                    out.push(Effect::Run { run, kind, payload, deadline });
                }
                ExecutorEffect::Stop { run } => out.push(Effect::Stop { run }),
                ExecutorEffect::Event(event) => out.push(Effect::Event(NodeEvent::Executor(event))),
                ExecutorEffect::Penalise { peer, reason } => {
                    out.push(Effect::Penalise { peer, reason: reason.to_string() });
                }
            }
        }
    }

    fn on_scheduler(&mut self, effects: &mut Outbox<SchedulerEffect>, out: &mut Outbox<Effect>) {
        for effect in effects.drain() {
            match effect {
                SchedulerEffect::Submit(spec) => self.submit(spec, out),
                SchedulerEffect::CancelJob(job) => self.route(Route::Requester(RequesterInput::Cancel(job))),
                SchedulerEffect::Embed { request, text } => out.push(Effect::Embed { request, text }),
                SchedulerEffect::Event(event) => out.push(Effect::Task(event)),
                SchedulerEffect::Done { task, result } => out.push(Effect::TaskDone { task, result }),
            }
        }
    }

    fn submit(&mut self, spec: Box<JobSpec>, out: &mut Outbox<Effect>) {
        let submitted = NodeEvent::JobSubmitted { job: spec.job, task: spec.task, kind: spec.kind };
        out.push(Effect::Event(submitted));
        self.route(Route::Requester(RequesterInput::Submit(spec)));
    }

    fn append(&mut self, body: Body) {
        self.appends += 1;
        self.route(Route::Ledger(LedgerInput::Append { request: self.appends, body }));
    }

    fn on_command(&mut self, cx: &Ctx<'_>, command: Command, out: &mut Outbox<Effect>) {
        match command {
            Command::Ask(mut spec) => {
                if spec.skills.is_empty() {
                    spec.skills = self.known_skills();
                }
                self.route(Route::Scheduler(SchedulerInput::Ask(spec)));
            }
            Command::Cancel(task) => self.route(Route::Scheduler(SchedulerInput::Cancel(task))),
            Command::Submit(spec) => {
                self.shells.insert(spec.job);
                self.submit(spec, out);
            }
            Command::Withdraw(job) => self.route(Route::Requester(RequesterInput::Cancel(job))),
            Command::Append(body) => self.append(*body),
            Command::Offer(capability) => self.offer(cx.now, Arc::new(*capability)),
            Command::Drain => {
                self.offer = None;
                self.announce_at = None;
                self.append(Body::Retire);
                self.route(Route::Executor(ExecutorInput::Drain));
            }
        }
    }

    /// The skills that nodes with a free hand offer, each once: what a question can be routed to.
    fn known_skills(&self) -> Vec<Skill> {
        let mut skills: Vec<Skill> = Vec::new();
        let offered = self.ledger.capabilities().filter(|(_, capability)| capability.slots > 0);
        for skill in offered.flat_map(|(_, capability)| capability.skills.iter()) {
            if skills.len() < MAX_SKILLS && !skills.iter().any(|known| known.text == skill.text) {
                skills.push(skill.clone());
            }
        }
        skills
    }

    fn offer(&mut self, now: Time, capability: Arc<Capability>) {
        self.announce_at = Some(now + self.config.announce_every);
        self.append(Body::Capability(Arc::clone(&capability)));
        let slots = capability.slots;
        self.route(Route::Executor(ExecutorInput::Offer { capability: Arc::clone(&capability), slots }));
        self.offer = Some(capability);
    }

    fn on_net(&mut self, cx: &mut Ctx<'_>, input: NetInput, out: &mut Outbox<Effect>) {
        match input {
            NetInput::PeerUp(peer) => {
                self.peers += 1;
                if self.peers == 1 {
                    self.publish_offer(out);
                }
                self.route(Route::Ledger(LedgerInput::PeerUp(peer)));
            }
            NetInput::PeerDown(peer) => {
                self.peers = self.peers.saturating_sub(1);
                self.route(Route::Ledger(LedgerInput::PeerDown(peer)));
                self.route(Route::Requester(RequesterInput::PeerDown(peer)));
                self.route(Route::Executor(ExecutorInput::PeerDown(peer)));
            }
            NetInput::Gossip { token, from, topic, bytes } => self.on_gossip(cx, token, from, topic, &bytes, out),
            NetInput::Direct { from, bytes } => self.on_direct(from, &bytes, out),
            NetInput::SendFailed { to } => self.send_failed(to),
        }
    }

    /// Gossips again what the node offers and trains: what it said while it was alone, nobody heard. The first neighbour would learn
    /// of it by reconciliation, and the others each from its neighbour, a round at a time.
    fn publish_offer(&mut self, out: &mut Outbox<Effect>) {
        let stands = |body: &Body| matches!(body, Body::Capability(_) | Body::Policy(_));
        let own = |entry: &&Verified<Entry>| entry.author() == self.me && stands(&entry.body);
        let said: Vec<_> = self.ledger.entries().filter(own).map(Verified::to_wire).collect();
        for entry in said {
            self.publish_ledger(&LedgerGossip::Entry(entry), out);
        }
    }

    pub(crate) fn send_failed(&mut self, to: NodeId) {
        self.route(Route::Requester(RequesterInput::SendFailed { to }));
        self.route(Route::Executor(ExecutorInput::SendFailed { to }));
    }

    fn on_store(&mut self, input: StoreInput) {
        self.route(Route::Ledger(match input {
            StoreInput::Persisted { batch } => LedgerInput::Persisted { batch },
            StoreInput::Failed { batch, reason } => LedgerInput::PersistFailed { batch, reason },
        }));
    }

    fn on_engine(&mut self, input: EngineInput) {
        self.route(match input {
            EngineInput::Progress { run, tokens, text } => {
                Route::Executor(ExecutorInput::Progress { run, tokens, text })
            }
            EngineInput::Done { run, result } => Route::Executor(ExecutorInput::Done { run, result }),
            EngineInput::Embedded { request, embedding } => {
                Route::Scheduler(SchedulerInput::Embedded { request, embedding })
            }
        });
    }

    /// Turns an effect that found its queue full into the failure that it is. Nothing waits for ever on it.
    fn on_overloaded(&mut self, effect: Effect) {
        use chorus_protocol::job::Failure;
        match effect {
            Effect::Send { to, .. } => self.send_failed(to),
            Effect::Persist(PersistBatch { batch, .. }) => {
                let reason = "the disk cannot keep up".to_owned();
                self.route(Route::Ledger(LedgerInput::PersistFailed { batch, reason }));
            }
            Effect::Run { run, .. } => {
                self.route(Route::Executor(ExecutorInput::Done { run, result: Err(Failure::Busy) }));
            }
            Effect::Embed { request, .. } => {
                self.route(Route::Scheduler(SchedulerInput::Embedded { request, embedding: None }));
            }
            // A lost gossip frame heals by reconciliation or by the beacon's next round; a lost stop ends at the run's own
            // deadline; events are for watchers, who can ask again.
            Effect::Publish { .. }
            | Effect::Validate { .. }
            | Effect::Penalise { .. }
            | Effect::Stop { .. }
            | Effect::Task(_)
            | Effect::TaskDone { .. }
            | Effect::Job(_)
            | Effect::JobDone { .. }
            | Effect::Event(_) => {}
        }
    }
}

impl Machine for Node {
    type Input = Input;
    type Effect = Effect;

    fn handle(&mut self, cx: &mut Ctx<'_>, input: Input, out: &mut Outbox<Effect>) {
        match input {
            Input::Net(input) => self.on_net(cx, input, out),
            Input::Command(command) => self.on_command(cx, command, out),
            Input::Store(input) => self.on_store(input),
            Input::Engine(input) => self.on_engine(input),
            Input::Overloaded(effect) => self.on_overloaded(*effect),
        }
        self.run(cx, out);
    }

    fn deadline(&self) -> Option<Time> {
        if !self.routes.is_empty() {
            return Some(Time::ZERO);
        }
        let machines =
            [self.ledger.deadline(), self.requester.deadline(), self.executor.deadline(), self.scheduler.deadline()];
        machines.into_iter().fold(self.announce_at, earliest)
    }

    fn expire(&mut self, cx: &mut Ctx<'_>, out: &mut Outbox<Effect>) {
        if self.announce_at.is_some_and(|at| at <= cx.now)
            && let Some(capability) = self.offer.clone()
        {
            self.offer(cx.now, capability);
        }
        let mut effects = Outbox::new();
        self.ledger.expire(cx, &mut effects);
        self.on_ledger(&mut effects, None, out);
        let mut effects = Outbox::new();
        self.requester.expire(cx, &mut effects);
        self.on_requester(&mut effects, out);
        let mut effects = Outbox::new();
        self.executor.expire(cx, &mut effects);
        self.on_executor(&mut effects, out);
        let mut effects = Outbox::new();
        self.scheduler.expire(cx, &mut effects);
        self.on_scheduler(&mut effects, out);
        self.run(cx, out);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use chorus_machine::Rng;
    use chorus_protocol::policy::{PolicyNotice, Version};
    use chorus_protocol::{Text, WallTime};

    use super::*;
    use crate::io::Topic;

    /// Hands a node one input; its disk answers at once. Returns what it gossiped.
    fn gossiped(node: &mut Node, input: Input) -> Vec<Vec<u8>> {
        let (mut rng, mut out) = (Rng::from_u64(1), Outbox::new());
        let mut cx = Ctx { now: Time::from_millis(1), wall: WallTime::from_millis(1_700_000_000_000), rng: &mut rng };
        node.handle(&mut cx, input, &mut out);
        let mut frames = Vec::new();
        while !out.is_empty() {
            for effect in out.drain().collect::<Vec<_>>() {
                match effect {
                    Effect::Persist(PersistBatch { batch, .. }) => {
                        node.handle(&mut cx, Input::Store(StoreInput::Persisted { batch }), &mut out);
                    }
                    Effect::Publish { topic: Topic::Ledger, bytes } => frames.push(bytes),
                    _ => {}
                }
            }
        }
        frames
    }

    #[test]
    fn what_was_offered_in_solitude_is_said_again_to_the_first_neighbour() {
        let mut node = Node::new(NodeConfig::new("test".parse().unwrap()), SecretKey::from_bytes(&[1; 32]));
        let peer = |n: u8| SecretKey::from_bytes(&[n; 32]).node_id();
        let net = |input| Input::Net(input);
        assert!(gossiped(&mut node, net(NetInput::PeerUp(peer(2)))).is_empty(), "nothing to say yet");
        gossiped(&mut node, net(NetInput::PeerDown(peer(2))));
        let capability = Capability {
            name: Default::default(),
            software: Default::default(),
            models: Default::default(),
            devices: Default::default(),
            slots: 1,
            skills: Default::default(),
            tools: Default::default(),
            sampling: None,
        };
        let said = gossiped(&mut node, Input::Command(Command::Offer(Box::new(capability))));
        assert_eq!(said.len(), 1);
        assert_eq!(gossiped(&mut node, net(NetInput::PeerUp(peer(2)))), said);
        assert!(gossiped(&mut node, net(NetInput::PeerUp(peer(3)))).is_empty(), "the second hears it from the first");
        for n in [2, 3] {
            gossiped(&mut node, net(NetInput::PeerDown(peer(n))));
        }
        assert_eq!(gossiped(&mut node, net(NetInput::PeerUp(peer(4)))), said, "alone again, and not alone any more");
        let notice = PolicyNotice {
            name: Text::truncated("adder"),
            version: Version::default(),
            step: 1,
            environments: Default::default(),
            running: true,
        };
        gossiped(&mut node, net(NetInput::PeerDown(peer(4))));
        let append = |body| Input::Command(Command::Append(Box::new(body)));
        let told = gossiped(&mut node, append(Body::Policy(Box::new(notice))));
        assert_eq!(node.ledger().policies().count(), 1, "the shell may write an entry of its own");
        assert_eq!(gossiped(&mut node, net(NetInput::PeerUp(peer(2)))), [said, told].concat());
    }
}
