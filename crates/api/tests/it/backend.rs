//! A small backend. What is under test is the HTTP layer above it, so it answers by rote: nothing here is a model or a swarm.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use chorus_api::{
    Backend, BackendError, Bytes, CurveForm, Embedded, Health, LedgerFilter, LedgerPage, LocalReply, LocalRequest,
    ModelCard, ModelKind, Pieces, Rollouts, TaskLog, Update, Weights,
};
use chorus_core::{EVENTS_A_RUN, TaskAnswer, TaskError, TaskEvent, TaskEventKind, TaskSpec};
use chorus_protocol::job::Finish;
use chorus_protocol::{Hash, JobId, NodeId, SecretKey, TaskId};
use chorus_scheduler::{ChainReport, Place, StepReport};
use futures::StreamExt;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// The words of every answer.
pub const WORDS: [&str; 4] = ["The ", "answer ", "is ", "4."];
/// How long the slow ones take for a word.
pub const SLOW: Duration = Duration::from_millis(20);

/// By its last message, a request chooses what happens: `slow` never ends by itself, `fail` and `panic` do what they say, `lost`
/// and `differ` lose their executor in the middle, and everything else is answered with [`WORDS`].
#[derive(Default)]
pub struct Rote {
    pub tasks: Arc<TaskLog>,
    pub ids: AtomicU64,
    pub requests: Mutex<Vec<LocalRequest>>,
    pub specs: Mutex<Vec<TaskSpec>>,
    pub filters: Mutex<Vec<LedgerFilter>>,
    /// Generations that were told to stop.
    pub stopped: AtomicUsize,
    pub cancelled: Mutex<Vec<TaskId>>,
    pub starting: AtomicBool,
    pub no_embedder: AtomicBool,
    /// What `status` waits for.
    pub hang: AtomicBool,
    pub running: Mutex<Vec<(TaskId, CancellationToken)>>,
    /// The disk, which a later API may be given.
    pub disk: Arc<Mutex<BTreeMap<TaskId, Vec<u8>>>>,
    pub disk_full: AtomicBool,
    /// The step of the batch that waits for its weights.
    pub batch: Mutex<Option<u64>>,
    /// The updates that came from outside.
    pub learned: Mutex<Vec<(Update, usize)>>,
}

pub fn node(number: u8) -> NodeId {
    SecretKey::from_bytes(&[number; 32]).node_id()
}

fn card(name: &str, kind: ModelKind) -> ModelCard {
    ModelCard {
        name: name.to_owned(),
        kind,
        fingerprint: Hash::from_bytes([7; 32]),
        context: 2_048,
        quantisation: "Q8_0".to_owned(),
        architecture: "llama".to_owned(),
    }
}

/// A handle on [`Rote`], which a test keeps too.
pub struct Face(pub Arc<Rote>);

impl Deref for Face {
    type Target = Arc<Rote>;

    fn deref(&self) -> &Arc<Rote> {
        &self.0
    }
}

