//! One policy's versions, one of which serves.
//!
//! A policy under training gets new weights every few seconds, and nobody who asks it anything should notice but by the
//! version that is named in the answer.
//!
//! ```text
//!              load(v+1): check every weight and token id ─▶ open ─▶ probe ─▶ room? ─┐
//!                                                                                    ▼
//!  sample ─▶ queue ─▶ slot ─▶ the version that serves now ─▶ v ──────────────▶ swap: v+1 serves
//!                                    │                       │ requests that run finish on v
//!                                    └── counted on (Arc) ───┘ its engine goes with the last of them
//! ```
//!
//! What it promises:
//!
//! 1. *Whole.* A request runs on one version from its first token to its last, and its answer names that version. It is
//!    chosen when the request has its slot, not when it joins the queue: nobody waits for weights that are out of date.
//! 2. *Sound.* A version serves only after every weight was seen to be a finite number, every token of its tokenizer to
//!    have a row, and one token to come out of it. On any error the version that served serves on.
//! 3. *Forward.* An older step does not replace a newer one, in whatever order loads end, unless it is asked for exactly.
//! 4. *Bounded.* One version loads at a time. At most [`MAX_RETIRED`] versions that serve no more are in memory; a swap
//!    that would make it more waits for the oldest one's requests to end.
//!
//! The queue and its slots are shared by all versions: a CPU that computes two versions at once is not faster, and the
//! order of requests stays what it was across a swap.
//!
//! What it does not do: fetch weights, or check signatures and hashes. Whoever calls [`VersionedEngine::load`] has admitted
//! the version's manifest and has every chunk of it on disk.

mod fit;
#[cfg(test)]
mod tests;

use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
    sync::{
        Arc, OnceLock, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use chorus_protocol::policy::Version;
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use crate::{
    Calibration, Chunk, Engine, EngineError, Finish, GenerateRequest, Generated, Load, MistralConfig, MistralEngine,
    ModelInfo, ModelSource, Sampling,
    admission::Admission,
    prompt::{check_request, check_sampling},
    supervisor::blocking,
};

/// Versions that serve no more and still have requests.
pub const MAX_RETIRED: usize = 2;
/// How long a new version's first token may take.
const PROBE_LIMIT: Duration = Duration::from_secs(60);
/// Token ids that a new version is asked to continue, spread over its vocabulary.
const PROBE_TOKENS: u32 = 8;

/// How to serve a policy.
#[derive(Debug, Clone)]
pub struct VersionedConfig {
    /// The name that the policy is asked for by.
    pub name: String,
    /// Tokens of prompt and answer together; by default, and at most, what the policy was made for.
    pub context: Option<u32>,
    /// Most requests that run at once on a GPU; on a CPU one does.
    pub max_concurrent: usize,
    /// Most requests that wait, whatever version will serve them.
    pub max_queued: usize,
    /// Use the CPU even if built for a GPU.
    pub force_cpu: bool,
    /// How long a request waits for an engine that is being restarted.
    pub restart_wait: Duration,
    /// How long a swap waits for the oldest retired version's requests when [`MAX_RETIRED`] have some.
    pub retire_wait: Duration,
}

impl VersionedConfig {
    /// Returns the default configuration for a policy of this name.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            context: None,
            max_concurrent: 4,
            max_queued: 64,
            force_cpu: false,
            restart_wait: Duration::from_secs(10),
            retire_wait: Duration::from_secs(30),
        }
    }
}

/// Which version may take another's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// One whose step is not older.
    Forward,
    /// This one, whatever serves: a trainer that lost its last steps goes back.
    Exactly,
}

/// A version that serves, and what it took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Swap {
    /// The version that serves now.
    pub version: Version,
    /// Updates of the weights up to it.
    pub step: u64,
    /// The version that served before, and its step; `None` if there was none, or if it was this one already.
    pub replaced: Option<(Version, u64)>,
    /// Waiting for loads that were asked for before.
    pub queued: Duration,
    /// Checking the files and loading them.
    pub loaded_in: Duration,
    /// Making one token.
    pub probed_in: Duration,
    /// Waiting for a retired version's requests to end.
    pub waited: Duration,
}

