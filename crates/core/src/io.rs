//! What a node is told, and what it wants done.

use chorus_beacon::{JobDone, JobError, JobEvent, JobSpec, RunId};
use chorus_ledger::{LedgerEvent, PersistBatch};
use chorus_machine::Time;
use chorus_protocol::capability::Capability;
use chorus_protocol::entry::{Body, Entry, Equivocation};
use chorus_protocol::job::{Failure, JobKind, Output, Payload};
use chorus_protocol::{Embedding, JobId, NodeId, TaskId, Verified};
use chorus_scheduler::{TaskAnswer, TaskError, TaskEvent, TaskSpec};

/// The two gossip topics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Topic {
    /// Entries and proofs.
    Ledger,
    /// Announcements of jobs.
    Beacon,
}

/// What a node had on disk when it stopped.
#[derive(Clone, Debug, Default)]
pub struct Restored {
    /// Entries that it had verified.
    pub entries: Vec<Verified<Entry>>,
    /// Proofs that convict authors.
    pub proofs: Vec<Equivocation>,
    /// What the ledger remembers of authors beyond their entries; opaque.
    pub marks: Vec<(NodeId, Vec<u8>)>,
}

/// Everything that can happen to a node.
#[derive(Debug)]
pub enum Input {
    /// Something on the network.
    Net(NetInput),
    /// A user wants something.
    Command(Command),
    /// The disk answered.
    Store(StoreInput),
    /// The engine, or the embedder, answered.
    Engine(EngineInput),
    /// A queue was full: this effect was not carried out. The node treats it as the failure that it is.
    Overloaded(Box<Effect>),
}

/// Something on the network.
#[derive(Debug)]
pub enum NetInput {
    /// A connection to a peer is up.
    PeerUp(NodeId),
    /// The last connection to a peer is gone.
    PeerDown(NodeId),
    /// A gossiped frame. The node answers with [`Effect::Validate`] for this token, once.
    Gossip {
        /// The shell's number for this frame.
        token: u64,
        /// Who passed it on; not necessarily who wrote it.
        from: NodeId,
        /// Where it was heard.
        topic: Topic,
        /// The frame.
        bytes: Vec<u8>,
    },
    /// A frame from one peer to this node.
    Direct {
        /// Who sent it, proven by the encrypted stream.
        from: NodeId,
        /// The frame.
        bytes: Vec<u8>,
    },
    /// A direct frame could not be delivered.
    SendFailed {
        /// To whom.
        to: NodeId,
    },
}

/// What a user, or the shell on a user's behalf, asks of a node.
#[derive(Debug)]
pub enum Command {
    /// Run a task.
    Ask(Box<TaskSpec>),
    /// Stop a task.
    Cancel(TaskId),
    /// Hand in a job that serves no task: the shell itself is the customer. Answered by [`Effect::Job`] and, once, by
    /// [`Effect::JobDone`].
    Submit(Box<JobSpec>),
    /// Take such a job back.
    Withdraw(JobId),
    /// Write an entry of the shell's own into the ledger. What becomes of it is only logged: say it again when it matters.
    Append(Box<Body>),
    /// This is what the node can do from now on, and how many jobs at a time.
    Offer(Box<Capability>),
    /// The node is about to leave: take no new work, tell the ledger.
    Drain,
}

/// The disk answered.
#[derive(Debug)]
pub enum StoreInput {
    /// A batch is written. Only of batches that ask to be `durable` is the node waiting to hear it.
    Persisted {
        /// The batch's number.
        batch: u64,
    },
    /// A batch could not be written.
    Failed {
        /// The batch's number.
        batch: u64,
        /// Why.
        reason: String,
    },
}

