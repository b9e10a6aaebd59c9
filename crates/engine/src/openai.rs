//! The engine that forwards to an OpenAI-compatible endpoint: llama.cpp, vLLM, Ollama or a cloud.
//!
//! One `POST {base}/chat/completions` with `stream: true` a request. Everything the endpoint sends is
//! bounded in size and in time: the connection, the wait for the first token, the wait between two,
//! one event, the whole answer. What it cannot know stays empty: token ids and the weights' hash.

use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::StreamExt;
use reqwest::{Client, RequestBuilder, Url, redirect};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{
    Calibration, ChatMessage, Chunk, Engine, EngineError, Finish, GenerateRequest, Generated, Load, ModelInfo,
    admission::Admission,
    prompt::{check_request, parse_schema},
    run::count,
    sse::EventReader,
    stream::Answer,
};

/// Bytes of a whole streamed answer: each token costs a few hundred.
const MAX_STREAM_BYTES: usize = 64 << 20;
const MAX_MODELS_BYTES: usize = 4 << 20;
const MAX_ERROR_BYTES: usize = 16 << 10;
/// Characters of an endpoint's error that are passed on.
const MAX_ERROR_TEXT: usize = 500;
const CALIBRATION_TOKENS: u32 = 32;

/// How to reach an endpoint.
#[derive(Clone)]
pub struct OpenAiConfig {
    /// Address up to and with the version, such as `http://127.0.0.1:8080/v1`.
    pub base_url: String,
    /// The model's name there.
    pub model: String,
    /// Sent as a bearer token.
    pub api_key: Option<String>,
    /// Tokens of prompt and answer together; the protocol has no way to ask.
    pub context: u32,
    /// Most requests sent at once.
    pub max_concurrent: usize,
    /// Most requests that wait.
    pub max_queued: usize,
    /// How long connecting may take.
    pub connect_timeout: Duration,
    /// How long the first token may take: the endpoint may have a queue of its own.
    pub first_token_timeout: Duration,
    /// How long each further token may take.
    pub token_timeout: Duration,
}

impl std::fmt::Debug for OpenAiConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenAiConfig")
            .field("base_url", &self.base_url)
            .field("model", &self.model)
            .field("api_key", &self.api_key.as_ref().map(|_| "…"))
            .field("context", &self.context)
            .finish_non_exhaustive()
    }
}

impl OpenAiConfig {
    /// Returns the default configuration for an endpoint.
    #[must_use]
    pub fn new(base_url: impl Into<String>, model: impl Into<String>) -> Self {
        Self {
            base_url: base_url.into(),
            model: model.into(),
            api_key: None,
            context: 8_192,
            max_concurrent: 8,
            max_queued: 64,
            connect_timeout: Duration::from_secs(5),
            first_token_timeout: Duration::from_secs(120),
            token_timeout: Duration::from_secs(30),
        }
    }
}

/// Forwards to an OpenAI-compatible endpoint.
#[derive(Debug)]
pub struct OpenAiEngine {
    config: OpenAiConfig,
    client: Client,
    admission: Admission,
    info: ModelInfo,
}

