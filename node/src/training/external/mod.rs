//! A trainer outside the node: any program that fetches a batch over the local API, learns, and brings the weights that came of it.
//!
//! ```text
//!  learner's thread ──offer(batch)──▶ Desk ◀──GET batch, weights──── a trainer outside
//!         ▲                            │  ◀──POST weights──────────┘
//!         └──────────Update────────────┘
//! ```
//!
//! Everything else stays as it is: the node examines rollouts before they are offered, holds the weights that it is given against held-out
//! tasks, writes the checkpoint, signs and publishes. A batch is offered until its weights are there, so a trainer that is killed
//! loses nothing but its own work. What an optimizer remembers is the outside trainer's affair; the node keeps weights.

mod columns;
mod weights;

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chorus_api::{BackendError, Bytes, Pieces, Rollouts, Update, Weights};
use chorus_rollout::buffer::Batch;
use chorus_trainer::policy::{self, Policy};
use chorus_trainer::train::{Learner, StepReport, Trajectory, advantages};
use futures::{StreamExt, stream};
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Notify, Semaphore};
use tokio::task::spawn_blocking;

use self::weights::Shapes;

/// The weights that the next batch updates, in the desk's directory.
const CURRENT: &str = "model.safetensors";
/// Weights that are on their way in.
const COMING: &str = "coming.safetensors";
/// What is read of a file at a time.
const PIECE_BYTES: usize = 256 << 10;

/// Where the learner's thread and the API meet.
pub(crate) struct Desk {
    /// The policy as the outside trainer sees it.
    directory: PathBuf,
    shapes: Shapes,
    state: Mutex<State>,
    offered: Notify,
    /// One set of weights comes in at a time.
    coming: Arc<Semaphore>,
}

struct State {
    /// The step of the weights that lie in the directory.
    step: u64,
    /// What waits for weights.
    batch: Option<Rollouts>,
    /// Whether somebody has fetched it.
    fetched: bool,
    /// The way to the learner's thread, until the room ends.
    updates: Option<SyncSender<Update>>,
}

/// The desk from the learner's side.
pub(super) struct Outside {
    desk: Arc<Desk>,
    updates: Receiver<Update>,
}

impl Outside {
    /// Opens a desk at which the policy that the learner has is trained.
    pub(super) fn open(directory: &Path, learner: &Learner) -> Result<Self, String> {
        let directory = directory.join("outside");
        let shapes = learner.policy().weights().iter();
        let shapes = shapes.map(|(name, weight)| (name.clone(), weight.dims().to_vec())).collect();
        let (sender, updates) = sync_channel(1);
        let state = State { step: 0, batch: None, fetched: false, updates: Some(sender) };
        let (offered, coming) = (Notify::new(), Arc::new(Semaphore::new(1)));
        let desk = Arc::new(Desk { directory, shapes, state: Mutex::new(state), offered, coming });
        desk.lay_out(learner.policy(), learner.steps())?;
        Ok(Self { desk, updates })
    }

    pub(super) fn desk(&self) -> Arc<Desk> {
        Arc::clone(&self.desk)
    }

    /// Waits until somebody outside has learned from the batch, and takes the weights over. Nothing when the room has ended.
    pub(super) fn learn(
        &self,
        learner: &mut Learner,
        batch: &Batch,
        groups: &[Vec<Trajectory>],
    ) -> Option<Result<StepReport, String>> {
        let step = learner.steps();
        let numbers: Vec<u64> = batch.groups.iter().map(|group| group.id.0).collect();
        let columns = match columns::encode(step, &numbers, groups) {
            Ok(columns) => Bytes::from(columns),
            Err(error) => return Some(Err(error.to_string())),
        };
        self.desk.offer(Rollouts { step, columns });
        let update = self.updates.recv().ok()?;
        let taken = policy::load(&self.desk.directory).and_then(|weights| learner.adopt(&weights));
        if let Err(error) = taken {
            let why = format!("the weights that came cannot be read: {error}; is the disk full?");
            return Some(self.desk.lay_out(learner.policy(), step).and(Err(why)));
        }
        Some(Ok(report(groups, update)))
    }
}

/// Returns what is known of an update that was made outside.
#[allow(clippy::cast_precision_loss, reason = "counts of rollouts are small")]
fn report(groups: &[Vec<Trajectory>], update: Update) -> StepReport {
    let all = || groups.iter().flatten();
    let count = all().count().max(1) as f32;
    let teaches = |group: &&Vec<Trajectory>| {
        let rewards: Vec<f32> = group.iter().map(|rollout| rollout.reward).collect();
        advantages(&rewards).iter().any(|advantage| advantage.abs() >= f32::EPSILON)
    };
    StepReport {
        reward: all().map(|rollout| rollout.reward).sum::<f32>() / count,
        useful: groups.iter().filter(teaches).count() as f32 / groups.len().max(1) as f32,
        lag: all().map(|rollout| rollout.lag as f32).sum::<f32>() / count,
        gradient: update.gradient,
        importance: update.importance,
        ..StepReport::default()
    }
}

impl Desk {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts the learner's weights into the directory.
    fn lay_out(&self, weights: &Policy, step: u64) -> Result<(), String> {
        let mut state = self.state();
        policy::save(weights, &self.directory).map_err(|error| format!("{}: {error}", self.directory.display()))?;
        state.step = step;
        Ok(())
    }

