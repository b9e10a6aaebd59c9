//! Keeps a loaded model alive: notices a dead engine thread, restarts it, checks that it works.
//!
//! ```text
//!             crash seen by a request                  checked with one token
//!   Ready ────────────────────────────▶ Restarting ───────────────────────────▶ Ready
//!                                        │  1. first crash in a while: a new thread over the
//!                                        │     weights that are in memory (milliseconds)
//!                                        └─ 2. otherwise, or if 1 fails: load again, with back-off
//! ```
//!
//! Requests that arrive while the engine restarts wait for it within a limit; the ones that it held
//! have failed with [`EngineError::Crashed`], so that their callers can ask another node at once.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use mistralrs::{Constraint, NormalRequest, Request, RequestMessage, Response, SamplingParams};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    EngineError, ModelInfo, ModelSource,
    loader::{self, LoadSpec, Loaded},
    source::{self, Inspection},
};

/// Crashes within this time of each other count as one series.
const CRASH_WINDOW: Duration = Duration::from_secs(60);
/// Wait before the second restart of a series; doubles with each further one.
const FIRST_BACK_OFF: Duration = Duration::from_millis(200);
const MAX_BACK_OFF: Duration = Duration::from_secs(30);
/// Crashes remembered: enough to reach the longest back-off.
const MAX_CRASHES: usize = 16;
/// How long a new engine thread may take to appear, and to make its first token.
const REVIVE_LIMIT: Duration = Duration::from_secs(2);
const PROBE_LIMIT: Duration = Duration::from_secs(10);
const REVIVE_POLL: Duration = Duration::from_millis(2);
const PROBE_TEXT: &str = "hello";

/// A loaded model and what is known about it.
pub(crate) struct Live {
    pub(crate) loaded: Loaded,
    pub(crate) info: ModelInfo,
    /// Of the weights' files.
    hash: [u8; 32],
    pub(crate) end_token: Option<u32>,
    pub(crate) has_chat_template: bool,
}

impl Live {
    async fn open(spec: &OpenSpec) -> Result<Self, EngineError> {
        let source = spec.load.source.clone();
        // The files are hashed while they are loaded: both read them once, from the page cache.
        let hub = matches!(source, ModelSource::Hub(_));
        let (loaded, inspected) = if hub {
            let loaded = loader::load(&spec.load).await?;
            (loaded, inspect_and_hash(source).await?)
        } else {
            inspect(source.clone()).await?;
            tokio::try_join!(loader::load(&spec.load), inspect_and_hash(source))?
        };
        let (inspection, hash) = inspected;
        let context = match spec.context {
            Some(context) => context.min(loaded.context),
            None => loaded.context,
        };
        let info = ModelInfo {
            name: spec.name.clone(),
            fingerprint: spec.fingerprint.unwrap_or(hash),
            context,
            quantisation: inspection.quantisation,
            architecture: inspection.architecture,
            bytes: inspection.bytes,
        };
        let Inspection { end_token, has_chat_template, .. } = inspection;
        Ok(Self { loaded, info, hash, end_token, has_chat_template })
    }

    /// Loads the model again; it must be the same one, because what is known of it was told to others.
    async fn reopen(spec: &OpenSpec, hash: [u8; 32]) -> Result<Self, EngineError> {
        let live = Self::open(spec).await?;
        if live.hash != hash {
            let reason = "its files are not those that were loaded before".to_owned();
            return Err(EngineError::ModelCorrupt { path: spec.load.source.path(), reason });
        }
        live.probe().await?;
        Ok(live)
    }

    /// Tells whether the engine thread is gone.
    pub(crate) fn is_dead(&self) -> bool {
        self.loaded.requests.is_closed()
    }

