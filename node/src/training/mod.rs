//! The training room of a node: a policy's trainer, or a sampler for one that another node trains.
//!
//! ```text
//!            ┌────────────────────────────── Room: one task, one loop ──────────────────────────────┐
//!  bulk ────▶│ sessions ─▶ commons: broadcast of versions ──Ready──▶ sampler: engine, frames, spool  │
//!  plane ◀───│                                                  or  trainer: buffer, learner         │
//!            └──────▲──────────────▲───────────────────▲──────────────────────▲──────────────────────┘
//!                   │ Done         │ Drawn             │ Learned              │ Ask (status, curve)
//!                 disk           engine              learner                  API
//! ```
//!
//! Everything that decides is in `chorus_rollout`, and runs in the simulator as it does here. What is here moves bytes: sockets, disk,
//! the engine, the learner's thread. The loop never waits for any of them.
//!
//! | file | subject |
//! |---|---|
//! | [`room`] | the loop |
//! | [`commons`] | what both roles share: the broadcast of versions |
//! | [`sampler`], [`sampling`] | the sampler's role; a task, an answer, a reward |
//! | [`trainer`], [`learning`] | the trainer's role; the learner's thread |
//! | [`host`] | opens and closes rooms on a node that samples for anybody |
//! | [`hires`], [`lease`] | the job that a sampler is hired by: the trainer's side, the sampler's |
//! | [`external`] | somebody outside the node learns instead |
//! | [`sessions`] | who is connected, and whom to connect to |
//! | [`disk`], [`library`] | frames and chunks on disk; a policy's versions |
//! | [`evidence`], [`exchange`] | what a convicted sampler signed, for anybody to check; how others come by it |
//! | [`notice`] | when the ledger is told how far a policy is |
//! | [`metrics`] | its figures for Prometheus |

mod commons;
mod disk;
pub(crate) mod evidence;
mod exchange;
pub(crate) mod external;
mod hires;
mod host;
mod learning;
mod lease;
pub(crate) mod library;
pub(crate) mod metrics;
mod notice;
mod room;
mod sampler;
mod sampling;
mod sessions;
mod trainer;

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use chorus_core::Input;
use chorus_engine::{VersionedConfig, VersionedEngine};
use chorus_machine::Rng;
use chorus_net::{BulkConfig, BulkEvent, BulkHandle, BulkPlane, NetHandle};
use chorus_protocol::policy::PolicyId;
use chorus_protocol::rollout::RolloutFrame;
use chorus_protocol::{Hash, NetworkId, NodeId, SecretKey, Text, Verified};
use chorus_rollout::broadcast::{Broadcast, BroadcastConfig};
use chorus_rollout::buffer::{Buffer, BufferConfig, FrameKey, Mode};
use chorus_rollout::plan::Plan;
use chorus_rollout::sampler::{Sampler, SamplerConfig, WhenFull};
use chorus_trainer::train::Curve;
use serde_json::Value;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use self::commons::Commons;
use self::disk::{Disk, Job};
use self::external::Desk;
use self::hires::Hires;
use self::host::Host;
use self::learning::Teacher;
pub(crate) use self::lease::Grant;
use self::lease::Lease;
use self::library::Library;
pub(crate) use self::notice::is_trained;
pub(crate) use self::room::News;
use self::room::{Ask, Opened, Role, Room, Sources, Works};
use self::sampler::SamplerRole;
use self::sessions::Sessions;
use self::trainer::TrainerRole;
use crate::config::Config;
use crate::driver::NodeHandle;
use crate::error::CommandError;

/// Requests of the API that may wait.
const ASK_QUEUE: usize = 16;
/// What `sampler.policy` says on a node that samples for whatever trainer hires it.
pub(crate) const ANYBODY: &str = "any";
/// Members that come back from the engine and may wait.
const DRAWN_QUEUE: usize = 256;

/// The policy's engine that the API may ask, while there is one.
#[derive(Clone, Default)]
pub(crate) struct Serving(Arc<Mutex<Option<Arc<VersionedEngine>>>>);

impl Serving {
    pub(crate) fn get(&self) -> Option<Arc<VersionedEngine>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, engine: Option<Arc<VersionedEngine>>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = engine;
    }
}

/// The way to the room from the API.
#[derive(Clone)]
pub(crate) struct TrainingHandle {
    asks: mpsc::Sender<Ask>,
    /// The policy's engine, on a sampler.
    pub(crate) serving: Serving,
    /// Where a trainer outside the node works, if this one is trained so.
    pub(crate) desk: Option<Arc<Desk>>,
}

impl TrainingHandle {
    /// Returns where the room stands; nothing when the process is ending.
    pub(crate) async fn status(&self) -> Option<Value> {
        let (reply, answer) = oneshot::channel();
        self.asks.send(Ask::Status(reply)).await.ok()?;
        answer.await.ok()
    }

