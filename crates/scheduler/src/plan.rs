//! A plan: what a planner's text must hold to be carried out.
//!
//! 1. The grammar ([`schema`]) keeps an engine that has one to the right shape. Engines without one write what they like, so
//!    the parser takes code fences, bare lists, plain strings and the usual names of the fields, among them Symphony's own
//!    `{"subtasks": ["Q1: …"]}`.
//! 2. What is harmless is tidied: a step said twice, and a need that cannot be meant: of the step itself, of a step that is not
//!    there, or of the last one, which is the answer. Small models number badly, and a step loses nothing by not waiting for a
//!    result that will never be.
//! 3. What would change the meaning is an error, worded for the planner, which gets one chance to repair it.
//! 4. A step that says nothing (`How to do it`) is no mistake of form but a model out of its depth. It is not asked again
//!    ([`PlanError::is_repairable`]): of four such plans that SmolLM2-135M was told to repair, none became better.
//! 5. So is a step that a planner took over from its example.
//! 6. A plan that was cut off by the token limit keeps its whole steps and gets a last one that answers the question.
//!
//! The last step is the answer. It needs whatever no other step uses, or that work would be lost.

use std::collections::BTreeSet;

use serde::Serialize;
use serde_json::{Value, json};

/// Steps of a plan.
pub const MAX_STEPS: usize = 8;
/// Bytes of a step's task.
pub const MAX_ASK_BYTES: usize = 600;
/// Bytes of a step's requirement. It is announced in part, so it must name a kind of work, not the question.
pub const MAX_SKILL_BYTES: usize = 48;
/// Words of a step's requirement. What is longer is no kind of work but a piece of the question, and is not announced.
pub const MAX_SKILL_WORDS: usize = 4;
/// Bytes of a planner's text that are looked at.
const MAX_TEXT_BYTES: usize = 16 * 1024;
/// A question and its plan, shown to planners as if it had been asked before.
pub(crate) const EXAMPLE: (&str, &str) = (
    "Ben has 3 boxes with 8 pens each and loses 5 pens. Is the number of pens left even? Answer yes or no.",
    concat!(
        r#"{"steps": [{"ask": "Compute 3 boxes times 8 pens minus 5 lost pens.", "skill": "arithmetic", "needs": []}, "#,
        r#"{"ask": "Say whether the number of pens left is even.", "skill": "logic", "needs": [1]}]}"#
    ),
);
/// What stands in place of a last step that was cut off.
pub const ANSWER_THE_QUESTION: &str = "Answer the question.";
/// The requirement of a step that names none.
pub const DEFAULT_SKILL: &str = "general reasoning";

/// One step of a plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Step {
    /// What its executor is asked.
    pub ask: String,
    /// The kind of work it is.
    pub skill: String,
    /// The steps whose results it needs, numbered from 1, in order.
    pub needs: Vec<u8>,
}

/// Steps that can be carried out: 1 to [`MAX_STEPS`], without cycles, the last one needing all loose ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    steps: Vec<Step>,
}

/// Why a planner's text is no plan. The text of the error is shown to the planner.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// There is no JSON in it, or it is broken.
    #[error("it is not JSON; write one JSON object with a list \"steps\"")]
    NotJson,
    /// The list of steps is missing or empty.
    #[error("it has no steps; \"steps\" must list at least one")]
    NoSteps,
    /// There are too many.
    #[error("it has {len} steps; use at most {MAX_STEPS}")]
    TooMany {
        /// How many there are.
        len: usize,
    },
    /// A step does not say what to do.
    #[error("step {step} does not say what to do; \"ask\" must be a task in plain words")]
    EmptyAsk {
        /// The step's number.
        step: usize,
    },
    /// A step cannot be done by somebody who sees nothing else.
    #[error("step {step} cannot be done by somebody who sees nothing else; say in it what to do, with the facts")]
    Vague {
        /// The step's number.
        step: usize,
    },
    /// Steps wait for one another.
    #[error(
        "step {step} waits for itself through its \"needs\"; a step may only need steps that can be done before it"
    )]
    Cycle {
        /// One of the steps.
        step: usize,
    },
}

impl PlanError {
    /// Returns whether a planner that is told may well do better.
    #[must_use]
    pub const fn is_repairable(&self) -> bool {
        !matches!(self, Self::Vague { .. })
    }
}

