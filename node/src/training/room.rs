//! The loop of a training room.

use std::sync::Arc;
use std::time::{Duration, Instant};

use chorus_core::{JobDone, JobError, JobEvent, RunId};
use chorus_machine::Time;
use chorus_net::{BulkEvent, NetHandle, SessionId};
use chorus_protocol::capability::SamplingOffer;
use chorus_protocol::policy::{Manifest, PolicyId};
use chorus_protocol::rollout::Bulk;
use chorus_protocol::{Admitted, Hash, JobId, NodeId};
use chorus_rollout::broadcast::BroadcastInput;
use chorus_rollout::sampler::SamplerInput;
use chorus_trainer::train::Curve;
use serde_json::Value;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::commons::Commons;
use super::disk::Done;
use super::evidence;
use super::exchange::{self, Exchange};
use super::external::Desk;
use super::hires::Hires;
use super::learning::Learned;
use super::lease::Grant;
use super::notice::is_trained;
use super::sampler::{Drawn, SamplerRole};
use super::trainer::TrainerRole;
use crate::driver::NodeHandle;

/// How often other holders of the policy are looked for: soon at first, then now and then.
const SEEK: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(10));
/// The longest sleep: a guard against a deadline that was forgotten.
const MAX_SLEEP: Duration = Duration::from_secs(1);

/// What the control plane tells a room.
pub(crate) enum News {
    /// Nodes that the DHT names as holders of something.
    Providers(Hash, Vec<NodeId>),
    /// A node is connected.
    PeerUp(NodeId),
    /// A node is not spoken with any more.
    Banned(NodeId),
    /// What a node offers to sample, by the ledger; none if it does not any more.
    Offer { node: NodeId, offer: Option<SamplingOffer> },
    /// Whether a policy is trained, by the ledger; none if that does not say any more.
    Policy { policy: PolicyId, running: Option<bool> },
    /// This node got a lease to sample.
    Granted(Grant),
    /// A run of this node is taken back; not necessarily one of the room's.
    Stop(RunId),
    /// Something happened to a job of the room's own.
    Job(JobEvent),
    /// Such a job has ended.
    JobDone { job: JobId, result: Result<Box<JobDone>, JobError> },
}

/// What the API asks of a room.
pub(super) enum Ask {
    Status(oneshot::Sender<Value>),
    Curve(oneshot::Sender<Option<Curve>>),
    Evidence(Hash, exchange::Reply),
}

/// Where inputs come from, whichever room is open.
pub(super) struct Sources {
    pub(super) events: mpsc::Receiver<BulkEvent>,
    pub(super) news: mpsc::Receiver<News>,
    pub(super) asks: mpsc::Receiver<Ask>,
}

/// Where what this room set to work tells of its ends.
pub(super) struct Works {
    pub(super) disk_done: mpsc::Receiver<Done>,
    pub(super) drawn: mpsc::Receiver<Drawn>,
    pub(super) learned: Option<mpsc::Receiver<Learned>>,
}

/// All that a policy's room has of its own.
pub(super) struct Opened {
    pub(super) commons: Commons,
    pub(super) role: Role,
    pub(super) works: Works,
}

impl Opened {
    /// Returns where somebody outside learns, if nobody in here does.
    pub(super) fn desk(&self) -> Option<Arc<Desk>> {
        match &self.role {
            Role::Trainer(role) => role.desk(),
            Role::Sampler(_) => None,
        }
    }
}

/// What this node does for the policy.
pub(super) enum Role {
    Sampler(Box<SamplerRole>),
    Trainer(Box<TrainerRole>),
}

/// See the module.
pub(super) struct Room {
    commons: Commons,
    role: Role,
    net: NetHandle,
    node: NodeHandle,
    exchange: Exchange,
    sources: Sources,
    works: Works,
    /// How long a room that nobody hires any more stays open; none for one that is open for good.
    linger: Option<Duration>,
    /// Since when it has had nothing to do.
    idle_since: Option<Instant>,
    /// A lease for another policy, for which this room has to close.
    next: Option<Grant>,
    /// The policy's name in the DHT.
    place: Hash,
    seek_at: Instant,
    seek_every: Duration,
}

