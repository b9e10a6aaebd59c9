//! What happened to every task: a bounded log that the node writes and any number of clients read.
//!
//! ```text
//!   driver ──push──▶ ┌ TaskLog ─────────────┐
//!          ──finish─▶│ task ▶ ring of events│ ◀──pull── stream (its own place in the ring)
//!   API    ──open──▶ │ task ▶ ring of events│ ◀──pull── stream
//!                    └──────────────────────┘
//! ```
//!
//! 1. The API opens a task before it hands it to the node, so nobody can ask for a task that is not there yet.
//! 2. The node pushes events, numbered from 0 without gaps, and at last the outcome. Pushing never waits: it locks for the time
//!    of an append, and readers hold that lock for the time of a clone of a pointer.
//! 3. A stream pulls, one event after the other, from wherever its reader wants to begin. However slow it is, and whatever is
//!    evicted meanwhile, it gets every event once, in order; what had to be forgotten before the reader came to it is said
//!    ([`LogItem::Missed`]), never passed over in silence.
//! 4. A stream ends when the task has ended and its last event has been read. The last event says how it ended; if the node gave
//!    none, the log makes it from the outcome.
//!
//! 5. Of a task that ended before the node was started only the last event is there; the journal has kept it.
//!
//! Bounds: events and bytes of one task, tasks, bytes of all tasks. Tasks that ended are forgotten first, the oldest before all.

use std::collections::{BTreeMap, VecDeque};
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use chorus_core::{TaskAnswer, TaskError, TaskEvent, TaskEventKind};
use chorus_protocol::TaskId;
use futures::stream::{self, BoxStream, StreamExt};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::watch;

/// Events of one task that are kept; an event may be a single token of text.
const MAX_EVENTS: usize = 16_384;
/// Bytes of one task's events that are kept, as far as they can be counted without serialising them.
const MAX_TASK_BYTES: usize = 8 << 20;
/// Tasks that are kept.
const MAX_TASKS: usize = 512;
/// Bytes of all tasks' events together.
const MAX_BYTES: usize = 64 << 20;
/// Characters of a question that are kept.
const MAX_QUESTION_CHARS: usize = 400;

/// What the log holds at most.
#[derive(Clone, Copy, Debug)]
pub struct TaskLogLimits {
    /// Tasks.
    pub tasks: usize,
    /// Events of one task.
    pub events: usize,
    /// Bytes of one task's events.
    pub task_bytes: usize,
    /// Bytes of all events.
    pub bytes: usize,
}

impl Default for TaskLogLimits {
    fn default() -> Self {
        Self { tasks: MAX_TASKS, events: MAX_EVENTS, task_bytes: MAX_TASK_BYTES, bytes: MAX_BYTES }
    }
}

/// Every place is taken by a task that is still under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{limit} tasks are under way; wait for one to end, or cancel one with DELETE /v1/tasks/ID")]
pub struct TaskLogFull {
    /// How many tasks are kept.
    pub limit: usize,
}

/// How a task ended.
pub type Outcome = Result<Arc<TaskAnswer>, TaskError>;

/// Something a reader of a task is told.
#[derive(Clone, Debug)]
pub enum LogItem {
    /// The next event.
    Event(Arc<TaskEvent>),
    /// The last event of a task that ended before the node was started, as it was told then.
    Recorded(Arc<Recorded>),
    /// Events that were forgotten before the reader came to them.
    Missed {
        /// The first of them.
        from: u64,
        /// The last of them.
        to: u64,
    },
}

/// The last event of a task that ended before the node was started.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// Its number.
    pub index: u64,
    /// The event, as JSON.
    pub event: Value,
    /// How long the task took.
    pub took: Duration,
}

impl Recorded {
    fn state(&self) -> TaskState {
        if self.event["event"] == "finished" { TaskState::Finished } else { TaskState::Failed }
    }
}

/// A task's events, from one place on to its end.
pub type TaskStream = BoxStream<'static, LogItem>;

/// What is kept of a question.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct TaskMeta {
    /// The question, or its beginning.
    pub question: String,
    /// The strategy that was asked for.
    pub strategy: String,
}

/// Where a task stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskState {
    /// It is under way.
    Running,
    /// It has an answer.
    Finished,
    /// It has none.
    Failed,
}

/// A task in a line.
#[derive(Clone, Debug, Serialize)]
pub struct TaskSummary {
    /// The task.
    pub id: TaskId,
    /// Where it stands.
    pub state: TaskState,
    /// What was asked.
    #[serde(flatten)]
    pub meta: TaskMeta,
    /// When it was asked, in seconds since the Unix epoch.
    pub created: u64,
    /// How long it has taken so far, or took.
    pub elapsed_ms: u64,
    /// Events so far.
    pub events: u64,
}

