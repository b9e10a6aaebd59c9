//! What a user asks: the question, how it is to be run, and what it may cost.

use std::time::Duration;

use chorus_protocol::TaskId;
use chorus_protocol::capability::{ModelName, Skill};
use chorus_protocol::job::{MAX_SCHEMA_BYTES, MAX_STOP_BYTES, MAX_STOPS, Risk, Turn};
use serde::Serialize;

use crate::answer::AnswerFormat;
use crate::error::TaskError;

/// Chains of one task, extra ones included.
pub const MAX_CHAINS: u8 = 8;
/// Planners that a task gets when nobody says how many (Symphony's M).
pub const DEFAULT_PLANNERS: u8 = 3;
/// Bytes of a question.
pub const MAX_QUESTION_BYTES: usize = 96 * 1024;
/// Bytes of question and context together. Below the 256 KiB of a job's payload, with room for instructions and results.
pub const MAX_PROMPT_BYTES: usize = 160 * 1024;
/// Turns of context; a payload holds 64, and the question is one of them.
pub const MAX_CONTEXT_TURNS: usize = 60;
/// Skills of the ledger that a task is told of.
pub const MAX_SKILLS: usize = 64;
/// Jobs that one task may submit, whatever its budget says.
pub const MAX_JOBS: u32 = 256;
/// Numbers that the events of one run of a task have to themselves: more than it can tell. When the node is restarted in the middle
/// of a task, the events of the next run begin at the next multiple, so numbers grow and none means two events.
pub const EVENTS_A_RUN: u64 = 1 << 20;
/// The longest a task may take.
pub const MAX_DEADLINE: Duration = Duration::from_secs(24 * 3_600);

/// How a task is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "name")]
pub enum Strategy {
    /// One node answers.
    Direct,
    /// Several nodes plan, many nodes do the subtasks, the answers are put to a vote.
    Chains {
        /// Independent decompositions, 1 to [`MAX_CHAINS`].
        planners: u8,
    },
}

impl Strategy {
    /// Returns the strategy's name, as it is written in commands and reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Chains { .. } => "chains",
        }
    }
}

impl Default for Strategy {
    fn default() -> Self {
        Self::Chains { planners: DEFAULT_PLANNERS }
    }
}

/// What a chain weighs in the vote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Weighting {
    /// The mean match score of the chain's executors, as Symphony publishes it. It measures fit, not quality.
    #[default]
    MatchScore,
    /// The mean log-odds of the executors' success probability, from their receipts: the weight that is optimal for independent
    /// voters of known accuracy (Nitzan and Paroush 1982).
    Calibrated,
}

/// What a task may cost in all. A job is only submitted while the budget can pay for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Budget {
    /// Tokens written by all executors together.
    pub tokens: u32,
    /// Jobs submitted, at most [`MAX_JOBS`].
    pub jobs: u32,
}

impl Default for Budget {
    fn default() -> Self {
        Self { tokens: 32_768, jobs: 96 }
    }
}