/// The engine, or the embedder, answered.
#[derive(Debug)]
pub enum EngineInput {
    /// A run has made tokens.
    Progress {
        /// The run.
        run: RunId,
        /// Tokens so far.
        tokens: u32,
        /// Text since the last one.
        text: String,
    },
    /// A run has ended.
    Done {
        /// The run.
        run: RunId,
        /// What it brought.
        result: Result<Output, Failure>,
    },
    /// A text was embedded, or could not be.
    Embedded {
        /// The scheduler's number for the request.
        request: u64,
        /// The embedding; `None` where there is no embedder.
        embedding: Option<Embedding>,
    },
}

/// Whether a gossiped frame may be passed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Acceptance {
    /// New and good: pass it on.
    Accept,
    /// Nothing new, or nobody's fault: drop it.
    Ignore,
    /// No honest node passes such a thing on.
    Reject {
        /// What is wrong with it.
        reason: String,
    },
}

impl From<chorus_ledger::Acceptance> for Acceptance {
    fn from(judged: chorus_ledger::Acceptance) -> Self {
        match judged {
            chorus_ledger::Acceptance::Accept => Self::Accept,
            chorus_ledger::Acceptance::Ignore => Self::Ignore,
            chorus_ledger::Acceptance::Reject { reason } => Self::Reject { reason: reason.to_string() },
        }
    }
}

/// Everything that a node can want done.
#[derive(Debug)]
pub enum Effect {
    /// Gossip a frame.
    Publish {
        /// Where.
        topic: Topic,
        /// The frame.
        bytes: Vec<u8>,
    },
    /// Send a frame to one peer.
    Send {
        /// To whom.
        to: NodeId,
        /// The frame.
        bytes: Vec<u8>,
    },
    /// Say whether a gossiped frame may be passed on.
    Validate {
        /// The frame's token.
        token: u64,
        /// The verdict.
        acceptance: Acceptance,
    },
    /// A peer broke the rules.
    Penalise {
        /// Who.
        peer: NodeId,
        /// How.
        reason: String,
    },
    /// Write to disk.
    Persist(PersistBatch),
    /// Run the engine.
    Run {
        /// The run's name.
        run: RunId,
        /// What kind of work it is.
        kind: JobKind,
        /// The work.
        payload: Box<Payload>,
        /// When it must be done.
        deadline: Time,
    },
    /// Stop a run.
    Stop {
        /// The run.
        run: RunId,
    },
    /// Embed a text.
    Embed {
        /// Comes back in [`EngineInput::Embedded`].
        request: u64,
        /// The text.
        text: String,
    },
    /// Tell whoever watches a task.
    Task(TaskEvent),
    /// A task has ended.
    TaskDone {
        /// The task.
        task: TaskId,
        /// How.
        result: Result<Box<TaskAnswer>, TaskError>,
    },
    /// Tell the shell of a job that it handed in by [`Command::Submit`].
    Job(JobEvent),
    /// Such a job has ended.
    JobDone {
        /// Which.
        job: JobId,
        /// How.
        result: Result<Box<JobDone>, JobError>,
    },
    /// Tell the log and the metrics.
    Event(NodeEvent),
}

/// Something worth a line in the log.
#[derive(Debug)]
pub enum NodeEvent {
    /// The ledger changed.
    Ledger(LedgerEvent),
    /// The executor did something.
    Executor(chorus_beacon::ExecutorEvent),
    /// A job of this node's own was handed in.
    JobSubmitted {
        /// The job.
        job: JobId,
        /// The task it serves.
        task: TaskId,
        /// What kind of work it is.
        kind: JobKind,
    },
    /// Something happened to such a job. Progress is not told here: it is what watchers of the task read.
    Job(JobEvent),
    /// Such a job ended.
    JobEnded {
        /// The job.
        job: JobId,
        /// Why it brought nothing, if it did not.
        error: Option<JobError>,
    },
    /// A frame of the node's own making was too large to send; this is a bug, or a payload near the limit.
    FrameTooLarge {
        /// What it was.
        what: &'static str,
        /// Its size in bytes.
        len: usize,
    },
    /// An entry of the node's own could not be written.
    AppendFailed {
        /// Why.
        reason: String,
    },
}
