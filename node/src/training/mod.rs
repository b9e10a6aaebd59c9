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
//! | [`external`] | somebody outside the node learns instead |
//! | [`sessions`] | who is connected, and whom to connect to |
//! | [`disk`], [`library`] | frames and chunks on disk; a policy's versions |
//! | [`evidence`] | what a convicted sampler signed, for anybody to check |
//! | [`metrics`] | its figures for Prometheus |

mod commons;
mod disk;
pub(crate) mod evidence;
pub(crate) mod external;
mod learning;
pub(crate) mod library;
pub(crate) mod metrics;
mod room;
mod sampler;
mod sampling;
mod sessions;
mod trainer;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use chorus_engine::{VersionedConfig, VersionedEngine};
use chorus_machine::Rng;
use chorus_net::{BulkConfig, BulkEvent, BulkHandle, BulkPlane, NetHandle};
use chorus_protocol::policy::PolicyId;
use chorus_protocol::rollout::RolloutFrame;
use chorus_protocol::{NetworkId, NodeId, SecretKey, Text, Verified};
use chorus_rollout::broadcast::{Broadcast, BroadcastConfig};
use chorus_rollout::buffer::{Buffer, BufferConfig, Mode};
use chorus_rollout::plan::Plan;
use chorus_rollout::sampler::{Sampler, SamplerConfig, WhenFull};
use chorus_trainer::train::Curve;
use serde_json::Value;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use self::commons::Commons;
use self::disk::Disk;
use self::external::Desk;
use self::learning::Teacher;
use self::library::Library;
pub(crate) use self::room::News;
use self::room::{Ask, Role, Room, Sources};
use self::sampler::SamplerRole;
use self::sessions::Sessions;
use self::trainer::TrainerRole;
use crate::config::Config;
use crate::error::CommandError;

/// Requests of the API that may wait.
const ASK_QUEUE: usize = 16;
/// Members that come back from the engine and may wait.
const DRAWN_QUEUE: usize = 256;

/// The way to the room from the API.
#[derive(Clone)]
pub(crate) struct TrainingHandle {
    asks: mpsc::Sender<Ask>,
    /// The policy's engine, on a sampler.
    pub(crate) engine: Option<Arc<VersionedEngine>>,
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

    /// Returns the learning curve; nothing on a sampler.
    pub(crate) async fn curve(&self) -> Option<Curve> {
        let (reply, answer) = oneshot::channel();
        self.asks.send(Ask::Curve(reply)).await.ok()?;
        answer.await.ok()?
    }
}

/// What a room is made of.
pub(crate) struct Parts {
    pub(crate) config: Config,
    pub(crate) key: SecretKey,
    pub(crate) network: NetworkId,
    pub(crate) net: NetHandle,
    pub(crate) rng: Rng,
    /// What the control plane tells it.
    pub(crate) news: mpsc::Receiver<News>,
    pub(crate) shutdown: CancellationToken,
}

