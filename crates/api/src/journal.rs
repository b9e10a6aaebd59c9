//! Tasks that outlive the process.
//!
//! ```text
//!  POST /v1/tasks ──record──▶ disk ──written──▶ 202, run ──▶ last event ──record──▶ disk
//!                               │
//!  start ◀──────────────────────┘  ended: shown again · under way: asked again, under its id
//! ```
//!
//! 1. A task's request is on disk before it is acknowledged, with the seed that was drawn for it and the moment of the wall clock
//!    at which its time is up. When the task ends, its last event takes the request's place.
//! 2. At the start, tasks that ended are shown again, each with its last event. A task that was under way is asked again as
//!    soon as this node can elect somebody: with the time that is left, the same seed, and events that are numbered behind
//!    those of the run before. What that run had brought so far is lost with the process.
//! 3. A task whose time is up meanwhile ends as `interrupted`; so does one that saw [`MAX_RESTARTS`] restarts, lest it be what
//!    brings the node down.
//! 4. A crash between a task's end and its record runs the task once more: at least once, not exactly once.
//!
//! The newest [`MAX_ENDED`] tasks that ended are kept, as long as they are no more than [`MAX_ENDED_BYTES`] together. Chats are
//! not kept: their client is gone with the connection.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use axum::http::StatusCode;
use chorus_core::{EVENTS_A_RUN, TaskError, TaskSpec};
use chorus_protocol::TaskId;
use futures::StreamExt;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};

use crate::app::{App, meta, open_task, within};
use crate::backend::ModelKind;
use crate::error::Fault;
use crate::task_log::{Recorded, TaskMeta, TaskStream};
use crate::tasks;

/// Tasks that ended and are kept on disk.
const MAX_ENDED: usize = 256;
/// Bytes of their records together.
const MAX_ENDED_BYTES: usize = 8 << 20;
/// Restarts that a task may see before it is given up.
const MAX_RESTARTS: u32 = 3;
/// How long a task waits after a restart for this node to have a model or a peer. It is asked then all the same.
const READY_LIMIT: Duration = Duration::from_secs(20);
const READY_POLL: Duration = Duration::from_millis(100);

/// What is on disk of a task, as JSON.
#[derive(Clone, Debug, Deserialize, Serialize)]
struct Record {
    /// When it was taken, in milliseconds since the Unix epoch.
    accepted_ms: u64,
    /// When its time is up, likewise.
    until_ms: u64,
    /// How often the node was restarted while it was under way.
    restarts: u32,
    state: State,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
enum State {
    /// It is under way; this is its request.
    Asked(Value),
    /// It has ended.
    Ended { meta: TaskMeta, took_ms: u64, event: Value },
}

/// The tasks on disk that ended, the oldest first, with the bytes of their records.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    ended: Mutex<VecDeque<(TaskId, usize)>>,
}

impl Journal {
    /// Counts a record in. Returns the tasks whose records have to make room for it.
    fn add(&self, task: TaskId, bytes: usize) -> Vec<TaskId> {
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        ended.push_back((task, bytes));
        let mut total: usize = ended.iter().map(|(_, bytes)| bytes).sum();
        let mut gone = Vec::new();
        while ended.len() > MAX_ENDED || (total > MAX_ENDED_BYTES && ended.len() > 1) {
            let Some((oldest, bytes)) = ended.pop_front() else { break };
            total -= bytes;
            gone.push(oldest);
        }
        gone
    }
}

/// Puts a task on disk and then hands it to the swarm. Returns when it may be acknowledged.
pub(crate) async fn accept(app: &App, spec: TaskSpec, mut request: Value) -> Result<(), Fault> {
    let task = spec.task;
    // A seed that was drawn is part of what was asked from now on.
    request["seed"] = json!(spec.seed);
    let accepted_ms = wall_ms();
    let until_ms = accepted_ms.saturating_add(millis(spec.deadline));
    let record = Record { accepted_ms, until_ms, restarts: 0, state: State::Asked(request) };
    write(app, task, &record).await?;
    match open_task(app, spec).await {
        Ok(events) => {
            tokio::spawn(record_end(App::clone(app), task, record, events));
            Ok(())
        }
        Err(fault) => {
            forget(app, task).await;
            Err(fault)
        }
    }
}

/// Shows the tasks again that ended before this start, and asks those again that were under way.
pub(crate) async fn restore(app: &App) {
    let kept = match within(app.cfg.request_timeout, "reading the tasks on disk", app.backend.kept()).await {
        Ok(kept) => kept,
        Err(fault) => return tracing::error!(?fault, "tasks of an earlier run are not shown and not run again"),
    };
    let mut records = Vec::with_capacity(kept.len());
    for (task, bytes) in kept {
        match serde_json::from_slice::<Record>(&bytes) {
            Ok(record) => records.push((task, bytes.len(), record)),
            Err(error) => {
                tracing::warn!(%task, %error, "a task's record cannot be read and is deleted");
                forget(app, task).await;
            }
        }
    }
    records.sort_by_key(|(task, _, record)| (record.accepted_ms, *task));
    for (task, bytes, record) in records {
        let created = SystemTime::UNIX_EPOCH + Duration::from_millis(record.accepted_ms);
        match record.state {
            State::Ended { meta, took_ms, event } => {
                let index = event["index"].as_u64().unwrap_or_default();
                let recorded = Recorded { index, event, took: Duration::from_millis(took_ms) };
                // There is room: the log holds more tasks than the journal.
                let _ = app.backend.tasks().restore(task, meta, created, recorded);
                for gone in app.journal.add(task, bytes) {
                    forget(app, gone).await;
                }
            }
            State::Asked(ref request) => begin_again(app, task, request.clone(), record, created),
        }
    }
}

