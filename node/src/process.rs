//! A node process, from its configuration to its end.
//!
//! 1. Data directory, key, ledger: what is wrong with the disk is told first.
//! 2. Sockets: network and API.
//! 3. The driver. From here on the node takes part: it has joined as soon as a peer answers.
//! 4. Model and embedder, in the background: when they are measured, the capability is announced. A model that cannot be
//!    loaded ends the process, because its operator wants to know now.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use chorus_api::{ApiConfig, TaskLog};
use chorus_core::{Command, Node, NodeConfig};
use chorus_engine::{
    Calibration, Embedder, Engine, EngineError, MistralConfig, MistralEngine, ModelInfo, ModelSource, OpenAiConfig,
    OpenAiEngine,
};
use chorus_machine::Rng;
use chorus_net::{Addr, Net, NetConfig, Ticket};
use chorus_protocol::{Embedding, NodeId, SecretKey};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::backend::NodeBackend;
use crate::capability;
use crate::config::{Config, EngineKind, models_dir};
use crate::driver::{Driver, INPUT_QUEUE, NodeHandle, Parts};
use crate::error::CommandError;
use crate::executor::{Engines, embed_one};
use crate::keyfile;
use crate::metrics::Metrics;
use crate::storage::Disk;
use crate::training;

/// The model that `scripts/models` puts in place.
pub(crate) const DEFAULT_MODEL: &str = "SmolLM2-135M-Instruct.Q8_0.gguf";
/// The embedder that `scripts/models` puts in place.
const DEFAULT_EMBEDDER: &str = "all-MiniLM-L6-v2";
/// Where a running node tells the commands how to reach it.
pub(crate) const RUN_FILE: &str = "run.json";
/// How long the tasks of a stopping process are waited for.
const GRACE: Duration = Duration::from_secs(3);
/// What the control plane tells the training room, and may wait.
const NEWS_QUEUE: usize = 256;

/// Runs a node until it is told to stop.
pub(crate) async fn run(config: Config) -> Result<(), CommandError> {
    let network = config.network_id()?;
    let key = prepare(&config)?;
    let (inputs_tx, inputs_rx) = mpsc::channel(INPUT_QUEUE);
    let (disk, restored, records) =
        Disk::open(&config.data_dir, &network, inputs_tx.clone()).map_err(CommandError::machine)?;
    let (net, net_events) = Net::start(net_config(&config, &network)?, &key).await.map_err(CommandError::machine)?;
    let mut rng = Rng::from_seed(entropy()?);
    let shutdown = CancellationToken::new();
    let (news_tx, news) = mpsc::channel(NEWS_QUEUE);
    let (handle, requests) = NodeHandle::channel();
    let epoch = Instant::now();
    let means = training::Means {
        config: config.clone(),
        key: key.clone(),
        network: network.clone(),
        net: net.clone(),
        node: handle.clone(),
        inputs: inputs_tx.clone(),
        epoch,
        rng: rng.fork(),
    };
    let room = training::Parts { means, news, shutdown: shutdown.clone() };
    let room = training::start(room).await?;
    let (tasks, metrics) = (Arc::new(TaskLog::default()), Arc::new(Metrics::default()));
    let mut driver = Driver::new(Parts {
        node: Node::new(node_config(&config)?, key.clone()),
        epoch,
        rng: rng.fork(),
        net: net.clone(),
        net_events,
        disk,
        inputs_tx,
        inputs_rx,
        requests,
        tasks: Arc::clone(&tasks),
        metrics: Arc::clone(&metrics),
        news: news_tx,
        shutdown: shutdown.clone(),
    });
    driver.restore(restored);
    let backend = Arc::new(NodeBackend::new(
        config.clone(),
        key.node_id(),
        handle.clone(),
        net,
        tasks,
        records,
        metrics,
        room,
        rng,
    ));
    let api = ApiConfig { token: token(&config), ..ApiConfig::new(config.api.listen) };
    let bound =
        chorus_api::serve(api, Arc::clone(&backend) as _, shutdown.clone()).await.map_err(CommandError::machine)?;
    write_run_file(&config.data_dir, &bound.local_addr().to_string())?;
    tracing::info!(node = %key.node_id(), name = config.name, api = %bound.local_addr(), "the node is up");
    let mut driving = tokio::spawn(driver.run());
    let ended = tokio::select! {
        ended = bring_up(&config, key.node_id(), &handle, &backend) => ended,
        () = interrupted() => Ok(()),
        died = &mut driving => Err(loop_died(died)),
    };
    shutdown.cancel();
    // The last answers are sent, then the loop says good-bye; neither holds up the end for long.
    let _ = tokio::time::timeout(GRACE, bound.stopped()).await;
    if !driving.is_finished() {
        let _ = tokio::time::timeout(GRACE, driving).await;
    }
    let _ = fs::remove_file(config.data_dir.join(RUN_FILE));
    ended
}