impl Swap {
    /// Returns how long it took from the call on.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.queued + self.loaded_in + self.probed_in + self.waited
    }
}

/// A request for tokens that follow others.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleRequest {
    /// Token ids, without a chat template; at least one.
    pub prompt: Vec<u32>,
    /// Most tokens to draw; the context's end comes first if it is nearer.
    pub max_tokens: u32,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Refuse unless this version serves.
    pub exactly: Option<Version>,
}

/// Tokens that one version drew.
#[derive(Debug, Clone, PartialEq)]
pub struct SampledRollout {
    /// Token ids; the end token is the last one if it came.
    pub tokens: Vec<u32>,
    /// Natural logarithm of each token's probability under that version at temperature 1, over the whole vocabulary.
    pub logprobs: Vec<f32>,
    /// Why it ended: the end token, or the length.
    pub finish: Finish,
    /// What produced every token of it.
    pub version: Version,
    /// Updates of the weights up to that version.
    pub step: u64,
}

/// A version in memory. Requests hold it while they run.
struct Served {
    engine: MistralEngine,
    version: Version,
    step: u64,
    /// Token ids below this one exist.
    vocabulary: u32,
    /// Tells whoever waits for it that its last request has ended.
    gone: CancellationToken,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.gone.cancel();
    }
}

/// Serves one policy: always whole versions, one after the other.
pub struct VersionedEngine {
    config: VersionedConfig,
    /// Known with the first version, which shows whether it runs on a GPU.
    admission: OnceLock<Admission>,
    serving: RwLock<Option<Arc<Served>>>,
    /// What tells that a retired version is gone, oldest first. Whoever loads holds the lock.
    retired: Mutex<VecDeque<CancellationToken>>,
    /// Restarts of the versions that serve no more.
    restarts_before: AtomicU64,
}

impl std::fmt::Debug for VersionedEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VersionedEngine")
            .field("name", &self.config.name)
            .field("serving", &self.serving())
            .finish_non_exhaustive()
    }
}

impl VersionedEngine {
    /// Returns an engine that serves nothing yet.
    #[must_use]
    pub fn new(config: VersionedConfig) -> Self {
        Self {
            config,
            admission: OnceLock::new(),
            serving: RwLock::default(),
            retired: Mutex::default(),
            restarts_before: AtomicU64::new(0),
        }
    }

    /// Returns the version that serves, and its step.
    #[must_use]
    pub fn serving(&self) -> Option<(Version, u64)> {
        self.current().map(|served| (served.version, served.step))
    }

    /// Loads a version beside the one that serves, checks it, and switches to it.
    ///
    /// `directory` is in Hugging Face layout and must not change while the version serves: after a crash it is read again.
    /// Dropping the future before the switch leaves everything as it was.
    ///
    /// # Errors
    ///
    /// In all cases the version that served serves on. [`EngineError::ModelNotFound`] and [`EngineError::ModelCorrupt`]
    /// say what is wrong with the files; [`EngineError::OlderVersion`] that a newer step serves;
    /// [`EngineError::Timeout`] that the oldest retired version still has requests.
    pub async fn load(&self, version: Version, step: u64, directory: &Path, order: Order) -> Result<Swap, EngineError> {
        let asked = Instant::now();
        let mut retired = self.retired.lock().await;
        let queued = asked.elapsed();
        let nothing = Duration::ZERO;
        if let Some((serving, newest)) = self.serving() {
            if serving == version {
                let (loaded_in, probed_in, waited) = (nothing, nothing, nothing);
                return Ok(Swap { version, step: newest, replaced: None, queued, loaded_in, probed_in, waited });
            }
            if order == Order::Forward && step < newest {
                return Err(EngineError::OlderVersion { step, serving: newest });
            }
        }
        let started = Instant::now();
        let served = self.open(version, step, directory.to_owned()).await?;
        let loaded_in = started.elapsed();
        let probing = Instant::now();
        served.probe(directory).await?;
        let probed_in = probing.elapsed();
        let waiting = Instant::now();
        make_room(&mut retired, self.config.retire_wait).await?;
        let waited = waiting.elapsed();
        let replaced = self.switch(served, &mut retired);
        let swap = Swap { version, step, replaced, queued, loaded_in, probed_in, waited };
        tracing::info!(policy = %self.config.name, version = %version.fmt_short(), step, took = ?swap.total(), "a new version serves");
        Ok(swap)
    }

