//! The engine that runs a model in this process.
//!
//! The life of a request: a place in the bounded queue, its prompt's tokens counted by the model's
//! own tokenizer, the context checked, a slot, then mistral.rs with the sampling hook. Its pieces
//! come back over a channel that has room for the whole answer, because mistral.rs waits for a full
//! one with all its other requests standing still.
//!
//! What this module knows about mistral.rs 0.8.1:
//!
//! - **On a CPU it mixes up requests that it decodes together.** Sequences of equal length are decoded
//!   as one batch, and `flash_attn_cpu_single_q` (attention/backends/cpu.rs) has one scratch buffer
//!   for the whole batch: every sequence gets the attention of the last one, that is, answers that
//!   depend on, and can repeat, somebody else's prompt. So on a CPU one request runs at a time, and
//!   the next begins when mistral.rs has let go of the one before. It costs nothing: a CPU makes no
//!   more tokens per second from a batch (`examples/engine_bench.rs` measures it).
//! - Dropping the response channel cancels a streaming request at its next piece of text; the hook's
//!   end token does it at the next token.
//! - A streaming request whose last bytes are half a UTF-8 character ends without a last message:
//!   the channel just closes, as it does when the engine thread dies.
//! - When a grammar is complete it admits only the end token of the grammar engine, which is often
//!   another one than the model's (`<|endoftext|>` against `<|im_end|>`), and mistral.rs goes on
//!   until the answer's limit. So these end tokens stop every request.
//! - A request that ends with its very first token is nevertheless run for a second one.
//! - A model has no limit of its own on prompt and answer together, only on each; so the answer is
//!   limited here to what the context leaves.
//! - Asking for a chat template that the model lacks panics; so a plain form is used then.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use mistralrs::{
    Constraint, NormalRequest, Request, RequestMessage, Response, SamplingParams, StopTokens, TextMessageRole,
    TextMessages, core::TokenizationRequest,
};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::{
    Calibration, ChatMessage, Chunk, Engine, EngineError, Finish, GenerateRequest, Generated, Load, ModelInfo,
    ModelSource, Role, Sampling,
    admission::Admission,
    calibrate,
    hook::{Choice, Fault, SampleHook, Sampled},
    loader::{LoadSpec, is_out_of_memory},
    stream::Answer,
    supervisor::{Live, OpenSpec, Supervisor},
};

