//! The world: nodes, time, and everything between them.
//!
//! ```text
//!            ┌───────────────────────── World ─────────────────────────┐
//!  Scenario ▶│ Queue ──Event──▶ turn(host) ──Input──▶ core::Node       │──▶ Report, trace hash
//!  seed      │   ▲                                        │ Effect     │
//!            │   └── links, gossip, disk, engine ◀────────┤            │──▶ the first Violation
//!            │                                            ▼            │
//!            │                                  Monitor (invariants)   │
//!            └─────────────────────────────────────────────────────────┘
//! ```
//!
//! 1. The next event is taken from the queue and added to the trace; time jumps to it.
//! 2. The host it concerns takes a turn: one input, or its own deadline. Nothing else happens meanwhile.
//! 3. The effects of the turn are shown to the monitor, then carried out by models of network, disk and engine, which plan events.
//! 4. Every tenth of a virtual second the world looks at itself: queue bounds, overdue tasks, whether ledgers agree.
//!
//! A node that is an adversary takes the same turns; only its effects pass through [`crate::adversary`] first.

use std::collections::BTreeMap;
use std::time::Duration;

use chorus_core::{Effect, Node, NodeConfig};
use chorus_machine::{Ctx, Machine, Outbox, Rng, Time};
use chorus_protocol::{NetworkId, memo};

use crate::disk::{Disk, DiskBug};
use crate::embedder::Embedder;
use crate::gossip::Gossip;
use crate::host::{self, Host};
use crate::invariant::{Invariant, Monitor};
use crate::link::Links;
use crate::mutant::Mutant;
use crate::queue::{Event, HostId, Queue};
use crate::report::{Outcome, Stats};
use crate::scenario::Scenario;
use crate::trace::{Trace, tag};
use crate::workload::{self, Question};

/// How often the world looks at itself.
pub const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long a run goes on past its scenario while ledgers differ and no bound says otherwise.
const PATIENCE: Duration = Duration::from_secs(10);
/// Verified records that a run remembers, so that each is verified once and not once a node.
const MAX_REMEMBERED: usize = 1 << 20;
/// Turns of one host at one moment before it counts as spinning.
const MAX_TURNS_AT_ONCE: u32 = 2_000;

/// A simulated swarm.
#[derive(Debug)]
pub struct World {
    pub(crate) scenario: Scenario,
    pub(crate) config: NodeConfig,
    pub(crate) network: NetworkId,
    pub(crate) now: Time,
    pub(crate) queue: Queue,
    pub(crate) hosts: Vec<Host>,
    pub(crate) links: Links,
    pub(crate) gossip: Gossip,
    pub(crate) embedder: Embedder,
    pub(crate) monitor: Monitor,
    pub(crate) stats: Stats,
    pub(crate) questions: Vec<Question>,
    /// Randomness of links, disks and engines.
    pub(crate) rng: Rng,
    /// Randomness of faults.
    pub(crate) fault_rng: Rng,
    /// Whom each fault has hit.
    pub(crate) victims: BTreeMap<u32, Vec<HostId>>,
    pub(crate) mutant: Mutant,
    /// The gossiped frame whose verdict is awaited, and who brought it.
    pub(crate) delivering: Option<(u32, HostId)>,
    /// When the last thing happened after which ledgers have to catch up.
    pub(crate) last_change: Time,
    /// Since when all honest connected nodes hold equal ledgers.
    pub(crate) equal_since: Option<Time>,
    pub(crate) seed: u64,
    /// Events of tasks in words, while somebody watches.
    pub(crate) watched: Option<Vec<String>>,
    trace: Trace,
    outbox: Outbox<Effect>,
    /// The effects of the turn that is being taken.
    effects: Vec<Effect>,
    turns_at_once: (Time, HostId, u32),
}

impl World {
    /// Makes the world of a scenario. `seed` takes the place of the scenario's own.
    #[must_use]
    pub fn new(scenario: Scenario, seed: u64, mutant: Mutant) -> Self {
        let mut rng = Rng::from_u64(seed);
        let network: NetworkId = "sim".parse().expect("a short lower-case word is a network's name");
        let mut config = NodeConfig::new(network.clone());
        config.ledger.sync_interval = Duration::from_millis(scenario.swarm.sync_interval_ms.max(1));
        if let Some(most) = scenario.swarm.bid_window_max_ms {
            config.beacon.window_max = Duration::from_millis(most);
        }
        let mut embedder = Embedder::default();
        let hosts = build_hosts(&scenario, mutant, &mut rng, &mut embedder);
        let monitor = Monitor::new(hosts.iter().map(|host| (host.index, host.id, host.is_honest())));
        let questions = workload::draw(&scenario, &mut rng.fork());
        let mut world = Self {
            config,
            network,
            now: Time::ZERO,
            queue: Queue::default(),
            links: Links::new(scenario.link.clone(), hosts.len()),
            gossip: Gossip::new(scenario.gossip.clone(), hosts.len()),
            embedder,
            monitor,
            stats: Stats::default(),
            questions,
            fault_rng: rng.fork(),
            rng: rng.fork(),
            victims: BTreeMap::new(),
            mutant,
            delivering: None,
            last_change: Time::ZERO,
            equal_since: None,
            seed,
            watched: None,
            trace: Trace::default(),
            outbox: Outbox::new(),
            effects: Vec::new(),
            turns_at_once: (Time::ZERO, 0, 0),
            hosts,
            scenario,
        };
        world.plan();
        world
    }

