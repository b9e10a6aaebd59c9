//! Processes start and die, and the scenario's faults set in and end.

use std::time::Duration;

use chorus_core::{Command, Input, Node, Restored};
use chorus_machine::{Machine, Time};
use chorus_protocol::Text;
use chorus_protocol::job::Failure;

use crate::queue::{Event, HostId, Life};
use crate::scenario::Fault;
use crate::world::World;

/// After a partition has healed, nodes find each other again within this.
const REDIAL_WITHIN: Duration = Duration::from_secs(2);

impl World {
    /// Starts a process with what its disk holds.
    pub(crate) fn start(&mut self, index: HostId) {
        let now = self.now;
        let network_config = self.config.clone();
        let host = &mut self.hosts[index as usize];
        if host.is_up() {
            return;
        }
        // A process's clock starts where it likes; what it shows means nothing elsewhere.
        host.clock.epoch = host.rng.below(1 << 40);
        host.wake = None;
        host.node = Some(Node::new(network_config, host.key.clone()));
        let content = host.disk.read();
        let restored = Restored {
            entries: content.entries.into_values().collect(),
            proofs: content.proofs.into_values().collect(),
            marks: content.marks.into_iter().collect(),
        };
        self.turn(index, |node, cx, out| node.restore(cx, restored, out));
        self.check_survived(index);
        let [fastest, slowest] = self.scenario.swarm.load_ms;
        let loads = Duration::from_secs_f64((fastest + (slowest - fastest) * self.rng.unit()) / 1_000.0);
        let life = self.hosts[index as usize].life;
        self.queue.push(now + loads, Event::Offer { host: index, life });
        self.seek_neighbours(index);
        self.last_change = now;
    }

    /// A process has measured its model, and offers it.
    pub(crate) fn offer(&mut self, index: HostId, life: Life) {
        if self.is_alive(index, life)
            && let Some(capability) = self.hosts[index as usize].capability.clone()
        {
            let command = Input::Command(Command::Offer(Box::new(capability)));
            self.turn(index, |node, cx, out| node.handle(cx, command, out));
        }
    }

    /// What the node published before must be there again.
    fn check_survived(&mut self, index: HostId) {
        let host = &self.hosts[index as usize];
        if let Some(node) = host.node.as_ref().filter(|_| host.is_honest()) {
            let wall = host.clock.wall(self.now);
            self.monitor.check_holds(index, index, node.ledger(), wall, self.now);
        }
    }

    /// Kills a process, or takes the power from its machine.
    pub(crate) fn crash(&mut self, index: HostId, down: Option<Duration>, power: bool) {
        let now = self.now;
        let host = &mut self.hosts[index as usize];
        if host.node.take().is_none() {
            return;
        }
        host.life += 1;
        host.wake = None;
        host.engine.kill();
        host.disk.crash(power, &mut self.rng);
        host.mesh.clear();
        host.rejects.clear();
        host.graylist.clear();
        let peers = std::mem::take(&mut host.peers);
        self.stats.crashes += 1;
        self.stats.tasks_died += self.monitor.on_crashed(index);
        for peer in peers {
            let delay = if power { self.links.detect() } else { self.links.latency(&mut self.rng) };
            let life = self.hosts[peer as usize].life;
            self.queue.push(now + delay, Event::PeerDown { host: peer, life, peer: index });
        }
        if let Some(down) = down {
            self.queue.push(now + down, Event::Start { host: index });
        }
        self.last_change = now;
    }

    /// Plans when a fault sets in.
    pub(crate) fn plan_fault(&mut self, index: u32) {
        let at_ms = match self.scenario.faults[index as usize] {
            Fault::Crash { at_ms, .. }
            | Fault::Partition { at_ms, .. }
            | Fault::Skew { at_ms, .. }
            | Fault::SlowDisk { at_ms, .. }
            | Fault::FullDisk { at_ms, .. }
            | Fault::EngineCrash { at_ms, .. } => at_ms,
        };
        self.queue.push(Time::from_millis(at_ms), Event::Fault { index });
    }

    /// Draws honest nodes that run.
    fn draw_victims(&mut self, count: u32) -> Vec<HostId> {
        let mut running: Vec<HostId> =
            self.hosts.iter().filter(|host| host.is_honest() && host.is_up()).map(|host| host.index).collect();
        self.fault_rng.shuffle(&mut running);
        running.truncate(count as usize);
        running
    }

