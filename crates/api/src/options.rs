//! How a task is to be run, as a request says it: the fields of `POST /v1/tasks`, and the `chorus` object of a chat completion.

use std::time::Duration;

use chorus_core::{Strategy, TaskSpec, Weighting};
use chorus_protocol::Text;
use chorus_protocol::job::Risk;

use crate::error::{Fault, SWARM_MODEL};
use crate::fields::Fields;

/// The fields that are read here.
pub(crate) const NAMES: [&str; 7] = ["strategy", "planners", "weighting", "risk", "deadline_s", "model", "skill"];
/// Planners that a task may ask for.
const MAX_PLANNERS: u64 = 8;
/// Planners when a request does not say.
const DEFAULT_PLANNERS: u8 = 3;
/// Seconds that a task may take.
const MAX_DEADLINE_S: f64 = 86_400.0;
/// The most tokens of an answer that a request may ask for.
pub(crate) const MAX_TOKENS: u64 = 131_072;

/// Writes what a request says about the run into a task. What it does not say stays as it is.
pub(crate) fn apply(fields: &Fields<'_>, spec: &mut TaskSpec) -> Result<(), Fault> {
    let planners = fields.int("planners", 1, MAX_PLANNERS)?.and_then(|planners| u8::try_from(planners).ok());
    let chains = Strategy::Chains { planners: planners.unwrap_or(DEFAULT_PLANNERS) };
    match fields.word("strategy", &[("direct", Strategy::Direct), ("chains", chains)])? {
        Some(strategy) => spec.strategy = strategy,
        None if planners.is_some() => spec.strategy = chains,
        None => {}
    }
    let weightings = [("match_score", Weighting::MatchScore), ("calibrated", Weighting::Calibrated)];
    if let Some(weighting) = fields.word("weighting", &weightings)? {
        spec.weighting = weighting;
    }
    if let Some(risk) = fields.word("risk", &[("low", Risk::Low), ("medium", Risk::Medium), ("high", Risk::High)])? {
        spec.risk = risk;
    }
    if let Some(seconds) = fields.number("deadline_s", 0.001, MAX_DEADLINE_S)? {
        spec.deadline = Duration::from_secs_f64(seconds);
    }
    // The swarm's own name stands for any model.
    if let Some(model) = fields.str("model")?.filter(|model| *model != SWARM_MODEL && !model.is_empty()) {
        let name = Text::new(model).map_err(|error| {
            Fault::field(fields.path("model"), "invalid_value", format!("the model's name is too long: {error}"))
        })?;
        spec.model = Some(name);
    }
    if let Some(skill) = fields.str("skill")? {
        spec.skill = Some(skill.to_owned());
    }
    Ok(())
}

/// How an answer's tokens are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Sampling {
    pub max_tokens: u32,
    pub temperature: f64,
    pub top_p: f64,
    /// Drawn afresh when the request does not say.
    pub seed: Option<u64>,
}

/// Reads `temperature`, `top_p`, `seed`, and `max_tokens` under any of its names.
pub(crate) fn sampling(fields: &Fields<'_>, defaults: Sampling) -> Result<Sampling, Fault> {
    let mut max_tokens = None;
    for name in ["max_completion_tokens", "max_tokens"] {
        let given = fields.int(name, 1, MAX_TOKENS)?.and_then(|tokens| u32::try_from(tokens).ok());
        max_tokens = max_tokens.or(given);
    }
    let top_p = fields.number("top_p", 0.001, 1.0)?;
    Ok(Sampling {
        max_tokens: max_tokens.unwrap_or(defaults.max_tokens),
        temperature: fields.number("temperature", 0.0, 2.0)?.unwrap_or(defaults.temperature),
        top_p: top_p.unwrap_or(defaults.top_p),
        seed: seed(fields)?.or(defaults.seed),
    })
}