    /// Plans what the scenario says will happen.
    fn plan(&mut self) {
        let within = Duration::from_millis(self.scenario.swarm.start_within_ms);
        for index in 0..self.scenario.nodes {
            let at = Time::ZERO + self.rng.between(Duration::ZERO, within);
            self.queue.push(at, Event::Start { host: index });
        }
        for (task, question) in (0u32..).zip(&self.questions) {
            self.queue.push(question.at, Event::Ask { task });
        }
        let faults = u32::try_from(self.scenario.faults.len()).unwrap_or(u32::MAX);
        (0..faults).for_each(|index| self.plan_fault(index));
        let groups = self.scenario.adversaries.iter().flat_map(|group| (0..group.count).map(move |_| group.from_ms));
        for (host, from_ms) in (0u32..).zip(groups) {
            self.queue.push(Time::from_millis(from_ms), Event::Attack { host });
        }
        self.queue.push(Time::ZERO + LOOK_EVERY, Event::Look);
    }

    /// Keeps the events of all tasks, in words.
    #[must_use]
    pub fn watching(mut self) -> Self {
        self.watched = Some(Vec::new());
        self
    }

    /// Runs to the end, or to the first violation.
    pub fn run(&mut self) -> Outcome {
        let _before = memo::remember(MAX_REMEMBERED);
        let end = Time::ZERO + self.scenario.duration();
        let patience = self.scenario.bounds.converge_ms.map_or(PATIENCE, Duration::from_millis);
        let last = end + patience;
        while self.monitor.violation().is_none() {
            let Some(next) = self.queue.next_at() else {
                break;
            };
            // Past the end only a disagreement keeps the world going.
            if next > end && (self.equal_since.is_some() || next > last) {
                break;
            }
            let Some((at, event)) = self.queue.pop() else {
                break;
            };
            self.now = at;
            self.record(&event);
            self.happen(event);
        }
        if self.monitor.violation().is_none() {
            self.check_at_end();
        }
        self.stats.records = memo::remember(0);
        let trace = (self.trace.events(), self.trace.hash());
        Outcome::of(self, trace)
    }

