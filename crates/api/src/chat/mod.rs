//! `POST /v1/chat/completions`, as OpenAI defines it.
//!
//! ```text
//!                        ┌─ model chorus ──▶ swarm: a task, followed through the task log ─┐
//!   request ──▶ read ──▶ ┤                                                                 ├─▶ pieces ──▶ reply: JSON or SSE
//!                        └─ other models ──▶ local: this node's own engine ────────────────┘
//! ```
//!
//! Both sources run as a task of their own and send [`Piece`]s into a bounded channel. When the client leaves, its end of the
//! channel is dropped; the source sees that at once and takes its work back, unless it is meant to go on in the background.
//!
//! Extensions to OpenAI's API: the request's `chorus` object (`strategy`, `planners`, `weighting`, `risk`, `deadline_s`, `model`,
//! `skill`, `background`), and the reply's (what the vote was, how sure it is, and the task under which more is known).

mod local;
mod reply;
mod request;
mod swarm;
mod text;

use axum::extract::{Request, State};
use axum::http::HeaderValue;
use axum::response::{IntoResponse, Response};
use chorus_protocol::job::Finish;
use chorus_protocol::{Hash, TaskId};
use serde_json::Value;
use tokio::sync::mpsc;

use crate::app::{App, read_body};
use crate::backend::ModelKind;
use crate::error::Fault;
use crate::fields;
use crate::models;

pub(crate) use request::default_spec;

/// Pieces that may wait for a client; a source whose client is slower than that waits in turn.
const PIECE_QUEUE: usize = 64;
/// The header that names the task behind a chat with the swarm.
pub(crate) const TASK_HEADER: &str = "x-chorus-task";

/// Something a source has to say.
#[derive(Debug)]
pub(crate) enum Piece {
    /// More of the answer.
    Text(String),
    /// The answer is whole. The last piece.
    Done(Box<Completion>),
    /// There is no answer. The last piece.
    Failed(Fault),
}

/// A whole answer.
#[derive(Clone, Debug)]
pub(crate) struct Completion {
    /// All of the text.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
    /// Tokens read and written.
    pub usage: (u64, u64),
    /// The weights that wrote it, if one model did.
    pub fingerprint: Option<Hash>,
    /// What else the swarm has to say.
    pub chorus: Option<Value>,
}

/// `POST /v1/chat/completions`.
pub(crate) async fn completions(State(app): State<App>, request: Request) -> Result<Response, Fault> {
    let body = fields::parse(&read_body(&app, request).await?)?;
    let id = TaskId::from_bytes(app.backend.draw_id());
    let mut spec = default_spec(id);
    spec.deadline = app.cfg.task_deadline;
    let chat = request::ChatRequest::read(&body, &mut spec)?;
    let permit = app.generation()?;
    let head = reply::Head::new(id, &chat);
    let (out, pieces) = mpsc::channel(PIECE_QUEUE);
    if chat.is_for_swarm() {
        let ask = swarm::Ask::new(&app, spec, &chat)?;
        tokio::spawn(swarm::run(App::clone(&app), ask, out, permit));
    } else {
        check_model(&app, &chat.model)?;
        let fresh = fresh_seed(&app);
        tokio::spawn(local::run(App::clone(&app), local::request(id, &chat, fresh), chat.stream, out, permit));
    }
    let mut response = if chat.stream {
        reply::stream(&app, head, pieces).await?
    } else {
        reply::whole(head, pieces).await?.into_response()
    };
    if chat.is_for_swarm()
        && let Ok(value) = HeaderValue::from_str(&id.to_string())
    {
        response.headers_mut().insert(TASK_HEADER, value);
    }
    Ok(response)
}

/// Refuses a model that this node does not run.
fn check_model(app: &App, model: &str) -> Result<(), Fault> {
    let cards = app.backend.models();
    if cards.iter().any(|card| card.kind == ModelKind::Chat && card.name == model) {
        return Ok(());
    }
    if cards.iter().any(|card| card.name == model) {
        let message = format!("'{model}' embeds texts and does not chat; send it to /v1/embeddings");
        return Err(Fault::field("model", "invalid_value", message));
    }
    Err(models::not_found(app, &cards, model, ModelKind::Chat).into())
}

/// Returns a seed for a request that gave none.
pub(crate) fn fresh_seed(app: &App) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = app.backend.draw_id();
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}
