//! What every route shares: the backend, the limits, and the few ways to wait, each with a deadline.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::extract::Request;
use bytes::Bytes;
use chorus_core::{Strategy, TaskSpec};
use chorus_protocol::TaskId;
use futures::StreamExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::backend::Backend;
use crate::config::ApiConfig;
use crate::error::{BackendError, Fault};
use crate::guard;
use crate::journal::Journal;
use crate::observe::HttpMetrics;
use crate::task_log::{TaskMeta, TaskStream};

/// How long a piece of work that was taken back may take to notice.
pub(crate) const CANCEL_GRACE: Duration = Duration::from_secs(5);

/// The state of every handler.
pub(crate) type App = Arc<Shared>;

/// See [`App`].
pub(crate) struct Shared {
    pub cfg: ApiConfig,
    pub backend: Arc<dyn Backend>,
    pub shutdown: CancellationToken,
    pub metrics: HttpMetrics,
    pub journal: Journal,
    /// When the API was started, in seconds since the Unix epoch.
    pub started: u64,
    generations: Arc<Semaphore>,
    streams: Arc<Semaphore>,
}

impl Shared {
    pub(crate) fn new(cfg: ApiConfig, backend: Arc<dyn Backend>, shutdown: CancellationToken) -> Self {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self {
            generations: Arc::new(Semaphore::new(cfg.max_generations)),
            streams: Arc::new(Semaphore::new(cfg.max_streams)),
            metrics: HttpMetrics::default(),
            journal: Journal::default(),
            started: since.as_secs(),
            cfg,
            backend,
            shutdown,
        }
    }

    /// Takes one of the places for work that generates.
    pub(crate) fn generation(&self) -> Result<OwnedSemaphorePermit, Fault> {
        place(&self.generations, "the list of completions under way", self.cfg.max_generations)
    }

    /// Takes one of the places for event streams.
    pub(crate) fn stream(&self) -> Result<OwnedSemaphorePermit, Fault> {
        place(&self.streams, "the list of event streams", self.cfg.max_streams)
    }
}

fn place(places: &Arc<Semaphore>, what: &str, limit: usize) -> Result<OwnedSemaphorePermit, Fault> {
    let full = |_| BackendError::Overloaded { what: what.to_owned(), limit };
    Arc::clone(places).try_acquire_owned().map_err(full).map_err(Fault::from)
}

/// Waits for the backend, for as long as it may take.
pub(crate) async fn within<T>(
    limit: Duration,
    what: &str,
    work: impl Future<Output = Result<T, BackendError>>,
) -> Result<T, Fault> {
    match timeout(limit, work).await {
        Ok(done) => done.map_err(Fault::from),
        Err(_) => Err(Fault::timeout(what, limit)),
    }
}

/// Reads a request's body, up to its largest size and for as long as it may take.
pub(crate) async fn read_body(app: &Shared, request: Request) -> Result<Bytes, Fault> {
    let limit = app.cfg.max_body_bytes;
    let read = async {
        let mut body = Vec::new();
        let mut pieces = request.into_body().into_data_stream();
        while let Some(piece) = pieces.next().await {
            let piece = piece.map_err(|error| {
                let reason = format!("the body broke off: {error}; send the request again");
                Fault::from(BackendError::InvalidRequest { param: None, reason })
            })?;
            if body.len() + piece.len() > limit {
                return Err(guard::too_large(limit));
            }
            body.extend_from_slice(&piece);
        }
        Ok(Bytes::from(body))
    };
    let time = app.cfg.body_timeout;
    timeout(time, read).await.map_err(|_| {
        let message = format!("the body did not come within {time:?}; send it faster, or in smaller requests");
        Fault::new(axum::http::StatusCode::REQUEST_TIMEOUT, "body_timeout", message)
    })?
}

/// Returns what the log keeps of a task's question.
pub(crate) fn meta(spec: &TaskSpec) -> TaskMeta {
    let strategy = match spec.strategy {
        Strategy::Chains { planners } => format!("chains of {planners} planners"),
        strategy => strategy.name().to_owned(),
    };
    TaskMeta { question: spec.question.clone(), strategy }
}

/// Opens a task in the log, hands it to the swarm, and returns its events from the first one on.
pub(crate) async fn open_task(app: &Shared, spec: TaskSpec) -> Result<TaskStream, Fault> {
    let task = spec.task;
    let log = app.backend.tasks();
    log.open(task, meta(&spec)).map_err(|full| BackendError::Overloaded {
        what: "the list of tasks under way".to_owned(),
        limit: full.limit,
    })?;
    let events = log.subscribe(task, 0).ok_or(BackendError::TaskNotFound { task })?;
    if let Err(fault) = within(app.cfg.request_timeout, "handing the task to the node", app.backend.ask(spec)).await {
        log.discard(task);
        return Err(fault);
    }
    tracing::info!(%task, "a task was taken");
    Ok(events)
}

/// Takes a task back that nobody waits for any more.
pub(crate) async fn cancel_task(app: &Shared, task: TaskId) {
    if let Err(fault) = within(CANCEL_GRACE, "taking the task back", app.backend.cancel(task)).await {
        tracing::warn!(%task, ?fault, "a task was not taken back; it ends at its deadline");
    }
}
