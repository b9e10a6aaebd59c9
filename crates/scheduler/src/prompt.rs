//! The words that models are given.
//!
//! Why they look as they do:
//!
//! - One user turn, no system turn: the executor's own system prompt stands before it, and many chat templates take only one.
//! - A planner is shown one example as an earlier turn, and the question last. SmolLM2-135M copied a template (`{"ask":"<what to
//!   do>", …}`) word for word in seven plans of seven, and without any example wrote about the instruction or the list of skills.
//!   A plan that copies the example is off the question, and refused as any such plan is ([`crate::plan`]).
//! - Short, because a CPU reads a prompt about as slowly as it writes, and because small models follow the last line best. So
//!   the question stands before the instruction wherever the answer is wanted.
//! - The instruction for the answer never holds a possible answer. A model that repeats it must not seem to have answered.
//! - What other models wrote is marked as notes that may be wrong, and is never the last thing that is said.

use std::fmt::Write as _;

use chorus_protocol::bounded::{List, Text};
use chorus_protocol::capability::Skill;
use chorus_protocol::job::{Role, Turn};

use crate::answer::{AnswerFormat, INSTRUCTION};
use crate::plan::{ANSWER_THE_QUESTION, EXAMPLE, PlanError};

/// What a planner is looked for by. It is the same for every task, so it gives nothing away and is embedded once.
pub(crate) const PLANNER_SKILL: &str = "planning: breaking a question into steps";
/// The tag of planners.
pub(crate) const PLANNER_TAG: &str = "planning";

/// Bytes of the chat so far that a planner sees.
const MAX_PLAN_CONTEXT_BYTES: usize = 3 * 1024;
/// Bytes of the question that a planner sees. A plan needs the task, not all of a long text.
const MAX_PLAN_QUESTION_BYTES: usize = 16 * 1024;
/// Bytes of a result that is handed to the next step.
const MAX_RESULT_BYTES: usize = 1_000;
/// Bytes of a bad plan that is shown for repair.
const MAX_BAD_PLAN_BYTES: usize = 2 * 1024;
/// Skills that are named to a planner.
const MAX_NAMED_SKILLS: usize = 12;

const PLAN: &str = "Split a question into at most {steps} short steps for helpers. \
A helper sees only its own step, so repeat in it every fact of the question that it needs. The last step gives the final answer. \
Write JSON with a list \"steps\". Each step has \"ask\" (what to do), \"skill\" (the kind of work, in one or two words) \
and \"needs\" (the numbers of the steps whose results it uses).";
const REPAIR: &str = "This plan cannot be used: {error}.\nWrite the corrected JSON only.";

/// A step's task and its result.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Note<'a> {
    pub(crate) ask: &'a str,
    pub(crate) result: &'a str,
}

/// Asks for a plan: the instruction with an example, as a question that was answered, and then the question.
pub(crate) fn plan(question: &str, context: &[Turn], skills: &[Skill], steps: u8) -> Vec<Turn> {
    let mut asked = PLAN.replace("{steps}", &steps.to_string());
    let tags = named_tags(skills);
    if !tags.is_empty() {
        let _ = write!(asked, " The skills of helpers are: {}.", tags.join(", "));
    }
    let (example, example_plan) = EXAMPLE;
    let _ = write!(asked, "\n\nQuestion: {example}");
    let mut text = String::new();
    if !context.is_empty() {
        let chat: String =
            context.iter().map(|turn| format!("{}: {}\n", name(turn.role), turn.content.as_str())).collect();
        let tail = &chat[chat.ceil_char_boundary(chat.len().saturating_sub(MAX_PLAN_CONTEXT_BYTES))..];
        let _ = write!(text, "The chat so far:\n{tail}\n");
    }
    let _ = write!(text, "Question: {}", cut(question, MAX_PLAN_QUESTION_BYTES));
    let answered = Turn { role: Role::Assistant, content: Text::truncated(example_plan) };
    vec![user(&asked), answered, user(&text)]
}