/// A node whose loop has ended answers nobody: better to end, loudly, and be started again by whoever supervises it.
fn loop_died(died: Result<(), tokio::task::JoinError>) -> CommandError {
    let why = died.err().map_or_else(|| "it returned".to_owned(), |error| error.to_string());
    CommandError::machine(format!("the node's loop ended by itself: {why}")).hint(
        "this is a fault of the program; please report it with the last lines of the log, and start the node again",
    )
}

/// Loads the models, announces what the node can do, and then waits for ever.
async fn bring_up(config: &Config, me: NodeId, handle: &NodeHandle, backend: &NodeBackend) -> Result<(), CommandError> {
    let engines = load(config).await?;
    let models = measure(engines.engine.as_deref()).await;
    let embeddings = embed_skills(config, engines.embedder.as_deref()).await;
    let offer = capability::build(config, me, &models, &embeddings);
    backend.install(engines.clone(), &models);
    let gone = |_| CommandError::machine("the node stopped while it started");
    handle.install(engines).await.map_err(gone)?;
    handle.command(Command::Offer(Box::new(offer))).await.map_err(gone)?;
    for (model, speed) in &models {
        let rate = speed.map_or(0.0, |speed| speed.decode_tokens_per_s);
        tracing::info!(model = model.name, quantisation = model.quantisation, tokens_per_s = rate, "ready to work");
    }
    std::future::pending().await
}

async fn load(config: &Config) -> Result<Engines, CommandError> {
    let engine: Option<Arc<dyn Engine>> = match config.engine.kind {
        EngineKind::None => None,
        EngineKind::Mistral => Some(Arc::new(MistralEngine::open(mistral(config)?).await.map_err(no_engine)?)),
        EngineKind::Openai => Some(Arc::new(openai(config).await.map_err(no_engine)?)),
    };
    let dir = embedder_dir(config);
    // A node that only asks embeds too: the requirement of a job is what its meaning is compared by.
    let embedder = match dir.join("tokenizer.json").exists() {
        true if config.engine.kind != EngineKind::None || !config.engine.embedder.is_empty() => {
            Some(Arc::new(Embedder::open(dir).await.map_err(no_engine)?))
        }
        _ => None,
    };
    Ok(Engines { engine, embedder, system_prompt: config.engine.system_prompt.clone() })
}

fn no_engine(error: EngineError) -> CommandError {
    CommandError::machine(error).hint("--model none starts a node that asks and does not answer")
}

fn mistral(config: &Config) -> Result<MistralConfig, CommandError> {
    let named = if config.engine.model.is_empty() { DEFAULT_MODEL } else { &config.engine.model };
    // A bare name may be one of the models that the script fetched.
    let fetched = models_dir().join(named);
    let source = if fetched.exists() { fetched.display().to_string() } else { named.to_owned() };
    let mut mistral = MistralConfig::new(ModelSource::parse(&source).map_err(no_engine)?);
    mistral.max_concurrent = usize::from(config.engine.slots);
    mistral.max_queued = config.engine.queue;
    mistral.context = (config.engine.context > 0).then_some(config.engine.context);
    Ok(mistral)
}

async fn openai(config: &Config) -> Result<OpenAiEngine, EngineError> {
    let mut openai = OpenAiConfig::new(&config.engine.url, &config.engine.model);
    openai.api_key = std::env::var(&config.engine.api_key_env).ok();
    openai.max_concurrent = usize::from(config.engine.slots);
    openai.max_queued = config.engine.queue;
    if config.engine.context > 0 {
        openai.context = config.engine.context;
    }
    OpenAiEngine::connect(openai).await
}

pub(crate) fn embedder_dir(config: &Config) -> PathBuf {
    if config.engine.embedder.is_empty() {
        models_dir().join(DEFAULT_EMBEDDER)
    } else {
        PathBuf::from(&config.engine.embedder)
    }
}