/// The log. See the module's documentation.
#[derive(Debug)]
pub struct TaskLog {
    limits: TaskLogLimits,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    records: BTreeMap<TaskId, Arc<Record>>,
    /// Tasks in the order in which they were opened; some of them may be gone.
    opened: VecDeque<TaskId>,
    /// Tasks that ended, the oldest end first.
    ended: VecDeque<TaskId>,
    bytes: usize,
}

/// One task. A stream keeps its record alive, also when the log has forgotten it.
#[derive(Debug)]
struct Record {
    task: TaskId,
    meta: TaskMeta,
    created: SystemTime,
    started: Instant,
    ring: Mutex<Ring>,
    changed: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Ring {
    /// The number of the first event that is kept.
    first: u64,
    events: VecDeque<Arc<TaskEvent>>,
    bytes: usize,
    outcome: Option<(Outcome, Duration)>,
    /// All that is left of a task that ended before the node was started.
    recorded: Option<Arc<Recorded>>,
}

impl Default for TaskLog {
    fn default() -> Self {
        Self::new(TaskLogLimits::default())
    }
}

impl TaskLog {
    /// Makes an empty log.
    #[must_use]
    pub fn new(limits: TaskLogLimits) -> Self {
        Self { limits, inner: Mutex::default() }
    }

    /// Makes room for a task that is about to be asked. A task that is there already stays as it is.
    ///
    /// # Errors
    /// [`TaskLogFull`] when every place is taken by a task under way.
    pub fn open(&self, task: TaskId, meta: TaskMeta) -> Result<(), TaskLogFull> {
        lock(&self.inner).open(task, meta, SystemTime::now(), &self.limits).map(|_| ())
    }

    /// Makes room for a task that was asked at `created`, before the node was started, and is about to be asked again. Its
    /// events go on at number `first`.
    ///
    /// # Errors
    /// [`TaskLogFull`] when every place is taken by a task under way.
    pub fn reopen(&self, task: TaskId, meta: TaskMeta, created: SystemTime, first: u64) -> Result<(), TaskLogFull> {
        let record = lock(&self.inner).open(task, meta, created, &self.limits)?;
        lock(&record.ring).first = first;
        Ok(())
    }

    /// Takes in a task that was asked at `created` and ended before the node was started.
    ///
    /// # Errors
    /// [`TaskLogFull`] when every place is taken by a task under way.
    pub fn restore(
        &self,
        task: TaskId,
        meta: TaskMeta,
        created: SystemTime,
        recorded: Recorded,
    ) -> Result<(), TaskLogFull> {
        let mut inner = lock(&self.inner);
        let record = inner.open(task, meta, created, &self.limits)?;
        let bytes = recorded.event.to_string().len();
        {
            let mut ring = lock(&record.ring);
            (ring.bytes, ring.recorded) = (bytes, Some(Arc::new(recorded)));
        }
        inner.bytes += bytes;
        inner.ended.push_back(task);
        Ok(())
    }

    /// Forgets a task that the node did not take.
    pub fn discard(&self, task: TaskId) {
        lock(&self.inner).remove(task);
    }

    /// Appends an event. An event of an unknown task opens it if it is its first, an event that is there already is ignored.
    pub fn push(&self, event: TaskEvent) {
        let mut inner = lock(&self.inner);
        let record = match inner.records.get(&event.task) {
            Some(record) => Arc::clone(record),
            None if event.index == 0 => {
                match inner.open(event.task, TaskMeta::default(), SystemTime::now(), &self.limits) {
                    Ok(record) => record,
                    Err(error) => return tracing::warn!(task = %event.task, %error, "a task's events are not kept"),
                }
            }
            None => return,
        };
        inner.append(&record, event, &self.limits);
    }

    /// Ends a task. Its readers' streams end once they have read what is there.
    pub fn finish(&self, task: TaskId, outcome: Result<TaskAnswer, TaskError>) {
        let mut inner = lock(&self.inner);
        let Some(record) = inner.records.get(&task).map(Arc::clone) else { return };
        if lock(&record.ring).outcome.is_some() {
            return;
        }
        let outcome = outcome.map(Arc::new);
        let took = record.started.elapsed();
        let last = lock(&record.ring).last_event(task, &outcome, took);
        if let Some(event) = last {
            inner.append(&record, event, &self.limits);
        }
        lock(&record.ring).outcome = Some((outcome, took));
        record.changed.send_replace(());
        inner.ended.push_back(task);
    }

