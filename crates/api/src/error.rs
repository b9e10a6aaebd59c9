//! What goes wrong, as the node says it ([`BackendError`]) and as HTTP says it (`Fault`).
//!
//! Every error that leaves the API has OpenAI's shape, `{"error": {"message", "type", "code", "param"}}`, and a message that
//! says what to do next.

use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use chorus_core::TaskError;
use chorus_protocol::{Hash, NodeId, TaskId};
use serde_json::{Value, json};

/// The name under which the swarm is asked.
pub(crate) const SWARM_MODEL: &str = "chorus";
/// What a client is told to wait when everything is taken.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// nginx's status for a request whose client took it back; no standard one says it.
const CLIENT_CLOSED_REQUEST: u16 = 499;

/// Why the node could not do what it was asked.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// No model of that name is here.
    #[error("no model '{model}' here; ask for one of: {}", available.join(", "))]
    ModelNotFound {
        /// What was asked for.
        model: String,
        /// What there is.
        available: Vec<String>,
    },
    /// The node runs no language model of its own.
    #[error("this node runs no language model; ask the swarm with the model 'chorus', or start the node with --model")]
    NoEngine,
    /// The node has no embedder.
    #[error(
        "this node has no embedder; fetch one with scripts/models, or set engine.embedder in the configuration file"
    )]
    NoEmbedder,
    /// The node neither trains nor samples.
    #[error(
        "this node trains no policy and samples for none; start one with `chorus trainer run` or `chorus node run --sample NAME@ID`"
    )]
    NoTraining,
    /// The policy is trained by the node itself.
    #[error(
        "this node trains its policy itself, or none; start the trainer with `chorus trainer run --external` to train it from outside"
    )]
    NotExternal,
    /// Evidence that nobody hands out.
    #[error("no evidence {evidence} could be had: {reason}")]
    NoEvidence {
        /// Its hash.
        evidence: Hash,
        /// Why, and what to do.
        reason: String,
    },
    /// The weights are of another update than the one that is waited for.
    #[error("{}", other_step(*given, *expected))]
    OtherStep {
        /// The step that the request names.
        given: u64,
        /// The step of the batch that waits for its weights, if one does.
        expected: Option<u64>,
    },
    /// A body is larger than the route takes.
    #[error("the body is larger than {limit} bytes, which is the most that this route takes; send less at a time")]
    TooLarge {
        /// The most that it takes, in bytes.
        limit: usize,
    },
    /// Something is still being started.
    #[error("{what} is still starting; try again in a moment, `chorus status` says how far it is")]
    Starting {
        /// What is being started.
        what: String,
    },
    /// Prompt and answer do not fit.
    #[error(
        "the prompt has {prompt_tokens} tokens and the model holds {context}; shorten the prompt or use a model with a longer context"
    )]
    ContextExceeded {
        /// Tokens of the prompt.
        prompt_tokens: u32,
        /// Tokens that fit.
        context: u32,
    },
    /// Too much is under way.
    #[error("{what} is full ({limit} at a time); try again in a moment, or ask another node")]
    Overloaded {
        /// What is full.
        what: String,
        /// How much it takes.
        limit: usize,
    },
    /// The request cannot be served as it stands.
    #[error("{reason}")]
    InvalidRequest {
        /// The field that is wrong.
        param: Option<String>,
        /// What is wrong with it, and what to change.
        reason: String,
    },
    /// The engine or the embedder failed.
    #[error("the engine failed: {reason}")]
    Engine {
        /// How.
        reason: String,
        /// Whether the same request may succeed after a pause.
        retryable: bool,
    },
    /// Something took longer than it may.
    #[error(
        "{what} took longer than {limit:.1?}; try again, ask for fewer tokens, or see `chorus status` for what blocks it"
    )]
    Timeout {
        /// What was waited for.
        what: String,
        /// How long it may take.
        limit: Duration,
    },
    /// The disk does not take what must be on it before the request is acknowledged.
    #[error("the request was not taken, because it cannot be written to disk: {reason}")]
    Disk {
        /// Why, and what to do.
        reason: String,
    },
    /// Somebody took the request back.
    #[error("the request was cancelled before it was done; send it again")]
    Cancelled,
    /// No such task.
    #[error(
        "no task {task} here; GET /v1/tasks lists those that are kept, and the oldest that ended are forgotten first"
    )]
    TaskNotFound {
        /// What was asked for.
        task: TaskId,
    },
    /// No such entry.
    #[error("the ledger holds no entry {hash}; GET /v1/ledger lists them")]
    EntryNotFound {
        /// What was asked for.
        hash: Hash,
    },
    /// No such peer.
    #[error("no node {node} is known here; GET /v1/peers lists those that are connected")]
    PeerNotFound {
        /// Who was asked for.
        node: NodeId,
    },
    /// The swarm did not answer the task.
    #[error("{0}")]
    Task(#[from] TaskError),
    /// The node is ending.
    #[error("this node is shutting down; ask another one")]
    ShuttingDown,
}

