//! A chat with the swarm: a task like any other, whose client reads one text instead of events.
//!
//! With the strategy `direct` the text is streamed as its executor writes it. With `chains` there is nothing to stream before
//! the vote: the answer comes in one piece at its end.

use std::time::Duration;

use chorus_core::{AnswerFormat, Strategy, TaskAnswer, TaskEventKind, TaskSpec};
use chorus_protocol::job::Turn;
use chorus_protocol::{TaskId, Text};
use futures::StreamExt;
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::sleep;

use super::request::ChatRequest;
use super::text::Voice;
use super::{Completion, Piece, fresh_seed};
use crate::app::{App, cancel_task, open_task};
use crate::backend::ChatTurn;
use crate::error::{BackendError, Fault};
use crate::task_log::{LogItem, TaskStream};

/// How much longer than its deadline a task is waited for: it ends by itself, and says why better than this could.
const DEADLINE_GRACE: Duration = Duration::from_secs(2);

/// What is asked of the swarm.
#[derive(Debug)]
pub(crate) struct Ask {
    spec: TaskSpec,
    stream: bool,
    background: bool,
}

impl Ask {
    /// Makes a task of a chat.
    pub(crate) fn new(app: &App, mut spec: TaskSpec, chat: &ChatRequest) -> Result<Self, Fault> {
        let (question, before) = chat.question()?;
        spec.question = question.to_owned();
        spec.context = before.iter().enumerate().map(|(at, turn)| bounded(at, turn)).collect::<Result<_, _>>()?;
        chat.sampling.apply(&mut spec, fresh_seed(app));
        if spec.strategy == Strategy::Direct {
            // A chat wants what was said, and there is no vote to take an answer out of it for.
            spec.format = AnswerFormat::Prose;
        }
        chat.shape.apply(&mut spec);
        spec.stream = spec.strategy == Strategy::Direct && chat.stream;
        spec.validate()?;
        Ok(Self { spec, stream: chat.stream, background: chat.background })
    }
}

fn bounded(at: usize, turn: &ChatTurn) -> Result<Turn, Fault> {
    let content = Text::new(turn.content.as_str()).map_err(|error| {
        let path = format!("messages[{at}].content");
        let message = format!("'{path}' is too long for the swarm: {error}");
        Fault::field(path, "context_length_exceeded", message)
    })?;
    Ok(Turn { role: turn.role, content })
}

/// Runs a task, and sends what its client reads. Takes the task back when the client leaves before its end, unless it is meant
/// to go on in the background.
pub(crate) async fn run(app: App, ask: Ask, out: mpsc::Sender<Piece>, _permit: OwnedSemaphorePermit) {
    let task = ask.spec.task;
    let (background, limit) = (ask.background, ask.spec.deadline + DEADLINE_GRACE);
    let mut follower = Follower { task, voice: Voice::default(), follow: ask.spec.stream, stream: ask.stream };
    let events = match open_task(&app, ask.spec).await {
        Ok(events) => events,
        Err(fault) => return send_last(&out, Piece::Failed(fault)).await,
    };
    let last = tokio::select! {
        biased;
        () = out.closed() => None,
        () = app.shutdown.cancelled() => Some(Piece::Failed(BackendError::ShuttingDown.into())),
        () = sleep(limit) => Some(Piece::Failed(Fault::timeout("the task", limit))),
        last = follower.follow(&app, events, &out) => last,
    };
    let ended = app.backend.tasks().outcome(task).is_some();
    // A client that was told to look for the whole answer elsewhere must find it there.
    let goes_on = background && last.is_none() || follower.voice.is_lost();
    if !(ended || goes_on) {
        cancel_task(&app, task).await;
    }
    if let Some(last) = last {
        send_last(&out, last).await;
    }
}

async fn send_last(out: &mpsc::Sender<Piece>, last: Piece) {
    // Only fails when the client has left, and then there is nobody to tell.
    let _ = out.send(last).await;
}

/// One client's view of a task.
struct Follower {
    task: TaskId,
    voice: Voice,
    /// Whether the client reads while the answer is made.
    follow: bool,
    /// Whether it reads a stream.
    stream: bool,
}

impl Follower {
    /// Reads events until there is an answer. Returns the last piece, or nothing when the client has left.
    async fn follow(&mut self, app: &App, mut events: TaskStream, out: &mpsc::Sender<Piece>) -> Option<Piece> {
        while let Some(item) = events.next().await {
            let LogItem::Event(event) = item else { continue };
            if let Some(new) = self.on_event(&event.kind) {
                out.send(Piece::Text(new)).await.ok()?;
            }
            if self.voice.is_lost() {
                return Some(Piece::Failed(self.diverged()));
            }
        }
        match app.backend.tasks().outcome(self.task) {
            Some(Ok(answer)) => self.end(&answer, out).await,
            Some(Err(error)) => Some(Piece::Failed(error.into())),
            None => Some(Piece::Failed(BackendError::TaskNotFound { task: self.task }.into())),
        }
    }

    /// Returns the text that an event brings for the client.
    fn on_event(&mut self, event: &TaskEventKind) -> Option<String> {
        match event {
            TaskEventKind::Text { place, node, text, .. } if self.follow && place.stage == "answer" => {
                self.voice.write(place.job, *node, text)
            }
            TaskEventKind::Lost { place, node, .. } => {
                self.voice.lose(place.job, *node);
                None
            }
            _ => None,
        }
    }

    async fn end(&mut self, answer: &TaskAnswer, out: &mpsc::Sender<Piece>) -> Option<Piece> {
        let Ok(rest) = self.voice.finish(&answer.text) else {
            return Some(Piece::Failed(self.diverged()));
        };
        if self.stream && !rest.is_empty() {
            out.send(Piece::Text(rest)).await.ok()?;
        }
        Some(Piece::Done(Box::new(Completion {
            text: answer.text.clone(),
            finish: answer.finish,
            usage: (answer.prompt_tokens, answer.completion_tokens),
            fingerprint: None,
            chorus: Some(extension(answer)),
        })))
    }

    fn diverged(&self) -> Fault {
        let message = format!(
            "the node that wrote this answer was lost, and the one after it writes something else than what was sent already; the \
             whole answer will be at GET /v1/tasks/{}, or ask again, without 'stream' if this must not happen",
            self.task
        );
        Fault::new(axum::http::StatusCode::BAD_GATEWAY, "answer_diverged", message)
    }
}

/// What the swarm says beside the text.
fn extension(answer: &TaskAnswer) -> Value {
    json!({
        "task": answer.task,
        "answer": answer.answer,
        "strategy": answer.strategy,
        "fallback": answer.fallback,
        "margin": answer.margin,
        "tie": answer.tie,
        "low_margin": answer.low_margin,
        "votes": answer.votes,
        "chains": answer.chains,
        "jobs": answer.jobs,
        "elapsed_ms": answer.elapsed.as_secs_f64() * 1e3,
    })
}
