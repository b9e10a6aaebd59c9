//! The node behind the API: what HTTP asks, in the node's own terms.

use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use chorus_api::{
    Backend, BackendError, ChatTurn, CurveForm, Embedded, Health, LedgerFilter, LedgerPage, LocalReply, LocalRequest,
    ModelCard, ModelKind, Pieces, Rollouts, TaskLog, Update, Weights,
};
use chorus_core::{Command, TaskSpec};
use chorus_engine::{
    Calibration, ChatMessage, Chunk, Engine, EngineError, Finish, GenerateRequest, ModelInfo, Sampling,
};
use chorus_machine::Rng;
use chorus_net::NetHandle;
use chorus_protocol::capability::Capability;
use chorus_protocol::entry::Entry;
use chorus_protocol::job::{self, Role};
use chorus_protocol::{Hash, NodeId, TaskId, Verified};
use chorus_store::StoreError;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::commands::entry_row;
use crate::config::{Config, EngineKind};
use crate::driver::{NodeHandle, Stopped};
use crate::executor::Engines;
use crate::metrics::Metrics;
use crate::storage::TaskRecords;
use crate::training::TrainingHandle;
use crate::training::external::Desk;
use crate::training::metrics::TrainingMetrics;

/// How long a peer stays blocked: until it is unblocked or this node restarts.
const BLOCK: Duration = Duration::from_secs(365 * 24 * 3_600);
/// Pieces of text between the engine and a client.
const PIECES: usize = 32;

/// The node, as the API sees it.
pub(crate) struct NodeBackend {
    config: Config,
    me: NodeId,
    handle: NodeHandle,
    net: NetHandle,
    tasks: Arc<TaskLog>,
    records: TaskRecords,
    metrics: Arc<Metrics>,
    /// The training room, where there is one.
    room: Option<TrainingHandle>,
    training: OnceLock<TrainingMetrics>,
    /// Draws ids and seeds for clients.
    rng: Mutex<Rng>,
    started: Instant,
    loaded: RwLock<Loaded>,
}

/// What came up after the start.
#[derive(Clone, Default)]
struct Loaded {
    ready: bool,
    engines: Engines,
    models: Vec<String>,
    speed: Option<Calibration>,
}

impl NodeBackend {
    #[allow(clippy::too_many_arguments, reason = "the parts of a node, each named by its type")]
    pub(crate) fn new(
        config: Config,
        me: NodeId,
        handle: NodeHandle,
        net: NetHandle,
        tasks: Arc<TaskLog>,
        records: TaskRecords,
        metrics: Arc<Metrics>,
        room: Option<TrainingHandle>,
        rng: Rng,
    ) -> Self {
        let loaded = RwLock::new(Loaded::default());
        let rng = Mutex::new(rng);
        Self {
            config,
            me,
            handle,
            net,
            tasks,
            records,
            metrics,
            room,
            training: OnceLock::new(),
            rng,
            started: Instant::now(),
            loaded,
        }
    }

    /// Takes the engines into service for direct requests.
    pub(crate) fn install(&self, engines: Engines, models: &[(ModelInfo, Option<Calibration>)]) {
        let loaded = Loaded {
            ready: true,
            engines,
            models: models.iter().map(|(info, _)| info.name.clone()).collect(),
            speed: models.first().and_then(|(_, speed)| *speed),
        };
        *self.loaded.write().unwrap_or_else(PoisonError::into_inner) = loaded;
    }

    fn desk(&self) -> Result<Arc<Desk>, BackendError> {
        let room = self.room.as_ref().ok_or(BackendError::NoTraining)?;
        room.desk.clone().ok_or(BackendError::NotExternal)
    }