    /// Starts a new engine thread over the same weights.
    async fn revive(&self) -> Result<Self, EngineError> {
        let model = Arc::clone(&self.loaded.model);
        // mistral.rs starts a new thread when it is asked for a dead one's sender, but takes a dying
        // one for alive until it is quite gone.
        let reviving = tokio::task::spawn_blocking(move || {
            let start = Instant::now();
            while start.elapsed() < REVIVE_LIMIT {
                match model.inner().get_sender(None) {
                    Ok(sender) if !sender.is_closed() => return Ok(sender),
                    Ok(_) => std::thread::sleep(REVIVE_POLL),
                    Err(error) => return Err(error.to_string()),
                }
            }
            Err("the old engine thread does not end".to_owned())
        });
        let crashed = |detail: String| EngineError::Crashed { detail };
        let requests = reviving.await.map_err(|e| crashed(e.to_string()))?.map_err(crashed)?;
        let Loaded { model, context, on_cpu, .. } = &self.loaded;
        let loaded = Loaded { model: Arc::clone(model), requests, context: *context, on_cpu: *on_cpu };
        Ok(Self {
            loaded,
            info: self.info.clone(),
            hash: self.hash,
            end_token: self.end_token,
            has_chat_template: self.has_chat_template,
        })
    }

    /// Generates one token.
    async fn probe(&self) -> Result<(), EngineError> {
        let (response, mut answers) = mpsc::channel(4);
        let request = NormalRequest {
            constraint: Constraint::None,
            ..NormalRequest::new_simple(
                RequestMessage::Completion { text: PROBE_TEXT.to_owned(), echo_prompt: false, best_of: None },
                SamplingParams { max_len: Some(1), ..SamplingParams::deterministic() },
                response,
                0,
                None,
                None,
            )
        };
        let crashed = |detail: &str| EngineError::Crashed { detail: detail.to_owned() };
        let sent = self.loaded.requests.send(Request::Normal(Box::new(request))).await;
        sent.map_err(|_| crashed("the new engine thread takes no requests"))?;
        match tokio::time::timeout(PROBE_LIMIT, answers.recv()).await {
            Ok(Some(Response::CompletionDone(_))) => Ok(()),
            Ok(_) => Err(crashed("the new engine thread cannot generate")),
            Err(_) => Err(EngineError::Timeout { what: "the restarted engine", limit: PROBE_LIMIT }),
        }
    }
}

async fn inspect(source: ModelSource) -> Result<Inspection, EngineError> {
    blocking(move || source::inspect(&source)).await
}

async fn inspect_and_hash(source: ModelSource) -> Result<(Inspection, [u8; 32]), EngineError> {
    blocking(move || {
        let inspection = source::inspect(&source)?;
        let fingerprint = source::fingerprint(&inspection.weights)?;
        Ok((inspection, fingerprint))
    })
    .await
}

pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, EngineError> + Send + 'static,
) -> Result<T, EngineError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(EngineError::Crashed { detail: error.to_string() }))
}

/// Everything needed to open the model, again if need be.
#[derive(Debug, Clone)]
pub(crate) struct OpenSpec {
    pub(crate) load: LoadSpec,
    pub(crate) name: String,
    /// What the model is known by, if not by the hash of its weights.
    pub(crate) fingerprint: Option<[u8; 32]>,
    pub(crate) context: Option<u32>,
    /// How long a request waits for a restarting engine.
    pub(crate) restart_wait: Duration,
}

#[derive(Clone)]
enum Health {
    Ready(Arc<Live>),
    Restarting { reason: Arc<str> },
}

/// Owns the loaded model and replaces it when it dies.
pub(crate) struct Supervisor {
    spec: OpenSpec,
    health: watch::Sender<Health>,
    crashes: Mutex<VecDeque<Instant>>,
    restarts: AtomicU64,
    closed: CancellationToken,
}

impl Supervisor {
    /// Loads the model.
    pub(crate) async fn open(spec: OpenSpec) -> Result<Arc<Self>, EngineError> {
        let live = Arc::new(Live::open(&spec).await?);
        Ok(Arc::new(Self {
            spec,
            health: watch::Sender::new(Health::Ready(live)),
            crashes: Mutex::default(),
            restarts: AtomicU64::new(0),
            closed: CancellationToken::new(),
        }))
    }

    /// Ends any restart; nothing is started after this.
    pub(crate) fn close(&self) {
        self.closed.cancel();
    }

    pub(crate) fn restarts(&self) -> u64 {
        self.restarts.load(Ordering::Relaxed)
    }

