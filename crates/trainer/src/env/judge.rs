//! A judge that outlives the environments it asks: one that panics or never returns costs a rollout, not the trainer.
//!
//! ```text
//!  trainer ──(environment, seed, answer)…──▶ thread: task, reward ──each within the limit──▶ Judgement…
//!                                              │ panics: caught, told
//!                                              └ too late: the thread is left behind and another one takes its place
//! ```
//!
//! A batch's questions are asked together: to wake a thread for each of them costs more than most rewards do.
//!
//! A thread cannot be stopped from outside, so those that are left behind are counted; at [`MAX_STUCK`] the judge asks nothing more
//! until one of them has come back.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use super::{Environment, Task, training_task_of};
use crate::policy::Tokenizer;

/// Threads that may be left behind at a time.
pub const MAX_STUCK: usize = 4;
/// How long a task and its reward may take, unless the caller says otherwise.
pub const DEFAULT_LIMIT: Duration = Duration::from_secs(2);
/// What is kept of a panic's message.
const MAX_MESSAGE: usize = 200;
/// Questions that a thread has at a time.
const QUEUE: usize = 256;

/// What an environment says to an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Judgement {
    /// The prompt's tokens.
    pub prompt: Arc<[u32]>,
    /// What the answer earns.
    pub reward: f32,
}

/// An answer to be judged: the environment's name, the seed of its training task, and the answer's tokens.
pub type Claim<'a> = (&'a str, u64, &'a [u32]);

/// Why there is no judgement.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum JudgeError {
    /// Nobody here knows the environment.
    #[error("there is no environment '{0}' here; give it to the judge, or take it out of the plan")]
    Unknown(String),
    /// The environment panicked.
    #[error("{environment} panicked at seed {seed}: {message}; the rollout is dropped")]
    Panicked {
        /// The environment.
        environment: String,
        /// The task's seed.
        seed: u64,
        /// What it said.
        message: String,
    },
    /// The environment did not return.
    #[error(
        "{environment} gave no reward within {limit:?} at seed {seed}; the rollout is dropped and the thread left behind"
    )]
    TooSlow {
        /// The environment.
        environment: String,
        /// The task's seed.
        seed: u64,
        /// What it had.
        limit: Duration,
    },
    /// The reward is infinite or no number.
    #[error("{environment} gave a reward that is no number at seed {seed}; the rollout is dropped")]
    NotANumber {
        /// The environment.
        environment: String,
        /// The task's seed.
        seed: u64,
    },
    /// Too many threads hang in environments.
    #[error(
        "{MAX_STUCK} threads hang in environments and no more are begun; mend the environment and start the trainer again"
    )]
    Stuck,
    /// The system gives no thread.
    #[error("the system gives no thread to judge in; raise its limit")]
    NoThread,
}

#[derive(Clone)]
struct Question {
    environment: Arc<dyn Environment>,
    seed: u64,
    answer: String,
}

/// What a thread answers: a judgement, or what a panic said.
type Answer = Result<Judgement, String>;

#[derive(Debug)]
struct Worker {
    questions: SyncSender<Question>,
    answers: Receiver<Answer>,
    thread: JoinHandle<()>,
}

/// See the module.
#[derive(Debug)]
pub struct Judge {
    environments: BTreeMap<String, Arc<dyn Environment>>,
    limit: Duration,
    worker: Option<Worker>,
    left_behind: Vec<JoinHandle<()>>,
}

impl Judge {
    /// Makes a judge of these environments, each of which has `limit` for a task and its reward.
    #[must_use]
    pub fn new(environments: impl IntoIterator<Item = Arc<dyn Environment>>, limit: Duration) -> Self {
        let environments = environments.into_iter().map(|environment| (environment.name(), environment)).collect();
        Self { environments, limit, worker: None, left_behind: Vec::new() }
    }

    /// Returns an environment by its name.
    #[must_use]
    pub fn environment(&self, name: &str) -> Option<&Arc<dyn Environment>> {
        self.environments.get(name)
    }

    /// Returns how many threads hang in environments.
    pub fn stuck(&mut self) -> usize {
        self.left_behind.retain(|thread| !thread.is_finished());
        self.left_behind.len()
    }

    /// Judges an answer to the training task of a seed.
    ///
    /// # Errors
    /// [`JudgeError`]; the judge itself goes on.
    pub fn judge(&mut self, environment: &str, seed: u64, answer: &[u32]) -> Result<Judgement, JudgeError> {
        self.judge_all(&[(environment, seed, answer)]).pop().unwrap_or(Err(JudgeError::NoThread))
    }