/// Returns the tags of the ledger's skills that a planner may choose from, in order.
pub(crate) fn named_tags(skills: &[Skill]) -> Vec<&str> {
    let mut tags: Vec<&str> = skills.iter().flat_map(|skill| skill.tags.iter().map(Text::as_str)).collect();
    tags.sort_unstable();
    tags.dedup();
    tags.truncate(MAX_NAMED_SKILLS);
    tags
}

/// Asks for a plan once more, with what was wrong with the first.
pub(crate) fn repair(mut asked: Vec<Turn>, bad: &str, error: &PlanError) -> Vec<Turn> {
    asked.push(Turn { role: Role::Assistant, content: Text::truncated(cut(bad, MAX_BAD_PLAN_BYTES)) });
    asked.push(user(&REPAIR.replace("{error}", &error.to_string())));
    asked
}

/// Asks for a step in the middle of a plan. Its executor sees the step and the results it needs: not the question.
pub(crate) fn middle(ask: &str, notes: &[Note<'_>]) -> Vec<Turn> {
    let mut text = list_notes("Known so far:", notes);
    let _ = write!(text, "{ask}\nReply briefly, with the result.");
    vec![user(&text)]
}

/// Asks for the last step: the answer to the question.
pub(crate) fn last(
    question: &str,
    context: &[Turn],
    ask: &str,
    notes: &[Note<'_>],
    format: &AnswerFormat,
) -> Vec<Turn> {
    let mut text = format!("{question}\n\n");
    text.push_str(&list_notes("Notes from helpers, which may be wrong:", notes));
    if ask != ANSWER_THE_QUESTION && !notes.is_empty() {
        let _ = writeln!(text, "What remains to be done: {ask}");
    }
    text.push_str(&instruction(format));
    followed_by(context, &text)
}

/// Asks the question as it is. In a chain the answer will be compared, so an instruction says how to mark it; alone, only a
/// question that has a format of its own gets one.
pub(crate) fn direct(question: &str, context: &[Turn], format: &AnswerFormat, compared: bool) -> Vec<Turn> {
    let silent = match format {
        AnswerFormat::Prose | AnswerFormat::Json => true,
        AnswerFormat::Auto => !compared,
        _ => false,
    };
    if silent {
        return followed_by(context, question);
    }
    followed_by(context, &format!("{question}\n\n{}", instruction(format)))
}

/// Says how the answer is to be marked.
fn instruction(format: &AnswerFormat) -> String {
    let what = match format {
        AnswerFormat::Prose | AnswerFormat::Json => return "Now answer the question.".to_owned(),
        AnswerFormat::Auto => "only the answer".to_owned(),
        AnswerFormat::Number => "the number".to_owned(),
        AnswerFormat::YesNo => "yes or no".to_owned(),
        AnswerFormat::Options(_) => "the letter of the right option".to_owned(),
        AnswerFormat::OneOf(options) => format!("one of: {}", options.join(", ")),
        AnswerFormat::List => "the values in order, with commas between them".to_owned(),
        AnswerFormat::Set => "the values, with commas between them".to_owned(),
    };
    format!("Think briefly. {INSTRUCTION} {what}.")
}

fn list_notes(title: &str, notes: &[Note<'_>]) -> String {
    if notes.is_empty() {
        return String::new();
    }
    let mut text = format!("{title}\n");
    for note in notes {
        let _ = writeln!(text, "- {} => {}", note.ask, note.result);
    }
    text.push('\n');
    text
}

/// Keeps the end of a long result, which is all that other steps get of it: what a model concludes stands there.
pub(crate) fn ending(result: &str) -> &str {
    &result[result.ceil_char_boundary(result.len().saturating_sub(MAX_RESULT_BYTES))..]
}

fn followed_by(context: &[Turn], text: &str) -> Vec<Turn> {
    context.iter().cloned().chain([user(text)]).collect()
}

fn user(text: &str) -> Turn {
    Turn { role: Role::User, content: Text::truncated(text) }
}

fn cut(text: &str, max: usize) -> &str {
    &text[..text.floor_char_boundary(max)]
}

const fn name(role: Role) -> &'static str {
    match role {
        Role::System => "System",
        Role::User => "User",
        Role::Assistant => "Assistant",
    }
}

/// Makes the bounded list that a payload holds.
pub(crate) fn bounded(turns: Vec<Turn>) -> List<Turn, 64> {
    List::truncated(turns)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use super::*;
    use crate::answer::judge;
    use crate::plan::Plan;

    fn text(turns: &[Turn]) -> &str {
        turns.last().unwrap().content.as_str()
    }

    #[test]
    fn a_middle_step_sees_neither_question_nor_other_results() {
        let turns = middle("Double it", &[Note { ask: "Add 2 and 3", result: "5" }]);
        assert_eq!(turns.len(), 1);
        assert_eq!(text(&turns), "Known so far:\n- Add 2 and 3 => 5\n\nDouble it\nReply briefly, with the result.");
    }

    #[test]
    fn the_last_step_sees_the_question_and_its_notes() {
        let turns =
            last("How many?", &[user("Hello")], "Count", &[Note { ask: "Add", result: "5" }], &AnswerFormat::Number);
        assert_eq!(turns.len(), 2);
        let text = text(&turns);
        for part in ["How many?", "may be wrong", "Add => 5", "Count", "the number"] {
            assert!(text.contains(part), "{part} is missing in {text}");
        }
    }

    #[test]
    fn a_plain_question_goes_out_as_it_is() {
        for format in [AnswerFormat::Prose, AnswerFormat::Auto] {
            assert_eq!(text(&direct("Hello?", &[], &format, false)), "Hello?");
        }
        assert!(text(&direct("Hello?", &[], &AnswerFormat::Auto, true)).contains("only the answer"));
        assert_eq!(text(&direct("Hello?", &[], &AnswerFormat::Prose, true)), "Hello?");
    }

    #[test]
    fn an_echoed_instruction_is_no_answer() {
        let either = AnswerFormat::OneOf(vec!["red".into(), "blue".into()]);
        for (format, said, want) in [
            (AnswerFormat::Auto, "7", "7"),
            (AnswerFormat::Number, "It is 7.", "7"),
            (AnswerFormat::YesNo, "Yes, it is.", "yes"),
            (AnswerFormat::List, "a, b", "[a, b]"),
            (either, "It is red.", "red"),
        ] {
            for echo in [format!("{said}\n{}", instruction(&format)), format!("{}\n{said}", instruction(&format))] {
                assert_eq!(judge(&echo, &format).unwrap().key.to_string(), want, "{echo}");
            }
        }
    }

    #[test]
    fn a_planner_that_copies_the_prompt_has_no_plan() {
        let turns = plan("What is 2 + 3?", &[], &[], 4);
        assert!(text(&turns).starts_with("Question: What is 2 + 3?"));
        assert!(Plan::parse(text(&turns), false, "What is 2 + 3?").is_err());
        let again = repair(turns, "nonsense", &PlanError::NotJson);
        assert_eq!(again.len(), 5);
        assert!(text(&again).contains("not JSON"));
    }

    #[test]
    fn the_example_is_a_plan_of_its_own_question_and_of_no_other() {
        let (question, plan) = EXAMPLE;
        assert_eq!(Plan::parse(plan, false, question).unwrap().steps().len(), 2);
        assert!(Plan::parse(plan, false, "What is the date 10 days before Christmas?").is_err());
        let last = plan.replace("Compute 3 boxes times 8 pens minus 5 lost pens.", "Compute 10 days before Christmas.");
        let copied = Plan::parse(&last, false, "What is the date 10 days before Christmas?");
        assert_eq!(copied, Err(PlanError::Vague { step: 2 }), "a step of the example is no step of this");
    }

    #[test]
    fn long_texts_are_cut_at_characters() {
        let long = "é".repeat(60_000);
        let turns = plan(&long, &[user(&long)], &[], 8);
        assert!(text(&turns).len() < 24 * 1024);
        assert!((MAX_RESULT_BYTES - 1..=MAX_RESULT_BYTES).contains(&ending(&long).len()));
        assert_eq!(ending("short"), "short");
    }
}
