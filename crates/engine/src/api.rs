//! What an engine is asked, what it answers, and the trait between them.

use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::EngineError;

/// Who speaks in a [`ChatMessage`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Standing instructions.
    System,
    /// The person or node that asks.
    User,
    /// An earlier answer of the model.
    Assistant,
}

impl Role {
    /// Returns the role's name in chat templates and in the OpenAI protocol.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatMessage {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
}

impl ChatMessage {
    /// Returns a system message.
    #[must_use]
    pub fn system(content: impl Into<String>) -> Self {
        Self { role: Role::System, content: content.into() }
    }

    /// Returns a user message.
    #[must_use]
    pub fn user(content: impl Into<String>) -> Self {
        Self { role: Role::User, content: content.into() }
    }

    /// Returns an assistant message.
    #[must_use]
    pub fn assistant(content: impl Into<String>) -> Self {
        Self { role: Role::Assistant, content: content.into() }
    }
}

/// How tokens are drawn.
///
/// Order of operations, as in Hugging Face's generation: temperature, then top-k, then top-p over
/// what top-k left.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Keys every draw, together with the token's position.
    pub seed: u64,
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f32,
    /// Keeps the smallest set of tokens with at least this probability; 1 keeps all.
    pub top_p: f32,
    /// Keeps this many of the most likely tokens; 0 keeps all.
    pub top_k: u32,
}

impl Sampling {
    /// Returns the sampling that always takes the most likely token.
    #[must_use]
    pub fn greedy() -> Self {
        Self { seed: 0, temperature: 0.0, top_p: 1.0, top_k: 0 }
    }

    /// Returns sampling from the whole distribution at `temperature`.
    #[must_use]
    pub fn seeded(seed: u64, temperature: f32) -> Self {
        Self { seed, temperature, top_p: 1.0, top_k: 0 }
    }

    /// Tells whether the most likely token is always taken.
    #[must_use]
    pub fn is_greedy(&self) -> bool {
        self.temperature <= 0.0 || self.top_k == 1
    }
}

/// One request for text.
#[derive(Debug, Clone)]
pub struct GenerateRequest {
    /// Names the request in logs; comes back nowhere else.
    pub id: u64,
    /// The conversation so far.
    pub messages: Vec<ChatMessage>,
    /// Most tokens to generate; the context's end comes first if it is nearer.
    pub max_tokens: u32,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// A JSON Schema that the answer must satisfy, enforced token by token.
    pub json_schema: Option<String>,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
    /// Whether to return each token's log-probability.
    pub logprobs: bool,
}

impl GenerateRequest {
    /// Returns a greedy request without a grammar, stop texts or log-probabilities.
    #[must_use]
    pub fn new(messages: Vec<ChatMessage>, max_tokens: u32) -> Self {
        Self {
            id: 0,
            messages,
            max_tokens,
            sampling: Sampling::greedy(),
            json_schema: None,
            stop: Vec::new(),
            logprobs: false,
        }
    }
}

/// A piece of the answer, as it is made.
///
/// When the receiver is slower than the engine, pieces are merged rather than queued.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Text that follows what was sent before.
    pub text: String,
    /// Tokens made so far, from the answer's first on. Those whose text is not certain yet, or has none, count too.
    pub tokens: u32,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// The model ended it, or a stop text was reached.
    Stop,
    /// `max_tokens` or the context's end was reached.
    Length,
    /// The caller cancelled; the answer is what was made until then.
    Cancelled,
}

/// A finished answer.
#[derive(Debug, Clone)]
pub struct Generated {
    /// The answer, without the stop text.
    pub text: String,
    /// Every sampled token, the end token included; empty where the engine cannot know them.
    pub token_ids: Vec<u32>,
    /// Natural logarithm of each sampled token's probability, if asked for.
    ///
    /// The probability is the model's own at the request's temperature (1 when greedy), over the
    /// whole vocabulary: before top-k, top-p and the grammar.
    pub logprobs: Vec<f32>,
    /// Tokens of the prompt, the chat template's included.
    pub prompt_tokens: u32,
    /// Tokens sampled.
    pub completion_tokens: u32,
    /// Why it ended.
    pub finish: Finish,
    /// What produced it.
    pub model: ModelInfo,
    /// From hand-over to the engine until the first token.
    pub prefill: Duration,
    /// From the first token until the last.
    pub decode: Duration,
}

/// What a model is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelInfo {
    /// The name it is asked for by.
    pub name: String,
    /// BLAKE3 of the weights file, or of the files' hashes in name order; zero if unknown.
    pub fingerprint: [u8; 32],
    /// Tokens of prompt and answer together.
    pub context: u32,
    /// Type of most of the weights, such as `Q8_0` or `BF16`.
    pub quantisation: String,
    /// Model family, such as `llama`.
    pub architecture: String,
    /// Bytes of the weights on disk; zero if unknown.
    pub bytes: u64,
}

/// Measured speed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Calibration {
    /// Prompt tokens processed per second.
    pub prefill_tokens_per_s: f32,
    /// Tokens generated per second by one request alone.
    pub decode_tokens_per_s: f32,
    /// How long the measurement took.
    pub took: Duration,
}

/// What an engine is busy with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// Requests being generated.
    pub running: usize,
    /// Requests admitted and waiting for a slot.
    pub queued: usize,
    /// Most that run at once.
    pub max_running: usize,
    /// Most that wait; one more is refused with [`EngineError::Overloaded`].
    pub max_queued: usize,
    /// Times the engine was restarted since it was opened.
    pub restarts: u64,
}

/// Something that generates text.
#[async_trait]
pub trait Engine: Send + Sync + 'static {
    /// Returns the models it serves, the default one first.
    fn info(&self) -> Vec<ModelInfo>;

    /// Returns what it is busy with.
    fn load(&self) -> Load;

    /// Generates an answer, sending its pieces to `tokens` as they are made.
    ///
    /// A closed `tokens` is not an error: the caller may want the result only. Cancelling, or
    /// dropping the future, ends the generation at the next token.
    ///
    /// # Errors
    ///
    /// Any [`EngineError`]; cancelled while still waiting, [`EngineError::Cancelled`].
    async fn generate(
        &self,
        request: GenerateRequest,
        tokens: mpsc::Sender<Chunk>,
        cancel: CancellationToken,
    ) -> Result<Generated, EngineError>;

    /// Measures how fast it is now, in less than two seconds where the model allows.
    ///
    /// # Errors
    ///
    /// Any [`EngineError`] of a generation.
    async fn calibrate(&self) -> Result<Calibration, EngineError>;
}
