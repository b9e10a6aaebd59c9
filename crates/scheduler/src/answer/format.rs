//! What an answer should look like: told by the user, or read from the question.

use serde::Serialize;

/// Options that are told apart.
const MAX_OPTIONS: usize = 26;

/// What an answer should look like.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "kind", content = "options")]
pub enum AnswerFormat {
    /// Read it from the question; where the question does not say, take what the model calls its answer.
    #[default]
    Auto,
    /// The whole text is the answer, as in a chat. Nothing is added to the question.
    Prose,
    /// The whole text is the answer, and it is JSON. Nothing is added to the question: a schema sees to the form.
    Json,
    /// A number.
    Number,
    /// Yes or no, true or false, valid or invalid.
    YesNo,
    /// One of the options lettered (A), (B), … in this order.
    Options(Vec<String>),
    /// One of these words or phrases.
    OneOf(Vec<String>),
    /// Several values in an order that matters.
    List,
    /// Several values in no order.
    Set,
}

impl AnswerFormat {
    /// Returns the format itself, or what the question says of it when it is [`AnswerFormat::Auto`]. Recognised are lettered
    /// options, options as dashes under `Options:` (both as in BIG-Bench Hard), yes-or-no questions that say so, and *how many*.
    #[must_use]
    pub fn resolve(&self, question: &str) -> Self {
        if *self != Self::Auto {
            return self.clone();
        }
        let lettered = lettered_options(question);
        if lettered.len() >= 2 {
            return Self::Options(lettered);
        }
        let dashed = dashed_options(question);
        if dashed.len() >= 2 {
            return Self::OneOf(dashed);
        }
        let lower = question.to_lowercase();
        let pairs = ["yes or no", "true or false", "valid or invalid", "yes/no", "true/false"];
        if pairs.iter().any(|pair| lower.contains(pair)) {
            return Self::YesNo;
        }
        if ["how many ", "how much "].iter().any(|words| lower.contains(words)) {
            return Self::Number;
        }
        Self::Auto
    }

    /// Returns the text of a lettered option.
    #[must_use]
    pub fn option(&self, letter: char) -> Option<&str> {
        let Self::Options(options) = self else { return None };
        let index = u32::from(letter).checked_sub(u32::from('A'))?;
        options.get(usize::try_from(index).ok()?).map(String::as_str).filter(|option| !option.is_empty())
    }

    /// Returns whether a letter names an option. Any letter may, where the options are not known.
    #[must_use]
    pub(crate) fn admits(&self, letter: char) -> bool {
        match self {
            Self::Options(options) => {
                let index = u32::from(letter).wrapping_sub(u32::from('A'));
                usize::try_from(index).is_ok_and(|index| index < options.len())
            }
            _ => letter.is_ascii_uppercase(),
        }
    }
}

/// Returns the letter of the option numbered `index` from 0.
#[must_use]
pub(crate) fn letter(index: usize) -> Option<char> {
    u8::try_from(index).ok().filter(|&i| usize::from(i) < MAX_OPTIONS).map(|i| char::from(b'A' + i))
}

/// Finds `(A) … (B) …`, or lines `A) …`, `B. …`, in order and without gaps.
fn lettered_options(question: &str) -> Vec<String> {
    let inline = collect_options(question, |text, letter| text.find(&format!("({letter})")).map(|at| (at, at + 3)));
    if inline.len() >= 2 {
        return inline;
    }
    collect_options(question, |text, letter| {
        [format!("\n{letter}) "), format!("\n{letter}. "), format!("\n{letter}: ")]
            .iter()
            .filter_map(|mark| text.find(mark.as_str()).map(|at| (at, at + mark.len())))
            .min()
    })
}

/// Cuts the text at each option's mark: `find` gives where a letter's mark begins and ends.
fn collect_options(question: &str, find: impl Fn(&str, char) -> Option<(usize, usize)>) -> Vec<String> {
    let mut marks = Vec::new();
    let mut from = 0;
    while let Some((begin, end)) = letter(marks.len()).and_then(|l| find(&question[from..], l)) {
        marks.push((from + begin, from + end));
        from += end;
    }
    let ends = marks.iter().skip(1).map(|&(begin, _)| begin).chain([question.len()]);
    marks
        .iter()
        .zip(ends)
        .map(|(&(_, text), end)| {
            // An option ends with its line: what follows the last one is not part of it.
            let option = question[text..end].trim_start();
            option.lines().next().unwrap_or_default().trim_end_matches([',', ';', '?', ' ']).to_owned()
        })
        .collect()
}

fn dashed_options(question: &str) -> Vec<String> {
    let lower = question.to_ascii_lowercase();
    let Some(at) = lower.rfind("options:") else { return Vec::new() };
    question[at + "options:".len()..]
        .lines()
        .skip_while(|line| line.trim().is_empty())
        .map_while(|line| line.trim().strip_prefix("- "))
        .map(|option| option.trim().to_owned())
        .filter(|option| !option.is_empty())
        .take(MAX_OPTIONS)
        .collect()
}