#[async_trait]
impl Backend for Face {
    fn draw_id(&self) -> [u8; 16] {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&(1 + self.ids.fetch_add(1, Ordering::SeqCst)).to_be_bytes());
        id
    }

    fn tasks(&self) -> &Arc<TaskLog> {
        &self.0.tasks
    }

    fn models(&self) -> Vec<ModelCard> {
        if self.starting.load(Ordering::SeqCst) {
            return Vec::new();
        }
        let mut cards = vec![card("tiny/model", ModelKind::Chat)];
        if !self.no_embedder.load(Ordering::SeqCst) {
            cards.push(card("mini", ModelKind::Embedding));
        }
        cards
    }

    fn health(&self) -> Health {
        let waiting_for = if self.starting.load(Ordering::SeqCst) { vec!["the model".to_owned()] } else { Vec::new() };
        Health { waiting_for }
    }

    async fn metrics(&self) -> String {
        "# TYPE chorus_peers gauge\nchorus_peers 2\n".to_owned()
    }

    async fn training(&self) -> Result<Value, BackendError> {
        Ok(json!({ "role": "trainer", "step": 3 }))
    }

    async fn curve(&self, form: CurveForm) -> Result<String, BackendError> {
        match form {
            CurveForm::Text => Err(BackendError::NoTraining),
            CurveForm::Csv => Ok("step,seconds\n".to_owned()),
            CurveForm::Svg => Ok("<svg/>".to_owned()),
        }
    }

    async fn batch(&self, wait: Duration) -> Result<Option<Rollouts>, BackendError> {
        let step = *self.batch.lock().unwrap();
        if step.is_none() {
            tokio::time::sleep(wait).await;
        }
        Ok(step.map(|step| Rollouts { step, columns: Bytes::from_static(b"columns") }))
    }

    async fn evidence(&self, evidence: Hash) -> Result<Vec<u8>, BackendError> {
        if evidence == Hash::ZERO {
            return Err(BackendError::NoEvidence { evidence, reason: "nobody has it".to_owned() });
        }
        Ok(evidence.as_bytes().to_vec())
    }

    async fn weights(&self) -> Result<Weights, BackendError> {
        let step = self.batch.lock().unwrap().ok_or(BackendError::NotExternal)?;
        let pieces = ["half", "half"].map(|piece| Ok(Bytes::from_static(piece.as_bytes())));
        Ok(Weights { step, bytes: 8, pieces: futures::stream::iter(pieces).boxed() })
    }

    async fn learned(&self, update: Update, mut pieces: Pieces) -> Result<u64, BackendError> {
        let expected = *self.batch.lock().unwrap();
        if expected != Some(update.step) {
            return Err(BackendError::OtherStep { given: update.step, expected });
        }
        let mut bytes = 0;
        while let Some(piece) = pieces.next().await {
            bytes += piece?.len();
        }
        self.0.learned.lock().unwrap().push((update, bytes));
        Ok(update.step + 1)
    }

    async fn status(&self) -> Result<Value, BackendError> {
        if self.hang.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        Ok(json!({ "node": node(1), "peers": 2 }))
    }

    async fn peers(&self) -> Result<Vec<Value>, BackendError> {
        Ok(vec![json!({ "node": node(2) })])
    }

    async fn set_blocked(&self, peer: NodeId, _blocked: bool) -> Result<(), BackendError> {
        if peer == node(2) { Ok(()) } else { Err(BackendError::PeerNotFound { node: peer }) }
    }

    async fn ledger(&self, filter: LedgerFilter) -> Result<LedgerPage, BackendError> {
        self.filters.lock().unwrap().push(filter);
        Ok(LedgerPage { entries: vec![json!({ "seq": 1 })], total: 5, next: Some("abc".to_owned()) })
    }

    async fn ledger_entry(&self, hash: Hash) -> Result<Value, BackendError> {
        if hash == Hash::ZERO { Ok(json!({ "hash": hash })) } else { Err(BackendError::EntryNotFound { hash }) }
    }

    async fn generate(
        &self,
        request: LocalRequest,
        pieces: mpsc::Sender<String>,
        cancel: CancellationToken,
    ) -> Result<LocalReply, BackendError> {
        let last = request.turns.last().map(|turn| turn.content.clone()).unwrap_or_default();
        self.requests.lock().unwrap().push(request);
        match last.as_str() {
            "fail" => return Err(BackendError::ContextExceeded { prompt_tokens: 9_000, context: 2_048 }),
            "panic" => panic!("asked to"),
            "slow" => {
                while !cancel.is_cancelled() {
                    let _ = pieces.send("word ".to_owned()).await;
                    tokio::select! {
                        () = cancel.cancelled() => {}
                        () = tokio::time::sleep(SLOW) => {}
                    }
                }
                self.stopped.fetch_add(1, Ordering::SeqCst);
                return Err(BackendError::Cancelled);
            }
            _ => {}
        }
        for word in WORDS {
            let _ = pieces.send(word.to_owned()).await;
        }
        Ok(LocalReply {
            text: WORDS.concat(),
            prompt_tokens: 11,
            completion_tokens: 4,
            finish: Finish::Stop,
            fingerprint: Hash::from_bytes([7; 32]),
        })
    }

    async fn embed(&self, texts: Vec<String>) -> Result<Embedded, BackendError> {
        let vectors = texts.iter().map(|text| vec![text.len() as f32, -0.5]).collect();
        Ok(Embedded { vectors, tokens: 3 })
    }

    async fn ask(&self, spec: TaskSpec) -> Result<(), BackendError> {
        if spec.question == "full" {
            return Err(BackendError::Overloaded { what: "the node's queue".to_owned(), limit: 3 });
        }
        let cancel = CancellationToken::new();
        self.running.lock().unwrap().push((spec.task, cancel.clone()));
        self.specs.lock().unwrap().push(spec.clone());
        tokio::spawn(run(Arc::clone(&self.0), spec, cancel));
        Ok(())
    }

    async fn keep(&self, task: TaskId, record: Option<Vec<u8>>) -> Result<(), BackendError> {
        if self.disk_full.load(Ordering::SeqCst) {
            return Err(BackendError::Disk { reason: "no room left; free some space".to_owned() });
        }
        let mut disk = self.disk.lock().unwrap();
        match record {
            Some(record) => disk.insert(task, record),
            None => disk.remove(&task),
        };
        Ok(())
    }

    async fn kept(&self) -> Result<Vec<(TaskId, Vec<u8>)>, BackendError> {
        Ok(self.disk.lock().unwrap().clone().into_iter().collect())
    }

    async fn cancel(&self, task: TaskId) -> Result<(), BackendError> {
        self.cancelled.lock().unwrap().push(task);
        for (_, cancel) in self.running.lock().unwrap().iter().filter(|(running, _)| *running == task) {
            cancel.cancel();
        }
        Ok(())
    }
}