/// No tokenizer in use packs more bytes than this into each token of a long text.
const MAX_BYTES_PER_TOKEN: usize = 64;
const MAX_MESSAGES: usize = 1_024;
const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 256;
const MAX_SCHEMA_BYTES: usize = 64 << 10;
/// End tokens as the grammar engine knows them (toktrie_hf_tokenizers 1.9, `from_tokenizer`).
const GRAMMAR_ENDS: [&str; 5] = ["<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<｜end▁of▁sentence｜>"];
/// How often, and how long, it is checked whether mistral.rs let go of a request.
const LET_GO_POLL: Duration = Duration::from_millis(1);
const LET_GO_LIMIT: Duration = Duration::from_secs(60);
/// How long a request waits for its reader after the answer is complete.
const FLUSH_LIMIT: Duration = Duration::from_secs(30);
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
        let name = config.name.clone().unwrap_or_else(|| config.source.default_name());
        let load =
            LoadSpec { source: config.source, max_concurrent: config.max_concurrent, force_cpu: config.force_cpu };
        let spec = OpenSpec { load, name, context: config.context, restart_wait: config.restart_wait };
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
            admission: Admission::new(max_running, config.max_queued),
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
        let max_tokens = u32::try_from(tokens.len()).unwrap_or(u32::MAX);
        let room = room_for_answer(&prompt, &live)?;
        if tokens.is_empty() || max_tokens > room {
            return Err(EngineError::ContextExceeded {
                prompt_tokens: count(prompt.len()).saturating_add(max_tokens),
                context: live.info.context,
            });
        }
        let slot = ticket.slot(&cancel).await?;
        let run = Run {
            prompt,
            max_tokens,
            choice: Choice::Forced(tokens.into()),
            logprobs: true,
            constraint: Constraint::None,
            stops: Vec::new(),
        };
        let (nobody, _) = mpsc::channel(1);
        let ran = self.run(&live, run, slot, nobody, &cancel).await?;
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

    /// Waits for a slot like any request.
    pub(crate) async fn slot(&self) -> Result<OwnedSemaphorePermit, EngineError> {
        self.admission.enter()?.slot(&CancellationToken::new()).await
    }

    pub(crate) fn fault(&self) -> &Fault {
        &self.fault
    }

    pub(crate) async fn live(&self) -> Result<Arc<Live>, EngineError> {
        self.supervisor.live().await
    }

    async fn prompt(&self, live: &Arc<Live>, messages: &[ChatMessage]) -> Result<Vec<u32>, EngineError> {
        check_prompt_bytes(messages, live.info.context)?;
        self.tokenise(live, Prompt::render(messages, live.has_chat_template)).await
    }

    /// Has the engine thread tokenise.
    async fn tokenise(&self, live: &Arc<Live>, prompt: Prompt) -> Result<Vec<u32>, EngineError> {
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

    fn crashed(&self, live: &Arc<Live>, detail: &str) -> EngineError {
        self.supervisor.crashed(live, detail);
        EngineError::Crashed { detail: detail.to_owned() }
    }

    /// Runs one admitted request to its end.
    pub(crate) async fn run(
        &self,
        live: &Arc<Live>,
        run: Run,
        slot: OwnedSemaphorePermit,
        reader: mpsc::Sender<Chunk>,
        cancel: &CancellationToken,
    ) -> Result<Ran, EngineError> {
        let max_tokens = run.max_tokens as usize;
        let hook = SampleHook::new(run.choice, run.logprobs, live.end_token, Arc::clone(&self.fault));
        let hook = Arc::new(hook);
        let held = Held { hook: Arc::clone(&hook), slot: Some(slot) };
        let (response, responses) = mpsc::channel(max_tokens + 2);
        let request = NormalRequest {
            is_streaming: true,
            constraint: run.constraint,
            logits_processors: Some(vec![hook.clone()]),
            ..NormalRequest::new_simple(
                RequestMessage::CompletionTokens(run.prompt),
                sampling_params(max_tokens, &run.stops),
                response,
                0,
                None,
                None,
            )
        };
        let started = Instant::now();
        if live.loaded.requests.send(Request::Normal(Box::new(request))).await.is_err() {
            return Err(self.crashed(live, "it was dead when a request came"));
        }
        let mut answer = Answer::new(run.stops, reader);
        let end = follow(responses, &mut answer, cancel).await;
        let finish = match end {
            End::Finished(finish) => finish,
            End::Failed(error) => return Err(error),
            End::Closed => self.silent_end(live, &hook, max_tokens, &mut answer).await?,
        };
        let mut outcome = hook.take();
        // A request that ends with its first token is run for one more.
        outcome.sampled.truncate(max_tokens);
        // The slot must not wait for the reader.
        drop((hook, held));
        let flushing = tokio::time::timeout(FLUSH_LIMIT, answer.flush());
        tokio::select! {
            () = cancel.cancelled() => {}
            _ = flushing => {}
        }
        if let Some(detail) = outcome.failure {
            return Err(EngineError::Inference { detail });
        }
        if answer.overran() {
            outcome.sampled.pop();
        }
        Ok(Ran {
            finish: if answer.is_stopped() { Finish::Stop } else { finish },
            text: answer.into_text(),
            sampled: outcome.sampled,
            started,
            first: outcome.first,
            last: outcome.last,
        })
    }

    /// Decides what a channel that closed without a last message means: an answer that ends in half
    /// a character, or a dead engine.
    async fn silent_end(
        &self,
        live: &Arc<Live>,
        hook: &SampleHook,
        max_tokens: usize,
        answer: &mut Answer,
    ) -> Result<Finish, EngineError> {
        let probe = self.tokenise(live, Prompt::Text("a".to_owned())).await;
        if live.is_dead() || probe.is_err() {
            return Err(self.crashed(live, "its thread ended while it held the request"));
        }
        // The last token's piece never came.
        answer.push("");
        Ok(if hook.sampled() >= max_tokens { Finish::Length } else { Finish::Stop })
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
        let constraint = constraint(request.json_schema.as_deref())?;
        let ticket = self.admission.enter()?;
        let prepare = async {
            let live = self.supervisor.live().await?;
            let prompt = self.prompt(&live, &request.messages).await?;
            let room = room_for_answer(&prompt, &live)?;
            Ok::<_, EngineError>((prompt, room))
        };
        let (prompt, room) = tokio::select! {
            biased;
            () = cancel.cancelled() => return Err(EngineError::Cancelled),
            prepared = prepare => prepared?,
        };
        let slot = ticket.slot(&cancel).await?;
        // It may have been restarted while this request waited.
        let live = self.supervisor.live().await?;
        let prompt_tokens = count(prompt.len());
        let run = Run {
            prompt,
            max_tokens: request.max_tokens.min(room),
            choice: Choice::Draw(request.sampling),
            logprobs: request.logprobs,
            constraint,
            stops: request.stop,
        };
        let ran = self.run(&live, run, slot, tokens, &cancel).await?;
        Ok(ran.into_generated(&live, prompt_tokens, request.logprobs))
    }

    async fn calibrate(&self) -> Result<Calibration, EngineError> {
        calibrate::measure(self).await
    }
}