impl Room {
    pub(super) fn new(
        opened: Opened,
        net: NetHandle,
        node: NodeHandle,
        sources: Sources,
        linger: Option<Duration>,
    ) -> Self {
        let Opened { commons, role, works } = opened;
        let policy = &commons.policy;
        let parts: [&[u8]; 2] = [policy.owner.as_bytes(), policy.name.as_str().as_bytes()];
        let place = Hash::derive("chorus policy providers v1", &parts);
        Self {
            commons,
            role,
            net,
            node,
            exchange: Exchange::default(),
            sources,
            works,
            linger,
            idle_since: None,
            next: None,
            place,
            seek_at: Instant::now() + SEEK.0,
            seek_every: SEEK.0,
        }
    }

    /// Takes the lease for which the room is opened.
    pub(super) fn grant(&mut self, grant: Grant) {
        if let Role::Sampler(role) = &mut self.role {
            role.granted(&self.commons, grant);
        }
    }

    /// Runs until the shutdown token fires, or a room that is not open for good is needed no more. Returns where inputs come from, and
    /// the lease for which the next room is to be opened.
    pub(super) async fn run(mut self, shutdown: CancellationToken) -> (Sources, Option<Grant>) {
        self.begin().await;
        while !self.is_over() {
            let wake = self.sleep();
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                Some(ask) = self.sources.asks.recv() => self.answer(ask),
                Some(done) = self.works.disk_done.recv() => self.disk_done(done),
                Some(learned) = next(&mut self.works.learned) => self.learned(learned),
                Some(drawn) = self.works.drawn.recv() => self.drawn(drawn),
                Some(news) = self.sources.news.recv() => self.news(news),
                Some(event) = self.sources.events.recv() => self.on_bulk(event),
                () = tokio::time::sleep(wake) => {}
            }
            self.on_time();
        }
        self.commons.sessions.close_all();
        (self.sources, self.next)
    }

    /// Returns whether the room has had nothing to do for as long as it lingers, or has to make room for another.
    fn is_over(&mut self) -> bool {
        let (Some(linger), Role::Sampler(role)) = (self.linger, &self.role) else { return false };
        if !role.is_idle() {
            self.idle_since = None;
            return false;
        }
        let since = *self.idle_since.get_or_insert_with(Instant::now);
        self.next.is_some() || since.elapsed() >= linger
    }

    async fn begin(&mut self) {
        let library = self.commons.library.clone();
        let owner = self.commons.is_owner();
        // Hashing what is there may take a while; nothing is connected yet, so nobody waits.
        let found = tokio::task::spawn_blocking(move || {
            if !owner {
                return library.scan();
            }
            // The owner makes its newest version anew from the checkpoint; nobody needs the others.
            for manifest in library.manifests() {
                if let Err(error) = library.forget(manifest.version) {
                    tracing::warn!(%error, "an old version was not deleted");
                }
            }
            Vec::new()
        });
        let newest = self.commons.resume(found.await.unwrap_or_default());
        match &mut self.role {
            Role::Sampler(role) => {
                role.load(&self.commons, newest.into_iter().collect());
                let policy = self.commons.policy.clone();
                let trained = self.node.read(move |node, _| node.ledger().policy(&policy).and_then(is_trained));
                role.trained(trained.await.ok().flatten());
            }
            Role::Trainer(role) => {
                role.begin(&mut self.commons);
                for (node, offer) in Hires::offers(&self.node).await {
                    role.offered(&mut self.commons, node, Some(offer));
                }
            }
        }
        let _ = self.net.provide(self.place);
        for evidence in evidence::held(self.commons.disk.evidence()) {
            self.exchange.provide(&self.net, evidence);
        }
    }

    fn deadline(&self) -> Option<Time> {
        let role = match &self.role {
            Role::Sampler(role) => role.deadline(),
            Role::Trainer(role) => role.deadline(),
        };
        chorus_machine::earliest(role, chorus_machine::Machine::deadline(&self.commons.broadcast))
    }

    fn sleep(&self) -> Duration {
        let machines = self.deadline().map(|deadline| self.commons.until(deadline));
        let away = |at: Instant| at.saturating_duration_since(Instant::now());
        let sessions = self.commons.sessions.wakes_at().map(away);
        let lease = match &self.role {
            Role::Sampler(role) => role.wakes_at().map(away),
            Role::Trainer(_) => None,
        };
        let least = [machines, sessions, lease, Some(away(self.seek_at))].into_iter().flatten().min();
        least.unwrap_or(MAX_SLEEP).min(MAX_SLEEP)
    }

    /// Does what is due.
    fn on_time(&mut self) {
        let now = Instant::now();
        if self.deadline().is_some_and(|deadline| self.commons.until(deadline).is_zero()) {
            let ready = self.commons.expire();
            self.take_ready(ready);
            match &mut self.role {
                Role::Sampler(role) => role.expire(&mut self.commons),
                Role::Trainer(role) => role.expire(&mut self.commons),
            }
        }
        match &mut self.role {
            Role::Trainer(role) => role.tick(&mut self.commons),
            Role::Sampler(role) => role.tick(),
        }
        if self.seek_at <= now {
            let _ = self.net.find_providers(self.place);
            self.seek_at = now + self.seek_every;
            self.seek_every = (self.seek_every * 2).min(SEEK.1);
        }
        self.exchange.tick(&mut self.commons, &self.net);
        self.commons.sessions.pump(now);
    }

    fn take_ready(&mut self, ready: Vec<Admitted<Manifest>>) {
        if let Role::Sampler(role) = &mut self.role {
            role.load(&self.commons, ready);
        }
    }

    fn news(&mut self, news: News) {
        match news {
            News::Providers(key, nodes) if key == self.place => self.commons.sessions.providers(&nodes),
            News::Providers(key, nodes) => self.exchange.holders(&mut self.commons, &self.net, key, &nodes),
            News::PeerUp(node) => self.commons.sessions.hurry(node),
            News::Banned(node) => self.commons.sessions.close(node),
            news => self.leases(news),
        }
    }

    /// What the job counter says, of either side of a lease.
    fn leases(&mut self, news: News) {
        match (&mut self.role, news) {
            (Role::Trainer(role), News::Offer { node, offer }) => role.offered(&mut self.commons, node, offer),
            (Role::Trainer(role), News::Job(event)) => role.job(&mut self.commons, &event),
            (Role::Trainer(role), News::JobDone { job, result }) => {
                role.job_ended(&mut self.commons, job, result.err())
            }
            (Role::Sampler(role), News::Granted(grant)) => {
                let other = grant.policy.as_ref().is_some_and(|policy| *policy != self.commons.policy);
                if other && self.linger.is_some() && role.is_idle() {
                    self.next = Some(grant);
                } else {
                    role.granted(&self.commons, grant);
                }
            }
            (Role::Sampler(role), News::Stop(run)) => role.stopped(run),
            (Role::Sampler(role), News::Policy { policy, running }) if policy == self.commons.policy => {
                role.trained(running);
            }
            // A trainer does not offer itself, so nobody hires it; and a sampler hires nobody.
            _ => {}
        }
    }

    fn disk_done(&mut self, done: Done) {
        match self.commons.disk_done(done) {
            Ok(ready) => self.take_ready(ready),
            Err(Done::EvidenceRead(piece)) => self.exchange.read(&mut self.commons, piece),
            Err(Done::EvidenceLoaded { evidence, bytes }) => {
                self.exchange.loaded(&mut self.commons, &self.net, evidence, bytes);
            }
            Err(done) => {
                if let Done::Evidence(accusation) = &done {
                    self.exchange.provide(&self.net, accusation.evidence);
                }
                match &mut self.role {
                    Role::Sampler(role) => role.disk_done(&mut self.commons, done),
                    Role::Trainer(role) => role.disk_done(&mut self.commons, done),
                }
            }
        }
    }

    fn learned(&mut self, learned: Learned) {
        if let Role::Trainer(role) = &mut self.role {
            role.learned(&mut self.commons, learned);
        }
    }

    fn drawn(&mut self, drawn: Drawn) {
        if let Role::Sampler(role) = &mut self.role {
            role.drawn(&mut self.commons, drawn);
        }
    }

    fn on_bulk(&mut self, event: BulkEvent) {
        match event {
            BulkEvent::Opened { session, node, way, inbound } => self.opened(session, node, way, inbound),
            BulkEvent::Message { session, node, message } if self.commons.sessions.is_current(session, node) => {
                self.message(node, message);
            }
            // What a session that was replaced still brings is said again on the one that took its place.
            BulkEvent::Message { .. } => {}
            BulkEvent::Sent { token, .. } => {
                let ready = self.commons.sent(token);
                self.take_ready(ready);
            }
            BulkEvent::Closed { session, node, reason } => {
                tracing::debug!(node = %node.fmt_short(), ?reason, "a bulk session ended");
                if self.commons.sessions.closed(session, node) {
                    self.gone(node);
                }
                if !self.commons.sessions.has(node) {
                    self.exchange.gone(&mut self.commons, &self.net, node);
                }
            }
        }
    }

    fn opened(&mut self, session: SessionId, node: NodeId, way: chorus_net::Way, inbound: bool) {
        if self.commons.sessions.opened(session, node, way, inbound) {
            self.gone(node);
        }
        let is_guest = self.exchange.opened(&mut self.commons, node);
        if inbound || is_guest {
            return;
        }
        match &mut self.role {
            Role::Sampler(role) if node == self.commons.policy.owner => {
                role.tell(&mut self.commons, SamplerInput::Connected)
            }
            _ => self.commons.greet(node),
        }
    }

    fn gone(&mut self, node: NodeId) {
        let ready = self.commons.peer_down(node);
        self.take_ready(ready);
        match &mut self.role {
            Role::Sampler(role) if node == self.commons.policy.owner => {
                role.tell(&mut self.commons, SamplerInput::Disconnected);
            }
            Role::Sampler(_) => {}
            Role::Trainer(role) => role.tell(&mut self.commons, chorus_rollout::buffer::BufferInput::Gone(node)),
        }
    }

    fn message(&mut self, node: NodeId, message: Bulk) {
        if let Bulk::Hello(hello) = &message {
            if hello.policy != self.commons.policy {
                tracing::debug!(node = %node.fmt_short(), policy = %hello.policy, "it speaks of another policy");
                return self.commons.sessions.close(node);
            }
            if self.commons.sessions.greeted(node) {
                self.greeted(node, message);
            }
            return;
        }
        if is_about_weights(&message) {
            let ready = self.commons.tell(BroadcastInput::Message { from: node, message });
            return self.take_ready(ready);
        }
        let Some(message) = self.exchange.message(&mut self.commons, &self.net, node, message) else { return };
        match &mut self.role {
            Role::Sampler(role) if node == self.commons.policy.owner => {
                role.tell(&mut self.commons, SamplerInput::Message(message));
            }
            Role::Sampler(_) => {}
            Role::Trainer(role) => role.message(&mut self.commons, node, message),
        }
    }

    fn greeted(&mut self, node: NodeId, hello: Bulk) {
        match &mut self.role {
            Role::Trainer(role) => role.message(&mut self.commons, node, hello),
            Role::Sampler(role) if node == self.commons.policy.owner => {
                role.tell(&mut self.commons, SamplerInput::Message(hello));
            }
            Role::Sampler(_) => self.commons.greet(node),
        }
        let ready = self.commons.peer_up(node);
        self.take_ready(ready);
    }

    fn answer(&mut self, ask: Ask) {
        // Whoever asked may have gone meanwhile.
        match ask {
            Ask::Status(reply) => {
                let mut status = self.commons.status();
                let own = match &self.role {
                    Role::Sampler(role) => role.status(&self.commons),
                    Role::Trainer(role) => role.status(&self.commons),
                };
                if let (Some(all), Some(own)) = (status.as_object_mut(), own.as_object()) {
                    all.extend(own.clone());
                }
                let _ = reply.send(status);
            }
            Ask::Evidence(evidence, reply) => self.exchange.ask(&self.commons, evidence, reply),
            Ask::Curve(reply) => {
                let curve = match &self.role {
                    Role::Trainer(role) => Some(role.curve().clone()),
                    Role::Sampler(_) => None,
                };
                let _ = reply.send(curve);
            }
        }
    }
}

/// A room without a learner never hears of one.
async fn next(learned: &mut Option<mpsc::Receiver<Learned>>) -> Option<Learned> {
    match learned {
        Some(learned) => learned.recv().await,
        None => std::future::pending().await,
    }
}

const fn is_about_weights(message: &Bulk) -> bool {
    matches!(
        message,
        Bulk::Announce(_)
            | Bulk::Have { .. }
            | Bulk::HaveOne { .. }
            | Bulk::WantChunks { .. }
            | Bulk::Cancel { .. }
            | Bulk::Chunk { .. }
            | Bulk::NoChunk { .. }
    )
}