    fn loaded(&self) -> Loaded {
        self.loaded.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The engine in a few words.
    fn engine_state(&self, loaded: &Loaded) -> Value {
        let state = match (self.config.engine.kind, loaded.ready) {
            (EngineKind::None, _) => "none: this node asks and does not answer".to_owned(),
            (_, false) => "the model still loads".to_owned(),
            (_, true) => {
                let rate = loaded.speed.map_or(0.0, |speed| speed.decode_tokens_per_s);
                format!("{} at {rate:.0} tokens/s", loaded.models.join(", "))
            }
        };
        let load = loaded.engines.engine.as_ref().map(|engine| engine.load());
        json!({
            "state": state,
            "models": loaded.models,
            "embedder": loaded.engines.embedder.is_some(),
            "running": load.map(|load| load.running),
            "queued": load.map(|load| load.queued),
            "restarts": load.map(|load| load.restarts),
        })
    }

    /// The policy that this node samples for, as an engine like any other.
    fn policy_engine(&self) -> Option<Arc<dyn Engine>> {
        let engine = self.room.as_ref()?.serving.get()?;
        Some(engine)
    }

    fn engine(&self, model: &str) -> Result<Arc<dyn Engine>, BackendError> {
        let serves = |engine: &Arc<dyn Engine>| engine.info().iter().any(|info| info.name == model);
        if let Some(policy) = self.policy_engine().filter(serves) {
            return Ok(policy);
        }
        let loaded = self.loaded();
        if !loaded.ready && self.config.engine.kind != EngineKind::None {
            return Err(BackendError::Starting { what: "the model".to_owned() });
        }
        let engine = loaded.engines.engine.ok_or(BackendError::NoEngine)?;
        let available: Vec<String> = engine.info().into_iter().map(|info| info.name).collect();
        if !available.iter().any(|known| known == model) {
            return Err(BackendError::ModelNotFound { model: model.to_owned(), available });
        }
        Ok(engine)
    }
}

fn stopping(_: Stopped) -> BackendError {
    BackendError::ShuttingDown
}

fn disk_error(error: StoreError) -> BackendError {
    BackendError::Disk { reason: error.to_string() }
}

fn engine_error(error: &EngineError) -> BackendError {
    match error {
        EngineError::ContextExceeded { prompt_tokens, context } => {
            BackendError::ContextExceeded { prompt_tokens: *prompt_tokens, context: *context }
        }
        EngineError::InvalidSchema { reason } => {
            BackendError::InvalidRequest { param: Some("response_format".to_owned()), reason: reason.clone() }
        }
        EngineError::InvalidRequest { reason } => BackendError::InvalidRequest { param: None, reason: reason.clone() },
        EngineError::Overloaded { limit, .. } => {
            BackendError::Overloaded { what: "the engine's queue".to_owned(), limit: *limit }
        }
        EngineError::Cancelled => BackendError::Cancelled,
        EngineError::Timeout { what, limit } => BackendError::Timeout { what: (*what).to_owned(), limit: *limit },
        _ => BackendError::Engine { reason: error.to_string(), retryable: error.is_retryable() },
    }
}

fn generate_request(request: LocalRequest) -> GenerateRequest {
    let message = |turn: ChatTurn| match turn.role {
        Role::System => ChatMessage::system(turn.content),
        Role::User => ChatMessage::user(turn.content),
        Role::Assistant => ChatMessage::assistant(turn.content),
    };
    let mut out = GenerateRequest::new(request.turns.into_iter().map(message).collect(), request.max_tokens);
    out.sampling = Sampling { seed: request.seed, temperature: request.temperature, top_p: request.top_p, top_k: 0 };
    out.stop = request.stop;
    out.json_schema = request.json_schema;
    out
}

fn card(info: ModelInfo, kind: ModelKind) -> ModelCard {
    ModelCard {
        name: info.name,
        kind,
        fingerprint: Hash::from_bytes(info.fingerprint),
        context: info.context,
        quantisation: info.quantisation,
        architecture: info.architecture,
    }
}

/// The place of an entry in the order of the pages: when it was written, then by whom. New entries come last, or nearly.
fn cursor(entry: &Verified<Entry>) -> String {
    format!("{:020}-{}", entry.wall_time.as_millis(), entry.hash())
}

fn page(node: &chorus_core::Node, filter: &LedgerFilter) -> LedgerPage {
    let wanted = |entry: &&Verified<Entry>| {
        filter.kind.as_deref().is_none_or(|kind| entry.body.kind() == kind)
            && filter.author.is_none_or(|author| entry.author() == author)
    };
    let mut keyed: Vec<_> = node.ledger().entries().filter(wanted).map(|entry| (cursor(entry), entry)).collect();
    keyed.sort_by(|a, b| a.0.cmp(&b.0));
    let total = keyed.len();
    let start = filter.after.as_ref().map_or(0, |after| keyed.partition_point(|(key, _)| key <= after));
    let end = start.saturating_add(filter.limit).min(total);
    let next = (end < total && end > start).then(|| keyed[end - 1].0.clone());
    LedgerPage { entries: keyed[start..end].iter().map(|(_, entry)| entry_row(entry)).collect(), total, next }
}

#[async_trait]
impl Backend for NodeBackend {
    fn draw_id(&self) -> [u8; 16] {
        self.rng.lock().unwrap_or_else(PoisonError::into_inner).bytes()
    }