/// A request in mistral.rs's terms.
pub(crate) struct Run {
    pub(crate) prompt: Vec<u32>,
    pub(crate) max_tokens: u32,
    pub(crate) choice: Choice,
    pub(crate) logprobs: bool,
    pub(crate) constraint: Constraint,
    pub(crate) stops: Vec<String>,
}

/// A request that ran.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) finish: Finish,
    pub(crate) text: String,
    pub(crate) sampled: Vec<Sampled>,
    pub(crate) started: Instant,
    pub(crate) first: Option<Instant>,
    pub(crate) last: Option<Instant>,
}

impl Ran {
    /// Time until the first token, and from the first to the last.
    pub(crate) fn durations(&self) -> (Duration, Duration) {
        match (self.first, self.last) {
            (Some(first), Some(last)) => (first - self.started, last - first),
            _ => (self.started.elapsed(), Duration::ZERO),
        }
    }

    fn into_generated(self, live: &Live, prompt_tokens: u32, logprobs: bool) -> Generated {
        let (prefill, decode) = self.durations();
        Generated {
            text: self.text,
            token_ids: self.sampled.iter().map(|sampled| sampled.token).collect(),
            logprobs: if logprobs { self.sampled.iter().map(|sampled| sampled.logprob).collect() } else { Vec::new() },
            prompt_tokens,
            completion_tokens: count(self.sampled.len()),
            finish: self.finish,
            model: live.info.clone(),
            prefill,
            decode,
        }
    }
}

/// A request in mistral.rs's hands, with its slot. Dropping it ends the generation, and the slot is
/// free when mistral.rs has let go of the request: it holds the hook as long as it may run it.
struct Held {
    hook: Arc<SampleHook>,
    slot: Option<OwnedSemaphorePermit>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.hook.cancel();
        let hook = Arc::downgrade(&self.hook);
        let Some(slot) = self.slot.take() else { return };
        // Without a runtime the whole engine is going away.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                let since = Instant::now();
                while hook.strong_count() > 0 && since.elapsed() < LET_GO_LIMIT {
                    tokio::time::sleep(LET_GO_POLL).await;
                }
                drop(slot);
            });
        }
    }
}

/// How the responses ended.
enum End {
    Finished(Finish),
    Failed(EngineError),
    Closed,
}

/// Takes the engine's responses until the last one, or until the caller cancels.
async fn follow(mut responses: mpsc::Receiver<Response>, answer: &mut Answer, cancel: &CancellationToken) -> End {
    loop {
        let waiting = answer.offer();
        let response = tokio::select! {
            biased;
            () = cancel.cancelled() => return End::Finished(Finish::Cancelled),
            response = responses.recv() => response,
            () = answer.room(), if waiting => continue,
        };
        let Some(response) = response else { return End::Closed };
        match response {
            Response::CompletionChunk(chunk) => {
                let Some(choice) = chunk.choices.into_iter().next() else { continue };
                answer.push(&choice.text);
                match choice.finish_reason.as_deref() {
                    None => {}
                    Some("length") => return End::Finished(Finish::Length),
                    Some("canceled") => return End::Finished(Finish::Cancelled),
                    Some(_) => return End::Finished(Finish::Stop),
                }
            }
            Response::ValidationError(error) => return End::Failed(refused(&error.to_string())),
            Response::CompletionModelError(detail, _) => return End::Failed(failed(detail)),
            Response::InternalError(error) => return End::Failed(failed(error.to_string())),
            _ => return End::Failed(failed("an answer of the wrong kind".to_owned())),
        }
    }
}

fn refused(reason: &str) -> EngineError {
    match reason.strip_prefix("Invalid grammar.") {
        Some(reason) => EngineError::InvalidSchema { reason: reason.trim().to_owned() },
        None => EngineError::InvalidRequest { reason: reason.to_owned() },
    }
}