    fn record(&mut self, event: &Event) {
        let (kind, host, detail) = match event {
            Event::Start { host } => (0, *host, 0),
            Event::Crash { host, .. } => (1, *host, 0),
            Event::Wake { host, life } => (2, *host, u64::from(*life)),
            Event::Gossip { host, frame, from } => {
                (3, *host, self.gossip.frame(*frame).map_or(0, |frame| frame.tag) ^ u64::from(*from))
            }
            Event::Direct { host, bytes, from, .. } => (4, *host, tag(bytes) ^ u64::from(*from)),
            Event::SendFailed { host, to, .. } => (5, *host, u64::from(*to)),
            Event::PeerUp { a, b } => (6, *a, u64::from(*b)),
            Event::PeerDown { host, peer, .. } => (7, *host, u64::from(*peer)),
            Event::Disk { host, .. } => (8, *host, 0),
            Event::Engine { host, run, .. } => (9, *host, *run),
            Event::RunEnded { host, ended, .. } => (10, *host, ended.0.fence),
            Event::Embedded { host, request, .. } => (11, *host, *request),
            Event::Ask { task } => (12, 0, u64::from(*task)),
            Event::Fault { index } => (13, 0, u64::from(*index)),
            Event::FaultOver { index } => (14, 0, u64::from(*index)),
            Event::HeldBack { host, .. } => (15, *host, 0),
            Event::Attack { host } => (16, *host, 0),
            Event::Look => (17, 0, 0),
            Event::Offer { host, .. } => (18, *host, 0),
        };
        self.trace.add(self.now, kind, host, detail);
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Start { host } => self.start(host),
            Event::Offer { host, life } => self.offer(host, life),
            Event::Crash { host, down, power } => self.crash(host, down.map(Duration::from_nanos), power),
            Event::Wake { host, life } => self.wake(host, life),
            Event::Gossip { host, from, frame } => self.arrive_gossip(host, from, frame),
            Event::Direct { host, from, life, bytes } => self.arrive_direct(host, from, life, bytes),
            Event::SendFailed { host, life, to } => self.send_failed(host, life, to),
            Event::PeerUp { a, b } => self.connect(a, b),
            Event::PeerDown { host, life, peer } => self.peer_down(host, life, peer),
            Event::Disk { host, life } => self.disk_commits(host, life),
            Event::Engine { host, life, run } => self.engine_speaks(host, life, run),
            Event::RunEnded { host, life, ended } => self.run_ended(host, life, *ended),
            Event::Embedded { host, life, request, embedding } => self.embedded(host, life, request, *embedding),
            Event::Ask { task } => self.ask(task),
            Event::Fault { index } => self.fault(index),
            Event::FaultOver { index } => self.fault_over(index),
            Event::HeldBack { host, life, effect } => {
                if self.is_alive(host, life) {
                    self.carry_out(host, *effect);
                }
            }
            Event::Attack { host } => self.attack(host),
            Event::Look => self.look(),
        }
    }

    /// Returns whether a process is still the one that something was planned for.
    pub(crate) fn is_alive(&self, host: HostId, life: u32) -> bool {
        self.hosts.get(host as usize).is_some_and(|host| host.is_up() && host.life == life)
    }

    pub(crate) fn host(&mut self, host: HostId) -> &mut Host {
        &mut self.hosts[host as usize]
    }

    /// Lets a host take a turn, and carries out what it wants done.
    pub(crate) fn turn(&mut self, index: HostId, act: impl FnOnce(&mut Node, &mut Ctx<'_>, &mut Outbox<Effect>)) {
        let now = self.now;
        let host = &mut self.hosts[index as usize];
        let Some(node) = host.node.as_mut() else {
            return;
        };
        let mut cx = Ctx { now: host.clock.local(now), wall: host.clock.wall(now), rng: &mut host.rng };
        act(node, &mut cx, &mut self.outbox);
        self.stats.turns += 1;
        self.stats.most_effects = self.stats.most_effects.max(self.outbox.len() as u64);
        let mut effects = std::mem::take(&mut self.effects);
        effects.extend(self.outbox.drain());
        if self.hosts[index as usize].is_honest() {
            self.show_monitor(index, &mut effects);
        }
        for effect in effects.drain(..) {
            self.pass(index, effect);
        }
        self.effects = effects;
        self.plan_wake(index);
    }

    /// Plans the host's next wake-up, unless an earlier one is planned already.
    fn plan_wake(&mut self, index: HostId) {
        let now = self.now;
        let host = &mut self.hosts[index as usize];
        let Some(deadline) = host.node.as_ref().and_then(Machine::deadline) else {
            return;
        };
        let at = host.clock.world(deadline).max(now);
        if host.wake.is_none_or(|planned| at < planned) {
            host.wake = Some(at);
            self.queue.push(at, Event::Wake { host: index, life: host.life });
        }
    }

    fn wake(&mut self, index: HostId, life: u32) {
        if !self.is_alive(index, life) {
            return;
        }
        let now = self.now;
        let host = &mut self.hosts[index as usize];
        if host.wake != Some(now) {
            return;
        }
        host.wake = None;
        let deadline = host.node.as_ref().and_then(Machine::deadline);
        if deadline.is_none_or(|deadline| deadline > host.clock.local(now)) {
            self.plan_wake(index);
            return;
        }
        let (at, who, turns) = self.turns_at_once;
        self.turns_at_once = if (at, who) == (now, index) { (at, who, turns + 1) } else { (now, index, 1) };
        if turns > MAX_TURNS_AT_ONCE {
            let seen = format!("it wants {turns} turns at one moment");
            self.monitor.broken(Invariant::BoundedQueues, now, index, seen);
        }
        self.turn(index, |node, cx, out| node.expire(cx, out));
    }
}

fn build_hosts(scenario: &Scenario, mutant: Mutant, rng: &mut Rng, embedder: &mut Embedder) -> Vec<Host> {
    // Adversaries have the first places; the graph and everything else is drawn, so places mean nothing.
    let mut kinds = scenario.adversaries.iter().flat_map(|group| std::iter::repeat_n(group.kind, group.count as usize));
    let bug = match mutant {
        Mutant::Disk(bug) => bug,
        _ => DiskBug::None,
    };
    let mut hosts: Vec<Host> = (0..scenario.nodes)
        .map(|index| {
            let disk = Disk::new(scenario.swarm.disk_ms, bug);
            host::build(index, &scenario.swarm, kinds.next(), disk, rng.fork(), embedder)
        })
        .collect();
    host::draw_neighbours(&mut hosts, scenario.gossip.peers, rng);
    hosts
}