/// A seed is any whole number of 64 bits, with or without a sign.
fn seed(fields: &Fields<'_>) -> Result<Option<u64>, Fault> {
    let negative = fields.get("seed").filter(|seed| !seed.is_u64()).and_then(serde_json::Value::as_i64);
    match negative {
        Some(seed) => Ok(Some(seed.cast_unsigned())),
        None => fields.int("seed", 0, u64::MAX),
    }
}

impl Sampling {
    /// Writes the sampling into a task. `fresh` is the seed when the request gave none.
    pub(crate) fn apply(&self, spec: &mut TaskSpec, fresh: u64) {
        spec.max_tokens = self.max_tokens;
        spec.temperature_milli = milli(self.temperature);
        spec.top_p_milli = milli(self.top_p);
        spec.seed = self.seed.unwrap_or(fresh);
        // A budget that cannot pay for one answer would fail every task that asks for a long one.
        spec.budget.tokens = spec.budget.tokens.max(self.max_tokens);
    }
}

fn milli(value: f64) -> u32 {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked to lie between 0 and 2")]
    let milli = (value * 1_000.0).round() as u32;
    milli
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use chorus_protocol::TaskId;
    use serde_json::{Value, json};

    use super::*;

    fn applied(value: &Value) -> Result<TaskSpec, Fault> {
        let mut spec = TaskSpec::new(TaskId::default(), "?");
        apply(&Fields::root(value)?, &mut spec)?;
        Ok(spec)
    }

    #[test]
    fn options_reach_the_task() {
        let spec = applied(&json!({
            "strategy": "chains", "planners": 5, "weighting": "calibrated", "risk": "high", "deadline_s": 1.5,
            "model": "tiny", "skill": "arithmetic",
        }))
        .unwrap();
        assert_eq!(spec.strategy, Strategy::Chains { planners: 5 });
        assert_eq!((spec.weighting, spec.risk), (Weighting::Calibrated, Risk::High));
        assert_eq!(spec.deadline, Duration::from_millis(1_500));
        assert_eq!(spec.model.unwrap().as_str(), "tiny");
        assert_eq!(spec.skill.as_deref(), Some("arithmetic"));
        assert_eq!(applied(&json!({"strategy": "direct"})).unwrap().strategy, Strategy::Direct);
        assert_eq!(applied(&json!({"planners": 2})).unwrap().strategy, Strategy::Chains { planners: 2 });
        assert_eq!(applied(&json!({"model": "chorus"})).unwrap().model, None);
        for bad in [json!({"planners": 9}), json!({"risk": "huge"}), json!({"deadline_s": -1}), json!({"model": 3})] {
            assert!(applied(&bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sampling_has_defaults_and_bounds() {
        let defaults = Sampling { max_tokens: 7, temperature: 0.5, top_p: 0.9, seed: None };
        let read = |value: Value| sampling(&Fields::root(&value).unwrap(), defaults);
        assert_eq!(read(json!({})).unwrap(), defaults);
        let all = read(json!({"max_tokens": 3, "max_completion_tokens": 4, "temperature": 0, "top_p": 1, "seed": -1}));
        assert_eq!(all.unwrap(), Sampling { max_tokens: 4, temperature: 0.0, top_p: 1.0, seed: Some(u64::MAX) });
        for bad in [
            json!({"max_tokens": 0}),
            json!({"temperature": 2.1}),
            json!({"top_p": 0}),
            json!({"seed": 0.5}),
            json!({"seed": "x"}),
            json!({"max_completion_tokens": "many"}),
        ] {
            assert!(read(bad.clone()).is_err(), "{bad}");
        }
        let mut spec = TaskSpec::new(TaskId::default(), "?");
        Sampling { max_tokens: 100_000, temperature: 0.7, top_p: 0.95, seed: None }.apply(&mut spec, 9);
        assert_eq!((spec.temperature_milli, spec.top_p_milli, spec.seed), (700, 950, 9));
        assert!(spec.budget.tokens >= spec.max_tokens);
    }
}