impl Plan {
    /// Reads a planner's text for a question. `cut_off` says that the token limit ended it, so that whole steps may be saved from
    /// broken JSON.
    ///
    /// # Errors
    /// A [`PlanError`] that tells the planner what to change.
    pub fn parse(text: &str, cut_off: bool, question: &str) -> Result<Self, PlanError> {
        let text = &text[..text.floor_char_boundary(MAX_TEXT_BYTES)];
        let (values, complete) = match find_json(text) {
            Some(value) => (steps_of(&value).ok_or(PlanError::NoSteps)?, true),
            None if cut_off => (whole_objects(text), false),
            None => return Err(PlanError::NotJson),
        };
        if values.is_empty() {
            return Err(if complete { PlanError::NoSteps } else { PlanError::NotJson });
        }
        let mut raw =
            values.iter().enumerate().map(|(i, value)| RawStep::read(value, i + 1)).collect::<Result<Vec<_>, _>>()?;
        if !complete {
            // Whole steps are kept while there is room for the answer; what they need must be among them.
            raw.truncate(MAX_STEPS - 1);
            let len = raw.len();
            raw.iter_mut()
                .for_each(|step| step.needs.retain(|&need| usize::try_from(need).is_ok_and(|need| need <= len)));
            raw.push(RawStep {
                ask: ANSWER_THE_QUESTION.to_owned(),
                skill: DEFAULT_SKILL.to_owned(),
                needs: Vec::new(),
            });
        }
        let plan = Self::validate(merge_repeated(raw))?;
        match first_copied(&plan.steps, question).or_else(|| first_vague(&plan.steps, question)) {
            Some(step) => Err(PlanError::Vague { step }),
            None => Ok(plan),
        }
    }

    /// Returns the steps, in the planner's order.
    #[must_use]
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Returns how many rounds of jobs follow from each step to the end, itself included, when everything that can run at the
    /// same time does.
    #[must_use]
    pub fn rounds_left(&self) -> Vec<u32> {
        let mut rounds = vec![1u32; self.steps.len()];
        // Each pass settles one more level; there are at most as many levels as steps.
        for _ in 0..self.steps.len() {
            for (at, step) in self.steps.iter().enumerate() {
                for need in &step.needs {
                    let before = usize::from(*need) - 1;
                    rounds[before] = rounds[before].max(rounds[at] + 1);
                }
            }
        }
        rounds
    }

    fn validate(raw: Vec<RawStep>) -> Result<Self, PlanError> {
        let len = raw.len();
        if len > MAX_STEPS {
            return Err(PlanError::TooMany { len });
        }
        let mut steps = Vec::with_capacity(len);
        for (at, raw) in raw.into_iter().enumerate() {
            let step = at + 1;
            let mut needs = BTreeSet::new();
            for need in raw.needs {
                let number = u8::try_from(need).ok().filter(|&n| n >= 1 && usize::from(n) < len);
                needs.extend(number.filter(|&n| usize::from(n) != step));
            }
            steps.push(Step { ask: raw.ask, skill: raw.skill, needs: needs.into_iter().collect() });
        }
        tie_loose_ends(&mut steps);
        match first_in_cycle(&steps) {
            Some(step) => Err(PlanError::Cycle { step }),
            None => Ok(Self { steps }),
        }
    }
}

/// Returns the JSON Schema of a plan of two to `steps` steps: small, because a grammar is compiled for every job. A single step
/// would be the question over again, which needs no plan. Skills are chosen from `tags`, which some node has; without tags they
/// are free.
#[must_use]
pub fn schema(steps: u8, tags: &[&str]) -> String {
    let steps = usize::from(steps).clamp(1, MAX_STEPS);
    let skill = if tags.is_empty() {
        r#"{"type":"string","minLength":3,"maxLength":32}"#.to_owned()
    } else {
        json!({ "enum": tags }).to_string()
    };
    format!(
        concat!(
            r#"{{"type":"object","properties":{{"steps":{{"type":"array","minItems":{least},"maxItems":{steps},"items":{{"type":"object","#,
            r#""properties":{{"ask":{{"type":"string","minLength":12,"maxLength":160}},"skill":{skill},"#,
            r#""needs":{{"type":"array","maxItems":{needs},"items":{{"type":"integer","minimum":1,"maximum":{steps}}}}}}},"#,
            r#""required":["ask","skill","needs"],"additionalProperties":false}}}}}},"required":["steps"],"additionalProperties":false}}"#
        ),
        least = steps.min(2),
        steps = steps,
        skill = skill,
        needs = steps.saturating_sub(1).max(1),
    )
}

/// A step as it was written.
#[derive(Debug, PartialEq)]
struct RawStep {
    ask: String,
    skill: String,
    needs: Vec<i64>,
}