    pub(crate) fn fault(&mut self, index: u32) {
        let now = self.now;
        self.last_change = now;
        match self.scenario.faults[index as usize].clone() {
            Fault::Crash { count, within_ms, down_ms, power, .. } => {
                for host in self.draw_victims(count) {
                    let at = now + self.fault_rng.between(Duration::ZERO, Duration::from_millis(within_ms));
                    let down = down_ms.map(|ms| ms.saturating_mul(1_000_000));
                    self.queue.push(at, Event::Crash { host, down, power });
                }
            }
            Fault::EngineCrash { count, within_ms, .. } => {
                // One event a fault: engines that break down later are hit by one more event of the same fault.
                let victims = self.draw_victims(count);
                self.victims.insert(index, victims);
                for _ in 0..count {
                    let at = now + self.fault_rng.between(Duration::ZERO, Duration::from_millis(within_ms));
                    self.queue.push(at, Event::FaultOver { index });
                }
            }
            Fault::Partition { share, for_ms, .. } => self.partition(index, share, for_ms),
            Fault::Skew { count, by_ms, .. } => {
                for host in self.draw_victims(count) {
                    let clock = &mut self.host(host).clock;
                    clock.skew_ms = clock.skew_ms.saturating_add(by_ms);
                }
            }
            Fault::SlowDisk { count, factor, for_ms, .. } => {
                let victims = self.draw_victims(count);
                for host in &victims {
                    self.host(*host).disk.slowness = factor.max(1.0);
                }
                self.end_later(index, victims, for_ms);
            }
            Fault::FullDisk { count, for_ms, .. } => {
                let victims = self.draw_victims(count);
                for host in &victims {
                    self.host(*host).disk.full = true;
                }
                self.end_later(index, victims, for_ms);
            }
        }
    }

    fn end_later(&mut self, index: u32, victims: Vec<HostId>, for_ms: u64) {
        self.victims.insert(index, victims);
        self.queue.push(self.now + Duration::from_millis(for_ms), Event::FaultOver { index });
    }

    fn partition(&mut self, index: u32, share: f64, for_ms: u64) {
        let mut all: Vec<HostId> = self.hosts.iter().map(|host| host.index).collect();
        self.fault_rng.shuffle(&mut all);
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "a share of at most 10,000"
        )]
        let cut = (all.len() as f64 * share).round() as usize;
        all.truncate(cut);
        for host in &all {
            self.links.set_part(*host, 1);
        }
        let detect = self.links.detect();
        for host in &self.hosts {
            for peer in host.peers.iter().filter(|peer| !self.links.reach(host.index, **peer)) {
                let event = Event::PeerDown { host: host.index, life: host.life, peer: *peer };
                self.queue.push(self.now + detect, event);
            }
        }
        self.end_later(index, all, for_ms);
    }

    pub(crate) fn fault_over(&mut self, index: u32) {
        self.last_change = self.now;
        let fault = self.scenario.faults[index as usize].clone();
        if let Fault::EngineCrash { .. } = fault {
            if let Some(host) = self.victims.get_mut(&index).and_then(Vec::pop) {
                self.break_engine(host);
            }
            return;
        }
        let victims = self.victims.remove(&index).unwrap_or_default();
        match fault {
            Fault::Partition { .. } => self.heal(&victims),
            Fault::SlowDisk { .. } => victims.iter().for_each(|host| self.host(*host).disk.slowness = 1.0),
            Fault::FullDisk { .. } => victims.iter().for_each(|host| self.host(*host).disk.full = false),
            Fault::Crash { .. } | Fault::Skew { .. } | Fault::EngineCrash { .. } => {}
        }
    }

    fn heal(&mut self, victims: &[HostId]) {
        for host in victims {
            self.links.set_part(*host, 0);
        }
        let pairs: Vec<(HostId, HostId)> = self
            .hosts
            .iter()
            .flat_map(|host| host.neighbours.iter().map(move |peer| (host.index, *peer)))
            .filter(|(a, b)| a < b && !self.hosts[*a as usize].peers.contains(b))
            .collect();
        for (a, b) in pairs {
            let at = self.now + self.links.handshake(&mut self.rng) + self.rng.between(Duration::ZERO, REDIAL_WITHIN);
            self.queue.push(at, Event::PeerUp { a, b });
        }
    }

    fn break_engine(&mut self, index: HostId) {
        let back = self.now + Duration::from_millis(self.scenario.swarm.engine_restart_ms);
        for run in self.host(index).engine.break_down(back) {
            let failure = Failure::Engine(Text::truncated("the engine broke down"));
            self.end_run(index, run, failure, Duration::ZERO);
        }
        self.stats.engine_crashes += 1;
    }

    /// A user asks an honest node that runs.
    pub(crate) fn ask(&mut self, task: u32) {
        let most = if self.scenario.work.askers == 0 { usize::MAX } else { self.scenario.work.askers as usize };
        let asks = self.hosts.iter().filter(|host| host.is_honest() && host.is_up());
        let running: Vec<HostId> = asks.take(most).map(|host| host.index).collect();
        let Some(question) = self.questions.get(task as usize).filter(|_| !running.is_empty()) else { return };
        let place = usize::try_from(question.who % running.len() as u64).unwrap_or(0);
        let (host, spec, deadline) = (running[place], question.spec(), question.deadline);
        // The node counts on its own clock.
        let clock = self.hosts[host as usize].clock;
        let due = clock.world(clock.local(self.now) + deadline);
        self.monitor.on_asked(host, spec.task, due);
        self.stats.tasks_asked += 1;
        let command = Input::Command(Command::Ask(Box::new(spec)));
        self.turn(host, |node, cx, out| node.handle(cx, command, out));
    }
}