    /// Returns evidence by its hash, from here or from whoever holds it, or why there is none; nothing when the process is ending.
    pub(crate) async fn evidence(&self, evidence: Hash) -> Option<Result<Vec<u8>, String>> {
        let (reply, answer) = oneshot::channel();
        self.asks.send(Ask::Evidence(evidence, reply)).await.ok()?;
        answer.await.ok()
    }

    /// Returns the learning curve; nothing on a sampler.
    pub(crate) async fn curve(&self) -> Option<Curve> {
        let (reply, answer) = oneshot::channel();
        self.asks.send(Ask::Curve(reply)).await.ok()?;
        answer.await.ok()?
    }
}

/// What rooms are made of.
pub(crate) struct Means {
    pub(crate) config: Config,
    pub(crate) key: SecretKey,
    pub(crate) network: NetworkId,
    pub(crate) net: NetHandle,
    /// The way to the node's job counter.
    pub(crate) node: NodeHandle,
    /// Where the end of a run is told.
    pub(crate) inputs: mpsc::Sender<Input>,
    /// The zero of the node's clock.
    pub(crate) epoch: Instant,
    pub(crate) rng: Rng,
}

/// What the training of a node is started with.
pub(crate) struct Parts {
    pub(crate) means: Means,
    /// What the control plane tells it.
    pub(crate) news: mpsc::Receiver<News>,
    pub(crate) shutdown: CancellationToken,
}

/// For whom a node trains or samples.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// This policy: its own, or one that somebody else trains.
    Policy(PolicyId),
    /// Whatever trainer hires it.
    Anybody,
}

/// Returns what this node trains or samples for, if it does.
pub(crate) fn purpose(config: &Config, me: NodeId) -> Result<Option<Purpose>, CommandError> {
    let (trains, samples) = (&config.trainer.policy, &config.sampler.policy);
    if !trains.is_empty() && !samples.is_empty() {
        return Err(CommandError::usage("a node trains or samples, not both")
            .hint("leave trainer.policy or sampler.policy empty; run a second node with --instance 1"));
    }
    if !trains.is_empty() {
        let name = Text::new(trains.clone()).map_err(CommandError::usage)?;
        return Ok(Some(Purpose::Policy(PolicyId { owner: me, name })));
    }
    match samples.as_str() {
        "" => Ok(None),
        ANYBODY => Ok(Some(Purpose::Anybody)),
        policy => Ok(Some(Purpose::Policy(parse_policy(policy)?))),
    }
}

/// Reads `name@did:key:…`.
pub(crate) fn parse_policy(text: &str) -> Result<PolicyId, CommandError> {
    let parse = || {
        let (name, owner) = text.rsplit_once('@')?;
        Some(PolicyId { owner: owner.parse().ok()?, name: Text::new(name).ok().filter(|name| !name.is_empty())? })
    };
    parse().ok_or_else(|| {
        CommandError::usage(format!("'{text}' is no policy"))
            .hint("a policy is its name, '@', and its trainer's id: arithmetic@did:key:z6Mk…; chorus policy ls lists those that are known")
    })
}

/// Starts what the configuration asks for; it runs until the shutdown token fires.
pub(crate) async fn start(parts: Parts) -> Result<Option<TrainingHandle>, CommandError> {
    let Parts { mut means, news, shutdown } = parts;
    let Some(purpose) = purpose(&means.config, means.key.node_id())? else { return Ok(None) };
    let (bulk, events) = open_bulk(&means).await?;
    let (asks_tx, asks) = mpsc::channel(ASK_QUEUE);
    let (serving, sources) = (Serving::default(), Sources { events, news, asks });
    let mut desk = None;
    match purpose {
        Purpose::Policy(policy) => {
            let directory = means.config.data_dir.join("training");
            let opened = open(&mut means, &bulk, &policy, &directory, &serving)?;
            desk = opened.desk();
            let room = Room::new(opened, means.net, means.node, sources, None);
            tokio::spawn(room.run(shutdown));
        }
        Purpose::Anybody => {
            tokio::spawn(Host::new(means, bulk, serving.clone(), sources).run(shutdown));
        }
    }
    Ok(Some(TrainingHandle { asks: asks_tx, serving, desk }))
}

async fn open_bulk(means: &Means) -> Result<(BulkHandle, mpsc::Receiver<BulkEvent>), CommandError> {
    let config = BulkConfig { listen: means.config.net.bulk.clone(), ..BulkConfig::default() };
    BulkPlane::start(config, &means.key, &means.net).await.map_err(|error| {
        CommandError::machine(error)
            .hint("choose other UDP addresses for net.bulk, or none: then libp2p carries it, slowly")
    })
}