/// A task as its user hands it in.
#[derive(Clone, Debug)]
pub struct TaskSpec {
    /// Its id, drawn by whoever asks. Asking again with the id of a task under way changes nothing.
    pub task: TaskId,
    /// The question.
    pub question: String,
    /// The chat before the question, oldest first. The strategy `direct` passes it on as it is; planners see its end.
    pub context: Vec<Turn>,
    /// How to run it.
    pub strategy: Strategy,
    /// What a chain weighs.
    pub weighting: Weighting,
    /// How much harm a wrong answer does.
    pub risk: Risk,
    /// How long it may take, from now.
    pub deadline: Duration,
    /// The most tokens of an answer. Plans and subtasks in the middle are capped lower.
    pub max_tokens: u32,
    /// Sampling temperature of the answers in thousandths; 0 is greedy. Plans have their own, or they would all be the same.
    pub temperature_milli: u32,
    /// Nucleus in thousandths; 1000 keeps everything.
    pub top_p_milli: u32,
    /// How often the node was restarted since the task was accepted. Whoever kept the task over a restart says so here.
    pub restarts: u32,
    /// The seed that every job's seed comes from. `direct` passes it on unchanged.
    pub seed: u64,
    /// The model that every executor must run; any when absent.
    pub model: Option<ModelName>,
    /// Whether events carry text while it is made.
    pub stream: bool,
    /// What it may cost.
    pub budget: Budget,
    /// What the answer should look like.
    pub format: AnswerFormat,
    /// Texts that end the answer and are not part of it. They bind the job that gives a chain's answer, and no other: plans and
    /// the steps before it are read by the scheduler and by other steps, not by the user.
    pub stop: Vec<String>,
    /// A JSON Schema that the answer must satisfy, token by token; it binds the same jobs as `stop`. The answer is then the whole
    /// text, and chains that write the same JSON in another order or spacing vote for the same.
    pub json_schema: Option<String>,
    /// The skill that an answerer should have, in a few words. Public: its embedding is announced.
    pub skill: Option<String>,
    /// Skills that the ledger's nodes offer; may be empty. They are public, so a question can be routed to the nearest of them
    /// without its own embedding leaving this node, and plans can name tags that exist. With two or more of them and no
    /// `skill`, the question is embedded before an answerer is looked for, which costs one call of the embedder.
    pub skills: Vec<Skill>,
}

impl TaskSpec {
    /// Makes a task with the default strategy, risk, limits and budget.
    #[must_use]
    pub fn new(task: TaskId, question: impl Into<String>) -> Self {
        Self {
            task,
            question: question.into(),
            context: Vec::new(),
            strategy: Strategy::default(),
            weighting: Weighting::default(),
            risk: Risk::default(),
            deadline: Duration::from_secs(120),
            max_tokens: 256,
            temperature_milli: 500,
            top_p_milli: 950,
            restarts: 0,
            seed: 0,
            model: None,
            stream: true,
            budget: Budget::default(),
            format: AnswerFormat::Auto,
            stop: Vec::new(),
            json_schema: None,
            skill: None,
            skills: Vec::new(),
        }
    }

    /// Says whether the task can be run at all.
    ///
    /// # Errors
    /// [`TaskError::Invalid`] or [`TaskError::TooLong`], with what to change.
    pub fn validate(&self) -> Result<(), TaskError> {
        let invalid = |reason: &str| Err(TaskError::Invalid { reason: reason.to_owned() });
        if self.question.trim().is_empty() {
            return invalid("the question is empty");
        }
        if self.question.len() > MAX_QUESTION_BYTES {
            return Err(TaskError::TooLong { len: self.question.len(), max: MAX_QUESTION_BYTES });
        }
        if self.context.len() > MAX_CONTEXT_TURNS {
            return invalid("the context has more than 60 turns; drop the oldest");
        }
        let bytes = self.context.iter().fold(self.question.len(), |sum, turn| sum.saturating_add(turn.content.len()));
        if bytes > MAX_PROMPT_BYTES {
            return Err(TaskError::TooLong { len: bytes, max: MAX_PROMPT_BYTES });
        }
        if self.deadline.is_zero() || self.deadline > MAX_DEADLINE {
            return invalid("the deadline must lie between now and a day from now");
        }
        if self.max_tokens == 0 || self.budget.tokens == 0 || self.budget.jobs == 0 {
            return invalid("max_tokens and both budgets must be at least 1");
        }
        if self.stop.len() > MAX_STOPS || self.stop.iter().any(|stop| stop.is_empty() || stop.len() > MAX_STOP_BYTES) {
            return invalid("at most 8 texts of 1 to 64 bytes may end the answer");
        }
        if let Some(schema) = &self.json_schema
            && (schema.len() > MAX_SCHEMA_BYTES || !is_json_object(schema))
        {
            return invalid("the JSON Schema must be a JSON object of at most 8192 bytes");
        }
        match self.strategy {
            Strategy::Chains { planners } if planners == 0 || planners > MAX_CHAINS => {
                invalid("chains need 1 to 8 planners")
            }
            _ => Ok(()),
        }
    }
}

fn is_json_object(text: &str) -> bool {
    serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(text).is_ok()
}