    /// Judges many answers, each as [`Judge::judge`] does, and returns what became of each in their order.
    pub fn judge_all(&mut self, claims: &[Claim<'_>]) -> Vec<Result<Judgement, JudgeError>> {
        let questions: Vec<Result<Question, JudgeError>> = claims.iter().map(|claim| self.question(claim)).collect();
        let known: Vec<&Question> = questions.iter().filter_map(|question| question.as_ref().ok()).collect();
        let mut judged = Vec::with_capacity(known.len());
        while judged.len() < known.len() {
            let left = &known[judged.len()..];
            judged.extend(self.some(&left[..left.len().min(QUEUE)]));
        }
        let mut judged = judged.into_iter();
        let result = |question: Result<Question, JudgeError>| {
            question.and_then(|_| judged.next().unwrap_or(Err(JudgeError::NoThread)))
        };
        questions.into_iter().map(result).collect()
    }

    fn question(&self, (environment, seed, answer): &Claim<'_>) -> Result<Question, JudgeError> {
        let known = self.environments.get(*environment).cloned();
        let asked = known.ok_or_else(|| JudgeError::Unknown((*environment).to_owned()))?;
        Ok(Question { environment: asked, seed: *seed, answer: Tokenizer.decode(answer) })
    }

    /// Asks one thread all of these, of which there is one at least, and returns what it said before it was left behind, if it was.
    fn some(&mut self, questions: &[&Question]) -> Vec<Result<Judgement, JudgeError>> {
        let worker = match self.worker.take() {
            Some(worker) => worker,
            None if self.stuck() >= MAX_STUCK => return vec![Err(JudgeError::Stuck); questions.len()],
            None => match Worker::start() {
                Some(worker) => worker,
                None => return vec![Err(JudgeError::NoThread); questions.len()],
            },
        };
        for question in questions {
            // A thread that is gone takes no question, and answers none: that is told apart below.
            let _ = worker.questions.send((*question).clone());
        }
        let mut said = Vec::with_capacity(questions.len());
        for question in questions {
            let (environment, seed) = (question.environment.name(), question.seed);
            match worker.answers.recv_timeout(self.limit) {
                Ok(Ok(judgement)) if judgement.reward.is_finite() => said.push(Ok(judgement)),
                Ok(Ok(_)) => said.push(Err(JudgeError::NotANumber { environment, seed })),
                Ok(Err(message)) => said.push(Err(JudgeError::Panicked { environment, seed, message })),
                Err(RecvTimeoutError::Timeout) => {
                    self.left_behind.push(worker.thread);
                    said.push(Err(JudgeError::TooSlow { environment, seed, limit: self.limit }));
                    return said;
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let message = "its thread ended".to_owned();
                    said.push(Err(JudgeError::Panicked { environment, seed, message }));
                    return said;
                }
            }
        }
        self.worker = Some(worker);
        said
    }
}

impl Worker {
    fn start() -> Option<Self> {
        let (questions, asked) = sync_channel::<Question>(QUEUE);
        let (answered, answers) = sync_channel(QUEUE);
        let work = move || {
            let mut last = None;
            // Ends when the judge is gone, or has left this thread behind.
            while let Ok(question) = asked.recv() {
                let answer = catch_unwind(AssertUnwindSafe(|| question.answer(&mut last)));
                let answer = answer.map_err(|panic| {
                    last = None;
                    message(&*panic)
                });
                if answered.send(answer).is_err() {
                    break;
                }
            }
        };
        let thread = std::thread::Builder::new().name("chorus-judge".to_owned()).spawn(work).ok()?;
        Some(Self { questions, answers, thread })
    }
}

/// The task that was judged last, since a group's members come one after the other.
type Last = Option<(String, u64, Task, Arc<[u32]>)>;

impl Question {
    fn answer(&self, last: &mut Last) -> Judgement {
        let name = self.environment.name();
        let known = last.take().filter(|(environment, seed, ..)| *environment == name && *seed == self.seed);
        let (_, _, task, prompt) = last.insert(known.unwrap_or_else(|| {
            let task = training_task_of(&*self.environment, self.seed);
            let prompt = Tokenizer.encode(&task.prompt).into();
            (name, self.seed, task, prompt)
        }));
        Judgement { prompt: Arc::clone(prompt), reward: self.environment.reward(task, &self.answer) }
    }
}

fn message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("without a word").chars().take(MAX_MESSAGE).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use std::sync::Mutex;
    use std::time::Instant;

    use super::*;

    /// Does what its answer tells it.
    #[derive(Debug)]
    struct Moody(Mutex<Receiver<()>>);

