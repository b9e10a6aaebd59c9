//! Between the node and its engine: runs become tasks of the runtime, and what they bring comes back as inputs.
//!
//! ```text
//!  driver ──Run──▶ EngineShell ──spawn──▶ Engine::generate ──chunks──▶ Input::Engine(Progress)
//!         ──Stop─▶      │ cancels                         └─result──▶ Input::Engine(Done)
//!         ──Embed▶      └──spawn──▶ Embedder ───────────────────────▶ Input::Engine(Embedded)
//! ```
//!
//! Every run ends in exactly one `Done`, also when it is cancelled, times out or panics.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use chorus_core::{EngineInput, Input, RunId};
use chorus_engine::{ChatMessage, Chunk, Embedder, Engine, EngineError, Finish, GenerateRequest, Generated, Sampling};
use chorus_protocol::job::{self, Failure, JobKind, Output, Payload};
use chorus_protocol::{Embedding, Hash, Text};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

/// Pieces of text that may wait between the engine and the driver; the engine merges what does not fit.
const CHUNK_QUEUE: usize = 32;
/// Embeddings under way at a time.
const MAX_EMBEDDINGS: usize = 64;
/// The longest that an embedding may take before the job goes on without one.
const EMBED_TIMEOUT: Duration = Duration::from_secs(5);

/// What runs the node's jobs.
#[derive(Clone, Default)]
pub(crate) struct Engines {
    /// The language model; absent on a node that only asks, and until it is loaded.
    pub engine: Option<Arc<dyn Engine>>,
    /// The embedder, where there is one.
    pub embedder: Option<Arc<Embedder>>,
    /// Stands before every job's own prompt.
    pub system_prompt: String,
}

/// The runs under way.
pub(crate) struct EngineShell {
    engines: Engines,
    runs: BTreeMap<RunId, CancellationToken>,
    embeddings: Arc<tokio::sync::Semaphore>,
    inputs: mpsc::Sender<Input>,
}

impl EngineShell {
    pub(crate) fn new(inputs: mpsc::Sender<Input>) -> Self {
        Self {
            engines: Engines::default(),
            runs: BTreeMap::new(),
            embeddings: Arc::new(tokio::sync::Semaphore::new(MAX_EMBEDDINGS)),
            inputs,
        }
    }

    /// Takes the engines into service.
    pub(crate) fn install(&mut self, engines: Engines) {
        self.engines = engines;
    }

    /// Starts a run.
    pub(crate) fn run(&mut self, run: RunId, kind: JobKind, payload: Payload, limit: Duration) {
        let cancel = CancellationToken::new();
        self.runs.insert(run, cancel.clone());
        let (engines, inputs) = (self.engines.clone(), self.inputs.clone());
        let span = tracing::info_span!("job", id = %run.job, fence = run.fence, requester = %run.requester.fmt_short(), kind = ?kind);
        tokio::spawn(
            async move {
                let work =
                    tokio::spawn(generate(engines, run, payload, limit, inputs.clone(), cancel).in_current_span());
                let result = work.await.unwrap_or_else(|error| {
                    Err(Failure::Engine(Text::truncated(&format!("the run broke off: {error}"))))
                });
                match &result {
                    Ok(output) => tracing::info!(tokens = output.completion_tokens, "done"),
                    Err(failure) => tracing::warn!(%failure, "failed"),
                }
                // The driver takes inputs until it stops, and then nobody waits for this one.
                let _ = inputs.send(Input::Engine(EngineInput::Done { run, result })).await;
            }
            .instrument(span),
        );
    }

    /// Stops a run; its `Done` still comes.
    pub(crate) fn stop(&mut self, run: &RunId) {
        if let Some(cancel) = self.runs.get(run) {
            cancel.cancel();
        }
    }

    /// Forgets a run that has ended.
    pub(crate) fn forget(&mut self, run: &RunId) {
        self.runs.remove(run);
    }

    /// Stops every run.
    pub(crate) fn stop_all(&mut self) {
        for cancel in self.runs.values() {
            cancel.cancel();
        }
    }

    /// Embeds a text. Returns `false` when too many wait already.
    pub(crate) fn embed(&self, request: u64, text: String) -> bool {
        let Ok(permit) = Arc::clone(&self.embeddings).try_acquire_owned() else { return false };
        let (embedder, inputs) = (self.engines.embedder.clone(), self.inputs.clone());
        tokio::spawn(async move {
            let embedding = match embedder {
                Some(embedder) => embed_one(&embedder, text).await,
                None => None,
            };
            drop(permit);
            let _ = inputs.send(Input::Engine(EngineInput::Embedded { request, embedding })).await;
        });
        true
    }
}