impl BackendError {
    /// Returns the HTTP status that says it.
    #[must_use]
    pub fn status(&self) -> u16 {
        match self {
            Self::ContextExceeded { .. } | Self::InvalidRequest { .. } => 400,
            Self::ModelNotFound { .. }
            | Self::TaskNotFound { .. }
            | Self::EntryNotFound { .. }
            | Self::PeerNotFound { .. }
            | Self::NoEvidence { .. }
            | Self::NoTraining => 404,
            Self::NotExternal | Self::OtherStep { .. } => 409,
            Self::TooLarge { .. } => 413,
            Self::Overloaded { .. } => 429,
            Self::Cancelled => CLIENT_CLOSED_REQUEST,
            Self::NoEngine | Self::NoEmbedder | Self::Starting { .. } | Self::ShuttingDown => 503,
            Self::Engine { retryable, .. } => {
                if *retryable {
                    503
                } else {
                    500
                }
            }
            Self::Timeout { .. } => 504,
            Self::Disk { .. } => 507,
            Self::Task(error) => task_status(error),
        }
    }

    /// Returns a word for the kind of error, stable across releases.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::ModelNotFound { .. } => "model_not_found",
            Self::NoEngine => "no_engine",
            Self::NoEmbedder => "no_embedder",
            Self::NoTraining => "no_training",
            Self::NoEvidence { .. } => "no_evidence",
            Self::NotExternal => "not_external",
            Self::TooLarge { .. } => "body_too_large",
            Self::OtherStep { .. } => "other_step",
            Self::Starting { .. } => "starting",
            Self::ContextExceeded { .. } => "context_length_exceeded",
            Self::Overloaded { .. } => "overloaded",
            Self::InvalidRequest { .. } => "invalid_value",
            Self::Engine { .. } => "engine_failed",
            Self::Timeout { .. } => "timeout",
            Self::Disk { .. } => "disk_failed",
            Self::Cancelled => "cancelled",
            Self::TaskNotFound { .. } => "task_not_found",
            Self::EntryNotFound { .. } => "entry_not_found",
            Self::PeerNotFound { .. } => "peer_not_found",
            Self::Task(error) => error.kind(),
            Self::ShuttingDown => "shutting_down",
        }
    }

    /// Returns whether the same request may succeed here after a pause.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Starting { .. } | Self::Overloaded { .. } | Self::Timeout { .. } | Self::Disk { .. } => true,
            Self::Engine { retryable, .. } => *retryable,
            Self::Task(error) => error.is_retryable(),
            _ => false,
        }
    }

    fn param(&self) -> Option<String> {
        match self {
            Self::InvalidRequest { param, .. } => param.clone(),
            Self::ModelNotFound { .. } => Some("model".to_owned()),
            Self::OtherStep { .. } => Some("step".to_owned()),
            Self::ContextExceeded { .. } => Some("messages".to_owned()),
            _ => None,
        }
    }
}

fn other_step(given: u64, expected: Option<u64>) -> String {
    match expected {
        Some(expected) => format!(
            "the batch that waits for weights is of step {expected}, not {given}; begin with GET /v1/training/weights and send \
             the weights that come of that batch with step={expected}"
        ),
        None => {
            format!("no batch waits for weights, so none of step {given}; fetch one first, with GET /v1/training/batch")
        }
    }
}

fn task_status(error: &TaskError) -> u16 {
    match error {
        TaskError::Invalid { .. } | TaskError::TooLong { .. } => 400,
        TaskError::Overloaded { .. } => 429,
        TaskError::Deadline { .. } => 504,
        TaskError::Cancelled => CLIENT_CLOSED_REQUEST,
        error if error.is_retryable() => 503,
        _ => 502,
    }
}

/// An error on its way out.
#[derive(Clone, Debug)]
pub(crate) struct Fault {
    status: StatusCode,
    code: &'static str,
    param: Option<String>,
    message: String,
    retry: bool,
}

impl Fault {
    pub(crate) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, param: None, message: message.into(), retry: false }
    }

    /// A field of the request is wrong.
    pub(crate) fn field(param: impl Into<String>, code: &'static str, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::new(StatusCode::BAD_REQUEST, code, message) }
    }

    /// Something took too long.
    pub(crate) fn timeout(what: impl Into<String>, limit: Duration) -> Self {
        BackendError::Timeout { what: what.into(), limit }.into()
    }

    /// Returns what it says to people.
    pub(crate) fn message(&self) -> &str {
        &self.message
    }

    /// OpenAI's families of errors, by which its clients choose the exception they raise.
    fn family(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            429 => "rate_limit_error",
            400..=498 => "invalid_request_error",
            CLIENT_CLOSED_REQUEST => "cancelled",
            _ => "server_error",
        }
    }

    /// Returns the body that says it.
    pub(crate) fn to_json(&self) -> Value {
        json!({ "error": { "message": self.message, "type": self.family(), "code": self.code, "param": self.param } })
    }
}

impl From<BackendError> for Fault {
    fn from(error: BackendError) -> Self {
        Self {
            status: StatusCode::from_u16(error.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
            code: error.code(),
            param: error.param(),
            message: error.to_string(),
            retry: error.is_retryable(),
        }
    }
}

impl From<TaskError> for Fault {
    fn from(error: TaskError) -> Self {
        BackendError::Task(error).into()
    }
}

impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.to_json())).into_response();
        if self.retry {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER.as_secs()));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
