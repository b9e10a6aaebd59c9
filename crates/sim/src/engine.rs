//! A virtual engine: runs take the time that their tokens take, and their texts follow from their payloads alone.
//!
//! A run reads its prompt at one rate and writes at another, sends a piece of text about every [`PIECE`], and ends with an output
//! whose text is a function of the payload: two engines with the same question agree, so that a vote has something to find. A plan
//! is answered with a plan in JSON. What no real engine does is not done here either: there is no run beyond the slots that
//! the node offered, and a stopped run says nothing more.

use std::collections::BTreeMap;
use std::time::Duration;

use chorus_core::RunId;
use chorus_machine::{Rng, Time};
use chorus_protocol::job::{Failure, Finish, JobKind, Output, Payload};
use chorus_protocol::{Hash, Text};

/// Time between two pieces of text.
const PIECE: Duration = Duration::from_millis(250);
/// Bytes of text that count as one token.
const BYTES_PER_TOKEN: usize = 4;
/// Figures of a question that a plan repeats.
const MAX_FIGURES: usize = 12;
/// Tokens are read so many times faster than they are written.
const PREFILL_FACTOR: f64 = 8.0;

/// How an engine treats the work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Manner {
    /// It works.
    #[default]
    Honest,
    /// It writes nonsense at once.
    Garbage,
    /// It takes the work and is never heard of again.
    Nothing,
}

/// A run under way.
#[derive(Debug)]
struct Run {
    id: RunId,
    kind: JobKind,
    payload: Box<Payload>,
    /// When it begins to write.
    writes_at: Time,
    /// When it is done.
    done_at: Time,
    /// When it must be done.
    deadline: Time,
    tokens: u32,
    prompt_tokens: u32,
    /// Tokens that were sent.
    sent: u32,
}

/// What a run has to say, and when it speaks again.
#[derive(Debug)]
pub enum Step {
    /// Tokens so far, and new text.
    Progress {
        /// The run.
        run: RunId,
        /// Tokens so far.
        tokens: u32,
        /// Text since the last one.
        text: String,
        /// When it speaks again.
        next: Time,
    },
    /// It has ended.
    Done {
        /// The run.
        run: RunId,
        /// With what.
        result: Result<Output, Failure>,
    },
    /// It was stopped before, or never speaks.
    Silent,
}

/// One node's engine.
#[derive(Debug)]
pub struct Engine {
    tokens_per_s: f64,
    manner: Manner,
    runs: BTreeMap<u64, Run>,
    numbered: u64,
    /// Broken down until then.
    down_until: Time,
    /// Runs that ended with an output.
    pub finished: u64,
    /// The most runs at a time.
    pub most: usize,
}

impl Engine {
    /// Makes an engine that writes so many tokens a second.
    #[must_use]
    pub fn new(tokens_per_s: f64, manner: Manner) -> Self {
        Self { tokens_per_s, manner, runs: BTreeMap::new(), numbered: 0, down_until: Time::ZERO, finished: 0, most: 0 }
    }

    /// Returns how many runs are under way.
    #[must_use]
    pub fn active(&self) -> usize {
        self.runs.len()
    }