    /// Returns a task's events from number `from` on, to its end. `None` when the task is not known.
    #[must_use]
    pub fn subscribe(&self, task: TaskId, from: u64) -> Option<TaskStream> {
        let record = self.record(task)?;
        let changed = record.changed.subscribe();
        let reader = Reader { record, changed, next: from };
        Some(stream::unfold(reader, Reader::next).boxed())
    }

    /// Returns how a task ended. `None` when it is under way, or not known.
    #[must_use]
    pub fn outcome(&self, task: TaskId) -> Option<Outcome> {
        let record = self.record(task)?;
        let ring = lock(&record.ring);
        ring.outcome.as_ref().map(|(outcome, _)| outcome.clone())
    }

    /// Returns the event that says how a task ended, as JSON: it holds the `result` or the `error`. `None` when the task is under
    /// way, or not known.
    #[must_use]
    pub fn last_event(&self, task: TaskId) -> Option<Value> {
        let record = self.record(task)?;
        let ring = lock(&record.ring);
        match (&ring.recorded, &ring.outcome, ring.events.back()) {
            (Some(recorded), ..) => Some(recorded.event.clone()),
            (None, Some(_), Some(last)) => Some(json!(**last)),
            _ => None,
        }
    }

    /// Returns a task in a line. `None` when it is not known.
    #[must_use]
    pub fn summary(&self, task: TaskId) -> Option<TaskSummary> {
        self.record(task).map(|record| record.summary())
    }

    /// Returns every task in a line, the newest first.
    #[must_use]
    pub fn summaries(&self) -> Vec<TaskSummary> {
        let inner = lock(&self.inner);
        let newest_first = inner.opened.iter().rev();
        let records: Vec<_> = newest_first.filter_map(|task| inner.records.get(task).map(Arc::clone)).collect();
        drop(inner);
        records.iter().map(|record| record.summary()).collect()
    }

    /// Returns how many tasks are under way.
    #[must_use]
    pub fn running(&self) -> usize {
        let inner = lock(&self.inner);
        inner.records.len().saturating_sub(inner.ended.len())
    }

    fn record(&self, task: TaskId) -> Option<Arc<Record>> {
        lock(&self.inner).records.get(&task).map(Arc::clone)
    }
}

impl Inner {
    fn open(
        &mut self,
        task: TaskId,
        mut meta: TaskMeta,
        created: SystemTime,
        limits: &TaskLogLimits,
    ) -> Result<Arc<Record>, TaskLogFull> {
        if let Some(record) = self.records.get(&task) {
            return Ok(Arc::clone(record));
        }
        while self.records.len() >= limits.tasks {
            let oldest = self.ended.front().copied().ok_or(TaskLogFull { limit: limits.tasks })?;
            self.remove(oldest);
        }
        if let Some((end, _)) = meta.question.char_indices().nth(MAX_QUESTION_CHARS) {
            meta.question.truncate(end);
        }
        let record = Arc::new(Record {
            task,
            meta,
            created,
            started: Instant::now(),
            ring: Mutex::default(),
            changed: watch::Sender::new(()),
        });
        self.records.insert(task, Arc::clone(&record));
        self.opened.push_back(task);
        Ok(record)
    }

    fn remove(&mut self, task: TaskId) {
        if let Some(record) = self.records.remove(&task) {
            self.bytes = self.bytes.saturating_sub(lock(&record.ring).bytes);
            self.opened.retain(|other| *other != task);
            self.ended.retain(|other| *other != task);
        }
    }

    /// Appends an event to a record, and makes room if that was too much for the record or for all of them.
    fn append(&mut self, record: &Record, event: TaskEvent, limits: &TaskLogLimits) {
        let mut ring = lock(&record.ring);
        let before = ring.bytes;
        if !ring.push(event) {
            return;
        }
        ring.trim(limits.events, limits.task_bytes);
        let now = ring.bytes;
        drop(ring);
        record.changed.send_replace(());
        self.bytes = (self.bytes + now).saturating_sub(before);
        while self.bytes > limits.bytes
            && let Some(oldest) = self.ended.front().copied()
        {
            self.remove(oldest);
        }
        if self.bytes > limits.bytes {
            let mut ring = lock(&record.ring);
            let before = ring.bytes;
            ring.trim(limits.events, before.saturating_sub(self.bytes - limits.bytes));
            self.bytes = (self.bytes + ring.bytes).saturating_sub(before);
        }
    }
}

impl Ring {
    fn next_index(&self) -> u64 {
        match &self.recorded {
            Some(recorded) => recorded.index + 1,
            None => self.first + self.events.len() as u64,
        }
    }