    /// Returns the model, waiting for a restart that is under way.
    pub(crate) async fn live(&self) -> Result<Arc<Live>, EngineError> {
        let mut health = self.health.subscribe();
        let ready = health.wait_for(|health| matches!(health, Health::Ready(_)));
        if let Ok(Ok(ready)) = tokio::time::timeout(self.spec.restart_wait, ready).await
            && let Health::Ready(live) = &*ready
        {
            return Ok(Arc::clone(live));
        }
        let detail = match &*self.health.borrow() {
            Health::Restarting { reason } => reason.to_string(),
            Health::Ready(_) => "it restarted a moment ago".to_owned(),
        };
        Err(EngineError::Crashed { detail })
    }

    /// Says that `failed` is dead. Only the first to say so starts the restart.
    pub(crate) fn crashed(self: &Arc<Self>, failed: &Arc<Live>, reason: &str) {
        let first = self.health.send_if_modified(|health| match health {
            Health::Ready(live) if Arc::ptr_eq(live, failed) => {
                *health = Health::Restarting { reason: reason.into() };
                true
            }
            _ => false,
        });
        if first && !self.closed.is_cancelled() {
            tracing::error!(model = %self.spec.name, reason, "the engine crashed; restarting it");
            let supervisor = Arc::clone(self);
            let failed = Arc::clone(failed);
            tokio::spawn(async move {
                let closed = supervisor.closed.clone();
                tokio::select! {
                    () = closed.cancelled() => {}
                    () = supervisor.restart(failed) => {}
                }
            });
        }
    }

    async fn restart(self: Arc<Self>, failed: Arc<Live>) {
        let started = Instant::now();
        let mut crashes = self.note_crash();
        if crashes == 1 {
            match failed.revive().await {
                Ok(live) => match live.probe().await {
                    Ok(()) => return self.ready(live, started),
                    Err(error) => tracing::warn!(%error, "a new engine thread did not help"),
                },
                Err(error) => tracing::warn!(%error, "no new engine thread"),
            }
        }
        let hash = failed.hash;
        // Free the weights before they are loaded again.
        drop(failed);
        loop {
            tokio::time::sleep(back_off(crashes)).await;
            match Live::reopen(&self.spec, hash).await {
                Ok(live) => return self.ready(live, started),
                Err(error) => {
                    tracing::error!(%error, "the engine did not come back");
                    let reason = error.to_string().into();
                    self.health.send_replace(Health::Restarting { reason });
                    crashes += 1;
                }
            }
        }
    }

    fn ready(&self, live: Live, started: Instant) {
        self.restarts.fetch_add(1, Ordering::Relaxed);
        tracing::info!(model = %self.spec.name, took = ?started.elapsed(), "the engine is back");
        self.health.send_replace(Health::Ready(Arc::new(live)));
    }

    /// Notes a crash and returns how many there were lately, this one included.
    fn note_crash(&self) -> usize {
        let now = Instant::now();
        let mut crashes = self.crashes.lock().unwrap_or_else(PoisonError::into_inner);
        while crashes.front().is_some_and(|&at| now - at > CRASH_WINDOW) || crashes.len() >= MAX_CRASHES {
            crashes.pop_front();
        }
        crashes.push_back(now);
        crashes.len()
    }
}

/// Returns the wait before the restart that follows the `crashes`-th crash of a series.
fn back_off(crashes: usize) -> Duration {
    match u32::try_from(crashes.saturating_sub(2)) {
        _ if crashes <= 1 => Duration::ZERO,
        Ok(doublings) => FIRST_BACK_OFF.saturating_mul(1 << doublings.min(10)).min(MAX_BACK_OFF),
        Err(_) => MAX_BACK_OFF,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn back_off_grows_from_nothing_to_its_limit() {
        assert_eq!(back_off(1), Duration::ZERO);
        assert_eq!(back_off(2), FIRST_BACK_OFF);
        assert_eq!(back_off(4), FIRST_BACK_OFF * 4);
        assert_eq!(back_off(100), MAX_BACK_OFF);
    }
}