    impl Environment for Moody {
        fn name(&self) -> String {
            "moody-1".to_owned()
        }

        fn task(&self, seed: u64) -> Task {
            Task { seed, prompt: format!("task {seed}"), solution: "good".to_owned() }
        }

        fn reward(&self, task: &Task, answer: &str) -> f32 {
            match answer {
                "panic" => panic!("I will not have it"),
                "hang" => self.0.lock().map_or(0.0, |gate| gate.recv().map_or(0.0, |()| 0.5)),
                "nan" => f32::NAN,
                answer => f32::from(u8::from(answer == task.solution)),
            }
        }

        fn max_tokens(&self) -> usize {
            8
        }
    }

    fn judge() -> (Judge, SyncSender<()>) {
        let (open, gate) = sync_channel(100);
        let moody: Arc<dyn Environment> = Arc::new(Moody(Mutex::new(gate)));
        (Judge::new([moody], Duration::from_millis(400)), open)
    }

    fn ask(judge: &mut Judge, answer: &str) -> Result<f32, JudgeError> {
        judge.judge("moody-1", 7, &Tokenizer.encode(answer)).map(|judgement| judgement.reward)
    }

    #[test]
    fn a_panic_and_a_reward_that_is_no_number_are_errors_and_the_next_answer_is_judged() {
        let (mut judge, _open) = judge();
        assert_eq!(ask(&mut judge, "good"), Ok(1.0));
        let error = ask(&mut judge, "panic").unwrap_err();
        assert!(error.to_string().contains("I will not have it"), "{error}");
        assert!(matches!(ask(&mut judge, "nan"), Err(JudgeError::NotANumber { .. })));
        assert_eq!(ask(&mut judge, "bad"), Ok(0.0));
        assert!(matches!(judge.judge("other-1", 7, &[]), Err(JudgeError::Unknown(_))));
        let task = judge.judge("moody-1", 9, &[]).unwrap();
        let prompt = training_task_of(&**judge.environment("moody-1").unwrap(), 9).prompt;
        assert_eq!(*task.prompt, *Tokenizer.encode(&prompt));
        assert_eq!(judge.stuck(), 0);
    }

    #[test]
    fn many_answers_are_judged_in_their_order_whatever_one_of_them_does() {
        let (mut judge, open) = judge();
        let answers: Vec<Vec<u32>> =
            ["good", "panic", "bad", "hang", "good", "nan", "good"].map(|answer| Tokenizer.encode(answer)).into();
        let mut claims: Vec<Claim<'_>> = answers.iter().map(|answer| ("moody-1", 7, &answer[..])).collect();
        claims.insert(2, ("other-1", 7, &answers[0]));
        // More than a thread has at a time.
        claims.extend(std::iter::repeat_n(("moody-1", 8, &answers[0][..]), 2 * QUEUE));
        let said = judge.judge_all(&claims);
        assert_eq!(said.len(), claims.len());
        let reward = |n: usize| said[n].as_ref().map(|judgement| judgement.reward);
        assert_eq!([0, 3, 5, 7].map(reward), [Ok(1.0), Ok(0.0), Ok(1.0), Ok(1.0)]);
        assert!(matches!(reward(1), Err(JudgeError::Panicked { .. })));
        assert!(matches!(reward(2), Err(JudgeError::Unknown(_))));
        assert!(matches!(reward(4), Err(JudgeError::TooSlow { .. })));
        assert!(matches!(reward(6), Err(JudgeError::NotANumber { .. })));
        assert!((8..claims.len()).all(|n| reward(n) == Ok(1.0)));
        assert_eq!(judge.stuck(), 1);
        open.send(()).unwrap();
    }

    #[test]
    fn what_never_returns_is_left_behind_and_only_so_many_of_it() {
        let (mut judge, open) = judge();
        for stuck in 1..=MAX_STUCK {
            let begun = Instant::now();
            assert!(matches!(ask(&mut judge, "hang"), Err(JudgeError::TooSlow { .. })));
            assert!(begun.elapsed() < Duration::from_secs(5));
            assert_eq!(judge.stuck(), stuck);
            let next = ask(&mut judge, "good");
            assert_eq!(next, if stuck < MAX_STUCK { Ok(1.0) } else { Err(JudgeError::Stuck) });
        }
        // They come back: the judge goes on.
        (0..MAX_STUCK).for_each(|_| open.send(()).unwrap());
        let begun = Instant::now();
        while judge.stuck() > 0 && begun.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(ask(&mut judge, "good"), Ok(1.0));
    }
}