    /// Takes an event, unless it is there already or the task has ended.
    fn push(&mut self, event: TaskEvent) -> bool {
        if self.outcome.is_some() || event.index < self.next_index() {
            return false;
        }
        if event.index > self.next_index() {
            // The node numbers without gaps; if it ever does not, readers are told what they miss.
            self.events.clear();
            self.bytes = 0;
            self.first = event.index;
        }
        self.bytes += weight(&event);
        self.events.push_back(Arc::new(event));
        true
    }

    /// Forgets the oldest events that are too much. The newest one always stays.
    fn trim(&mut self, max_events: usize, max_bytes: usize) {
        while self.events.len() > 1 && (self.events.len() > max_events || self.bytes > max_bytes) {
            if let Some(event) = self.events.pop_front() {
                self.bytes = self.bytes.saturating_sub(weight(&event));
                self.first += 1;
            }
        }
    }

    /// Returns the event that says how the task ended, unless the node itself has said it.
    fn last_event(&self, task: TaskId, outcome: &Outcome, elapsed: Duration) -> Option<TaskEvent> {
        let last = self.events.back();
        let said = last
            .is_some_and(|event| matches!(event.kind, TaskEventKind::Finished { .. } | TaskEventKind::Failed { .. }));
        if said {
            return None;
        }
        let kind = match outcome {
            Ok(answer) => TaskEventKind::Finished { result: Box::new(TaskAnswer::clone(answer)) },
            Err(error) => TaskEventKind::Failed { error: error.clone() },
        };
        let at = last.map(|event| event.at).unwrap_or_default();
        Some(TaskEvent { task, index: self.next_index(), at, elapsed, kind })
    }
}

impl Record {
    fn summary(&self) -> TaskSummary {
        let ring = lock(&self.ring);
        let (state, elapsed) = match (&ring.recorded, &ring.outcome) {
            (Some(recorded), _) => (recorded.state(), recorded.took),
            (None, Some((Ok(_), took))) => (TaskState::Finished, *took),
            (None, Some((Err(_), took))) => (TaskState::Failed, *took),
            (None, None) => (TaskState::Running, self.started.elapsed()),
        };
        TaskSummary {
            id: self.task,
            state,
            meta: self.meta.clone(),
            created: self.created.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs(),
            elapsed_ms: u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
            events: ring.next_index(),
        }
    }
}

/// One stream's place.
struct Reader {
    record: Arc<Record>,
    changed: watch::Receiver<()>,
    next: u64,
}

impl Reader {
    async fn next(mut self) -> Option<(LogItem, Self)> {
        loop {
            // Seen before looking: what is pushed after the look wakes this reader again.
            self.changed.borrow_and_update();
            match self.look() {
                Look::Item(item) => return Some((item, self)),
                Look::End => return None,
                Look::Nothing => {}
            }
            if self.changed.changed().await.is_err() {
                return None;
            }
        }
    }

    fn look(&mut self) -> Look {
        let ring = lock(&self.record.ring);
        let first = ring.recorded.as_ref().map_or(ring.first, |recorded| recorded.index);
        if self.next < first {
            let from = mem::replace(&mut self.next, first);
            return Look::Item(LogItem::Missed { from, to: first - 1 });
        }
        if let Some(recorded) = &ring.recorded {
            let seen = self.next > recorded.index;
            self.next = recorded.index + 1;
            return if seen { Look::End } else { Look::Item(LogItem::Recorded(Arc::clone(recorded))) };
        }
        let at = usize::try_from(self.next - ring.first).unwrap_or(usize::MAX);
        match ring.events.get(at) {
            Some(event) => {
                self.next += 1;
                Look::Item(LogItem::Event(Arc::clone(event)))
            }
            None if ring.outcome.is_some() => Look::End,
            None => Look::Nothing,
        }
    }
}

enum Look {
    Item(LogItem),
    Nothing,
    End,
}

/// Returns about how many bytes an event takes.
fn weight(event: &TaskEvent) -> usize {
    let text = match &event.kind {
        TaskEventKind::Text { text, .. } => text.len(),
        TaskEventKind::SubtaskDone { result, .. } => result.len(),
        TaskEventKind::Planned { steps, .. } => steps.len() * 512,
        TaskEventKind::Finished { result } => {
            result.text.len() + result.answer.len() + result.chains.len() * 1024 + size_of::<TaskAnswer>()
        }
        _ => 64,
    };
    size_of::<TaskEvent>() + text
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
