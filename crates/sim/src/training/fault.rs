//! What goes wrong: sessions that break, machines that die and come back, a network in parts.

use std::time::Duration;

use chorus_machine::Time;

use super::disk::draw_ms;
use super::scenario::Fault;
use super::session::{Pair, Place, pair};
use super::world::{Event, World};

impl World {
    /// Returns everybody with whom a node may have a session.
    pub(super) fn contacts(&self, place: Place) -> Vec<Place> {
        if place == 0 {
            return (1..=self.scenario.samplers).collect();
        }
        let mut contacts = self.hosts[place as usize].neighbours.clone();
        contacts.insert(0);
        contacts.into_iter().collect()
    }

    /// Plans an attempt to connect, unless one is planned.
    pub(super) fn dial(&mut self, pair: Pair) {
        let after = draw_ms(self.scenario.link.redial_ms, &mut self.rng) + self.latency(pair) * 3;
        let session = self.sessions.entry(pair).or_default();
        if !session.up && !session.dialling {
            session.dialling = true;
            self.queue.push(self.now + after, Event::Dial { pair });
        }
    }

    /// Connects two nodes, if both are there. Whoever did not notice the end of the last session is told of it first.
    pub(super) fn connect(&mut self, pair: Pair) {
        let (a, b) = pair;
        let session = self.sessions.entry(pair).or_default();
        session.dialling = false;
        let both = self.hosts[a as usize].process.is_some() && self.hosts[b as usize].process.is_some();
        if session.up || !both {
            return; // Whoever starts dials.
        }
        if self.hosts[a as usize].access.part != self.hosts[b as usize].access.part {
            return self.dial(pair);
        }
        self.notice(pair, a);
        self.notice(pair, b);
        let session = self.sessions.entry(pair).or_default();
        (session.up, session.believes) = (true, [true, true]);
        self.session_up(b, a);
        self.session_up(a, b);
    }

    /// Breaks a session. Each side that lives notices after a while.
    pub(super) fn break_session(&mut self, pair: Pair, notice: Duration) {
        let Some(session) = self.sessions.get_mut(&pair).filter(|session| session.up) else { return };
        session.up = false;
        session.epoch += 1;
        for (place, peer) in [pair, (pair.1, pair.0)] {
            let life = self.hosts[place as usize].life;
            self.queue.push(self.now + notice, Event::Down { place, life, peer });
        }
    }

    /// Tells one side that its session is gone, if it believes otherwise.
    pub(super) fn notice(&mut self, pair: Pair, place: Place) {
        let Some(session) = self.sessions.get_mut(&pair).filter(|session| !session.up) else { return };
        let belief = session.belief(pair, place);
        if std::mem::replace(belief, false) {
            let peer = if pair.0 == place { pair.1 } else { pair.0 };
            self.session_down(place, peer);
            self.dial(pair);
        }
    }

    pub(super) fn down(&mut self, place: Place, life: u32, peer: Place) {
        if self.is_alive(place, life) {
            self.notice(pair(place, peer), place);
        }
    }

    /// Kills a process.
    pub(super) fn crash(&mut self, place: Place, down: Option<Duration>, power: bool) {
        let Some(process) = self.hosts[place as usize].process.take() else { return };
        let host = &mut self.hosts[place as usize];
        host.life += 1;
        host.lost = down.is_none();
        host.disk.crash(&mut self.fault_rng);
        self.stats.crashes += 1;
        let notice = if power { self.detect() } else { self.hosts[place as usize].access.delay };
        for peer in self.contacts(place) {
            self.break_session(pair(place, peer), notice);
            if let Some(session) = self.sessions.get_mut(&pair(place, peer)) {
                *session.belief(pair(place, peer), place) = false;
            }
        }
        self.process_died(place, process);
        if let Some(down) = down {
            self.queue.push(self.now + down, Event::Start { place });
        }
    }

    pub(super) fn detect(&self) -> Duration {
        Duration::from_secs_f64(self.scenario.link.detect_ms / 1_000.0)
    }

    /// Plans when faults set in.
    pub(super) fn plan_faults(&mut self) {
        for (index, fault) in self.scenario.faults.iter().enumerate() {
            self.queue.push(Time::from_millis(fault.span_ms().0), Event::Fault { index });
        }
    }

    /// Draws samplers that run.
    fn draw(&mut self, count: u32) -> Vec<Place> {
        let mut running: Vec<Place> =
            (1..=self.scenario.samplers).filter(|place| self.hosts[*place as usize].process.is_some()).collect();
        self.fault_rng.shuffle(&mut running);
        running.truncate(count as usize);
        running
    }

    fn moment(&mut self, within_ms: u64) -> Time {
        self.now + self.fault_rng.between(Duration::ZERO, Duration::from_millis(within_ms))
    }

    pub(super) fn fault(&mut self, index: usize) {
        let over = |ms| self.now + Duration::from_millis(ms);
        match self.scenario.faults[index].clone() {
            Fault::Crash { count, within_ms, down_ms, power, .. } => {
                for place in self.draw(count) {
                    let at = self.moment(within_ms);
                    self.queue.push(at, Event::Crash { place, down: down_ms.map(Duration::from_millis), power });
                }
            }
            Fault::TrainerCrash { down_ms, power, .. } => {
                self.crash(0, Some(Duration::from_millis(down_ms)), power);
            }
            Fault::Partition { share, for_ms, .. } => {
                self.queue.push(over(for_ms), Event::FaultOver { index });
                #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of at most 10,000")]
                let count = (f64::from(self.scenario.samplers) * share).round() as u32;
                let cut = self.draw(count);
                cut.iter().for_each(|place| self.hosts[*place as usize].access.part = 1);
                let parted: Vec<Pair> = self.sessions.keys().copied().filter(|pair| self.is_parted(*pair)).collect();
                let detect = self.detect();
                parted.into_iter().for_each(|pair| self.break_session(pair, detect));
            }
            Fault::BrokenSessions { count, within_ms, .. } => {
                let mut all: Vec<Pair> = self.sessions.keys().copied().collect();
                self.fault_rng.shuffle(&mut all);
                for pair in all.into_iter().take(count as usize) {
                    let at = self.moment(within_ms);
                    self.queue.push(at, Event::Break { pair });
                }
            }
            Fault::FullDisk { count, trainer, for_ms, .. } => {
                self.queue.push(over(for_ms), Event::FaultOver { index });
                let mut hit = self.draw(count);
                hit.extend(trainer.then_some(0));
                hit.iter().for_each(|place| self.hosts[*place as usize].disk.full = true);
            }
        }
    }

    fn is_parted(&self, (a, b): Pair) -> bool {
        self.hosts[a as usize].access.part != self.hosts[b as usize].access.part
    }

    pub(super) fn fault_over(&mut self, index: usize) {
        match self.scenario.faults[index] {
            Fault::Partition { .. } => self.hosts.iter_mut().for_each(|host| host.access.part = 0),
            Fault::FullDisk { .. } => self.hosts.iter_mut().for_each(|host| host.disk.full = false),
            _ => {}
        }
    }
}