/// Embeds one text, or says that there is no embedding for it.
pub(crate) async fn embed_one(embedder: &Embedder, text: String) -> Option<Embedding> {
    match tokio::time::timeout(EMBED_TIMEOUT, embedder.embed(&[text])).await {
        Ok(Ok(embedded)) => embedded.embeddings.first().and_then(Embedding::from_f32),
        Ok(Err(error)) => {
            tracing::warn!(%error, "no embedding");
            None
        }
        Err(_) => {
            tracing::warn!("no embedding within {EMBED_TIMEOUT:?}");
            None
        }
    }
}

async fn generate(
    engines: Engines,
    run: RunId,
    payload: Payload,
    limit: Duration,
    inputs: mpsc::Sender<Input>,
    cancel: CancellationToken,
) -> Result<Output, Failure> {
    let engine = engines.engine.ok_or(Failure::NoSuchModel)?;
    let (chunk_tx, mut chunk_rx) = mpsc::channel::<Chunk>(CHUNK_QUEUE);
    let request = request(&payload, &engines.system_prompt);
    let work = engine.generate(request, chunk_tx, cancel.clone());
    let forward = async {
        while let Some(Chunk { text, tokens }) = chunk_rx.recv().await {
            let text = if payload.stream { text } else { String::new() };
            if inputs.send(Input::Engine(EngineInput::Progress { run, tokens, text })).await.is_err() {
                break;
            }
        }
        // The engine goes on without a listener; the result is what counts.
        std::future::pending::<()>().await;
    };
    tokio::select! {
        result = work => outcome(result),
        () = forward => Err(Failure::Cancelled),
        () = tokio::time::sleep(limit) => {
            cancel.cancel();
            Err(Failure::Deadline)
        }
    }
}

/// The engine's request for a payload. The node's own system prompt stands first; a job that brings one keeps its own behind it.
fn request(payload: &Payload, system_prompt: &str) -> GenerateRequest {
    let mut messages = Vec::with_capacity(payload.turns.len() + 1);
    let brings_its_own = payload.turns.iter().any(|turn| turn.role == job::Role::System);
    if !system_prompt.is_empty() && !brings_its_own {
        messages.push(ChatMessage::system(system_prompt));
    }
    messages.extend(payload.turns.iter().map(|turn| match turn.role {
        job::Role::System => ChatMessage::system(turn.content.as_str()),
        job::Role::User => ChatMessage::user(turn.content.as_str()),
        job::Role::Assistant => ChatMessage::assistant(turn.content.as_str()),
    }));
    let mut request = GenerateRequest::new(messages, payload.max_tokens);
    request.sampling = Sampling {
        seed: payload.seed,
        temperature: milli(payload.temperature_milli),
        top_p: milli(payload.top_p_milli),
        top_k: 0,
    };
    request.json_schema = payload.json_schema.as_ref().map(|schema| schema.as_str().to_owned());
    request.stop = payload.stop.iter().map(|stop| stop.as_str().to_owned()).collect();
    request
}

#[allow(clippy::cast_precision_loss, reason = "thousandths of small numbers")]
fn milli(value: u32) -> f32 {
    value as f32 / 1_000.0
}

fn outcome(result: Result<Generated, EngineError>) -> Result<Output, Failure> {
    let generated = result.map_err(|error| failure(&error))?;
    let finish = match generated.finish {
        Finish::Stop => job::Finish::Stop,
        Finish::Length => job::Finish::Length,
        Finish::Cancelled => return Err(Failure::Cancelled),
    };
    let text = Text::new(generated.text)
        .map_err(|error| Failure::Engine(Text::truncated(&format!("the answer is too long: {error}"))))?;
    Ok(Output {
        text,
        prompt_tokens: generated.prompt_tokens,
        completion_tokens: generated.completion_tokens,
        finish,
        model: Hash::from_bytes(generated.model.fingerprint),
    })
}

/// What an engine's error is called on the wire. Paths and addresses of this machine stay here.
fn failure(error: &EngineError) -> Failure {
    match error {
        EngineError::ContextExceeded { prompt_tokens, context } => {
            Failure::ContextExceeded { prompt_tokens: *prompt_tokens, context: *context }
        }
        EngineError::Overloaded { .. } => Failure::Busy,
        EngineError::Cancelled => Failure::Cancelled,
        EngineError::InvalidSchema { reason } | EngineError::InvalidRequest { reason } => {
            Failure::InvalidPayload(Text::truncated(reason))
        }
        EngineError::ModelNotFound { .. } => Failure::NoSuchModel,
        EngineError::Crashed { .. } => Failure::Engine(Text::truncated("it crashed and restarts")),
        EngineError::OutOfMemory { .. } => Failure::Engine(Text::truncated("out of memory")),
        EngineError::Timeout { .. } => Failure::Deadline,
        EngineError::Inference { detail } => Failure::Engine(Text::truncated(detail)),
        EngineError::Remote { status, .. } => {
            Failure::Engine(Text::truncated(&format!("the endpoint behind it answered {status}")))
        }
        _ => Failure::Engine(Text::truncated("it cannot serve now")),
    }
}
