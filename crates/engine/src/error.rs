//! What can go wrong in an engine, and what to do next.

use std::{path::PathBuf, time::Duration};

use chorus_protocol::policy::Version;

/// Why an engine could not do what it was asked.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// There is no model at the path.
    #[error(
        "no model at {}: {reason}. Check the path, or run scripts/models to fetch the default models",
        path.display()
    )]
    ModelNotFound {
        /// Where it was looked for.
        path: PathBuf,
        /// What is missing.
        reason: String,
    },
    /// The model's files are damaged or incomplete.
    #[error(
        "the model at {} is damaged: {reason}. Delete it and fetch it again (scripts/models --verify \
         checks the default models)",
        path.display()
    )]
    ModelCorrupt {
        /// The damaged file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The model is whole, but its kind cannot be run here.
    #[error("cannot run the model {}: {reason}", path.display())]
    ModelUnsupported {
        /// The model.
        path: PathBuf,
        /// Which property is unsupported, and what is supported.
        reason: String,
    },
    /// A model named on the Hugging Face hub could not be fetched.
    #[error(
        "cannot fetch the model {model} from the Hugging Face hub: {reason}. Check the name, the \
         network and HF_TOKEN, or give a local path"
    )]
    HubUnavailable {
        /// The model's name on the hub.
        model: String,
        /// What went wrong.
        reason: String,
    },
    /// The prompt leaves no room for an answer.
    #[error(
        "the prompt has {prompt_tokens} tokens, the model's context is {context}. Shorten the prompt \
         or use a model with a longer context"
    )]
    ContextExceeded {
        /// Tokens of the prompt; a lower bound where it was refused by its size in bytes.
        prompt_tokens: u32,
        /// Tokens the model can hold.
        context: u32,
    },
    /// Too many requests wait already.
    #[error("{queued} requests wait already (limit {limit}). Ask another node, or try again later")]
    Overloaded {
        /// Requests waiting.
        queued: usize,
        /// Most that may wait.
        limit: usize,
    },
    /// The caller cancelled before the generation began.
    #[error("the request was cancelled before it ran")]
    Cancelled,
    /// The engine failed while it held the request, and is being restarted.
    #[error("the engine crashed ({detail}) and is being restarted. Ask another node, or try again")]
    Crashed {
        /// What is known about the cause.
        detail: String,
    },
    /// Memory ran out, or would.
    #[error(
        "not enough memory: {detail}. Use a smaller or more quantised model, a shorter context, or \
         fewer requests at once"
    )]
    OutOfMemory {
        /// What was needed and what was there.
        detail: String,
    },
    /// The model computed nonsense or failed on this request; the engine still runs.
    #[error("the model failed on this request: {detail}. Ask another node")]
    Inference {
        /// What the model reported.
        detail: String,
    },
    /// The JSON Schema cannot be turned into a grammar.
    #[error("the JSON Schema cannot be enforced: {reason}. Correct the schema")]
    InvalidSchema {
        /// What is wrong with it.
        reason: String,
    },
    /// The request itself makes no sense.
    #[error("bad request: {reason}")]
    InvalidRequest {
        /// What is wrong with it.
        reason: String,
    },
    /// An OpenAI-compatible endpoint answered with an error.
    #[error("the endpoint answered {status}: {message}")]
    Remote {
        /// HTTP status.
        status: u16,
        /// The endpoint's own words, cut short.
        message: String,
    },
    /// An OpenAI-compatible endpoint could not be reached, or broke off.
    #[error("the endpoint {endpoint} failed: {reason}. Check that it runs and the configured address")]
    Unreachable {
        /// Its address.
        endpoint: String,
        /// What went wrong.
        reason: String,
    },
    /// No version of the policy is loaded yet.
    #[error("no version of {model} is here yet. Wait for the first one, or ask another node")]
    NothingServes {
        /// The policy's name.
        model: String,
    },
    /// A request named the version that must answer it, and another one serves.
    #[error("version {} was asked for, {} serves. Load the version that is wanted, or ask another node",
        wanted.fmt_short(), serving.fmt_short())]
    OtherVersion {
        /// The version that was asked for.
        wanted: Version,
        /// The version that serves.
        serving: Version,
    },
    /// A version is older than the one that serves.
    #[error("step {step} is older than step {serving}, which serves. Ask for it exactly if it is meant to go back")]
    OlderVersion {
        /// The step that was to be loaded.
        step: u64,
        /// The step that serves.
        serving: u64,
    },
    /// Something took longer than it may.
    #[error("{what} took longer than {limit:?}")]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// How long it may take.
        limit: Duration,
    },
    /// Reading or writing a file failed.
    #[error("cannot access {}: {reason}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        reason: String,
    },
}

impl EngineError {
    /// Tells whether the same request may succeed here after a pause.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Overloaded { .. }
            | Self::Crashed { .. }
            | Self::Unreachable { .. }
            | Self::Timeout { .. }
            | Self::NothingServes { .. }
            | Self::OtherVersion { .. } => true,
            Self::Remote { status, .. } => matches!(status, 408 | 425 | 429 | 500..=599),
            _ => false,
        }
    }

    /// Tells whether another node may serve the same request: the fault is here, not in it.
    #[must_use]
    pub fn is_retryable_elsewhere(&self) -> bool {
        match self {
            Self::Cancelled | Self::InvalidSchema { .. } | Self::InvalidRequest { .. } | Self::OlderVersion { .. } => {
                false
            }
            // 400, 413 and 422 blame the request; everything else is between us and the endpoint.
            Self::Remote { status, .. } => !matches!(status, 400 | 413 | 422),
            _ => true,
        }
    }

    pub(crate) fn io(path: impl Into<PathBuf>, error: &std::io::Error) -> Self {
        Self::Io { path: path.into(), reason: error.to_string() }
    }
}
