//! The engine that runs a model in this process.
//!
//! The life of a request: a place in the bounded queue, its prompt's tokens counted by the model's
//! own tokenizer, the context checked, a slot, then mistral.rs with the sampling hook. Its pieces
//! come back over a channel that has room for the whole answer, because mistral.rs waits for a full
//! one with all its other requests standing still.
//!
//! `run` says what is known about mistral.rs, and `prompt` what a request must be like.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use async_trait::async_trait;
use mistralrs::{Request, core::TokenizationRequest};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::{
    Calibration, ChatMessage, Chunk, Engine, EngineError, Finish, GenerateRequest, Generated, Load, ModelInfo,
    ModelSource, Sampling,
    admission::Admission,
    calibrate,
    hook::{Choice, Fault, Logprobs},
    loader::LoadSpec,
    prompt::{Prompt, check_prompt_bytes, check_request, constraint, room_for_answer},
    run::{Ran, Run, count, nobody},
    supervisor::{Live, OpenSpec, Supervisor},
};

/// How long the engine thread may take to count tokens; it does so between two steps, and a step may
/// be the prompt of another request.
const TOKENISE_LIMIT: Duration = Duration::from_secs(120);

/// How to run a model.
#[derive(Debug, Clone)]
pub struct MistralConfig {
    /// Where the model is.
    pub source: ModelSource,
    /// What it is called; by default the file's or directory's name.
    pub name: Option<String>,
    /// What its fingerprint is, if its files are known by another hash than their own, as a policy's version is.
    pub fingerprint: Option<[u8; 32]>,
    /// Tokens of prompt and answer together; by default, and at most, what the model was made for.
    /// Each running request holds memory for the tokens it has, so this bounds it.
    pub context: Option<u32>,
    /// Most requests that run at once on a GPU. On a CPU it is always one: more would not give more
    /// tokens per second, and mistral.rs 0.8.1 mixes them up.
    pub max_concurrent: usize,
    /// Most requests that wait.
    pub max_queued: usize,
    /// Use the CPU even if built for a GPU.
    pub force_cpu: bool,
    /// How long a request waits for an engine that is being restarted.
    pub restart_wait: Duration,
}

impl MistralConfig {
    /// Returns the default configuration for a model.
    #[must_use]
    pub fn new(source: ModelSource) -> Self {
        Self {
            source,
            name: None,
            fingerprint: None,
            context: None,
            max_concurrent: 4,
            max_queued: 64,
            force_cpu: false,
            restart_wait: Duration::from_secs(10),
        }
    }
}

/// Runs one model with mistral.rs.
pub struct MistralEngine {
    supervisor: Arc<Supervisor>,
    admission: Admission,
    fault: Arc<Fault>,
    info: ModelInfo,
}

impl std::fmt::Debug for MistralEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MistralEngine").field("info", &self.info).finish_non_exhaustive()
    }
}

impl Drop for MistralEngine {
    fn drop(&mut self) {
        self.supervisor.close();
    }
}

impl MistralEngine {
    /// Loads the model and starts its engine thread.
    ///
    /// # Errors
    ///
    /// Says which file is missing, damaged or unsupported, or that memory does not suffice.
    pub async fn open(config: MistralConfig) -> Result<Self, EngineError> {
        Self::open_sharing(config, &OnceLock::new()).await
    }

    /// Loads the model into a queue that others may use too; the first one to be loaded makes it.
    pub(crate) async fn open_sharing(
        config: MistralConfig,
        admission: &OnceLock<Admission>,
    ) -> Result<Self, EngineError> {
        let name = config.name.clone().unwrap_or_else(|| config.source.default_name());
        let load =
            LoadSpec { source: config.source, max_concurrent: config.max_concurrent, force_cpu: config.force_cpu };
        let MistralConfig { fingerprint, context, restart_wait, .. } = config;
        let spec = OpenSpec { load, name, fingerprint, context, restart_wait };
        let supervisor = Supervisor::open(spec).await?;
        let live = supervisor.live().await?;
        let info = live.info.clone();
        let max_running = if live.loaded.on_cpu { 1 } else { config.max_concurrent };
        tracing::info!(
            model = %info.name, architecture = %info.architecture,
            quantisation = %info.quantisation, context = info.context, "the model is loaded"
        );
        Ok(Self {
            supervisor,
            admission: admission.get_or_init(|| Admission::new(max_running, config.max_queued)).clone(),
            fault: Arc::new(Fault::none()),
            info,
        })
    }

