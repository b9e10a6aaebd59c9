//! What is asked of the swarm: tasks at drawn moments, by drawn nodes.

use std::time::Duration;

use chorus_core::{Strategy, TaskSpec};
use chorus_machine::{Rng, Time};
use chorus_protocol::TaskId;
use chorus_protocol::capability::ModelName;

use crate::host::{model_name, skill_text};
use crate::scenario::Scenario;

/// Planners of a task that is run as chains.
const PLANNERS: u8 = 3;

/// One task of the workload.
#[derive(Clone, Debug)]
pub struct Question {
    /// Its id.
    pub task: TaskId,
    /// When it is asked.
    pub at: Time,
    /// Draws who asks, among the honest nodes that run then.
    pub who: u64,
    /// How it is run.
    pub strategy: Strategy,
    /// What is asked.
    pub text: String,
    /// The skill that is looked for.
    pub skill: String,
    /// The model that is asked for, if any.
    pub model: Option<ModelName>,
    /// How long it may take.
    pub deadline: Duration,
    /// Tokens of an answer, at most.
    pub max_tokens: u32,
    /// Whether text is wanted while it is made.
    pub stream: bool,
    /// Seed of the sampler.
    pub seed: u64,
}

impl Question {
    /// Returns what is handed to the node.
    #[must_use]
    pub fn spec(&self) -> TaskSpec {
        TaskSpec {
            strategy: self.strategy,
            deadline: self.deadline,
            max_tokens: self.max_tokens,
            seed: self.seed,
            model: self.model.clone(),
            stream: self.stream,
            skill: Some(self.skill.clone()),
            ..TaskSpec::new(self.task, self.text.clone())
        }
    }
}

/// Draws the workload of a scenario.
pub fn draw(scenario: &Scenario, rng: &mut Rng) -> Vec<Question> {
    let work = &scenario.work;
    let (from, until) = (Duration::from_millis(work.from_ms), Duration::from_millis(work.until_ms));
    (0..work.tasks)
        .map(|number| {
            let [a, b] = [rng.below(1_000), rng.below(1_000)];
            let chains = rng.chance(work.chains);
            let named = rng.chance(work.named_model);
            Question {
                task: TaskId::from_bytes(rng.bytes()),
                at: Time::ZERO + rng.between(from, until),
                who: rng.next_u64(),
                strategy: if chains { Strategy::Chains { planners: PLANNERS } } else { Strategy::Direct },
                text: format!("Question {number}: what is {a} + {b}?"),
                skill: skill_text(rng.below(u64::from(scenario.swarm.skills))),
                model: named.then(|| model_name(rng.below(u64::from(scenario.swarm.models)))),
                deadline: Duration::from_millis(work.deadline_ms),
                max_tokens: work.max_tokens,
                stream: rng.chance(work.stream),
                seed: rng.next_u64(),
            }
        })
        .collect()
}
