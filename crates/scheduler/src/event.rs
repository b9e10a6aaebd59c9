//! What a user is told while a task runs: one self-explanatory JSON object an event, in order, numbered from 0, or from a
//! multiple of [`crate::spec::EVENTS_A_RUN`] after a restart of the node.

use std::time::Duration;

use chorus_machine::Time;
use chorus_protocol::job::Risk;
use chorus_protocol::{BeaconId, JobId, NodeId, TaskId};
use serde::Serialize;

use crate::error::TaskError;
use crate::plan::Step;
use crate::report::{TaskAnswer, millis};
use crate::vote::VoteShare;

/// Something that happened to a task.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TaskEvent {
    /// The task.
    pub task: TaskId,
    /// Its number within the task, without gaps within a run, for `id` and `Last-Event-ID` of a stream.
    pub index: u64,
    /// When it happened, in the shell's time; not serialised, because it means nothing elsewhere.
    #[serde(skip)]
    pub at: Time,
    /// How long after the question it happened.
    #[serde(rename = "elapsed_ms", serialize_with = "millis")]
    pub elapsed: Duration,
    /// What happened.
    #[serde(flatten)]
    pub kind: TaskEventKind,
}

/// Which job of a task an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    /// The job.
    pub job: JobId,
    /// The chain it belongs to, from 0.
    pub chain: u8,
    /// `plan`, `step` or `answer` (the step that gives the chain's answer).
    pub stage: &'static str,
    /// The step's number in its plan, from 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step: Option<u8>,
}

/// What happened to a task.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum TaskEventKind {
    /// The node was restarted in the middle of the task, and runs it anew. What an earlier run brought is lost with its events;
    /// the seeds are the same.
    Resumed {
        /// How often that has happened.
        restarts: u32,
    },
    /// It is under way.
    Accepted {
        /// How it will be run.
        strategy: &'static str,
        /// Chains it starts with.
        chains: u8,
        /// How much harm a wrong answer does.
        risk: Risk,
        /// How long it may take.
        #[serde(rename = "deadline_ms", serialize_with = "millis")]
        deadline: Duration,
        /// Why that is not what was asked for.
        #[serde(skip_serializing_if = "Option::is_none")]
        fallback: Option<String>,
    },
    /// A job was announced.
    Announced {
        /// Which.
        #[serde(flatten)]
        place: Place,
        /// The announcement.
        beacon: BeaconId,
        /// How many nodes the ledger says can do it.
        candidates: usize,
    },
    /// A bid came.
    Bid {
        /// For which job.
        #[serde(flatten)]
        place: Place,
        /// Who bids.
        node: NodeId,
        /// The match score recomputed from the ledger.
        score: f64,
        /// What the bidder claims.
        claimed: f64,
    },
    /// An executor was elected.
    Elected {
        /// For which job.
        #[serde(flatten)]
        place: Place,
        /// Who.
        node: NodeId,
        /// Its match score.
        score: f64,
        /// Its fencing token.
        fence: u64,
        /// How many bid.
        bids: usize,
        /// Whether it is a second executor beside a slow one.
        hedge: bool,
    },
    /// The executor has begun.
    Started {
        /// Which job.
        #[serde(flatten)]
        place: Place,
        /// Who.
        node: NodeId,
    },
    /// New text. After a `lost`, and beside a hedge, the text of another node starts from its beginning.
    Text {
        /// Of which job.
        #[serde(flatten)]
        place: Place,
        /// From whom.
        node: NodeId,
        /// Tokens so far.
        tokens: u32,
        /// The text since the last event.
        text: String,
    },
    /// An executor was lost; the job goes on with another.
    Lost {
        /// Which job.
        #[serde(flatten)]
        place: Place,
        /// Who.
        node: NodeId,
        /// Why.
        reason: String,
    },
    /// A job found every node busy, and waits for a free one.
    Waiting {
        /// Which job.
        #[serde(flatten)]
        place: Place,
        /// Why.
        reason: String,
    },
    /// A chain has a plan.
    Planned {
        /// Which chain.
        chain: u8,
        /// Who planned.
        planner: NodeId,
        /// The plan.
        steps: Vec<Step>,
    },
    /// A chain's plan is of no use, or could not be carried out.
    PlanRejected {
        /// Which chain.
        chain: u8,
        /// What is wrong.
        reason: String,
        /// `repair`: the planner is asked once more. `direct`: the chain answers the question without a plan.
        then: &'static str,
    },
    /// A step is done.
    SubtaskDone {
        /// Which.
        #[serde(flatten)]
        place: Place,
        /// Who did it.
        node: NodeId,
        /// Its match score.
        score: f64,
        /// Tokens written.
        tokens: u32,
        /// From submission to result.
        #[serde(rename = "took_ms", serialize_with = "millis")]
        took: Duration,
        /// The result, or its beginning.
        result: String,
    },
    /// A chain ended.
    ChainDone {
        /// Which.
        chain: u8,
        /// Its answer, if it has one.
        answer: Option<String>,
        /// Its weight in the vote.
        weight: f64,
        /// Why it has no answer.
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
    /// More chains were started.
    Widened {
        /// How many.
        chains: u8,
        /// Why.
        reason: String,
    },
    /// The vote was counted.
    Voted {
        /// The answer that won.
        answer: String,
        /// How far it leads.
        margin: f64,
        /// Whether two answers weigh the same.
        tie: bool,
        /// Whether the margin is too small to trust.
        low_margin: bool,
        /// Whether chains were still under way that could not have changed it.
        early: bool,
        /// Every answer and its votes.
        votes: Vec<VoteShare>,
    },
    /// The task has its answer. The last event.
    Finished {
        /// All of it.
        result: Box<TaskAnswer>,
    },
    /// The task has none. The last event.
    Failed {
        /// Why, and what to do.
        error: TaskError,
    },
}

/// Where a task stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TaskStatus {
    /// The task.
    pub task: TaskId,
    /// How long it has been under way.
    #[serde(rename = "elapsed_ms", serialize_with = "millis")]
    pub elapsed: Duration,
    /// What it waits for.
    pub waiting_for: String,
}
