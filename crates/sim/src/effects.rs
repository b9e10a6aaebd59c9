//! What a node wants done, and how the world does it: disk, engine, embedder, and what the monitor is shown first.

use std::time::Duration;

use chorus_core::{
    Effect, EngineInput, Input, LedgerEvent, NodeEvent, PersistBatch, RunId, StoreInput, TaskEventKind, Topic,
};
use chorus_ledger::receipt_work;
use chorus_machine::{Machine, Time};
use chorus_protocol::Embedding;
use chorus_protocol::Received;
use chorus_protocol::beacon::Work;
use chorus_protocol::entry::Body;
use chorus_protocol::job::{Failure, JobKind, Payload};
use chorus_protocol::message::{Direct, Frame, LedgerGossip};

use crate::adversary::Passed;
use crate::engine::Step;
use crate::invariant::Invariant;
use crate::mutant::{Mutant, accept_anyway, grant_again};
use crate::network::GRANT;
use crate::queue::{Event, HostId, Life};
use crate::world::World;

/// How long a stopped engine takes to say so.
const STOP_TAKES: Duration = Duration::from_millis(1);
/// What a full disk says.
const DISK_FULL: &str = "no space left on device";

impl World {
    /// Shows an honest node's effects to the monitor, before any of them is carried out.
    pub(crate) fn show_monitor(&mut self, index: HostId, effects: &mut Vec<Effect>) {
        let mut leases_changed = false;
        for effect in effects.iter() {
            if let Effect::Task(event) = effect {
                self.monitor.on_task_event(index, event, self.now);
                if let Some(lines) = &mut self.watched {
                    lines.push(format!("{} node {index} task {:?} {:?}", self.now, event.task, event.kind));
                }
                leases_changed |= matches!(event.kind, TaskEventKind::Elected { .. } | TaskEventKind::Lost { .. });
            }
        }
        if leases_changed && let Some(node) = &self.hosts[index as usize].node {
            let leases = node.requester().leases().map(|lease| (lease.lease, lease.fence, lease.executor));
            self.monitor.on_leases(index, leases, self.now);
        }
        self.mutate(index, effects);
        for effect in effects.iter() {
            self.show_effect(index, effect);
        }
    }

    fn mutate(&mut self, index: HostId, effects: &mut Vec<Effect>) {
        match self.mutant {
            Mutant::GrantsTwice => {
                let others: Vec<_> = self.hosts.iter().map(|host| host.id).collect();
                let host = &self.hosts[index as usize];
                let second: Vec<Effect> = effects
                    .iter()
                    .filter_map(|effect| match effect {
                        Effect::Send { bytes, .. } => {
                            grant_again(&host.key, &self.network, bytes, &others, &mut self.rng)
                        }
                        _ => None,
                    })
                    .collect();
                effects.extend(second);
            }
            Mutant::EndsTwice => {
                let ended = effects.iter().filter_map(|effect| match effect {
                    Effect::TaskDone { task, .. } => Some(*task),
                    _ => None,
                });
                let again: Vec<_> = ended.collect();
                let cancelled = |task| Effect::TaskDone { task, result: Err(chorus_core::TaskError::Cancelled) };
                effects.extend(again.into_iter().map(cancelled));
            }
            Mutant::NeverEnds => effects.retain(|effect| !matches!(effect, Effect::TaskDone { .. })),
            Mutant::None | Mutant::Disk(_) | Mutant::IgnoresFences | Mutant::RunsAnything => {}
        }
    }