    fn tasks(&self) -> &Arc<TaskLog> {
        &self.tasks
    }

    fn models(&self) -> Vec<ModelCard> {
        let engines = self.loaded().engines;
        let chat = engines.engine.into_iter().chain(self.policy_engine()).flat_map(|engine| engine.info());
        let embedding = engines.embedder.map(|embedder| card(embedder.info().clone(), ModelKind::Embedding));
        chat.map(|info| card(info, ModelKind::Chat)).chain(embedding).collect()
    }

    fn health(&self) -> Health {
        let loads = self.config.engine.kind != EngineKind::None && !self.loaded().ready;
        Health { waiting_for: loads.then(|| "the model to load".to_owned()).into_iter().collect() }
    }

    async fn generate(
        &self,
        request: LocalRequest,
        pieces: mpsc::Sender<String>,
        cancel: CancellationToken,
    ) -> Result<LocalReply, BackendError> {
        let engine = self.engine(&request.model)?;
        let (chunks_tx, mut chunks) = mpsc::channel::<Chunk>(PIECES);
        let forward = tokio::spawn(async move {
            while let Some(chunk) = chunks.recv().await {
                if pieces.send(chunk.text).await.is_err() {
                    break;
                }
            }
        });
        let result = engine.generate(generate_request(request), chunks_tx, cancel).await;
        // The last pieces are on their way; the reply must not overtake them.
        let _ = forward.await;
        let generated = result.map_err(|error| engine_error(&error))?;
        let finish = match generated.finish {
            Finish::Stop => job::Finish::Stop,
            Finish::Length => job::Finish::Length,
            Finish::Cancelled => return Err(BackendError::Cancelled),
        };
        Ok(LocalReply {
            text: generated.text,
            prompt_tokens: generated.prompt_tokens,
            completion_tokens: generated.completion_tokens,
            finish,
            fingerprint: Hash::from_bytes(generated.model.fingerprint),
        })
    }

    async fn embed(&self, texts: Vec<String>) -> Result<Embedded, BackendError> {
        let embedder = self.loaded().engines.embedder.ok_or(BackendError::NoEmbedder)?;
        let embedded = embedder.embed(&texts).await.map_err(|error| engine_error(&error))?;
        let vectors = embedded.embeddings.iter().map(|vector| vector.to_vec()).collect();
        Ok(Embedded { vectors, tokens: embedded.tokens })
    }

    async fn ask(&self, spec: TaskSpec) -> Result<(), BackendError> {
        self.handle.command(Command::Ask(Box::new(spec))).await.map_err(stopping)
    }

    async fn keep(&self, task: TaskId, record: Option<Vec<u8>>) -> Result<(), BackendError> {
        self.records.keep(task, record).await.map_err(disk_error)
    }

    async fn kept(&self) -> Result<Vec<(TaskId, Vec<u8>)>, BackendError> {
        self.records.kept().await.map_err(disk_error)
    }

    async fn cancel(&self, task: TaskId) -> Result<(), BackendError> {
        self.handle.command(Command::Cancel(task)).await.map_err(stopping)
    }

    async fn status(&self) -> Result<Value, BackendError> {
        let read = self.handle.read(|node, now| {
            let name = |(id, offer): (NodeId, &Arc<Capability>)| {
                json!({ "node": id, "name": offer.name, "slots": offer.slots, "models": offer.models })
            };
            (node.status(now), node.ledger().capabilities().map(name).collect::<Vec<_>>())
        });
        let (status, nodes) = read.await.map_err(stopping)?;
        let loaded = self.loaded();
        let ticket = (!self.net.listening().is_empty()).then(|| self.net.ticket().to_string());
        let mut out = json!(status);
        out["node"] = json!(self.me);
        out["name"] = json!(self.config.name);
        out["network"] = json!(self.config.network);
        out["software"] = json!(concat!("chorus/", env!("CARGO_PKG_VERSION")));
        out["uptime_s"] = json!(self.started.elapsed().as_secs());
        out["peers"] = json!(self.net.peers().await.len());
        out["engine"] = self.engine_state(&loaded);
        out["nodes"] = json!(nodes);
        out["ticket"] = json!(ticket);
        if let Some(room) = &self.room {
            out["training"] = json!(room.status().await);
        }
        Ok(out)
    }