/// Opens the room of a policy. What it keeps beside the policy's versions lies in `directory`.
fn open(
    means: &mut Means,
    bulk: &BulkHandle,
    policy: &PolicyId,
    directory: &Path,
    serving: &Serving,
) -> Result<Opened, CommandError> {
    let (config, me) = (&means.config, means.key.node_id());
    fs::create_dir_all(directory).map_err(CommandError::machine)?;
    let library = Library::open(&config.data_dir, policy, &means.network).map_err(CommandError::machine)?;
    let (disk, disk_done, frames) =
        Disk::open(directory, library.clone(), means.network.clone()).map_err(CommandError::machine)?;
    let broadcast = Broadcast::new(broadcast_config(config), means.network.clone(), policy.clone(), me);
    let mut commons = Commons::new(
        means.key.clone(),
        means.network.clone(),
        policy.clone(),
        Sessions::new(bulk.clone(), me, policy.owner),
        disk,
        library.clone(),
        broadcast,
        means.node.clone(),
        means.rng.fork(),
        means.epoch,
    );
    let (drawn_tx, drawn) = mpsc::channel(DRAWN_QUEUE);
    let mut learned = None;
    let role = if policy.owner == me {
        let secret = means.rng.bytes();
        let hires = Hires::new(&config.trainer, means.node.clone(), &mut commons);
        let (role, lessons, idle) = trainer(config, directory, library, policy.clone(), &frames, secret, hires)?;
        // A kill between an update's checkpoint and the deletion of what it used leaves frames that nothing else deletes.
        if commons.disk.submit(Job::Delete(idle)).is_err() {
            tracing::warn!("frames that count for nothing are kept until the next start");
        }
        learned = Some(lessons);
        Role::Trainer(Box::new(role))
    } else {
        let versioned = Arc::new(VersionedEngine::new(engine_config(config, policy)));
        // Who samples nothing only keeps versions, for others and for himself, and loads none.
        let serves = (config.sampler.slots > 0).then_some(versioned);
        serving.set(serves.clone());
        let own: Vec<_> = frames.iter().filter(|frame| frame.author() == me).map(held).collect();
        let config = sampler_config(config, policy.clone());
        let sampler = Sampler::new(config, means.network.clone(), means.key.clone(), &own);
        Role::Sampler(Box::new(SamplerRole::new(sampler, serves, drawn_tx, Lease::new(means.inputs.clone()))))
    };
    Ok(Opened { commons, role, works: Works { disk_done, drawn, learned } })
}

fn broadcast_config(config: &Config) -> BroadcastConfig {
    // Those that rollouts may still be of are kept, so that they can be examined after a restart too.
    let keep = BroadcastConfig::default().keep.max(config.trainer.staleness as usize + 2);
    BroadcastConfig {
        keep,
        share: config.sampler.share,
        extra_percent: config.trainer.extra_percent,
        max_bytes: config.sampler.max_policy_mb.saturating_mul(1 << 20),
        ..BroadcastConfig::default()
    }
}

fn held(frame: &Verified<RolloutFrame>) -> (u64, usize, u32) {
    (frame.sequence(), frame.encoded_len(), u32::try_from(frame.len()).unwrap_or(u32::MAX))
}

fn sampler_config(config: &Config, policy: PolicyId) -> SamplerConfig {
    let section = &config.sampler;
    let mut sampler = SamplerConfig::new(policy, section.slots);
    sampler.spool_bytes = section.spool_mb.saturating_mul(1 << 20);
    sampler.when_full = if section.drop_oldest { WhenFull::DropOldest } else { WhenFull::Stop };
    sampler
}

fn engine_config(config: &Config, policy: &PolicyId) -> VersionedConfig {
    let mut engine = VersionedConfig::new(policy.name.as_str());
    engine.max_queued = usize::from(config.sampler.slots).max(config.engine.queue);
    engine
}

fn trainer(
    config: &Config,
    directory: &Path,
    library: Library,
    policy: PolicyId,
    frames: &[Verified<RolloutFrame>],
    secret: [u8; 32],
    hires: Hires,
) -> Result<(TrainerRole, mpsc::Receiver<learning::Learned>, Vec<FrameKey>), CommandError> {
    let section = config.trainer.clone();
    let (teacher, lessons, resumed) = Teacher::start(&section, directory, library, policy.clone(), secret)?;
    let mode = if section.sequential { Mode::Sequential } else { Mode::Streaming { staleness: section.staleness } };
    let name = |name: &String| Text::new(name.clone()).map_err(CommandError::usage);
    let environments = section.environments.iter().map(|text| Ok((name(text)?, 1)));
    let environments = environments.collect::<Result<_, CommandError>>()?;
    let mut buffer = BufferConfig::new(policy, mode, Plan { seed: section.seed, environments });
    (buffer.batch, buffer.members) = (section.batch, section.members);
    let step = resumed.as_ref().map_or(0, |resumed| resumed.progress.step);
    let (curve, buffer, idle) = match resumed {
        Some(resumed) => {
            let (buffer, idle) =
                Buffer::restore(buffer, &resumed.progress, &resumed.versions, frames).map_err(CommandError::usage)?;
            (resumed.curve, buffer, idle)
        }
        // Of a run that is not gone on with.
        None => {
            let idle = frames.iter().map(|frame| FrameKey { sampler: frame.author(), sequence: frame.sequence() });
            (Curve::default(), Buffer::new(buffer).map_err(CommandError::usage)?, idle.collect())
        }
    };
    Ok((TrainerRole::new(section, buffer, hires, teacher, directory.to_owned(), curve, step), lessons, idle))
}