    fn offer(&self, batch: Rollouts) {
        let mut state = self.state();
        (state.batch, state.fetched) = (Some(batch), false);
        drop(state);
        self.offered.notify_waiters();
    }

    /// Ends what waits here. The learner's thread hears that nothing comes any more.
    pub(super) fn close(&self) {
        let mut state = self.state();
        (state.updates, state.batch) = (None, None);
        drop(state);
        self.offered.notify_waiters();
    }

    /// Returns what an outside trainer has to do next; nothing while it is not its turn.
    pub(super) fn waits_for(&self) -> Option<String> {
        let state = self.state();
        let step = state.batch.as_ref()?.step;
        Some(match state.fetched {
            true => format!("the trainer outside to bring the weights that come of the batch of step {step}"),
            false => format!("a trainer outside to fetch the batch of step {step}, with GET /v1/training/batch"),
        })
    }

    /// See [`chorus_api::Backend::batch`].
    pub(crate) async fn batch(&self, wait: Duration) -> Result<Option<Rollouts>, BackendError> {
        let mut late = std::pin::pin!(tokio::time::sleep(wait));
        loop {
            // Made before the look, so that what is offered right after it is not missed.
            let offered = self.offered.notified();
            {
                let mut state = self.state();
                if state.updates.is_none() {
                    return Err(BackendError::ShuttingDown);
                }
                if let Some(batch) = state.batch.clone() {
                    state.fetched = true;
                    return Ok(Some(batch));
                }
            }
            tokio::select! {
                () = offered => {}
                () = &mut late => return Ok(None),
            }
        }
    }

    /// See [`chorus_api::Backend::weights`].
    pub(crate) async fn weights(self: Arc<Self>) -> Result<Weights, BackendError> {
        // The file's name is given to other weights while this one is read, but never without its step.
        let open = move || {
            let state = self.state();
            let file = std::fs::File::open(self.directory.join(CURRENT))?;
            Ok::<_, std::io::Error>((state.step, file.metadata()?.len(), file))
        };
        let opened = spawn_blocking(open).await.map_err(failed)?;
        let (step, bytes, file) = opened.map_err(disk)?;
        let pieces = stream::try_unfold(File::from_std(file), |mut file| async move {
            let mut piece = vec![0; PIECE_BYTES];
            let read = file.read(&mut piece).await.map_err(disk)?;
            piece.truncate(read);
            Ok((read > 0).then(|| (Bytes::from(piece), file)))
        });
        Ok(Weights { step, bytes, pieces: pieces.boxed() })
    }

    /// See [`chorus_api::Backend::learned`].
    pub(crate) async fn learned(self: Arc<Self>, update: Update, pieces: Pieces) -> Result<u64, BackendError> {
        let full = |_| BackendError::Overloaded { what: "the desk for weights".to_owned(), limit: 1 };
        let place = Arc::clone(&self.coming).try_acquire_owned().map_err(full)?;
        self.expects(&self.state(), update.step)?;
        self.write(pieces).await?;
        let take = move || {
            let _place = place;
            self.take(update)
        };
        spawn_blocking(take).await.map_err(failed)?
    }

    fn expects(&self, state: &State, given: u64) -> Result<(), BackendError> {
        let expected = state.batch.as_ref().map(|batch| batch.step);
        if expected == Some(given) { Ok(()) } else { Err(BackendError::OtherStep { given, expected }) }
    }

    async fn write(&self, mut pieces: Pieces) -> Result<(), BackendError> {
        let path = self.directory.join(COMING);
        // A new file, since a write of a request that was broken off may still be under way in the old one.
        match tokio::fs::remove_file(&path).await {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(disk(error)),
            _ => {}
        }
        let mut file = File::create(&path).await.map_err(disk)?;
        while let Some(piece) = pieces.next().await {
            file.write_all(&piece?).await.map_err(disk)?;
        }
        file.flush().await.map_err(disk)
    }

    /// Examines the weights that came, and hands them to the learner's thread.
    fn take(&self, update: Update) -> Result<u64, BackendError> {
        let coming = self.directory.join(COMING);
        weights::check(&coming, &self.shapes)
            .map_err(|error| BackendError::InvalidRequest { param: None, reason: error.to_string() })?;
        let mut state = self.state();
        self.expects(&state, update.step)?;
        std::fs::rename(&coming, self.directory.join(CURRENT)).map_err(disk)?;
        let sent = state.updates.as_ref().is_some_and(|updates| updates.try_send(update).is_ok());
        if !sent {
            return Err(BackendError::ShuttingDown);
        }
        (state.batch, state.step) = (None, update.step + 1);
        Ok(state.step)
    }
}

#[allow(clippy::needless_pass_by_value, reason = "it is given to map_err")]
fn disk(error: std::io::Error) -> BackendError {
    BackendError::Disk { reason: format!("{error}; see that the disk has room, and send it again") }
}

#[allow(clippy::needless_pass_by_value, reason = "it is given to map_err")]
fn failed(error: tokio::task::JoinError) -> BackendError {
    BackendError::Engine { reason: error.to_string(), retryable: true }
}

#[cfg(test)]
mod tests;