    fn show_effect(&mut self, index: HostId, effect: &Effect) {
        let now = self.now;
        match effect {
            Effect::Persist(batch) => self.show_batch(index, batch),
            Effect::Publish { topic: Topic::Ledger, bytes } => self.show_publication(index, bytes),
            Effect::Send { bytes, .. } => {
                if let Some(Ok(Direct::Grant { lease, .. })) = is_grant(bytes).then(|| Direct::from_bytes(bytes))
                    && let Ok(lease) = lease.trust_own_disk(&self.network)
                {
                    self.monitor.on_grant(index, &lease, now);
                }
            }
            Effect::Run { run, .. } => {
                let me = self.hosts[index as usize].id;
                self.monitor.on_run(index, me, *run, now);
            }
            Effect::TaskDone { task, result } => {
                self.monitor.on_task_done(index, *task, now);
                let answer = result.as_ref().ok().map(|answer| &**answer);
                self.stats.task_done(answer, result.as_ref().err().map(chorus_core::TaskError::kind));
            }
            Effect::Event(NodeEvent::Ledger(LedgerEvent::Quarantined { node })) => {
                self.monitor.on_quarantined(index, *node, now);
            }
            Effect::Penalise { peer, .. } => {
                let honest = self.monitor.host(peer).is_some_and(|peer| self.hosts[peer as usize].is_honest());
                *(if honest { &mut self.stats.penalties_honest } else { &mut self.stats.penalties }) += 1;
            }
            Effect::Event(NodeEvent::FrameTooLarge { .. }) => self.stats.frames_too_large += 1,
            Effect::Event(NodeEvent::AppendFailed { .. }) => self.stats.appends_failed += 1,
            _ => {}
        }
    }

    /// Looks for own entries, and among them for receipts.
    fn show_batch(&mut self, index: HostId, batch: &PersistBatch) {
        let me = self.hosts[index as usize].id;
        for entry in batch.puts.iter().filter(|entry| entry.author() == me) {
            self.monitor.on_written(entry.hash());
            if let Body::Receipt(receipt) = &entry.body
                && let Some(work) = receipt_work(entry, &self.network)
            {
                self.monitor.on_receipt(index, receipt.verdict, &work, self.now);
            }
        }
    }

    fn show_publication(&mut self, index: HostId, bytes: &[u8]) {
        let host = &self.hosts[index as usize];
        let Ok(LedgerGossip::Entry(entry)) = LedgerGossip::from_bytes(bytes) else { return };
        if entry.claimed_author() != host.id {
            return;
        }
        let Ok(entry) = entry.trust_own_disk(&self.network) else { return };
        let on_disk = host.disk.holds(&(host.id, entry.seq), &entry.hash());
        self.monitor.on_published(index, &entry, on_disk, self.now);
        self.last_change = self.now;
    }

    /// An honest node that accepts whatever result comes; see [`Mutant::IgnoresFences`].
    pub(crate) fn accept_anyway(&mut self, index: HostId, work: Received<Work>) {
        let host = &self.hosts[index as usize];
        let effect = accept_anyway(&host.key, &self.network, host.clock.wall(self.now), work);
        if let Some(Effect::Persist(batch)) = effect {
            self.show_batch(index, &batch);
        }
    }

    /// Lets an effect pass through whoever stands in its way.
    pub(crate) fn pass(&mut self, index: HostId, effect: Effect) {
        let host = &mut self.hosts[index as usize];
        let passed = match &mut host.adversary {
            None => Passed::Now(effect),
            Some(adversary) => adversary.pass(&host.key, &self.network, effect),
        };
        match passed {
            Passed::Now(effect) => self.carry_out(index, effect),
            Passed::Later(delay, effect) => {
                let life = self.hosts[index as usize].life;
                self.queue.push(self.now + delay, Event::HeldBack { host: index, life, effect: Box::new(effect) });
            }
            Passed::Never => {}
        }
    }

    /// Does what a node wants done.
    pub(crate) fn carry_out(&mut self, index: HostId, effect: Effect) {
        match effect {
            Effect::Publish { topic, bytes } => self.publish(index, topic, bytes, None),
            Effect::Send { to, bytes } => self.send(index, to, bytes),
            Effect::Validate { token, acceptance } => self.verdict(index, token, &acceptance),
            Effect::Persist(batch) => self.persist(index, batch),
            Effect::Run { run, kind, payload, deadline } => self.run_engine(index, run, kind, payload, deadline),
            Effect::Stop { run } => {
                if self.host(index).engine.stop(run) {
                    self.end_run(index, run, Failure::Cancelled, STOP_TAKES);
                }
            }
            Effect::Embed { request, text } => self.embed(index, request, &text),
            Effect::Penalise { .. }
            | Effect::Task(_)
            | Effect::TaskDone { .. }
            | Effect::Job(_)
            | Effect::JobDone { .. }
            | Effect::Event(_) => {}
        }
    }