/// Opens a task that was under way, so that whoever asks for it finds it, and runs it as soon as that makes sense.
fn begin_again(app: &App, task: TaskId, request: Value, mut record: Record, created: SystemTime) {
    let read = tasks::read(app, task, &request);
    let known = read.as_ref().map(meta).unwrap_or_default();
    record.restarts = record.restarts.saturating_add(1);
    let first = u64::from(record.restarts) * EVENTS_A_RUN;
    if let Err(full) = app.backend.tasks().reopen(task, known, created, first) {
        return tracing::error!(%task, %full, "a task on disk is not run again");
    }
    let app = App::clone(app);
    tokio::spawn(async move {
        match read {
            Err(fault) => {
                let reason = format!("its request is not understood any more: {}", fault.message());
                interrupt(&app, task, record, reason).await;
            }
            Ok(spec) => run_again(&app, spec, record).await,
        }
    });
}

async fn run_again(app: &App, mut spec: TaskSpec, record: Record) {
    let task = spec.task;
    if record.restarts > MAX_RESTARTS {
        let reason = format!("that has happened {} times now", record.restarts);
        return interrupt(app, task, record, reason).await;
    }
    // Counted before it runs: a task that brings the node down must not do so for ever.
    if let Err(fault) = write(app, task, &record).await {
        return interrupt(app, task, record, fault.message().to_owned()).await;
    }
    wait_until_ready(app, left(&record) / 2).await;
    spec.deadline = left(&record);
    spec.restarts = record.restarts;
    if spec.deadline.is_zero() {
        return interrupt(app, task, record, "its time was up before it could be run again".to_owned()).await;
    }
    tracing::info!(%task, restarts = record.restarts, "a task that was under way is run again");
    match open_task(app, spec).await {
        Ok(events) => record_end(App::clone(app), task, record, events).await,
        Err(fault) => interrupt(app, task, record, fault.message().to_owned()).await,
    }
}

/// Waits until this node can elect somebody: itself, or a peer.
async fn wait_until_ready(app: &App, limit: Duration) {
    let until = Instant::now() + limit.min(READY_LIMIT);
    while Instant::now() < until {
        let runs_a_model = || app.backend.models().iter().any(|card| card.kind == ModelKind::Chat);
        let is_up = app.backend.health().waiting_for.is_empty();
        if is_up && (runs_a_model() || app.backend.peers().await.is_ok_and(|peers| !peers.is_empty())) {
            return;
        }
        sleep(READY_POLL).await;
    }
}

/// Ends a task that is not run again.
async fn interrupt(app: &App, task: TaskId, record: Record, reason: String) {
    let (error, log) = (TaskError::Interrupted { reason }, app.backend.tasks());
    tracing::warn!(%task, %error, "a task is given up");
    log.finish(task, Err(error));
    write_end(app, task, record).await;
}

/// Waits for a task's end and writes it down. When the node ends first, the task stays on disk as it is.
async fn record_end(app: App, task: TaskId, record: Record, mut events: TaskStream) {
    tokio::select! {
        biased;
        () = app.shutdown.cancelled() => return,
        () = async { while events.next().await.is_some() {} } => {}
    }
    write_end(&app, task, record).await;
}

async fn write_end(app: &App, task: TaskId, record: Record) {
    let log = app.backend.tasks();
    let (Some(summary), Some(event)) = (log.summary(task), log.last_event(task)) else { return };
    let state = State::Ended { meta: summary.meta, took_ms: summary.elapsed_ms, event };
    match write(app, task, &Record { state, ..record }).await {
        Ok(bytes) => {
            for gone in app.journal.add(task, bytes) {
                forget(app, gone).await;
            }
        }
        Err(fault) => tracing::warn!(%task, ?fault, "a task's end is not on disk; it is run again after a restart"),
    }
}

/// Writes a record, and returns its size in bytes.
async fn write(app: &App, task: TaskId, record: &Record) -> Result<usize, Fault> {
    let bytes = serde_json::to_vec(record).map_err(|error| {
        Fault::new(StatusCode::INTERNAL_SERVER_ERROR, "disk_failed", format!("a task cannot be written down: {error}"))
    })?;
    let len = bytes.len();
    within(app.cfg.request_timeout, "writing the task to disk", app.backend.keep(task, Some(bytes))).await?;
    Ok(len)
}

async fn forget(app: &App, task: TaskId) {
    let done = timeout(app.cfg.request_timeout, app.backend.keep(task, None)).await;
    if !matches!(done, Ok(Ok(()))) {
        tracing::warn!(%task, "a task's record is not deleted from disk");
    }
}

fn left(record: &Record) -> Duration {
    Duration::from_millis(record.until_ms.saturating_sub(wall_ms()))
}

fn wall_ms() -> u64 {
    millis(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_records_make_room_by_number_and_by_size() {
        let (journal, id) = (Journal::default(), |number: usize| TaskId::from_bytes((number as u128).to_be_bytes()));
        for number in 0..MAX_ENDED {
            assert!(journal.add(id(number), 10).is_empty());
        }
        assert_eq!(journal.add(id(MAX_ENDED), 10), [id(0)]);
        let gone = journal.add(id(MAX_ENDED + 1), MAX_ENDED_BYTES);
        assert_eq!(gone.len(), MAX_ENDED, "one that is as large as all may be stays alone");
        assert!(journal.add(id(MAX_ENDED + 2), 2 * MAX_ENDED_BYTES).contains(&id(MAX_ENDED + 1)));
    }
}
