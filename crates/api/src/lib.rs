//! The HTTP face of a node: OpenAI-compatible, tasks with resumable events, ledger, metrics.
//!
//! ```text
//!   client ──▶ listener ──▶ observe ──▶ guard ──▶ routes ──▶ Backend (the node)
//!              bounded,     id, log,    host,     chat, tasks,    │
//!              timeouts     metrics     token,    models, …       ▼
//!                                       size        ▲───────── TaskLog ◀── events, outcomes
//! ```
//!
//! 1. [`listener`](ApiConfig) takes a bounded number of connections and closes those that are silent or do not read.
//! 2. Every request gets an id, and is checked before its body is read: host, origin, token, size, type.
//! 3. A route reads its fields strictly, asks the [`Backend`] with a deadline, and answers; every error has OpenAI's shape and
//!    says what to do next.
//! 4. What happens to a task comes through the [`TaskLog`], which any number of clients read at their own pace.
//!
//! | route | what it does |
//! |---|---|
//! | `POST /v1/chat/completions` | answers a chat: the model `chorus` is the swarm, any other this node's own engine |
//! | `GET /v1/models`, `GET /v1/models/{model}` | which models may be asked |
//! | `POST /v1/embeddings` | embeds texts with this node's own embedder |
//! | `POST /v1/tasks` | hands a task to the swarm |
//! | `GET /v1/tasks`, `GET` and `DELETE /v1/tasks/{id}` | lists tasks, shows one, takes one back |
//! | `GET /v1/tasks/{id}/events` | follows a task; resumes by `Last-Event-ID` or `?from=` |
//! | `GET /v1/status`, `GET /v1/peers` | what the node does, who is connected |
//! | `POST /v1/peers/{node}` | refuses a node, or lets it in again |
//! | `GET /v1/training`, `GET /v1/training/curve` | how far this node's trainer or sampler is |
//! | `GET /v1/training/batch`, `GET` and `POST /v1/training/weights` | for a trainer outside the node: what to learn from, and what came of it |
//! | `GET /v1/ledger`, `GET /v1/ledger/{hash}` | the replicated ledger, page by page |
//! | `GET /metrics`, `GET /healthz` | for Prometheus, and for whoever supervises the process |
//!
//! What it does not do: TLS (put a reverse proxy before it), CORS, HTTP/2, tool calls, audio and images.

mod app;
mod backend;
mod chat;
mod config;
mod embeddings;
mod error;
mod fields;
mod guard;
mod journal;
mod listener;
pub mod metrics;
mod models;
mod node;
mod observe;
mod options;
mod serve;
mod shape;
mod task_log;
mod tasks;
mod training;

pub use backend::{
    Backend, ChatTurn, CurveForm, Embedded, Health, LedgerFilter, LedgerPage, LocalReply, LocalRequest, ModelCard,
    ModelKind, Pieces, Rollouts, Update, Weights,
};
pub use bytes::Bytes;
pub use config::{ApiConfig, ApiError, MIN_TOKEN_CHARS};
pub use error::BackendError;
pub use serve::{BoundApi, serve};
pub use task_log::{
    LogItem, Outcome, TaskLog, TaskLogFull, TaskLogLimits, TaskMeta, TaskState, TaskStream, TaskSummary,
};