/// Returns the policy that this node trains or samples for, if it does.
pub(crate) fn policy(config: &Config, me: NodeId) -> Result<Option<PolicyId>, CommandError> {
    let (trains, samples) = (&config.trainer.policy, &config.sampler.policy);
    if !trains.is_empty() && !samples.is_empty() {
        return Err(CommandError::usage("a node trains or samples, not both")
            .hint("leave trainer.policy or sampler.policy empty; run a second node with --instance 1"));
    }
    if !trains.is_empty() {
        let name = Text::new(trains.clone()).map_err(CommandError::usage)?;
        return Ok(Some(PolicyId { owner: me, name }));
    }
    (!samples.is_empty()).then(|| parse_policy(samples)).transpose()
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

/// Opens the room that the configuration asks for, and runs it until the shutdown token fires.
pub(crate) async fn start(parts: Parts) -> Result<Option<TrainingHandle>, CommandError> {
    let me = parts.key.node_id();
    let Some(policy) = policy(&parts.config, me)? else { return Ok(None) };
    let directory = parts.config.data_dir.join("training");
    fs::create_dir_all(&directory).map_err(CommandError::machine)?;
    let (bulk, events) = open_bulk(&parts).await?;
    let library = Library::open(&parts.config.data_dir, &policy, &parts.network).map_err(CommandError::machine)?;
    let (disk, disk_done, frames) =
        Disk::open(&directory, library.clone(), parts.network.clone()).map_err(CommandError::machine)?;
    // Those that rollouts may still be of are kept, so that they can be examined after a restart too.
    let keep = BroadcastConfig::default().keep.max(parts.config.trainer.staleness as usize + 2);
    let broadcast = BroadcastConfig {
        keep,
        share: parts.config.sampler.share,
        extra_percent: parts.config.trainer.extra_percent,
        ..BroadcastConfig::default()
    };
    let broadcast = Broadcast::new(broadcast, parts.network.clone(), policy.clone(), me);
    let sessions = Sessions::new(bulk, me, policy.owner);
    let common = Commons::new(
        parts.key.clone(),
        parts.network.clone(),
        policy.clone(),
        sessions,
        disk,
        library.clone(),
        broadcast,
        parts.rng.clone(),
    );
    let (asks_tx, asks) = mpsc::channel(ASK_QUEUE);
    let (drawn_tx, drawn) = mpsc::channel(DRAWN_QUEUE);
    let (mut engine, mut learned, mut desk) = (None, None, None);
    let role = if policy.owner == me {
        let secret = parts.rng.clone().bytes();
        let (role, lessons) = trainer(&parts.config, &directory, library, policy, &frames, secret)?;
        (learned, desk) = (Some(lessons), role.desk());
        Role::Trainer(Box::new(role))
    } else {
        let versioned = Arc::new(VersionedEngine::new(engine_config(&parts.config, &policy)));
        engine = (parts.config.sampler.slots > 0).then(|| Arc::clone(&versioned));
        let own: Vec<_> = frames.iter().filter(|frame| frame.author() == me).map(held).collect();
        let sampler =
            Sampler::new(sampler_config(&parts.config, policy), parts.network.clone(), parts.key.clone(), &own);
        // Who samples nothing only keeps versions, for others and for himself, and loads none.
        let serves = (parts.config.sampler.slots > 0).then_some(versioned);
        Role::Sampler(Box::new(SamplerRole::new(sampler, serves, drawn_tx)))
    };
    let sources = Sources { events, disk_done, drawn, learned, news: parts.news, asks };
    tokio::spawn(Room::new(common, role, parts.net, sources).run(parts.shutdown));
    Ok(Some(TrainingHandle { asks: asks_tx, engine, desk }))
}

async fn open_bulk(parts: &Parts) -> Result<(BulkHandle, mpsc::Receiver<BulkEvent>), CommandError> {
    let config = BulkConfig { listen: parts.config.net.bulk.clone(), ..BulkConfig::default() };
    BulkPlane::start(config, &parts.key, &parts.net).await.map_err(|error| {
        CommandError::machine(error)
            .hint("choose other UDP addresses for net.bulk, or none: then libp2p carries it, slowly")
    })
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
) -> Result<(TrainerRole, mpsc::Receiver<learning::Learned>), CommandError> {
    let section = config.trainer.clone();
    let (teacher, lessons, resumed) = Teacher::start(&section, directory, library, policy.clone(), secret)?;
    let mode = if section.sequential { Mode::Sequential } else { Mode::Streaming { staleness: section.staleness } };
    let name = |name: &String| Text::new(name.clone()).map_err(CommandError::usage);
    let environments = section.environments.iter().map(|text| Ok((name(text)?, 1)));
    let environments = environments.collect::<Result<_, CommandError>>()?;
    let mut buffer = BufferConfig::new(policy, mode, Plan { seed: section.seed, environments });
    (buffer.batch, buffer.members) = (section.batch, section.members);
    let step = resumed.as_ref().map_or(0, |resumed| resumed.progress.step);
    let (curve, buffer) = match resumed {
        Some(resumed) => {
            let (buffer, _) =
                Buffer::restore(buffer, &resumed.progress, &resumed.versions, frames).map_err(CommandError::usage)?;
            (resumed.curve, buffer)
        }
        None => (Curve::default(), Buffer::new(buffer).map_err(CommandError::usage)?),
    };
    Ok((TrainerRole::new(section, buffer, teacher, directory.to_owned(), curve, step), lessons))
}