    async fn training(&self) -> Result<Value, BackendError> {
        let room = self.room.as_ref().ok_or(BackendError::NoTraining)?;
        room.status().await.ok_or(BackendError::ShuttingDown)
    }

    async fn curve(&self, form: CurveForm) -> Result<String, BackendError> {
        let room = self.room.as_ref().ok_or(BackendError::NoTraining)?;
        let curve = room.curve().await.ok_or(BackendError::NoTraining)?;
        Ok(match form {
            CurveForm::Text => curve.to_text(),
            CurveForm::Csv => curve.to_csv(),
            CurveForm::Svg => curve.to_svg(&self.config.trainer.environments.join(", ")),
        })
    }

    async fn evidence(&self, evidence: Hash) -> Result<Vec<u8>, BackendError> {
        let room = self.room.as_ref().ok_or(BackendError::NoTraining)?;
        let found = room.evidence(evidence).await.ok_or(BackendError::ShuttingDown)?;
        found.map_err(|reason| BackendError::NoEvidence { evidence, reason })
    }

    async fn batch(&self, wait: Duration) -> Result<Option<Rollouts>, BackendError> {
        self.desk()?.batch(wait).await
    }

    async fn weights(&self) -> Result<Weights, BackendError> {
        self.desk()?.weights().await
    }

    async fn learned(&self, update: Update, pieces: Pieces) -> Result<u64, BackendError> {
        self.desk()?.learned(update, pieces).await
    }

    async fn peers(&self) -> Result<Vec<Value>, BackendError> {
        let names = self.handle.read(|node, _| {
            let name = |(id, offer): (NodeId, &Arc<Capability>)| (id, offer.name.to_string());
            node.ledger().capabilities().map(name).collect::<std::collections::BTreeMap<_, _>>()
        });
        let names = names.await.map_err(stopping)?;
        let peers = self.net.peers().await;
        let rows: Vec<Value> = peers
            .iter()
            .map(|peer| {
                json!({
                    "node": peer.node,
                    "name": names.get(&peer.node),
                    "agent": peer.agent,
                    "address": peer.addrs.first().map(ToString::to_string),
                    "rtt_ms": peer.rtt.map(|rtt| rtt.as_secs_f64() * 1e3),
                    "relayed": peer.relayed,
                    "outbound": peer.outbound,
                    "connected_s": peer.connected_for.as_secs(),
                })
            })
            .collect();
        Ok(rows)
    }

    async fn set_blocked(&self, peer: NodeId, blocked: bool) -> Result<(), BackendError> {
        let done = if blocked { self.net.ban(peer, BLOCK) } else { self.net.unban(peer) };
        done.map_err(|error| BackendError::Engine { reason: error.to_string(), retryable: error.is_retryable() })
    }

    async fn ledger(&self, filter: LedgerFilter) -> Result<LedgerPage, BackendError> {
        self.handle.read(move |node, _| page(node, &filter)).await.map_err(stopping)
    }

    async fn ledger_entry(&self, hash: Hash) -> Result<Value, BackendError> {
        let entry = self.handle.read(move |node, _| node.ledger().get(&hash).map(entry_row)).await.map_err(stopping)?;
        entry.ok_or(BackendError::EntryNotFound { hash })
    }

    async fn metrics(&self) -> String {
        let peers = self.net.peers().await.len();
        let Ok(status) = self.handle.read(|node, now| node.status(now)).await else { return String::new() };
        let mut text = self.metrics.render(&status, peers);
        if let Some(room) = &self.room
            && let Some(status) = room.status().await
        {
            text.push_str(&self.training.get_or_init(|| TrainingMetrics::new(&status)).render(&status));
        }
        text
    }
}
