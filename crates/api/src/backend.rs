//! What the HTTP face needs of the node behind it, and nothing else.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use chorus_core::TaskSpec;
use chorus_protocol::job::{Finish, Role};
use chorus_protocol::{Hash, NodeId, TaskId};
use futures::stream::BoxStream;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::error::BackendError;
use crate::task_log::TaskLog;

/// The node, as the API sees it.
///
/// Every call may be dropped by its caller at any time, and is given a deadline by the API. None may block the thread.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// Returns 16 fresh random bytes, of which ids and seeds are made.
    fn draw_id(&self) -> [u8; 16];

    /// Returns the log into which the node pushes the events and the outcome of every task.
    fn tasks(&self) -> &Arc<TaskLog>;

    /// Returns what this node itself runs: language models, the default one first, and the embedder.
    fn models(&self) -> Vec<ModelCard>;

    /// Returns whether the node is ready for work.
    fn health(&self) -> Health;

    /// Returns the node's metrics in Prometheus's text format, for example with [`crate::metrics::Registry::render`].
    async fn metrics(&self) -> String;

    /// Returns what the node is doing, and what it waits for.
    async fn status(&self) -> Result<Value, BackendError>;

    /// Returns where this node's trainer or sampler stands, or [`BackendError::NoTraining`].
    async fn training(&self) -> Result<Value, BackendError>;

    /// Returns the learning curve of this node's trainer, or [`BackendError::NoTraining`].
    async fn curve(&self, form: CurveForm) -> Result<String, BackendError>;

    /// Returns evidence against a sampler: this node's own, or fetched from whoever holds it, and then its hash is right. Gives up after
    /// a while with [`BackendError::NoEvidence`].
    async fn evidence(&self, evidence: Hash) -> Result<Vec<u8>, BackendError>;

    /// Returns the batch that a trainer outside the node is to learn from next, the same until its weights came; nothing when there
    /// is none within `wait`.
    async fn batch(&self, wait: Duration) -> Result<Option<Rollouts>, BackendError>;

    /// Returns the weights that the next batch updates.
    async fn weights(&self) -> Result<Weights, BackendError>;

    /// Takes the weights that came of a batch, in safetensors, and returns the step that they are of. What the pieces add up to is
    /// bounded by the caller. Without a whole and fitting set of weights nothing changes.
    async fn learned(&self, update: Update, pieces: Pieces) -> Result<u64, BackendError>;

    /// Returns the connected peers.
    async fn peers(&self) -> Result<Vec<Value>, BackendError>;

    /// Refuses a node from now on, or lets it in again.
    async fn set_blocked(&self, node: NodeId, blocked: bool) -> Result<(), BackendError>;

    /// Returns a page of the ledger.
    async fn ledger(&self, filter: LedgerFilter) -> Result<LedgerPage, BackendError>;

    /// Returns one entry of the ledger, or [`BackendError::EntryNotFound`].
    async fn ledger_entry(&self, hash: Hash) -> Result<Value, BackendError>;

    /// Generates with this node's own engine.
    ///
    /// Pieces of the answer go to `pieces` as they are made; a closed receiver is no error. Together they are a prefix of the
    /// reply's text. When `cancel` fires, the engine stops at the next token.
    async fn generate(
        &self,
        request: LocalRequest,
        pieces: mpsc::Sender<String>,
        cancel: CancellationToken,
    ) -> Result<LocalReply, BackendError>;

    /// Embeds texts with this node's own embedder.
    async fn embed(&self, texts: Vec<String>) -> Result<Embedded, BackendError>;

    /// Hands a task to the swarm. Its id is drawn, and it is open in [`Backend::tasks`], before this is called. Everything that happens from then on, the end
    /// included, comes through the log.
    async fn ask(&self, spec: TaskSpec) -> Result<(), BackendError>;

    /// Writes a task's record to disk in place of an earlier one, or deletes it. Returns when the disk has it.
    async fn keep(&self, task: TaskId, record: Option<Vec<u8>>) -> Result<(), BackendError>;

    /// Returns the records that are on disk.
    async fn kept(&self) -> Result<Vec<(TaskId, Vec<u8>)>, BackendError>;

    /// Takes a task back. A task that is unknown or has ended is no error.
    async fn cancel(&self, task: TaskId) -> Result<(), BackendError>;
}