fn failed(detail: String) -> EngineError {
    if is_out_of_memory(&detail) {
        return EngineError::OutOfMemory { detail };
    }
    EngineError::Inference { detail }
}

/// Greedy, so that the hook's choice is what comes out; mistral.rs takes no temperature for 1.
fn sampling_params(max_tokens: usize, stops: &[String]) -> SamplingParams {
    SamplingParams {
        temperature: Some(0.0),
        max_len: Some(max_tokens),
        stop_toks: Some(StopTokens::Seqs(stops.iter().cloned().chain(GRAMMAR_ENDS.map(str::to_owned)).collect())),
        ..SamplingParams::neutral()
    }
}

/// A prompt before it is tokenised.
enum Prompt {
    Chat(TextMessages),
    Text(String),
}

impl Prompt {
    /// Renders messages for the model's chat template, or plainly if it has none.
    fn render(messages: &[ChatMessage], has_chat_template: bool) -> Self {
        if has_chat_template {
            let chat = messages.iter().fold(TextMessages::new(), |chat, message| {
                let role = match message.role {
                    Role::System => TextMessageRole::System,
                    Role::User => TextMessageRole::User,
                    Role::Assistant => TextMessageRole::Assistant,
                };
                chat.add_message(role, &message.content)
            });
            return Self::Chat(chat);
        }
        let mut text = String::new();
        for message in messages {
            text.push_str(message.role.as_str());
            text.push_str(": ");
            text.push_str(&message.content);
            text.push_str("\n\n");
        }
        text.push_str("assistant:");
        Self::Text(text)
    }
}

fn check_request(request: &GenerateRequest) -> Result<(), EngineError> {
    let Sampling { temperature, top_p, .. } = request.sampling;
    let problem = if request.messages.is_empty() || request.messages.len() > MAX_MESSAGES {
        format!("it has {} messages; 1 to {MAX_MESSAGES} are possible", request.messages.len())
    } else if request.max_tokens == 0 {
        "max_tokens is 0".to_owned()
    } else if !(0.0..=100.0).contains(&temperature) {
        format!("temperature is {temperature}; 0 to 100 are possible")
    } else if !(0.0..=1.0).contains(&top_p) {
        format!("top_p is {top_p}; 0 to 1 are possible")
    } else if request.stop.len() > MAX_STOPS {
        format!("it has {} stop texts; at most {MAX_STOPS} are possible", request.stop.len())
    } else if request.stop.iter().any(|stop| stop.is_empty() || stop.len() > MAX_STOP_BYTES) {
        format!("a stop text must have 1 to {MAX_STOP_BYTES} bytes")
    } else {
        return Ok(());
    };
    Err(EngineError::InvalidRequest { reason: problem })
}

fn constraint(schema: Option<&str>) -> Result<Constraint, EngineError> {
    let Some(schema) = schema else { return Ok(Constraint::None) };
    let invalid = |reason: String| EngineError::InvalidSchema { reason };
    if schema.len() > MAX_SCHEMA_BYTES {
        return Err(invalid(format!("it has {} bytes, at most {MAX_SCHEMA_BYTES}", schema.len())));
    }
    let mut schema: serde_json::Value =
        serde_json::from_str(schema).map_err(|error| invalid(format!("it is not JSON: {error}")))?;
    // Free white space lets a small model write blanks until its tokens are used up.
    if let Some(object) = schema.as_object_mut() {
        object.entry("x-guidance").or_insert_with(|| {
            serde_json::json!({
                "whitespace_flexible": false, "item_separator": ", ", "key_separator": ": ",
            })
        });
    }
    Ok(Constraint::JsonSchema(schema))
}

/// Refuses a prompt that cannot fit, before it is tokenised.
fn check_prompt_bytes(messages: &[ChatMessage], context: u32) -> Result<(), EngineError> {
    let bytes: usize = messages.iter().map(|message| message.content.len()).sum();
    let at_least = bytes / MAX_BYTES_PER_TOKEN;
    if at_least > context as usize {
        return Err(EngineError::ContextExceeded { prompt_tokens: count(at_least), context });
    }
    Ok(())
}

/// Returns how many tokens an answer may have.
fn room_for_answer(prompt: &[u32], live: &Live) -> Result<u32, EngineError> {
    let (prompt_tokens, context) = (count(prompt.len()), live.info.context);
    match context.checked_sub(prompt_tokens) {
        None | Some(0) => Err(EngineError::ContextExceeded { prompt_tokens, context }),
        Some(room) => Ok(room),
    }
}

fn count(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}
