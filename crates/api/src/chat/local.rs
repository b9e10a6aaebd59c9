//! A chat with this node's own engine.

use chorus_protocol::{Hash, TaskId};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::task::{JoinError, JoinHandle};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::request::ChatRequest;
use super::{Completion, Piece};
use crate::app::{App, CANCEL_GRACE};
use crate::backend::{LocalReply, LocalRequest};
use crate::error::{BackendError, Fault};

/// Pieces that may wait between the engine and this loop; the engine merges what does not fit.
const TEXT_QUEUE: usize = 32;

type Generation = JoinHandle<Result<LocalReply, BackendError>>;

/// Makes the engine's request of a client's.
pub(crate) fn request(id: TaskId, chat: &ChatRequest, fresh_seed: u64) -> LocalRequest {
    #[allow(clippy::cast_possible_truncation, reason = "both lie between 0 and 2")]
    let (temperature, top_p) = (chat.sampling.temperature as f32, chat.sampling.top_p as f32);
    LocalRequest {
        id,
        model: chat.model.clone(),
        turns: chat.turns.clone(),
        max_tokens: chat.sampling.max_tokens,
        temperature,
        top_p,
        seed: chat.sampling.seed.unwrap_or(fresh_seed),
        stop: chat.shape.stop.clone(),
        json_schema: chat.shape.json_schema.clone(),
    }
}

/// Generates, and sends what is made to the client. Ends early when the client leaves, the node ends or time runs out, and
/// takes the work back then.
pub(crate) async fn run(
    app: App,
    request: LocalRequest,
    stream: bool,
    out: mpsc::Sender<Piece>,
    _permit: OwnedSemaphorePermit,
) {
    let cancel = CancellationToken::new();
    let (pieces, texts) = mpsc::channel(TEXT_QUEUE);
    let (backend, token) = (app.backend.clone(), cancel.clone());
    let mut generation = tokio::spawn(async move { backend.generate(request, pieces, token).await });
    // A closed channel tells the engine that nobody wants pieces.
    let texts = stream.then_some(texts);
    let last = follow(&app, &mut generation, texts, &out).await;
    cancel.cancel();
    if let Some(last) = last {
        // Only fails when the client has left, and then there is nobody to tell.
        let _ = out.send(last).await;
    }
    if !generation.is_finished() && timeout(CANCEL_GRACE, &mut generation).await.is_err() {
        tracing::warn!("the engine does not stop a request that was cancelled; its task is ended");
        generation.abort();
    }
}

/// Passes text on until the generation ends. Returns the last piece, or nothing when the client has left.
async fn follow(
    app: &App,
    generation: &mut Generation,
    mut texts: Option<mpsc::Receiver<String>>,
    out: &mpsc::Sender<Piece>,
) -> Option<Piece> {
    let limit = app.cfg.generate_timeout;
    let mut deadline = std::pin::pin!(sleep(limit));
    let mut sent = String::new();
    let done = loop {
        tokio::select! {
            biased;
            () = out.closed() => return None,
            () = app.shutdown.cancelled() => return Some(Piece::Failed(BackendError::ShuttingDown.into())),
            () = &mut deadline => return Some(Piece::Failed(Fault::timeout("the generation", limit))),
            text = next(&mut texts) => match text {
                Some(text) => pass(&mut sent, text, out).await?,
                None => texts = None,
            },
            done = &mut *generation => break done,
        }
    };
    // What was sent just before the end.
    while let Some(text) = texts.as_mut().and_then(|texts| texts.try_recv().ok()) {
        pass(&mut sent, text, out).await?;
    }
    Some(match outcome(done) {
        Ok(reply) => {
            if let Some(rest) = reply.text.strip_prefix(sent.as_str()).filter(|rest| !rest.is_empty()) {
                out.send(Piece::Text(rest.to_owned())).await.ok()?;
            }
            Piece::Done(Box::new(completion(reply)))
        }
        Err(error) => Piece::Failed(error.into()),
    })
}

/// Waits for the next text; for ever when there is none to come, because then the generation's end is what is waited for.
async fn next(texts: &mut Option<mpsc::Receiver<String>>) -> Option<String> {
    match texts {
        Some(texts) => texts.recv().await,
        None => std::future::pending().await,
    }
}

async fn pass(sent: &mut String, text: String, out: &mpsc::Sender<Piece>) -> Option<()> {
    sent.push_str(&text);
    out.send(Piece::Text(text)).await.ok()
}

fn outcome(done: Result<Result<LocalReply, BackendError>, JoinError>) -> Result<LocalReply, BackendError> {
    done.unwrap_or_else(|error| {
        let reason = if error.is_panic() { "it panicked; the node's log has the cause" } else { "it was stopped" };
        Err(BackendError::Engine { reason: reason.to_owned(), retryable: true })
    })
}

fn completion(reply: LocalReply) -> Completion {
    Completion {
        finish: reply.finish,
        usage: (u64::from(reply.prompt_tokens), u64::from(reply.completion_tokens)),
        fingerprint: Some(reply.fingerprint).filter(|fingerprint| *fingerprint != Hash::ZERO),
        text: reply.text,
        chorus: None,
    }
}