    /// Returns the tokens of `text`, without a chat template.
    ///
    /// # Errors
    ///
    /// [`EngineError::Crashed`] if the engine dies meanwhile.
    pub async fn tokenize(&self, text: &str) -> Result<Vec<u32>, EngineError> {
        let live = self.supervisor.live().await?;
        self.tokenise(&live, Prompt::Text(text.to_owned())).await
    }

    /// Returns the natural-log probability that the model gives each of `tokens` as the answer to
    /// `messages`, at temperature 1.
    ///
    /// It takes as long as generating them.
    ///
    /// # Errors
    ///
    /// Any [`EngineError`] of a generation; [`EngineError::InvalidRequest`] if an end token is
    /// followed by others.
    pub async fn score(
        &self,
        messages: &[ChatMessage],
        tokens: &[u32],
        cancel: CancellationToken,
    ) -> Result<Vec<f32>, EngineError> {
        let ticket = self.admission.enter()?;
        let live = self.supervisor.live().await?;
        let prompt = self.prompt(&live, messages).await?;
        let slot = ticket.slot(&cancel).await?;
        self.score_tokens(prompt, tokens, slot, &cancel).await
    }

    /// Scores `tokens` as what follows the tokens of `prompt`, in a slot that the caller has.
    pub(crate) async fn score_tokens(
        &self,
        prompt: Vec<u32>,
        tokens: &[u32],
        slot: OwnedSemaphorePermit,
        cancel: &CancellationToken,
    ) -> Result<Vec<f32>, EngineError> {
        let live = self.supervisor.live().await?;
        let room = room_for_answer(&prompt, &live)?;
        if tokens.is_empty() || count(tokens.len()) > room {
            return Err(EngineError::ContextExceeded {
                prompt_tokens: count(prompt.len()).saturating_add(count(tokens.len())),
                context: live.info.context,
            });
        }
        let run = Run::of_tokens(prompt, count(tokens.len()), Choice::Forced(tokens.into()));
        let ran = self.run(&live, run, slot, nobody(), cancel).await?;
        if ran.finish == Finish::Cancelled {
            return Err(EngineError::Cancelled);
        }
        if ran.sampled.len() != tokens.len() {
            return Err(EngineError::InvalidRequest {
                reason: format!("the tokens to score end at token {}", ran.sampled.len()),
            });
        }
        Ok(ran.sampled.iter().map(|sampled| sampled.logprob).collect())
    }

    /// Draws tokens that follow those of `prompt`, in a slot that the caller has.
    pub(crate) async fn sample(
        &self,
        prompt: Vec<u32>,
        max_tokens: u32,
        sampling: Sampling,
        slot: OwnedSemaphorePermit,
        cancel: &CancellationToken,
    ) -> Result<Ran, EngineError> {
        let live = self.supervisor.live().await?;
        let room = room_for_answer(&prompt, &live)?;
        let run = Run::of_tokens(prompt, max_tokens.min(room), Choice::Draw(sampling));
        self.run(&live, run, slot, nobody(), cancel).await
    }

    /// Generates in a slot that the caller has.
    pub(crate) async fn generate_in(
        &self,
        slot: OwnedSemaphorePermit,
        request: GenerateRequest,
        tokens: mpsc::Sender<Chunk>,
        cancel: &CancellationToken,
    ) -> Result<Generated, EngineError> {
        check_request(&request)?;
        let run = self.prepare(request, cancel).await?;
        self.answer(run, slot, tokens, cancel).await
    }

    /// Waits for a slot like any request.
    pub(crate) async fn slot(&self) -> Result<OwnedSemaphorePermit, EngineError> {
        self.admission.enter()?.slot(&CancellationToken::new()).await
    }

    pub(crate) fn fault(&self) -> &Arc<Fault> {
        &self.fault
    }

    pub(crate) async fn live(&self) -> Result<Arc<Live>, EngineError> {
        self.supervisor.live().await
    }