    /// Takes a run. Returns its number and when it speaks first, or why it does not run.
    ///
    /// # Errors
    /// [`Failure::Engine`] while the engine is down.
    #[allow(clippy::too_many_arguments, reason = "a run is made of exactly these")]
    pub fn start(
        &mut self,
        id: RunId,
        kind: JobKind,
        payload: Box<Payload>,
        deadline: Time,
        now: Time,
        rng: &mut Rng,
    ) -> Result<(u64, Time), Failure> {
        if now < self.down_until {
            return Err(Failure::Engine(Text::truncated("the engine restarts; ask another node")));
        }
        let bytes: usize = payload.turns.iter().map(|turn| turn.content.len()).sum();
        let prompt_tokens = u32::try_from(bytes / BYTES_PER_TOKEN + 1).unwrap_or(u32::MAX);
        let cap = payload.max_tokens.max(1);
        let tokens = cap / 2 + u32::try_from(rng.below(u64::from(cap - cap / 2))).unwrap_or(0) + 1;
        let reading = Duration::from_secs_f64(f64::from(prompt_tokens) / (self.tokens_per_s * PREFILL_FACTOR));
        let writing = Duration::from_secs_f64(f64::from(tokens) / self.tokens_per_s);
        let (writes_at, done_at) = match self.manner {
            Manner::Honest => (now + reading, now + reading + writing),
            Manner::Garbage => (now, now + Duration::from_millis(1)),
            Manner::Nothing => (now, Time::from_nanos(u64::MAX)),
        };
        self.numbered += 1;
        let run =
            Run { id, kind, payload, writes_at, done_at, deadline, tokens: tokens.min(cap), prompt_tokens, sent: 0 };
        let speaks = done_at.min(writes_at + PIECE).min(deadline);
        self.runs.insert(self.numbered, run);
        self.most = self.most.max(self.runs.len());
        Ok((self.numbered, speaks))
    }

    /// Lets a run speak.
    pub fn step(&mut self, number: u64, now: Time) -> Step {
        let Some(run) = self.runs.get_mut(&number) else { return Step::Silent };
        if self.manner == Manner::Nothing {
            return Step::Silent;
        }
        if now >= run.done_at {
            let Some(run) = self.runs.remove(&number) else { return Step::Silent };
            self.finished += 1;
            return Step::Done { run: run.id, result: Ok(self.output(&run)) };
        }
        let written = (now - run.writes_at).as_secs_f64() * self.tokens_per_s;
        if now >= run.deadline {
            let id = run.id;
            self.runs.remove(&number);
            return Step::Done { run: id, result: Err(Failure::Deadline) };
        }
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a float cast saturates")]
        let tokens = (written as u32).min(run.tokens);
        let text =
            if run.payload.stream { "so ".repeat((tokens - run.sent.min(tokens)) as usize) } else { String::new() };
        run.sent = tokens;
        Step::Progress { run: run.id, tokens, text, next: run.done_at.min(now + PIECE).min(run.deadline) }
    }

    /// Stops a run. Returns whether it was under way.
    pub fn stop(&mut self, id: RunId) -> bool {
        let number = self.runs.iter().find(|(_, run)| run.id == id).map(|(number, _)| *number);
        number.is_some_and(|number| self.runs.remove(&number).is_some())
    }

    /// Breaks down, until `back`. Returns the runs that fail with it.
    pub fn break_down(&mut self, back: Time) -> Vec<RunId> {
        self.down_until = back;
        std::mem::take(&mut self.runs).into_values().map(|run| run.id).collect()
    }

    /// Ends with its process.
    pub fn kill(&mut self) {
        self.runs.clear();
        self.down_until = Time::ZERO;
    }

    fn output(&self, run: &Run) -> Output {
        let text = match (self.manner, run.kind) {
            (Manner::Garbage, _) => "zzz".to_owned(),
            (_, JobKind::Plan) => plan(&run.payload),
            (_, JobKind::Answer) => answer(&run.payload),
            // Rollouts have a simulator of their own, and no host here offers to sample.
            (_, JobKind::Sample) => String::new(),
        };
        Output {
            text: Text::truncated(&text),
            prompt_tokens: run.prompt_tokens,
            completion_tokens: run.tokens,
            finish: Finish::Stop,
            model: Hash::derive("chorus simulated weights", &[]),
        }
    }
}

fn asked(payload: &Payload) -> &str {
    payload.turns.last().map_or("", |turn| turn.content.as_str())
}

