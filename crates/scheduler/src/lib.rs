//! How a task is run: strategies, budgets, chains and the weighted vote (Symphony, "Chains and the vote" in the design).
//!
//! The scheduler is one customer of the beacon's counter. It decides *what* jobs a task is made of; *who* does each of them, and
//! what happens when that node dies, is the beacon's business. Of the beacon it knows only the counter's types.
//!
//! ```text
//!              Ask, Cancel                          JobSpec
//!    user ───────────────────▶ ┌───────────┐ ───────────────────▶ beacon (elects, leases, retries, hedges)
//!         ◀─────────────────── │ Scheduler │ ◀───────────────────
//!          TaskEvent*, Done    └───────────┘   JobEvent*, JobDone
//!                                 │     ▲
//!                            Embed│     │Embedded
//!                                 ▼     │
//!                              the node's embedder
//! ```
//!
//! `direct` is one `Answer` job. `chains`, as published and with what the publication leaves open filled in:
//!
//! 1. *M* planners (default 3) each decompose the question. They are elected one after the other, a few milliseconds apart, so
//!    that each can pass over the executors of the others.
//! 2. A plan is JSON under a small schema ([`plan`]). It is validated; a bad one is repaired once with the error in context; a
//!    second bad one turns that chain into `direct`. Small models plan badly, so this path is quick and ordinary.
//! 3. Each subtask carries a requirement of its own. Only its embedding and a few tags are announced. A subtask runs as soon
//!    as the subtasks that it needs are done; its executor sees the subtask and their results, and nothing else. The last
//!    subtask alone sees the question, and gives the chain's answer.
//! 4. A chain weighs the mean match score of its executors, or their track record as log-odds ([`Weighting`]).
//! 5. The answers are extracted from the models' chatter and normalised ([`answer`]), then put to a weighted vote ([`vote`]).
//!    Ties and low margins are reported. A low margin at high risk buys two more chains, once.
//!
//! Every task ends exactly once, at its deadline at the latest: with an answer while one chain lives, else with a [`TaskError`]
//! that says what to do. All randomness of the models is seeded from the task's seed ([`seed`]), so a task can be run again.

pub mod answer;
mod budget;
mod chain;
mod desk;
mod error;
mod event;
pub mod plan;
mod prompt;
mod report;
mod requirement;
mod scheduler;
pub mod seed;
pub mod spec;
mod task;
pub mod vote;
mod work;

pub use answer::AnswerFormat;
pub use error::{ChainError, TaskError};
pub use event::{Place, TaskEvent, TaskEventKind, TaskStatus};
pub use report::{ChainReport, StepReport, TaskAnswer};
pub use scheduler::{Scheduler, SchedulerConfig, SchedulerEffect, SchedulerInput};
pub use spec::{Budget, Strategy, TaskSpec, Weighting};
pub use vote::VoteShare;