/// Plays a task.
async fn run(rote: Arc<Rote>, spec: TaskSpec, cancel: CancellationToken) {
    let first = u64::from(spec.restarts) * EVENTS_A_RUN;
    let mut play = Play { rote: &rote, task: spec.task, index: first };
    play.push(TaskEventKind::Accepted {
        strategy: spec.strategy.name(),
        chains: 1,
        risk: spec.risk,
        deadline: spec.deadline,
        fallback: None,
    });
    let lose = |number| TaskEventKind::Lost { place: place(), node: node(number), reason: "gone".to_owned() };
    match spec.question.as_str() {
        "fail" => {
            let error = TaskError::Deadline { elapsed: spec.deadline, waiting_for: "a bid".to_owned() };
            return play.fail(error);
        }
        "slow" => {
            while !cancel.is_cancelled() {
                play.text(1, "word ");
                tokio::select! {
                    () = cancel.cancelled() => {}
                    () = tokio::time::sleep(SLOW) => {}
                }
            }
            return play.fail(TaskError::Cancelled);
        }
        "lost" => {
            play.text(1, WORDS[0]);
            play.text(1, WORDS[1]);
            play.push(lose(1));
            WORDS.iter().for_each(|word| play.text(2, word));
        }
        "differ" => {
            play.text(1, "The answers, ");
            play.push(lose(1));
            WORDS.iter().for_each(|word| play.text(2, word));
        }
        _ => {
            for word in WORDS {
                play.text(1, word);
                tokio::task::yield_now().await;
            }
        }
    }
    let answer = answer(&spec);
    play.push(TaskEventKind::Finished { result: Box::new(answer.clone()) });
    rote.tasks.finish(spec.task, Ok(answer));
}

struct Play<'a> {
    rote: &'a Rote,
    task: TaskId,
    index: u64,
}

impl Play<'_> {
    fn push(&mut self, kind: TaskEventKind) {
        let elapsed = Duration::from_millis(self.index);
        self.rote.tasks.push(TaskEvent { task: self.task, index: self.index, at: Default::default(), elapsed, kind });
        self.index += 1;
    }

    fn text(&mut self, number: u8, text: &str) {
        self.push(TaskEventKind::Text { place: place(), node: node(number), tokens: 1, text: text.to_owned() });
    }

    fn fail(&mut self, error: TaskError) {
        self.push(TaskEventKind::Failed { error: error.clone() });
        self.rote.tasks.finish(self.task, Err(error));
    }
}

fn place() -> Place {
    Place { job: JobId::default(), chain: 0, stage: "answer", step: None }
}

fn answer(spec: &TaskSpec) -> TaskAnswer {
    let step = StepReport {
        subtask: String::new(),
        requirement: "any".to_owned(),
        executor: node(1),
        score: 0.9,
        reputation: 0.5,
        tokens: 4,
        election: Duration::from_millis(3),
        elapsed: Duration::from_millis(9),
    };
    let chain = ChainReport {
        chain: 0,
        planner: None,
        steps: vec![step],
        answer: Some("4".to_owned()),
        weight: 0.9,
        fallback: None,
        error: None,
    };
    TaskAnswer {
        task: spec.task,
        answer: "4".to_owned(),
        text: WORDS.concat(),
        finish: if spec.question == "cut" { Finish::Length } else { Finish::Stop },
        margin: 1.0,
        tie: false,
        low_margin: false,
        votes: Vec::new(),
        chains: vec![chain],
        prompt_tokens: 21,
        completion_tokens: 4,
        jobs: 1,
        elapsed: Duration::from_millis(12),
        strategy: spec.strategy.name(),
        fallback: None,
    }
}