    /// Draws tokens with the version that serves when the request has its slot.
    ///
    /// # Errors
    ///
    /// [`EngineError::NothingServes`] before the first version, [`EngineError::OtherVersion`] if the request names another
    /// one than serves, [`EngineError::Cancelled`] if cancelled before the last token, and any of a generation.
    pub async fn sample(
        &self,
        request: SampleRequest,
        cancel: CancellationToken,
    ) -> Result<SampledRollout, EngineError> {
        check_sampling(&request.sampling, request.max_tokens)?;
        let (served, slot) = self.bind(request.exactly, &cancel).await?;
        served.check_tokens("prompt", &request.prompt)?;
        let SampleRequest { prompt, max_tokens, sampling, .. } = request;
        let ran = served.engine.sample(prompt, max_tokens, sampling, slot, &cancel).await?;
        if ran.finish == Finish::Cancelled {
            return Err(EngineError::Cancelled);
        }
        let (tokens, logprobs) = ran.sampled.iter().map(|sampled| (sampled.token, sampled.logprob)).unzip();
        Ok(SampledRollout { tokens, logprobs, finish: ran.finish, version: served.version, step: served.step })
    }

    /// Returns the natural-log probability of each of `tokens` after `prompt` at temperature 1, and the version that
    /// gives it: to verify what another node says it sampled. It takes as long as sampling them.
    ///
    /// # Errors
    ///
    /// As [`Self::sample`]; [`EngineError::InvalidRequest`] if an end token is followed by others.
    pub async fn score(
        &self,
        prompt: Vec<u32>,
        tokens: &[u32],
        exactly: Option<Version>,
        cancel: CancellationToken,
    ) -> Result<(Vec<f32>, Version), EngineError> {
        let (served, slot) = self.bind(exactly, &cancel).await?;
        served.check_tokens("prompt", &prompt)?;
        served.check_tokens("completion", tokens)?;
        let logprobs = served.engine.score_tokens(prompt, tokens, slot, &cancel).await?;
        Ok((logprobs, served.version))
    }

    /// Waits in the queue for a slot, and takes the version that serves then.
    async fn bind(
        &self,
        exactly: Option<Version>,
        cancel: &CancellationToken,
    ) -> Result<(Arc<Served>, OwnedSemaphorePermit), EngineError> {
        let admission = self.admission.get().ok_or_else(|| self.nothing_serves())?;
        // Refused at once rather than after the queue, though it may also be swapped away meanwhile.
        self.wanted(exactly)?;
        let slot = admission.enter()?.slot(cancel).await?;
        Ok((self.wanted(exactly)?, slot))
    }

    fn wanted(&self, exactly: Option<Version>) -> Result<Arc<Served>, EngineError> {
        let served = self.current().ok_or_else(|| self.nothing_serves())?;
        match exactly {
            Some(wanted) if wanted != served.version => {
                Err(EngineError::OtherVersion { wanted, serving: served.version })
            }
            _ => Ok(served),
        }
    }