impl OpenAiEngine {
    /// Checks the address, and that the endpoint answers and serves the model.
    ///
    /// # Errors
    ///
    /// [`EngineError::InvalidRequest`] for a bad address, [`EngineError::Unreachable`] or
    /// [`EngineError::Remote`] if the endpoint does not answer well, [`EngineError::ModelNotFound`]
    /// if it lists models, and not this one.
    pub async fn connect(config: OpenAiConfig) -> Result<Self, EngineError> {
        let bad_address = |reason: String| EngineError::InvalidRequest {
            reason: format!("{:?} is not an endpoint's address: {reason}", config.base_url),
        };
        let url = Url::parse(&config.base_url).map_err(|error| bad_address(error.to_string()))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(bad_address("it must begin with http:// or https://".to_owned()));
        }
        let mut builder = Client::builder().connect_timeout(config.connect_timeout).redirect(redirect::Policy::none());
        if matches!(url.host_str(), Some("localhost" | "127.0.0.1" | "[::1]")) {
            builder = builder.no_proxy();
        }
        let client = builder.build().map_err(|error| bad_address(error.to_string()))?;
        let info = ModelInfo {
            name: config.model.clone(),
            fingerprint: [0; 32],
            context: config.context,
            quantisation: "unknown".to_owned(),
            architecture: "unknown".to_owned(),
            bytes: 0,
        };
        let admission = Admission::new(config.max_concurrent, config.max_queued);
        let engine = Self { config, client, admission, info };
        engine.check_model().await?;
        Ok(engine)
    }

    async fn check_model(&self) -> Result<(), EngineError> {
        let limit = self.config.connect_timeout * 2;
        let asking = async {
            let response = self.authorised(self.client.get(self.url("models"))).send().await;
            let response = response.map_err(|error| self.unreachable(&error))?;
            let status = response.status().as_u16();
            let ok = response.status().is_success();
            let body = self.read_body(response, MAX_MODELS_BYTES).await?;
            Ok((status, ok, body))
        };
        let (status, ok, body) = tokio::time::timeout(limit, asking)
            .await
            .map_err(|_| EngineError::Timeout { what: "the endpoint's list of models", limit })??;
        // Not every compatible server has the list; the first request will tell.
        if matches!(status, 404 | 405 | 501) {
            return Ok(());
        }
        if !ok {
            return Err(remote_error(status, &body, self.config.context));
        }
        let listed: Vec<String> = serde_json::from_slice::<ModelList>(&body)
            .map(|list| list.data.into_iter().map(|model| model.id).collect())
            .unwrap_or_default();
        if listed.is_empty() || listed.contains(&self.config.model) {
            return Ok(());
        }
        Err(EngineError::ModelNotFound {
            path: self.config.model.clone().into(),
            reason: format!("{} serves {}", self.config.base_url, listed.join(", ")),
        })
    }

    fn url(&self, path: &str) -> String {
        format!("{}/{path}", self.config.base_url.trim_end_matches('/'))
    }

    fn authorised(&self, request: RequestBuilder) -> RequestBuilder {
        match &self.config.api_key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    fn unreachable(&self, error: &dyn std::error::Error) -> EngineError {
        // reqwest's own text names the address only; the reason is underneath.
        let mut reason = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            reason = cause.to_string();
            source = cause.source();
        }
        EngineError::Unreachable { endpoint: self.config.base_url.clone(), reason }
    }

    fn broke_off(&self, reason: &str) -> EngineError {
        EngineError::Unreachable { endpoint: self.config.base_url.clone(), reason: reason.to_owned() }
    }

    /// Reads a body up to `limit` bytes; what is beyond is an error.
    async fn read_body(&self, response: reqwest::Response, limit: usize) -> Result<Vec<u8>, EngineError> {
        let mut body = Vec::new();
        let mut stream = response.bytes_stream();
        while let Some(bytes) = stream.next().await {
            let bytes = bytes.map_err(|error| self.unreachable(&error))?;
            if body.len() + bytes.len() > limit {
                return Err(self.broke_off("it answered with more bytes than make sense"));
            }
            body.extend_from_slice(&bytes);
        }
        Ok(body)
    }

    fn body(&self, request: &GenerateRequest) -> Result<Value, EngineError> {
        let messages: Vec<Value> = (request.messages.iter())
            .map(|message| json!({ "role": message.role.as_str(), "content": message.content }))
            .collect();
        let mut body = json!({
            "model": self.config.model,
            "messages": messages,
            "max_tokens": request.max_tokens,
            "temperature": request.sampling.temperature,
            "top_p": request.sampling.top_p,
            "seed": request.sampling.seed,
            "stream": true,
            "stream_options": { "include_usage": true },
        });
        // Not in OpenAI's own protocol, but in everybody else's.
        if request.sampling.top_k > 0 {
            body["top_k"] = json!(request.sampling.top_k);
        }
        if !request.stop.is_empty() {
            body["stop"] = json!(request.stop);
        }
        if request.logprobs {
            body["logprobs"] = json!(true);
        }
        if let Some(schema) = &request.json_schema {
            let schema = parse_schema(schema)?;
            body["response_format"] = json!({
                "type": "json_schema",
                "json_schema": { "name": "answer", "strict": true, "schema": schema },
            });
        }
        Ok(body)
    }

    /// Sends the request and follows the answer to its end.
    async fn stream(
        &self,
        body: &Value,
        answer: &mut Answer,
        cancel: &CancellationToken,
    ) -> Result<Streamed, EngineError> {
        let mut streamed = Streamed::default();
        let limit = self.config.first_token_timeout;
        let late = EngineError::Timeout { what: "the endpoint's first token", limit };
        let sending = self.authorised(self.client.post(self.url("chat/completions"))).json(body).send();
        let response = tokio::select! {
            biased;
            () = cancel.cancelled() => return Ok(streamed.cancelled()),
            sent = tokio::time::timeout(limit, sending) => {
                sent.map_err(|_| late.clone())?.map_err(|error| self.unreachable(&error))?
            }
        };
        let status = response.status().as_u16();
        if !response.status().is_success() {
            let body = self.read_body(response, MAX_ERROR_BYTES).await.unwrap_or_default();
            return Err(remote_error(status, &body, self.config.context));
        }
        let mut bytes_left = MAX_STREAM_BYTES;
        let mut reader = EventReader::default();
        let mut stream = response.bytes_stream();
        while !streamed.done {
            let (limit, what) = match streamed.first {
                None => (self.config.first_token_timeout, "the endpoint's first token"),
                Some(_) => (self.config.token_timeout, "the endpoint's next token"),
            };
            let waiting = answer.offer();
            let bytes = tokio::select! {
                biased;
                () = cancel.cancelled() => return Ok(streamed.cancelled()),
                bytes = tokio::time::timeout(limit, stream.next()) => bytes,
                () = answer.room(), if waiting => continue,
            };
            let bytes = bytes.map_err(|_| EngineError::Timeout { what, limit })?;
            let Some(bytes) = bytes else { break };
            let bytes = bytes.map_err(|error| self.unreachable(&error))?;
            bytes_left = (bytes_left.checked_sub(bytes.len()))
                .ok_or_else(|| self.broke_off("its answer is longer than makes sense"))?;
            let events = reader.push(&bytes).map_err(|_| self.broke_off("one of its events is too long"))?;
            for event in events {
                self.event(&event, &mut streamed, answer)?;
            }
        }
        if streamed.finish.is_none() {
            return Err(self.broke_off("it broke off in the middle of the answer"));
        }
        Ok(streamed)
    }

    fn event(&self, event: &str, streamed: &mut Streamed, answer: &mut Answer) -> Result<(), EngineError> {
        if event.trim() == "[DONE]" {
            streamed.done = true;
            return Ok(());
        }
        let event: Event = serde_json::from_str(event)
            .map_err(|error| self.broke_off(&format!("it sent an event that is not understood: {error}")))?;
        if let Some(error) = event.error {
            return Err(remote_error(500, error.to_string().as_bytes(), self.config.context));
        }
        if let Some(usage) = event.usage {
            streamed.usage = Some(usage);
        }
        let Some(choice) = event.choices.into_iter().next() else { return Ok(()) };
        if let Some(logprobs) = choice.logprobs.and_then(|logprobs| logprobs.content) {
            streamed.logprobs.extend(logprobs.iter().map(|token| token.logprob));
        }
        if let Some(text) = choice.delta.and_then(|delta| delta.content).filter(|text| !text.is_empty()) {
            let now = Instant::now();
            streamed.first.get_or_insert(now);
            streamed.last = Some(now);
            streamed.pieces += 1;
            // With log-probabilities every token is named; without them a piece is one, for every endpoint we know.
            answer.push(&text, streamed.pieces.max(count(streamed.logprobs.len())));
        }
        match choice.finish_reason.as_deref() {
            None => {}
            Some("length") => streamed.finish = Some(Finish::Length),
            Some(_) => streamed.finish = Some(Finish::Stop),
        }
        if answer.is_stopped() {
            streamed.finish = Some(Finish::Stop);
            streamed.done = true;
        }
        Ok(())
    }
}