/// Two steps: a part that names the figures of what was asked, and the answer that needs it.
fn plan(payload: &Payload) -> String {
    let hash = blake3::hash(asked(payload).as_bytes());
    let part = hash.as_bytes()[0] % 8;
    let words = asked(payload).split(|c: char| !c.is_ascii_alphanumeric());
    let figures: Vec<&str> =
        words.filter(|word| word.contains(|c: char| c.is_ascii_digit())).take(MAX_FIGURES).collect();
    format!(
        "{{\"steps\":[{{\"ask\":\"work out part {part} of {}\",\"skill\":\"skill {part}\",\"needs\":[]}},\
         {{\"ask\":\"answer from the parts\",\"skill\":\"skill {}\",\"needs\":[1]}}]}}",
        figures.join(" and "),
        (part + 1) % 8
    )
}

/// The number that the last line of what was asked leads to.
fn answer(payload: &Payload) -> String {
    let hash = blake3::hash(asked(payload).lines().last().unwrap_or("").as_bytes());
    format!("The answer is {}.", u16::from(hash.as_bytes()[0]) + 256 * u16::from(hash.as_bytes()[1]))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use chorus_protocol::job::{Role, Turn};
    use chorus_protocol::{JobId, List, SecretKey};

    use super::*;

    const NEVER: Time = Time::from_nanos(u64::MAX);

    fn run_id(n: u8) -> RunId {
        RunId { job: JobId::from_bytes([n; 16]), fence: 1, requester: SecretKey::from_bytes(&[9; 32]).node_id() }
    }

    fn payload() -> Box<Payload> {
        Box::new(Payload {
            salt: [0; 16],
            turns: List::truncated([Turn { role: Role::User, content: Text::truncated("2 + 2?") }]),
            json_schema: None,
            max_tokens: 32,
            temperature_milli: 0,
            top_p_milli: 1_000,
            seed: 0,
            stop: List::default(),
            stream: true,
            policy: None,
        })
    }

    fn whole_run(engine: &mut Engine, n: u8) -> (Result<Output, Failure>, u32, Time) {
        let mut rng = Rng::from_u64(u64::from(n));
        let (number, mut at) =
            engine.start(run_id(n), JobKind::Answer, payload(), NEVER, Time::ZERO, &mut rng).unwrap();
        let mut pieces = 0;
        loop {
            match engine.step(number, at) {
                Step::Progress { next, .. } => (at, pieces) = (next, pieces + 1),
                Step::Done { result, .. } => return (result, pieces, at),
                Step::Silent => panic!("the run went silent"),
            }
        }
    }

    #[test]
    fn a_run_takes_the_time_of_its_tokens_and_answers_the_same_everywhere() {
        let (slow, pieces, took) = whole_run(&mut Engine::new(10.0, Manner::Honest), 1);
        let (fast, _, sooner) = whole_run(&mut Engine::new(100.0, Manner::Honest), 2);
        assert!(took > Time::from_millis(1_500) && sooner < Time::from_millis(500) && pieces >= 5);
        assert_eq!(slow.unwrap().text, fast.unwrap().text);
    }

    #[test]
    fn a_breakdown_fails_every_run_and_refuses_new_ones_until_it_is_over() {
        let mut engine = Engine::new(10.0, Manner::Honest);
        let mut rng = Rng::from_u64(1);
        engine.start(run_id(1), JobKind::Answer, payload(), NEVER, Time::ZERO, &mut rng).unwrap();
        assert_eq!(engine.break_down(Time::from_millis(100)), [run_id(1)]);
        let refused = engine.start(run_id(2), JobKind::Answer, payload(), NEVER, Time::from_millis(99), &mut rng);
        assert!(matches!(refused, Err(Failure::Engine(_))));
        assert!(engine.start(run_id(3), JobKind::Answer, payload(), NEVER, Time::from_millis(100), &mut rng).is_ok());
        assert!(engine.stop(run_id(3)) && !engine.stop(run_id(3)) && engine.active() == 0);
    }

    #[test]
    fn a_simulated_plan_is_one_that_the_scheduler_accepts() {
        let plan = chorus_scheduler::plan::Plan::parse(&plan(&payload()), false, "2 + 2?").unwrap();
        assert_eq!(plan.steps().len(), 2);
    }
}