    fn current(&self) -> Option<Arc<Served>> {
        self.serving.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn nothing_serves(&self) -> EngineError {
        EngineError::NothingServes { model: self.config.name.clone() }
    }

    /// Checks a version's files while they are loaded; both read them once.
    async fn open(&self, version: Version, step: u64, directory: PathBuf) -> Result<Served, EngineError> {
        let VersionedConfig { name, context, max_concurrent, max_queued, force_cpu, restart_wait, .. } =
            self.config.clone();
        let config = MistralConfig {
            name: Some(name),
            fingerprint: Some(*version.as_hash().as_bytes()),
            context,
            max_concurrent,
            max_queued,
            force_cpu,
            restart_wait,
            ..MistralConfig::new(ModelSource::Directory(directory.clone()))
        };
        let checking = blocking(move || fit::check(&directory));
        let (vocabulary, engine) = tokio::try_join!(checking, MistralEngine::open_sharing(config, &self.admission))?;
        Ok(Served { engine, version, step, vocabulary, gone: CancellationToken::new() })
    }

    /// Makes a version the one that serves, and returns which one did.
    fn switch(&self, served: Served, retired: &mut VecDeque<CancellationToken>) -> Option<(Version, u64)> {
        let before = {
            let mut serving = self.serving.write().unwrap_or_else(PoisonError::into_inner);
            serving.replace(Arc::new(served))?
        };
        retired.push_back(before.gone.clone());
        self.restarts_before.fetch_add(before.engine.load().restarts, Ordering::Relaxed);
        Some((before.version, before.step))
    }
}

impl Served {
    /// Makes one token; logits that are no numbers are an error.
    async fn probe(&self, directory: &Path) -> Result<(), EngineError> {
        let last = self.vocabulary.saturating_sub(1);
        let context = self.engine.info().first().map_or(1, |info| info.context);
        let length = PROBE_TOKENS.min(context.saturating_sub(1)).max(1);
        let prompt = (0..length).map(|index| last / length * index).collect();
        // Nobody else knows this engine yet, so its one slot is free.
        let slot = Arc::new(Semaphore::new(1)).acquire_owned().await;
        let slot = slot.expect("the semaphore is never closed");
        let cancel = CancellationToken::new();
        let probing = self.engine.sample(prompt, 1, Sampling::greedy(), slot, &cancel);
        match tokio::time::timeout(PROBE_LIMIT, probing).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(EngineError::Inference { detail })) => {
                Err(EngineError::ModelCorrupt { path: directory.to_owned(), reason: detail })
            }
            Ok(Err(error)) => Err(error),
            Err(_) => Err(EngineError::Timeout { what: "a new version's first token", limit: PROBE_LIMIT }),
        }
    }

    fn check_tokens(&self, what: &str, tokens: &[u32]) -> Result<(), EngineError> {
        let reason = match tokens.iter().find(|&&token| token >= self.vocabulary) {
            Some(token) => format!("the {what}'s token {token} is beyond the vocabulary of {}", self.vocabulary),
            None if tokens.is_empty() => format!("the {what} has no tokens"),
            None => return Ok(()),
        };
        Err(EngineError::InvalidRequest { reason })
    }
}

/// Waits until one more version may retire.
async fn make_room(retired: &mut VecDeque<CancellationToken>, limit: Duration) -> Result<(), EngineError> {
    retired.retain(|gone| !gone.is_cancelled());
    while let Some(oldest) = retired.front()
        && retired.len() >= MAX_RETIRED
    {
        let what = "the last request of a retired version";
        tokio::time::timeout(limit, oldest.cancelled()).await.map_err(|_| EngineError::Timeout { what, limit })?;
        retired.pop_front();
    }
    Ok(())
}

#[async_trait]
impl Engine for VersionedEngine {
    /// Returns the version that serves, its hash being the fingerprint; nothing before the first one.
    fn info(&self) -> Vec<ModelInfo> {
        self.current().map(|served| served.engine.info()).unwrap_or_default()
    }

    fn load(&self) -> Load {
        let restarts = self.restarts_before.load(Ordering::Relaxed);
        let Some(served) = self.current() else {
            return Load { running: 0, queued: 0, max_running: 0, max_queued: self.config.max_queued, restarts };
        };
        let load = served.engine.load();
        Load { restarts: restarts + load.restarts, ..load }
    }

    async fn generate(
        &self,
        request: GenerateRequest,
        tokens: mpsc::Sender<Chunk>,
        cancel: CancellationToken,
    ) -> Result<Generated, EngineError> {
        check_request(&request)?;
        let (served, slot) = self.bind(None, &cancel).await?;
        served.engine.generate_in(slot, request, tokens, &cancel).await
    }

    async fn calibrate(&self) -> Result<Calibration, EngineError> {
        self.wanted(None)?.engine.calibrate().await
    }
}
