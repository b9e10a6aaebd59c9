//! From a model's text to an answer that can be voted on.
//!
//! In the published systems answer extraction dominates the measured accuracy, so it has a module of its own, in four steps:
//!
//! 1. [`AnswerFormat::resolve`] reads from the question what the answer should look like.
//! 2. [`extract()`] finds the answer in the model's chatter.
//! 3. [`normalise()`] turns it into an [`Answer`], so that `12`, `12.0`, `\boxed{12}` and `twelve` are one.
//! 4. [`judge`] does both, and adds how the answer is shown to people.

mod date;
mod echo;
mod extract;
mod format;
mod latex;
mod normalise;
mod number;
#[cfg(test)]
mod tests;

pub use extract::extract;
pub use format::AnswerFormat;
pub use normalise::{Answer, normalise};

/// How prompts tell a model to mark its answer. A model that repeats it has not answered, so [`extract()`] takes it out.
pub(crate) const INSTRUCTION: &str = "End with a line that says \"Answer:\" and then";

/// Characters of an answer that are shown.
const MAX_SHOWN_CHARS: usize = 400;

/// An answer taken from a model's text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judged {
    /// What is compared in the vote.
    pub key: Answer,
    /// What people read.
    pub shown: String,
    /// Whether it is of the kind that was asked for: an option of the question, a number, a yes or no.
    pub fits: bool,
}

/// Takes the answer from a model's text. `None` when the text is blank. One that only says the question's alternatives back is shown
/// as it stands, and fits nothing.
#[must_use]
pub fn judge(text: &str, format: &AnswerFormat) -> Option<Judged> {
    if matches!(format, AnswerFormat::Prose | AnswerFormat::Json) {
        let shown = text.trim();
        let fits = *format == AnswerFormat::Prose || normalise::json(shown).is_some();
        let judged = || Judged { key: normalise(shown, format), shown: shown.to_owned(), fits };
        return (!shown.is_empty()).then(judged);
    }
    let Some(raw) = extract(text, format) else { return undecided(text) };
    let key = normalise(&raw, format);
    let shown = match &key {
        Answer::Choice(letter) => match format.option(*letter) {
            Some(option) => format!("({letter}) {option}"),
            None => key.to_string(),
        },
        Answer::Number(_) | Answer::List(_) | Answer::Set(_) => key.to_string(),
        Answer::Bool(_) | Answer::Date(_) | Answer::Text(_) => {
            let clean = latex::clean(&raw);
            if clean.is_empty() { key.to_string() } else { clean.chars().take(MAX_SHOWN_CHARS).collect() }
        }
    };
    let fits = fits(&key, format);
    Some(Judged { key, shown, fits })
}

fn undecided(text: &str) -> Option<Judged> {
    let text = echo::without_instruction(text);
    let shown: String = text.trim().chars().take(MAX_SHOWN_CHARS).collect();
    let judged = || Judged { key: Answer::Text(normalise::plain(&shown)), shown: shown.clone(), fits: false };
    (!shown.is_empty()).then(judged)
}

fn fits(key: &Answer, format: &AnswerFormat) -> bool {
    match (format, key) {
        (AnswerFormat::Number, key) => matches!(key, Answer::Number(_)),
        (AnswerFormat::YesNo, key) => matches!(key, Answer::Bool(_)),
        (AnswerFormat::Options(_), Answer::Choice(letter)) => format.admits(*letter),
        (AnswerFormat::Options(_), _) => false,
        (AnswerFormat::OneOf(options), key) => options.iter().any(|option| normalise(option, format) == *key),
        _ => true,
    }
}
