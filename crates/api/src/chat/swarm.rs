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
use super::text::{Stops, Voice};
use super::{Completion, Piece, fresh_seed};
use crate::app::{App, cancel_task, open_task};
use crate::backend::ChatTurn;
use crate::error::{BackendError, Fault};
use crate::task_log::{LogItem, Outcome, TaskStream};

/// How much longer than its deadline a task is waited for: it ends by itself, and says why better than this could.
const DEADLINE_GRACE: Duration = Duration::from_secs(2);

/// What is asked of the swarm.
#[derive(Debug)]
pub(crate) struct Ask {
    spec: TaskSpec,
    stops: Vec<String>,
    /// Whether text is wanted while it is made.
    follow: bool,
    stream: bool,
    background: bool,
}

impl Ask {
    /// Makes a task of a chat.
    pub(crate) fn new(app: &App, mut spec: TaskSpec, chat: &ChatRequest) -> Result<Self, Fault> {
        if chat.json_schema.is_some() {
            let message = "'response_format' is not supported for the swarm by this version; ask one of this node's own \
                           models (GET /v1/models), or leave it out";
            return Err(Fault::field("response_format", "unsupported_parameter", message));
        }
        let (question, before) = chat.question()?;
        spec.question = question.to_owned();
        spec.context = before.iter().enumerate().map(|(at, turn)| bounded(at, turn)).collect::<Result<_, _>>()?;
        chat.sampling.apply(&mut spec, fresh_seed(app));
        if spec.strategy == Strategy::Direct {
            // A chat wants what was said, and there is no vote to take an answer out of it for.
            spec.format = AnswerFormat::Prose;
        }
        // Text is also needed to see where a stop stands, in answers that are read as they are made.
        let follow = spec.strategy == Strategy::Direct && (chat.stream || !chat.stop.is_empty());
        spec.stream = follow;
        spec.validate()?;
        Ok(Self { spec, stops: chat.stop.clone(), follow, stream: chat.stream, background: chat.background })
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
    let mut follower = Follower {
        task,
        voice: Voice::default(),
        stops: Stops::new(ask.stops),
        follow: ask.follow,
        stream: ask.stream,
        text: String::new(),
        written: 0,
        max_tokens: ask.spec.max_tokens,
    };
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
    let goes_on = last.is_none() && background;
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
    stops: Stops,
    follow: bool,
    stream: bool,
    /// What stands before every stop, so far.
    text: String,
    /// Tokens that the executor has written.
    written: u32,
    max_tokens: u32,
}

impl Follower {
    /// Reads events until there is an answer. Returns the last piece, or nothing when the client has left.
    async fn follow(&mut self, app: &App, mut events: TaskStream, out: &mpsc::Sender<Piece>) -> Option<Piece> {
        while let Some(item) = events.next().await {
            let LogItem::Event(event) = item else { continue };
            let Some(new) = self.on_event(&event.kind) else { continue };
            self.say(new, out).await?;
            if self.stops.is_hit() {
                return Some(Piece::Done(Box::new(self.stopped())));
            }
        }
        match app.backend.tasks().outcome(self.task) {
            Some(outcome) => self.end(outcome, out).await,
            None => Some(Piece::Failed(BackendError::TaskNotFound { task: self.task }.into())),
        }
    }

    /// Returns the text that an event brings for the client.
    fn on_event(&mut self, event: &TaskEventKind) -> Option<String> {
        match event {
            TaskEventKind::Text { place, node, tokens, text } if self.follow && place.stage == "answer" => {
                self.written = self.written.max(*tokens);
                self.voice.write(place.job, *node, text)
            }
            TaskEventKind::Lost { place, node, .. } => {
                self.voice.lose(place.job, *node);
                None
            }
            _ => None,
        }
    }

    async fn say(&mut self, new: String, out: &mpsc::Sender<Piece>) -> Option<()> {
        let clear = self.stops.push(&new);
        self.pass(clear, out).await
    }

    async fn pass(&mut self, clear: String, out: &mpsc::Sender<Piece>) -> Option<()> {
        self.text.push_str(&clear);
        if !self.stream || clear.is_empty() {
            return Some(());
        }
        out.send(Piece::Text(clear)).await.ok()
    }

    async fn end(&mut self, outcome: Outcome, out: &mpsc::Sender<Piece>) -> Option<Piece> {
        let answer = match outcome {
            Ok(answer) => answer,
            Err(error) => return Some(Piece::Failed(error.into())),
        };
        if !self.stream {
            // Nothing was sent, so what was written by whoever was lost does not matter.
            self.voice = Voice::default();
            self.stops.reset();
            self.text.clear();
        }
        let Ok(rest) = self.voice.finish(&answer.text) else {
            return Some(Piece::Failed(self.diverged()));
        };
        self.say(rest, out).await?;
        if !self.stops.is_hit() {
            let held = self.stops.flush();
            self.pass(held, out).await?;
        }
        Some(Piece::Done(Box::new(self.completion(&answer))))
    }

    /// The answer ended at a stop, before its executor knew: the task is taken back, and its prompt was never counted.
    fn stopped(&self) -> Completion {
        let chorus = json!({ "task": self.task, "completion_tokens_so_far": self.written });
        Completion { text: self.text.clone(), finish: "stop", usage: None, fingerprint: None, chorus: Some(chorus) }
    }

    fn completion(&self, answer: &TaskAnswer) -> Completion {
        // The swarm's answer does not say why it ended; one that is as long as it may be was cut.
        let answering = answer.chains.iter().filter(|chain| chain.answer.as_deref() == Some(&answer.answer));
        let last_steps = answering.filter_map(|chain| chain.steps.last());
        let cut = last_steps.max_by_key(|step| step.tokens).is_some_and(|step| step.tokens >= self.max_tokens);
        Completion {
            text: self.text.clone(),
            finish: if cut && !self.stops.is_hit() { "length" } else { "stop" },
            usage: Some((answer.prompt_tokens, answer.completion_tokens)),
            fingerprint: None,
            chorus: Some(extension(answer)),
        }
    }

    fn diverged(&self) -> Fault {
        let message = format!(
            "the node that wrote this answer was lost, and the one after it answers differently from what was sent already; the \
             whole answer is at GET /v1/tasks/{}, or ask again without 'stream'",
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
