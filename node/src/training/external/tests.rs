//! The desk, with a policy of the real kind and nobody in between.
#![allow(clippy::unwrap_used)]

use chorus_protocol::Text;
use chorus_protocol::rollout::GroupId;
use chorus_rollout::buffer::BatchGroup;
use chorus_trainer::policy::PolicyConfig;
use chorus_trainer::train::LearnerConfig;
use futures::TryStreamExt;

use super::*;

const SOON: Duration = Duration::from_secs(5);

fn learner(seed: u64) -> Learner {
    Learner::new(Policy::random(PolicyConfig::tiny(1, 32), seed).unwrap(), LearnerConfig::default())
}

fn batch() -> (Batch, Vec<Vec<Trajectory>>) {
    let group = BatchGroup { id: GroupId(9), environment: Text::new("x").unwrap(), seed: 0, rollouts: Vec::new() };
    let rollout = |reward| Trajectory { prompt: vec![49], tokens: vec![50], logprobs: vec![-1.0], reward, lag: 1 };
    (Batch { step: 0, groups: vec![group] }, vec![vec![rollout(0.0), rollout(1.0)]])
}

/// What a trainer outside would send: the weights of another policy of the same shape.
fn others(directory: &Path) -> Vec<u8> {
    policy::save(learner(2).policy(), directory).unwrap();
    std::fs::read(directory.join(CURRENT)).unwrap()
}

fn in_pieces(bytes: &[u8]) -> Pieces {
    let pieces: Vec<_> = bytes.chunks(1_000).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
    stream::iter(pieces).boxed()
}

async fn read(weights: Weights) -> Vec<u8> {
    let pieces: Vec<Bytes> = weights.pieces.try_collect().await.unwrap();
    assert_eq!(pieces.iter().map(|piece| piece.len() as u64).sum::<u64>(), weights.bytes);
    pieces.concat()
}

/// Runs the learner's side on a thread of its own, for one batch.
fn learn(
    outside: Outside,
    mut learner: Learner,
) -> std::thread::JoinHandle<(Option<Result<StepReport, String>>, Learner)> {
    std::thread::spawn(move || {
        let (batch, groups) = batch();
        (outside.learn(&mut learner, &batch, &groups), learner)
    })
}

#[tokio::test]
async fn a_batch_is_offered_until_fitting_weights_are_there() {
    let dir = tempfile::tempdir().unwrap();
    let learner = learner(1);
    let outside = Outside::open(dir.path(), &learner).unwrap();
    let desk = outside.desk();
    assert_eq!(desk.batch(Duration::from_millis(20)).await.unwrap().map(|batch| batch.step), None);
    let (first, better) = (desk.clone().weights().await.unwrap(), others(&dir.path().join("other")));
    assert_eq!((first.step, desk.waits_for()), (0, None));
    let update = |step| Update { step, gradient: 0.5, importance: 1.5 };
    let early = desk.clone().learned(update(0), in_pieces(&better)).await.unwrap_err();
    assert_eq!(early, BackendError::OtherStep { given: 0, expected: None });

    let learning = learn(outside, learner);
    let batch = desk.batch(SOON).await.unwrap().unwrap();
    assert!(desk.waits_for().unwrap().contains("bring the weights"), "{:?}", desk.waits_for());
    // Whoever was killed asks again, and is given the same.
    assert_eq!(desk.batch(SOON).await.unwrap().unwrap().columns, batch.columns);
    let other = desk.clone().learned(update(1), in_pieces(&better)).await.unwrap_err();
    assert_eq!(other, BackendError::OtherStep { given: 1, expected: Some(0) });
    let cut = desk.clone().learned(update(0), in_pieces(&better[..better.len() - 4])).await.unwrap_err();
    assert!(matches!(cut, BackendError::InvalidRequest { .. }), "{cut}");
    assert!(desk.batch(SOON).await.unwrap().is_some(), "what did not fit has changed nothing");

    assert_eq!(desk.clone().learned(update(0), in_pieces(&better)).await.unwrap(), 1);
    let (report, learner) = learning.join().unwrap();
    let report = report.unwrap().unwrap();
    assert_eq!((report.reward, report.useful, report.gradient, report.importance), (0.5, 1.0, 0.5, 1.5));
    assert_eq!(learner.steps(), 1);
    let now = desk.clone().weights().await.unwrap();
    assert_eq!(now.step, 1);
    assert_eq!(read(now).await, better);
    assert_ne!(read(first).await, better, "what is being read stays what it was");
    policy::save(learner.policy(), &dir.path().join("learner")).unwrap();
    assert_eq!(std::fs::read(dir.path().join("learner").join(CURRENT)).unwrap(), better);
}

#[tokio::test]
async fn one_set_of_weights_comes_in_at_a_time_and_one_that_breaks_off_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let learner = learner(1);
    let outside = Outside::open(dir.path(), &learner).unwrap();
    let (desk, better) = (outside.desk(), others(&dir.path().join("other")));
    let learning = learn(outside, learner);
    desk.batch(SOON).await.unwrap().unwrap();
    let slow = stream::iter([Ok(Bytes::from_static(b"half"))]).chain(stream::pending()).boxed();
    let sending = tokio::spawn(desk.clone().learned(Update::default(), slow));
    tokio::time::timeout(SOON, async {
        while desk.coming.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    let full = desk.clone().learned(Update::default(), in_pieces(&better)).await.unwrap_err();
    assert!(full.is_retryable(), "{full}");
    sending.abort();
    assert!(sending.await.unwrap_err().is_cancelled());
    assert_eq!(desk.clone().learned(Update::default(), in_pieces(&better)).await.unwrap(), 1);
    assert!(learning.join().unwrap().0.unwrap().is_ok());
}

#[tokio::test]
async fn a_room_that_ends_leaves_nobody_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let learner = learner(1);
    let outside = Outside::open(dir.path(), &learner).unwrap();
    let desk = outside.desk();
    let learning = learn(outside, learner);
    desk.batch(SOON).await.unwrap().unwrap();
    desk.close();
    assert!(learning.join().unwrap().0.is_none(), "the thread is told that nothing comes");
    assert_eq!(desk.batch(SOON).await.unwrap_err(), BackendError::ShuttingDown);
}