    /// Puts a request in the model's own terms.
    async fn prepare(&self, request: GenerateRequest, cancel: &CancellationToken) -> Result<Run, EngineError> {
        let constraint = constraint(request.json_schema.as_deref())?;
        let prepare = async {
            let live = self.supervisor.live().await?;
            let prompt = self.prompt(&live, &request.messages).await?;
            let room = room_for_answer(&prompt, &live)?;
            Ok(Run {
                prompt,
                max_tokens: request.max_tokens.min(room),
                choice: Choice::Draw(request.sampling),
                logprobs: if request.logprobs { Logprobs::AsDrawn } else { Logprobs::No },
                constraint,
                stops: request.stop,
                text: true,
            })
        };
        tokio::select! {
            biased;
            () = cancel.cancelled() => Err(EngineError::Cancelled),
            prepared = prepare => prepared,
        }
    }

    async fn answer(
        &self,
        run: Run,
        slot: OwnedSemaphorePermit,
        tokens: mpsc::Sender<Chunk>,
        cancel: &CancellationToken,
    ) -> Result<Generated, EngineError> {
        // It may have been restarted while this request waited.
        let live = self.supervisor.live().await?;
        let (prompt_tokens, logprobs) = (count(run.prompt.len()), run.logprobs != Logprobs::No);
        let ran = self.run(&live, run, slot, tokens, cancel).await?;
        Ok(ran.into_generated(&live, prompt_tokens, logprobs))
    }

    async fn prompt(&self, live: &Arc<Live>, messages: &[ChatMessage]) -> Result<Vec<u32>, EngineError> {
        check_prompt_bytes(messages, live.info.context)?;
        self.tokenise(live, Prompt::render(messages, live.has_chat_template)).await
    }

    /// Has the engine thread tokenise.
    pub(crate) async fn tokenise(&self, live: &Arc<Live>, prompt: Prompt) -> Result<Vec<u32>, EngineError> {
        let (response, mut answers) = mpsc::channel(1);
        let request = TokenizationRequest {
            text: match prompt {
                Prompt::Chat(messages) => Err::<String, _>(messages.into()).into(),
                Prompt::Text(text) => Ok(text).into(),
            },
            tools: None,
            add_generation_prompt: true,
            add_special_tokens: true,
            enable_thinking: None,
            reasoning_effort: None,
            response,
        };
        if live.loaded.requests.send(Request::Tokenize(request)).await.is_err() {
            return Err(self.crashed(live, "it was dead when a request came"));
        }
        // The engine thread panics if nobody takes its answer, so a task of its own does, whatever
        // becomes of this future.
        let (done, answer) = oneshot::channel();
        tokio::spawn(async move {
            let result = answers.recv().await.map(|result| result.map_err(|e| format!("{e:#}")));
            drop(done.send(result));
        });
        match tokio::time::timeout(TOKENISE_LIMIT, answer).await {
            Ok(Ok(Some(Ok(tokens)))) => Ok(tokens),
            Ok(Ok(Some(Err(reason)))) => Err(EngineError::InvalidRequest {
                reason: format!("the model's chat template refuses the messages: {reason}"),
            }),
            Ok(_) => Err(self.crashed(live, "it died while it counted tokens")),
            Err(_) => Err(EngineError::Timeout { what: "counting tokens", limit: TOKENISE_LIMIT }),
        }
    }

    pub(crate) fn crashed(&self, live: &Arc<Live>, detail: &str) -> EngineError {
        self.supervisor.crashed(live, detail);
        EngineError::Crashed { detail: detail.to_owned() }
    }
}

#[async_trait]
impl Engine for MistralEngine {
    fn info(&self) -> Vec<ModelInfo> {
        vec![self.info.clone()]
    }

    fn load(&self) -> Load {
        Load {
            running: self.admission.running(),
            queued: self.admission.queued(),
            max_running: self.admission.max_running(),
            max_queued: self.admission.max_queued(),
            restarts: self.supervisor.restarts(),
        }
    }

    async fn generate(
        &self,
        request: GenerateRequest,
        tokens: mpsc::Sender<Chunk>,
        cancel: CancellationToken,
    ) -> Result<Generated, EngineError> {
        check_request(&request)?;
        let ticket = self.admission.enter()?;
        let run = self.prepare(request, &cancel).await?;
        let slot = ticket.slot(&cancel).await?;
        self.answer(run, slot, tokens, &cancel).await
    }

    async fn calibrate(&self) -> Result<Calibration, EngineError> {
        calibrate::measure(self).await
    }
}
