//! The machine: tasks in, jobs out, and every answer to the task that waits for it.

use std::collections::BTreeMap;
use std::time::Duration;

use chorus_beacon::job::{JobDone, JobError, JobEvent, JobSpec};
use chorus_machine::{Ctx, Machine, Outbox, Time, earliest};
use chorus_protocol::{Embedding, JobId, TaskId};

use crate::desk::{Desk, Routes};
use crate::error::TaskError;
use crate::event::{TaskEvent, TaskEventKind, TaskStatus};
use crate::report::TaskAnswer;
use crate::spec::TaskSpec;
use crate::task::Task;

/// What the scheduler may do, in numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Tasks at a time.
    pub max_tasks: usize,
    /// Steps that a planner is asked for at most, 1 to 8. Every step costs a round of jobs, and small models do not plan far.
    pub plan_steps: u8,
    /// How long a planner waits for the election of the one before it, so that they are different nodes.
    pub planner_stagger: Duration,
    /// Whether a task of low risk ends as soon as the chains that are still out cannot change the vote.
    pub stop_when_decided: bool,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self { max_tasks: 64, plan_steps: 4, planner_stagger: Duration::from_millis(250), stop_when_decided: true }
    }
}

/// What can happen to the scheduler.
#[derive(Debug)]
pub enum SchedulerInput {
    /// A user asks.
    Ask(Box<TaskSpec>),
    /// A user no longer wants to know.
    Cancel(TaskId),
    /// Something happened to a job on its way.
    Job(JobEvent),
    /// A job ended.
    JobDone {
        /// Which.
        job: JobId,
        /// How.
        result: Result<Box<JobDone>, JobError>,
    },
    /// The embedder answered, or cannot.
    Embedded {
        /// Which request.
        request: u64,
        /// The text's meaning; absent on a node without an embedder.
        embedding: Option<Embedding>,
    },
}

/// What the scheduler wants done.
#[derive(Debug)]
pub enum SchedulerEffect {
    /// Hand a job in at the beacon's counter.
    Submit(Box<JobSpec>),
    /// Take a job back. Its end need not be reported.
    CancelJob(JobId),
    /// Embed a text on this node, and answer with [`SchedulerInput::Embedded`].
    Embed {
        /// The request.
        request: u64,
        /// The text: never sent elsewhere.
        text: String,
    },
    /// Tell whoever watches.
    Event(TaskEvent),
    /// A task has ended: once for every [`SchedulerInput::Ask`] of an id that is not under way.
    Done {
        /// Which.
        task: TaskId,
        /// How.
        result: Result<Box<TaskAnswer>, TaskError>,
    },
}

/// Runs the tasks of one node.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    tasks: BTreeMap<TaskId, Task>,
    routes: Routes,
}

impl Scheduler {
    /// Makes a scheduler without tasks.
    #[must_use]
    pub fn new(config: SchedulerConfig) -> Self {
        Self { config, tasks: BTreeMap::new(), routes: Routes::default() }
    }

    /// Returns how many tasks are under way.
    #[must_use]
    pub fn active(&self) -> usize {
        self.tasks.len()
    }

    /// Says what every task under way waits for.
    pub fn status(&self, now: Time) -> impl Iterator<Item = TaskStatus> + '_ {
        self.tasks.values().map(move |task| task.status(now))
    }

    fn ask(&mut self, cx: &mut Ctx<'_>, spec: TaskSpec, out: &mut Outbox<SchedulerEffect>) {
        let id = spec.task;
        if self.tasks.contains_key(&id) {
            return;
        }
        let refusal = if self.tasks.len() >= self.config.max_tasks {
            Err(TaskError::Overloaded { limit: self.config.max_tasks })
        } else {
            spec.validate()
        };
        if let Err(error) = refusal {
            let kind = TaskEventKind::Failed { error: error.clone() };
            out.push(SchedulerEffect::Event(TaskEvent {
                task: id,
                index: 0,
                at: cx.now,
                elapsed: Duration::ZERO,
                kind,
            }));
            out.push(SchedulerEffect::Done { task: id, result: Err(error) });
            return;
        }
        let task = Task::begin(spec, &mut Desk { cx, out, config: &self.config, routes: &mut self.routes });
        self.tasks.insert(id, task);
        self.tidy(id);
    }

    /// Lets a task do something, and forgets it if that was its end.
    fn with(
        &mut self,
        cx: &mut Ctx<'_>,
        id: TaskId,
        out: &mut Outbox<SchedulerEffect>,
        act: impl FnOnce(&mut Task, &mut Desk<'_, '_>),
    ) {
        if let Some(task) = self.tasks.get_mut(&id) {
            act(task, &mut Desk { cx, out, config: &self.config, routes: &mut self.routes });
            self.tidy(id);
        }
    }

    fn tidy(&mut self, id: TaskId) {
        if self.tasks.get(&id).is_some_and(Task::is_over) {
            self.tasks.remove(&id);
            self.routes.forget(id);
        }
    }
}

impl Machine for Scheduler {
    type Input = SchedulerInput;
    type Effect = SchedulerEffect;

    fn handle(&mut self, cx: &mut Ctx<'_>, input: SchedulerInput, out: &mut Outbox<SchedulerEffect>) {
        match input {
            SchedulerInput::Ask(spec) => self.ask(cx, *spec, out),
            SchedulerInput::Cancel(task) => self.with(cx, task, out, Task::cancel),
            SchedulerInput::Job(event) => {
                if let Some(&task) = self.routes.jobs.get(&event.job) {
                    self.with(cx, task, out, |task, desk| task.on_job_event(desk, event));
                }
            }
            SchedulerInput::JobDone { job, result } => {
                if let Some(task) = self.routes.jobs.remove(&job) {
                    self.with(cx, task, out, |task, desk| task.on_job_done(desk, job, result));
                }
            }
            SchedulerInput::Embedded { request, embedding } => {
                if let Some(task) = self.routes.embedded(request, embedding.as_ref()) {
                    self.with(cx, task, out, |task, desk| task.on_embedded(desk, request, embedding.as_ref()));
                }
            }
        }
    }

    fn deadline(&self) -> Option<Time> {
        self.tasks.values().map(Task::deadline).fold(None, earliest)
    }

    fn expire(&mut self, cx: &mut Ctx<'_>, out: &mut Outbox<SchedulerEffect>) {
        let due: Vec<TaskId> = self
            .tasks
            .iter()
            .filter(|(_, task)| task.deadline().is_some_and(|at| at <= cx.now))
            .map(|(id, _)| *id)
            .collect();
        for id in due {
            self.with(cx, id, out, Task::expire);
        }
    }
}

#[cfg(test)]
mod tests;