/// How a learning curve is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CurveForm {
    /// For a terminal.
    #[default]
    Text,
    /// For a spreadsheet.
    Csv,
    /// For a page.
    Svg,
}

/// A large body on its way, piece by piece. An error is its last piece.
pub type Pieces = BoxStream<'static, Result<Bytes, BackendError>>;

/// Rollouts for one update, as columns: `protocol/spec/rollout.md`.
#[derive(Clone, Debug)]
pub struct Rollouts {
    /// The step of the weights that it updates.
    pub step: u64,
    /// The columns.
    pub columns: Bytes,
}

/// The weights of a policy, in safetensors.
pub struct Weights {
    /// The updates that they went through.
    pub step: u64,
    /// How large they are, in bytes.
    pub bytes: u64,
    /// The file.
    pub pieces: Pieces,
}

impl fmt::Debug for Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Weights").field("step", &self.step).field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

/// What a trainer outside the node says of an update.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Update {
    /// The step of the batch that it learned from.
    pub step: u64,
    /// The gradient's length before it was clipped, for the curve; 0 when it was not said.
    pub gradient: f64,
    /// Mean importance weight before it was truncated, for the curve; 0 when it was not said.
    pub importance: f32,
}

/// What a model is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelKind {
    /// It answers chats.
    Chat,
    /// It embeds texts.
    Embedding,
}

/// A model that this node runs.
#[derive(Clone, Debug)]
pub struct ModelCard {
    /// The name it is asked for by.
    pub name: String,
    /// What it is for.
    pub kind: ModelKind,
    /// BLAKE3 of its weights; zero if unknown.
    pub fingerprint: Hash,
    /// Tokens of prompt and answer together.
    pub context: u32,
    /// Its quantisation, such as `Q8_0`.
    pub quantisation: String,
    /// Its architecture, such as `llama`.
    pub architecture: String,
}

/// One turn of a chat, as it goes to this node's own engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatTurn {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
}

/// A request for this node's own engine.
#[derive(Clone, Debug)]
pub struct LocalRequest {
    /// Names the request in logs.
    pub id: TaskId,
    /// The model, one of [`Backend::models`].
    pub model: String,
    /// The chat so far.
    pub turns: Vec<ChatTurn>,
    /// The most tokens to generate; the context's end comes first if it is nearer.
    pub max_tokens: u32,
    /// Sampling temperature; 0 is greedy.
    pub temperature: f32,
    /// Nucleus; 1 keeps everything.
    pub top_p: f32,
    /// The sampler's seed.
    pub seed: u64,
    /// Texts that end the answer and are not part of it.
    pub stop: Vec<String>,
    /// A JSON Schema that the answer must satisfy, token by token.
    pub json_schema: Option<String>,
}

/// What this node's own engine answered.
#[derive(Clone, Debug)]
pub struct LocalReply {
    /// The whole answer.
    pub text: String,
    /// Tokens read.
    pub prompt_tokens: u32,
    /// Tokens written.
    pub completion_tokens: u32,
    /// Why it ended.
    pub finish: Finish,
    /// BLAKE3 of the weights that wrote it; zero if unknown.
    pub fingerprint: Hash,
}

/// Embeddings of a few texts.
#[derive(Clone, Debug)]
pub struct Embedded {
    /// One vector a text, in their order.
    pub vectors: Vec<Vec<f32>>,
    /// Tokens read.
    pub tokens: u32,
}

/// Whether the node is ready for work.
#[derive(Clone, Debug, Default)]
pub struct Health {
    /// What is waited for; nothing when ready.
    pub waiting_for: Vec<String>,
}

/// Which entries of the ledger are wanted.
#[derive(Clone, Debug, Default)]
pub struct LedgerFilter {
    /// Only this kind: one of [`Body::KINDS`](chorus_protocol::entry::Body::KINDS).
    pub kind: Option<String>,
    /// Only of this author.
    pub author: Option<NodeId>,
    /// Only entries that follow this cursor, as a page before gave it.
    pub after: Option<String>,
    /// At most this many.
    pub limit: usize,
}

/// A page of the ledger.
#[derive(Clone, Debug, Default)]
pub struct LedgerPage {
    /// The entries, in an order that does not change while entries are added.
    pub entries: Vec<Value>,
    /// How many entries the filter lets through in all.
    pub total: usize,
    /// Where the next page begins; `None` on the last one.
    pub next: Option<String>,
}