impl RawStep {
    fn read(value: &Value, step: usize) -> Result<Self, PlanError> {
        let field = |names: &[&str]| names.iter().find_map(|name| value.get(name));
        let text = |names: &[&str]| field(names).and_then(Value::as_str);
        let ask = value.as_str().or_else(|| text(&["ask", "task", "subtask", "question", "step", "description"]));
        let ask = unnumbered(ask.unwrap_or_default());
        if !ask.contains(char::is_alphanumeric) {
            return Err(PlanError::EmptyAsk { step });
        }
        let skill = text(&["skill", "requirement", "requires", "expertise"]).unwrap_or(DEFAULT_SKILL);
        let needs = match field(&["needs", "depends_on", "dependencies", "requires_steps"]) {
            Some(Value::Array(items)) => items.iter().filter_map(number).collect(),
            Some(single) => number(single).into_iter().collect(),
            // Without a word on it a step builds on the one before, as in Symphony's plans.
            None => i64::try_from(step - 1).into_iter().filter(|&before| before > 0).collect(),
        };
        Ok(Self { ask: cut(&ask, MAX_ASK_BYTES), skill: tidy_skill(skill), needs })
    }
}

/// Reads `1`, `"1"` and `"step 1"`.
fn number(value: &Value) -> Option<i64> {
    let words = || value.as_str()?.trim_start_matches(|c: char| !c.is_ascii_digit() && c != '-').trim().parse().ok();
    value.as_i64().or_else(words)
}

/// Takes Symphony's `Q1:`, and `1.`, `Step 1:` off a task.
fn unnumbered(ask: &str) -> String {
    let ask = ask.split_whitespace().collect::<Vec<_>>().join(" ");
    let lower = ask.to_ascii_lowercase();
    let prefix = ["step ", "q", ""].into_iter().find(|prefix| lower.starts_with(prefix)).unwrap_or_default();
    let rest = &ask[prefix.len()..];
    let after = rest.trim_start_matches(|c: char| c.is_ascii_digit());
    let marked = after.len() < rest.len()
        && after.starts_with([':', '.', ')'])
        && !after[1..].starts_with(|c: char| c.is_ascii_digit());
    if marked { after[1..].trim_start().to_owned() } else { ask }
}

/// Brings a requirement to a few lower-case words. One that is too long, and words with digits in them, come from the question.
fn tidy_skill(skill: &str) -> String {
    let words: Vec<&str> =
        skill.split(|c: char| !c.is_alphanumeric() && c != '-').filter(|word| !word.is_empty()).collect();
    if words.len() > MAX_SKILL_WORDS {
        return DEFAULT_SKILL.to_owned();
    }
    let plain: Vec<&str> = words.into_iter().filter(|word| !word.contains(char::is_numeric)).collect();
    let short = cut(&plain.join(" ").to_lowercase(), MAX_SKILL_BYTES);
    if short.contains(char::is_alphabetic) { short } else { DEFAULT_SKILL.to_owned() }
}

fn cut(text: &str, max: usize) -> String {
    text[..text.floor_char_boundary(max)].trim_end().to_owned()
}

/// Finds the JSON in a text: all of it, or from the first bracket to the last of its kind.
fn find_json(text: &str) -> Option<Value> {
    let structured =
        |text: &str| serde_json::from_str::<Value>(text).ok().filter(|value| value.is_object() || value.is_array());
    structured(text.trim()).or_else(|| {
        [('{', '}'), ('[', ']')].into_iter().find_map(|(open, close)| {
            let (begin, end) = (text.find(open)?, text.rfind(close)?);
            structured(text.get(begin..=end)?)
        })
    })
}

fn steps_of(value: &Value) -> Option<Vec<Value>> {
    let list = value
        .as_array()
        .or_else(|| ["steps", "subtasks", "plan", "tasks"].iter().find_map(|name| value.get(name)?.as_array()))?;
    Some(list.clone())
}

/// Returns the whole objects that stand inside the first list of a text that was cut off.
fn whole_objects(text: &str) -> Vec<Value> {
    let Some(at) = text.find('[') else { return Vec::new() };
    let mut stream = serde_json::Deserializer::from_str(&text[at + 1..]).into_iter::<Value>();
    let mut from = at + 1;
    let mut found = Vec::new();
    while found.len() < MAX_STEPS {
        match stream.next() {
            Some(Ok(value)) => found.push(value),
            _ => break,
        }
        from += stream.byte_offset();
        let Some(rest) = text[from..].trim_start().strip_prefix(',') else { break };
        from = text.len() - rest.len();
        stream = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
    }
    found.retain(|value| value.is_object() || value.is_string());
    found
}