#[async_trait]
impl Engine for OpenAiEngine {
    fn info(&self) -> Vec<ModelInfo> {
        vec![self.info.clone()]
    }

    fn load(&self) -> Load {
        Load {
            running: self.admission.running(),
            queued: self.admission.queued(),
            max_running: self.admission.max_running(),
            max_queued: self.admission.max_queued(),
            restarts: 0,
        }
    }

    async fn generate(
        &self,
        request: GenerateRequest,
        tokens: mpsc::Sender<Chunk>,
        cancel: CancellationToken,
    ) -> Result<Generated, EngineError> {
        check_request(&request)?;
        let body = self.body(&request)?;
        let _slot = self.admission.enter()?.slot(&cancel).await?;
        let started = Instant::now();
        let mut answer = Answer::new(request.stop, tokens);
        let streamed = self.stream(&body, &mut answer, &cancel).await?;
        answer.finish(&cancel).await;
        let usage = streamed.usage.unwrap_or_default();
        let first = streamed.first.unwrap_or_else(Instant::now);
        Ok(Generated {
            text: answer.into_text(),
            token_ids: Vec::new(),
            logprobs: streamed.logprobs,
            prompt_tokens: usage.prompt_tokens,
            // Without usage, a piece is a token for every endpoint we know.
            completion_tokens: usage.completion_tokens.max(streamed.pieces),
            finish: streamed.finish.unwrap_or(Finish::Stop),
            model: self.info.clone(),
            prefill: first - started,
            decode: streamed.last.map_or(Duration::ZERO, |last| last - first),
        })
    }