    fn persist(&mut self, index: HostId, batch: PersistBatch) {
        let host = &mut self.hosts[index as usize];
        if let Some(delay) = host.disk.write(batch, &mut self.rng) {
            self.queue.push(self.now + delay, Event::Disk { host: index, life: host.life });
        }
    }

    pub(crate) fn disk_commits(&mut self, index: HostId, life: Life) {
        if !self.is_alive(index, life) {
            return;
        }
        let committed = self.hosts[index as usize].disk.commit(&mut self.rng);
        if let Some(delay) = committed.next {
            self.queue.push(self.now + delay, Event::Disk { host: index, life });
        }
        for batch in committed.batches {
            let input = if committed.refused {
                StoreInput::Failed { batch, reason: DISK_FULL.to_owned() }
            } else {
                StoreInput::Persisted { batch }
            };
            self.turn(index, |node, cx, out| node.handle(cx, Input::Store(input), out));
        }
    }

    fn run_engine(&mut self, index: HostId, run: RunId, kind: JobKind, payload: Box<Payload>, deadline: Time) {
        let now = self.now;
        let host = &mut self.hosts[index as usize];
        let deadline = host.clock.world(deadline);
        let slots = host.capability.as_ref().map_or(0, |capability| usize::from(capability.slots));
        match host.engine.start(run, kind, payload, deadline, now, &mut self.rng) {
            Ok((number, speaks)) => {
                if host.is_honest() && host.engine.active() > slots {
                    let seen = format!("{} runs share {slots} slots", host.engine.active());
                    self.monitor.broken(Invariant::BoundedQueues, now, index, seen);
                }
                let life = self.hosts[index as usize].life;
                self.queue.push(speaks, Event::Engine { host: index, life, run: number });
            }
            Err(failure) => self.end_run(index, run, failure, Duration::ZERO),
        }
    }

    pub(crate) fn end_run(&mut self, index: HostId, run: RunId, failure: Failure, after: Duration) {
        let life = self.hosts[index as usize].life;
        self.queue.push(self.now + after, Event::RunEnded { host: index, life, ended: Box::new((run, failure)) });
    }

    pub(crate) fn run_ended(&mut self, index: HostId, life: Life, (run, failure): (RunId, Failure)) {
        if self.is_alive(index, life) {
            let input = Input::Engine(EngineInput::Done { run, result: Err(failure) });
            self.turn(index, |node, cx, out| node.handle(cx, input, out));
        }
    }

    pub(crate) fn engine_speaks(&mut self, index: HostId, life: Life, number: u64) {
        if !self.is_alive(index, life) {
            return;
        }
        let now = self.now;
        let input = match self.host(index).engine.step(number, now) {
            Step::Progress { run, tokens, text, next } => {
                self.queue.push(next, Event::Engine { host: index, life, run: number });
                EngineInput::Progress { run, tokens, text }
            }
            Step::Done { run, result } => EngineInput::Done { run, result },
            Step::Silent => return,
        };
        self.turn(index, |node, cx, out| node.handle(cx, Input::Engine(input), out));
    }

    fn embed(&mut self, index: HostId, request: u64, text: &str) {
        let [fastest, slowest] = self.scenario.swarm.embed_ms;
        let takes = Duration::from_secs_f64((fastest + (slowest - fastest) * self.rng.unit()) / 1_000.0);
        let embedding = Box::new(self.embedder.embed(text));
        let life = self.hosts[index as usize].life;
        self.queue.push(self.now + takes, Event::Embedded { host: index, life, request, embedding });
    }

    pub(crate) fn embedded(&mut self, index: HostId, life: Life, request: u64, embedding: Embedding) {
        if self.is_alive(index, life) {
            let input = Input::Engine(EngineInput::Embedded { request, embedding: Some(embedding) });
            self.turn(index, |node, cx, out| node.handle(cx, input, out));
        }
    }
}

/// Returns whether a direct frame is a grant, without decoding it: the first byte tells messages apart.
fn is_grant(bytes: &[u8]) -> bool {
    bytes.first() == Some(&GRANT)
}
