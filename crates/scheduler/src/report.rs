//! What a task brought, and who did what for it.

use std::time::Duration;

use chorus_protocol::job::Finish;
use chorus_protocol::{NodeId, TaskId};
use serde::{Serialize, Serializer};

use crate::vote::VoteShare;

/// Serialises a duration as milliseconds with three decimals.
pub(crate) fn millis<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64((duration.as_secs_f64() * 1e6).round() / 1e3)
}

/// One step of a chain, as it was done.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepReport {
    /// What was asked of the executor. Empty when it was the question itself.
    pub subtask: String,
    /// The skill that was looked for.
    pub requirement: String,
    /// Who did it.
    pub executor: NodeId,
    /// Its match score, recomputed from the ledger, in [0, 1].
    pub score: f64,
    /// Its success probability when the result came, in [0, 1].
    pub reputation: f64,
    /// Tokens written.
    pub tokens: u32,
    /// From submission to the first lease.
    #[serde(rename = "election_ms", serialize_with = "millis")]
    pub election: Duration,
    /// From submission to result.
    #[serde(rename = "elapsed_ms", serialize_with = "millis")]
    pub elapsed: Duration,
}

/// One chain, as it went.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ChainReport {
    /// Its number, from 0.
    pub chain: u8,
    /// Who planned it; nobody did in the strategy `direct`.
    pub planner: Option<NodeId>,
    /// What was done, in order of completion. A chain that gave its plan up keeps the steps that were done before.
    pub steps: Vec<StepReport>,
    /// Its answer, if it has one.
    pub answer: Option<String>,
    /// Its weight in the vote; 0 without an answer.
    pub weight: f64,
    /// Why it gave its plan up and answered the question directly.
    pub fallback: Option<String>,
    /// Why it has no answer.
    pub error: Option<String>,
}

/// What a task brought.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TaskAnswer {
    /// The task.
    pub task: TaskId,
    /// The answer that won the vote, extracted and tidied. The whole text when the question wants prose.
    pub answer: String,
    /// The full text of the heaviest chain that gave this answer.
    pub text: String,
    /// Why that text ended: `stop` when its model or a stop text ended it, `length` when the token limit cut it off.
    pub finish: Finish,
    /// How far the winner leads the next answer, as a share of all votes, in [0, 1]. One chain alone has a margin of 1.
    pub margin: f64,
    /// Whether two answers weigh the same; the one with more chains won, then the one with the heavier chain.
    pub tie: bool,
    /// Whether the margin is too small to trust.
    pub low_margin: bool,
    /// Every answer and its votes, the winner first.
    pub votes: Vec<VoteShare>,
    /// Every chain, counted or not.
    pub chains: Vec<ChainReport>,
    /// Tokens read by all executors.
    pub prompt_tokens: u64,
    /// Tokens written by all executors.
    pub completion_tokens: u64,
    /// Jobs submitted.
    pub jobs: u32,
    /// From question to answer.
    #[serde(rename = "elapsed_ms", serialize_with = "millis")]
    pub elapsed: Duration,
    /// The strategy that brought the answer.
    pub strategy: &'static str,
    /// Why that is not the strategy that was asked for, or not with as many planners.
    pub fallback: Option<String>,
}
