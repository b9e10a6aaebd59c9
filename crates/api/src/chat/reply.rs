//! Renders an answer as OpenAI does: one `chat.completion`, or a stream of `chat.completion.chunk`s that ends with `[DONE]`.

use std::convert::Infallible;
use std::time::{Duration, SystemTime};

use axum::Json;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use chorus_protocol::job::Finish;
use chorus_protocol::{Hash, TaskId};
use futures::stream::{self, StreamExt};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;

use super::request::ChatRequest;
use super::{Completion, Piece};
use crate::app::App;
use crate::error::{BackendError, Fault};

/// How long a stream's head waits for the first text. An error that comes before gets a status of its own; afterwards it can
/// only be an event.
const HEAD_WAIT: Duration = Duration::from_secs(1);
/// Characters of a fingerprint that clients see.
const FINGERPRINT_CHARS: usize = 16;

/// What every chunk of a reply says.
#[derive(Clone, Debug)]
pub(crate) struct Head {
    id: String,
    created: u64,
    model: String,
    include_usage: bool,
}

impl Head {
    pub(crate) fn new(id: TaskId, chat: &ChatRequest) -> Self {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self {
            id: format!("chatcmpl-{id}"),
            created: since.as_secs(),
            model: chat.model.clone(),
            include_usage: chat.include_usage,
        }
    }
}

/// Waits for the whole answer.
pub(crate) async fn whole(head: Head, mut pieces: mpsc::Receiver<Piece>) -> Result<Json<Value>, Fault> {
    loop {
        match pieces.recv().await {
            Some(Piece::Text(_)) => {}
            Some(Piece::Done(done)) => return Ok(Json(completion(&head, *done))),
            Some(Piece::Failed(fault)) => return Err(fault),
            None => return Err(source_gone()),
        }
    }
}

fn completion(head: &Head, done: Completion) -> Value {
    let mut reply = json!({
        "id": head.id,
        "object": "chat.completion",
        "created": head.created,
        "model": head.model,
        "choices": [{
            "index": 0,
            "message": { "role": "assistant", "content": done.text, "refusal": null, "annotations": [] },
            "logprobs": null,
            "finish_reason": done.finish,
        }],
        "usage": usage(done.usage),
        "system_fingerprint": fingerprint(done.fingerprint),
    });
    if let Some(chorus) = done.chorus {
        reply["chorus"] = chorus;
    }
    reply
}

fn usage((prompt, completion): (u64, u64)) -> Value {
    json!({ "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt.saturating_add(completion) })
}

fn fingerprint(weights: Option<Hash>) -> Option<String> {
    weights.map(|weights| format!("fp_{}", weights.to_string().get(..FINGERPRINT_CHARS).unwrap_or_default()))
}

/// Streams the answer as it is made.
pub(crate) async fn stream(app: &App, head: Head, mut pieces: mpsc::Receiver<Piece>) -> Result<Response, Fault> {
    let early = match timeout(HEAD_WAIT, pieces.recv()).await {
        Ok(Some(Piece::Failed(fault))) => return Err(fault),
        Ok(None) => return Err(source_gone()),
        Ok(Some(piece)) => Some(piece),
        Err(_) => None,
    };
    let opening = chunk(&head, &json!({ "role": "assistant", "content": "" }), None);
    let rest = stream::iter(early)
        .chain(ReceiverStream::new(pieces))
        .flat_map(move |piece| stream::iter(render(&head, piece)));
    let events =
        stream::iter([opening.to_string()]).chain(rest).map(|data| Ok::<_, Infallible>(Event::default().data(data)));
    let keep_alive = KeepAlive::new().interval(app.cfg.keep_alive).text("keep-alive");
    Ok(Sse::new(events).keep_alive(keep_alive).into_response())
}

/// Returns the data of the events that a piece becomes.
fn render(head: &Head, piece: Piece) -> Vec<String> {
    match piece {
        Piece::Text(text) => vec![chunk(head, &json!({ "content": text }), None).to_string()],
        Piece::Done(done) => {
            let mut last = chunk(head, &json!({}), Some(done.finish));
            last["system_fingerprint"] = json!(fingerprint(done.fingerprint));
            if let Some(chorus) = done.chorus {
                last["chorus"] = chorus;
            }
            let mut events = vec![last.to_string()];
            if head.include_usage {
                let mut counted = chunk(head, &Value::Null, None);
                counted["choices"] = json!([]);
                counted["usage"] = usage(done.usage);
                events.push(counted.to_string());
            }
            events.push("[DONE]".to_owned());
            events
        }
        Piece::Failed(fault) => vec![fault.to_json().to_string(), "[DONE]".to_owned()],
    }
}

fn chunk(head: &Head, delta: &Value, finish: Option<Finish>) -> Value {
    let mut chunk = json!({
        "id": head.id,
        "object": "chat.completion.chunk",
        "created": head.created,
        "model": head.model,
        "system_fingerprint": null,
        "choices": [{ "index": 0, "delta": delta, "logprobs": null, "finish_reason": finish }],
    });
    if head.include_usage {
        chunk["usage"] = Value::Null;
    }
    chunk
}

/// The task behind a reply ended without a word, which only a panic of it can bring about.
fn source_gone() -> Fault {
    let reason = "its task ended without an answer; the node's log has the cause".to_owned();
    BackendError::Engine { reason, retryable: true }.into()
}