/// Every model with its measured speed. One that cannot be measured is offered all the same, without figures.
async fn measure(engine: Option<&dyn Engine>) -> Vec<(ModelInfo, Option<Calibration>)> {
    let Some(engine) = engine else { return Vec::new() };
    let speed = match engine.calibrate().await {
        Ok(speed) => Some(speed),
        Err(error) => {
            tracing::warn!(%error, "the engine's speed could not be measured");
            None
        }
    };
    engine.info().into_iter().map(|info| (info, speed)).collect()
}

async fn embed_skills(config: &Config, embedder: Option<&Embedder>) -> Vec<Option<Embedding>> {
    let mut embeddings = Vec::with_capacity(config.skills.len());
    for skill in &config.skills {
        embeddings.push(match embedder {
            Some(embedder) => embed_one(embedder, skill.text.clone()).await,
            None => None,
        });
    }
    embeddings
}

fn prepare(config: &Config) -> Result<SecretKey, CommandError> {
    fs::create_dir_all(&config.data_dir).map_err(|error| {
        CommandError::machine(format!("cannot create {}: {error}", config.data_dir.display()))
            .hint("choose another place with --data-dir")
    })?;
    keyfile::load_or_create(&config.data_dir).map_err(CommandError::machine)
}

fn node_config(config: &Config) -> Result<NodeConfig, CommandError> {
    let mut node = NodeConfig::new(config.network_id()?);
    node.beacon.selection = config.beacon.selection;
    node.beacon.window = Duration::from_millis(config.beacon.window_ms);
    node.beacon.window_max = Duration::from_millis(config.beacon.window_max_ms);
    node.beacon.validate().map_err(CommandError::usage)?;
    Ok(node)
}

fn net_config(config: &Config, network: &chorus_protocol::NetworkId) -> Result<NetConfig, CommandError> {
    let mut net = NetConfig::new(network.clone());
    net.listen = addresses(&config.net.listen)?;
    net.external = addresses(&config.net.external)?;
    net.bootstrap = bootstrap(config)?;
    net.peer_file = Some(config.data_dir.join("peers"));
    net.mdns = config.net.mdns;
    net.relay_server = config.net.relay_server;
    Ok(net)
}

fn addresses(texts: &[String]) -> Result<Vec<Addr>, CommandError> {
    texts.iter().map(|text| text.parse().map_err(CommandError::usage)).collect()
}

/// Tickets and multiaddresses, from the configuration, the flags and the bootstrap file.
fn bootstrap(config: &Config) -> Result<Vec<Addr>, CommandError> {
    let mut peers = Vec::new();
    for text in config.bootstrap_peers()? {
        if text.starts_with("chorus1") {
            let ticket: Ticket = text.parse().map_err(CommandError::usage)?;
            if ticket.network().as_str() != config.network {
                return Err(CommandError::usage(format!(
                    "the ticket is for the network '{}', and this node is in '{}'",
                    ticket.network(),
                    config.network
                ))
                .hint(format!("use --network {}", ticket.network())));
            }
            peers.extend(ticket.bootstrap());
        } else {
            peers.push(text.parse().map_err(CommandError::usage)?);
        }
    }
    Ok(peers)
}

/// The ticket of a node that need not run: its key and the addresses that it will listen on.
pub(crate) fn offline_ticket(config: &Config) -> Result<Ticket, CommandError> {
    let key = prepare(config)?;
    let addresses = addresses(if config.net.external.is_empty() { &config.net.listen } else { &config.net.external })?;
    Ok(Ticket::new(config.network_id()?, key.node_id(), addresses))
}

fn token(config: &Config) -> Option<String> {
    Some(config.api.token.clone()).filter(|token| !token.is_empty())
}

fn entropy() -> Result<[u8; 32], CommandError> {
    use std::io::Read;
    let mut seed = [0; 32];
    fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut seed)).map_err(CommandError::machine)?;
    Ok(seed)
}

fn write_run_file(data_dir: &Path, api: &str) -> Result<(), CommandError> {
    let text = serde_json::json!({ "api": api, "pid": std::process::id() }).to_string();
    let (path, partial) = (data_dir.join(RUN_FILE), data_dir.join("run.json.new"));
    fs::write(&partial, text).and_then(|()| fs::rename(&partial, &path)).map_err(CommandError::machine)
}

/// Returns when the process is asked to end: Ctrl-C, or SIGTERM.
async fn interrupted() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => {}
            }
            return;
        }
    }
    let _ = tokio::signal::ctrl_c().await;
}