    async fn calibrate(&self) -> Result<Calibration, EngineError> {
        let started = Instant::now();
        let messages = vec![ChatMessage::user("Count from one to one hundred in words.")];
        let request = GenerateRequest::new(messages, CALIBRATION_TOKENS);
        let (nobody, _) = mpsc::channel(1);
        let generated = self.generate(request, nobody, CancellationToken::new()).await?;
        let rate = |tokens: u32, time: Duration| {
            if time.is_zero() { 0.0 } else { tokens as f32 / time.as_secs_f32() }
        };
        Ok(Calibration {
            prefill_tokens_per_s: rate(generated.prompt_tokens, generated.prefill),
            decode_tokens_per_s: rate(generated.completion_tokens.saturating_sub(1), generated.decode),
            took: started.elapsed(),
        })
    }
}

/// What came over the stream beside the text.
#[derive(Debug, Default)]
struct Streamed {
    finish: Option<Finish>,
    logprobs: Vec<f32>,
    usage: Option<Usage>,
    pieces: u32,
    first: Option<Instant>,
    last: Option<Instant>,
    done: bool,
}

impl Streamed {
    fn cancelled(mut self) -> Self {
        self.finish = Some(Finish::Cancelled);
        self
    }
}

#[derive(Deserialize)]
struct ModelList {
    #[serde(default)]
    data: Vec<ListedModel>,
}

#[derive(Deserialize)]
struct ListedModel {
    id: String,
}

#[derive(Deserialize)]
struct Event {
    #[serde(default)]
    choices: Vec<EventChoice>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct EventChoice {
    delta: Option<Delta>,
    logprobs: Option<EventLogprobs>,
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Delta {
    content: Option<String>,
}

#[derive(Deserialize)]
struct EventLogprobs {
    content: Option<Vec<EventLogprob>>,
}

#[derive(Deserialize)]
struct EventLogprob {
    logprob: f32,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
struct Usage {
    #[serde(default)]
    prompt_tokens: u32,
    #[serde(default)]
    completion_tokens: u32,
}

/// Turns an endpoint's error, in any of the usual shapes, into ours.
fn remote_error(status: u16, body: &[u8], context: u32) -> EngineError {
    let json: Option<Value> = serde_json::from_slice(body).ok();
    let error = json.as_ref().map(|json| json.get("error").unwrap_or(json));
    let field = |name: &str| error.and_then(|error| error.get(name)).and_then(Value::as_str);
    if field("code") == Some("context_length_exceeded") || field("type") == Some("exceed_context_size_error") {
        return EngineError::ContextExceeded { prompt_tokens: context, context };
    }
    let message = field("message")
        .or_else(|| error.and_then(Value::as_str))
        .map_or_else(|| String::from_utf8_lossy(body).into_owned(), str::to_owned);
    EngineError::Remote { status, message: message.trim().chars().take(MAX_ERROR_TEXT).collect() }
}