/// Drops a step that repeats an earlier one, and points its users to that one. The last step stays the last.
fn merge_repeated(mut raw: Vec<RawStep>) -> Vec<RawStep> {
    let mut at = 1;
    while at < raw.len() {
        let Some(earlier) = raw[..at].iter().position(|step| step.ask == raw[at].ask) else {
            at += 1;
            continue;
        };
        let last = at + 1 == raw.len();
        let (kept, dropped) = if last { (at, earlier) } else { (earlier, at) };
        let gone = raw.remove(dropped);
        let number = |index: usize| i64::try_from(index).unwrap_or(i64::MAX).saturating_add(1);
        let (gone_number, kept_number) = (number(dropped), number(if kept > dropped { kept - 1 } else { kept }));
        if let Some(step) = raw.get_mut(if kept > dropped { kept - 1 } else { kept }) {
            step.needs.extend(gone.needs);
        }
        for step in &mut raw {
            for need in &mut step.needs {
                if *need == gone_number {
                    *need = kept_number;
                } else if *need > gone_number {
                    *need -= 1;
                }
            }
        }
    }
    raw
}

/// Makes the last step need every step that no other needs.
fn tie_loose_ends(steps: &mut [Step]) {
    let used: BTreeSet<u8> = steps.iter().flat_map(|step| step.needs.iter().copied()).collect();
    let Some((last, before)) = steps.split_last_mut() else { return };
    let loose = (1u8..).zip(before.iter()).map(|(number, _)| number).filter(|number| !used.contains(number));
    let mut needs: BTreeSet<u8> = last.needs.iter().copied().collect();
    needs.extend(loose);
    last.needs = needs.into_iter().collect();
}

/// Returns a step that a planner took from its example, which has nothing to do with the question.
fn first_copied(steps: &[Step], question: &str) -> Option<usize> {
    let (example, plan) = EXAMPLE;
    let copied = || steps.iter().position(|step| plan.contains(&format!("\"{}\"", step.ask))).map(|at| at + 1);
    (question != example).then(copied)?
}

/// Returns a step that says too little for somebody who sees neither the question nor anything else: fewer than three words, or
/// none of the question's. A step that builds on results may be shorter, and the last one is done by somebody who sees the
/// question. Only plain ASCII is judged: other scripts may not part their words.
fn first_vague(steps: &[Step], question: &str) -> Option<usize> {
    let facts = content_words(question);
    let vague = |step: &Step| {
        let words = step.ask.split_whitespace().count();
        let alone = step.needs.is_empty();
        step.ask.is_ascii()
            && (words < if alone { 3 } else { 2 } || (alone && content_words(&step.ask).is_disjoint(&facts)))
    };
    let judged = if steps.len() > 1 { &steps[..steps.len() - 1] } else { steps };
    (!facts.is_empty()).then(|| judged.iter().position(vague).map(|at| at + 1))?
}

/// Returns the numbers of a text, and the beginnings of its words: so *apple* and *apples* are one.
fn content_words(text: &str) -> BTreeSet<String> {
    const STOP_WORDS: [&str; 24] = [
        "what",
        "which",
        "when",
        "where",
        "with",
        "that",
        "this",
        "have",
        "from",
        "does",
        "there",
        "many",
        "much",
        "will",
        "they",
        "their",
        "then",
        "than",
        "into",
        "answer",
        "question",
        "step",
        "following",
        "would",
    ];
    text.to_lowercase()
        .split(|c: char| !c.is_alphanumeric())
        .filter(|word| word.contains(char::is_numeric) || (word.chars().count() > 3 && !STOP_WORDS.contains(word)))
        .map(|word| if word.contains(char::is_numeric) { word.to_owned() } else { word.chars().take(4).collect() })
        .collect()
}

/// Returns a step that can never run, if there is one (Kahn's algorithm).
fn first_in_cycle(steps: &[Step]) -> Option<usize> {
    let mut done: BTreeSet<u8> = BTreeSet::new();
    loop {
        let next = (1u8..)
            .zip(steps)
            .find(|(number, step)| !done.contains(number) && step.needs.iter().all(|need| done.contains(need)));
        match next {
            Some((number, _)) => done.insert(number),
            None => return (1..=steps.len()).find(|step| !u8::try_from(*step).is_ok_and(|step| done.contains(&step))),
        };
    }
}

#[cfg(test)]
mod tests;
