//! Finds the answer in what a model wrote.
//!
//! Looked for in this order; the first that the format accepts wins:
//!
//! 1. the last `\boxed{…}`;
//! 2. what follows the last *answer is*, `Answer:` and their kin, up to the end of the sentence;
//! 3. what the format itself is known by: an option's letter, a number, a yes or no;
//! 4. the last line.
//!
//! Small models go on after their answer: they invent the next question and answer that too, or repeat the instruction. So
//! the text is cut where a new question begins, what is said back is taken out, and an echoed placeholder (`Answer: …`) is
//! passed over.

use super::echo::without_echo;
use super::format::AnswerFormat;
use super::normalise::{choice, leading_polarity, polarity, position_of};
use super::{latex, number};

/// Bytes at the end of a text in which the answer is looked for.
const WINDOW_BYTES: usize = 32 * 1024;
/// Words of a last line that is taken for an answer as it stands.
const MAX_PLAIN_WORDS: usize = 8;
/// Words of an announced answer, where no format says what it should be.
const MAX_ANSWER_WORDS: usize = 20;
/// Bytes of an extracted answer.
const MAX_ANSWER_BYTES: usize = 4 * 1024;

/// What announces an answer, in lower case.
const MARKERS: [&str; 15] = [
    "answer is",
    "answer:",
    "answer**:",
    "answer =",
    "answer would be",
    "answer should be",
    "answer will be",
    "option is",
    "choice is",
    "conclusion:",
    "result is",
    "result:",
    "solution is",
    "solution:",
    "####",
];

/// Beginnings of a line with which a model starts a question of its own.
const NEXT_QUESTION: [&str; 6] = ["question:", "q:", "user:", "human:", "<|im_start|>", "### question"];

/// Finds the answer in a model's text. `None` when the text is blank, or only says the question's alternatives back.
#[must_use]
pub fn extract(text: &str, format: &AnswerFormat) -> Option<String> {
    let tail = &text[text.ceil_char_boundary(text.len().saturating_sub(WINDOW_BYTES))..];
    let text = without_echo(cut_runaway(after_thinking(tail)), format);
    let text = text.trim();
    if text.is_empty() {
        return None;
    }
    let accepted = |candidate: &String| accepts(candidate, format);
    let answer = boxed(text)
        .filter(accepted)
        .or_else(|| marked(text, format))
        .or_else(|| by_format(text, format))
        .unwrap_or_else(|| last_line(text));
    Some(answer[..answer.floor_char_boundary(MAX_ANSWER_BYTES)].to_owned())
}

/// Drops what a reasoning model thinks before it speaks.
fn after_thinking(text: &str) -> &str {
    match text.rfind("</think>") {
        Some(at) if !text[at + 8..].trim().is_empty() => &text[at + 8..],
        _ => text,
    }
}

/// Cuts the text where the model begins to ask and answer by itself.
fn cut_runaway(text: &str) -> &str {
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        let start = line.trim_start().to_ascii_lowercase();
        let begins = NEXT_QUESTION.iter().any(|mark| start.starts_with(mark));
        if begins && !text[..at].trim().is_empty() {
            return &text[..at];
        }
        at += line.len();
    }
    text
}

/// Returns what the last `\boxed{…}` holds.
fn boxed(text: &str) -> Option<String> {
    let inner = &text[text.rfind("\\boxed{")? + "\\boxed{".len()..];
    let inner = &inner[..latex::closing(inner).unwrap_or_else(|| inner.lines().next().unwrap_or_default().len())];
    (!is_placeholder(inner)).then(|| inner.trim().to_owned())
}

/// Returns what the last marker announces that the format accepts.
fn marked(text: &str, format: &AnswerFormat) -> Option<String> {
    let lower = text.to_ascii_lowercase();
    let mut ends: Vec<usize> = MARKERS
        .iter()
        .flat_map(|marker| lower.match_indices(marker).map(|(at, found)| at + found.len()))
        .chain(line_marks(&lower))
        .collect();
    ends.sort_unstable();
    ends.into_iter().rev().find_map(|end| {
        let candidate = announced(&text[end..]);
        (!is_placeholder(&candidate) && accepts(&candidate, format)).then_some(candidate)
    })
}

/// Returns where a line begins with `A:`, as in a dialogue.
fn line_marks(lower: &str) -> impl Iterator<Item = usize> + '_ {
    let first = lower.starts_with("a:").then_some(2);
    first.into_iter().chain(lower.match_indices("\na:").map(|(at, mark)| at + mark.len()))
}

/// Takes the announced answer: the rest of the line up to the end of the sentence, or the next line when the rest is empty.
fn announced(after: &str) -> String {
    let line = after
        .lines()
        .map(|line| line.trim().trim_start_matches([':', '*', '_', '=', '-', ' ']).trim())
        // A minus right before a digit is a sign, so what was cut must not have been one.
        .zip(after.lines())
        .map(|(cut, whole)| resign(cut, whole))
        .find(|line| !line.is_empty())
        .unwrap_or_default();
    sentence(&line).to_owned()
}

/// Gives a number its sign back.
fn resign(cut: &str, whole: &str) -> String {
    let before = &whole[..whole.find(cut).unwrap_or_default()];
    let signed = cut.starts_with(|c: char| c.is_ascii_digit()) && before.ends_with('-');
    if signed { format!("-{cut}") } else { cut.to_owned() }
}

/// Cuts a line at its first full stop that ends a sentence: one that is followed by a space and is not part of `B. Paris`.
fn sentence(line: &str) -> &str {
    let mut from = 0;
    while let Some(at) = line[from..].find(". ").map(|at| at + from) {
        let word = line[..at].rsplit([' ', '(', '*']).next().unwrap_or_default();
        if word.chars().count() > 1 || word.chars().any(|c| c.is_ascii_digit()) {
            return &line[..at];
        }
        from = at + 2;
    }
    line
}

/// Says whether a candidate is what the instruction shows, not what the model found.
fn is_placeholder(candidate: &str) -> bool {
    let text = latex::clean(candidate);
    let hollow =
        !text.contains(char::is_alphanumeric) && text.chars().all(|c| matches!(c, '.' | '…' | '_' | ' ' | '-' | '?'));
    let angled = text.starts_with('<')
        && text.ends_with('>')
        && text.len() > 2
        && !text[1..text.len() - 1].contains(['<', '>', ' ']);
    let lower = text.to_lowercase();
    let echoed = lower.starts_with("your answer") || lower.starts_with("[your");
    hollow || angled || echoed || lower == "the answer"
}

/// Says whether a candidate can be read in this format.
fn accepts(candidate: &str, format: &AnswerFormat) -> bool {
    let text = latex::clean(candidate);
    match format {
        AnswerFormat::Number => number::parse(&text).or_else(|| number::first_in(&text)).is_some(),
        AnswerFormat::YesNo => polarity(&text).or_else(|| leading_polarity(&text)).is_some(),
        AnswerFormat::Options(options) => {
            !text.to_ascii_lowercase().starts_with("not ")
                && (choice(&text, format).is_some() || position_of(&text, options).is_some())
        }
        AnswerFormat::OneOf(options) => position_of(&text, options).is_some() || leading_polarity(&text).is_some(),
        // "The answer is not …" is no answer, and what is longer than a sentence is prose.
        AnswerFormat::Auto => {
            let words = text.split_whitespace().count();
            (1..=MAX_ANSWER_WORDS).contains(&words) && !text.to_ascii_lowercase().starts_with("not ")
        }
        AnswerFormat::Prose | AnswerFormat::Json | AnswerFormat::List | AnswerFormat::Set => !text.is_empty(),
    }
}

/// Finds the answer by what the format is known by.
fn by_format(text: &str, format: &AnswerFormat) -> Option<String> {
    match format {
        AnswerFormat::Number => number::last_in(&text.replace("\\", " ")),
        AnswerFormat::YesNo => by_sense(text),
        AnswerFormat::Options(options) => by_option(text, options, format),
        AnswerFormat::OneOf(options) => last_named(text, options).or_else(|| by_sense(text)),
        AnswerFormat::Auto => by_look(text),
        AnswerFormat::Prose | AnswerFormat::Json | AnswerFormat::List | AnswerFormat::Set => None,
    }
}

/// A text that begins with its yes or no means it; else the last line that has one.
fn by_sense(text: &str) -> Option<String> {
    let has = |line: &&str| leading_polarity(line).is_some();
    let lines = || text.lines().map(str::trim).filter(|line| !line.is_empty());
    let line = lines().next().filter(has).or_else(|| lines().rev().find(has));
    line.map(str::to_owned).or_else(|| {
        let words = text.split(|c: char| !c.is_alphanumeric());
        words.rev().find(|word| polarity(word).is_some()).map(str::to_owned)
    })
}

/// A text that begins with an option, and goes on to no other, means it; else the last lettered option, else the last line that
/// names one.
fn by_option(text: &str, options: &[String], format: &AnswerFormat) -> Option<String> {
    let lettered = |(at, _): (usize, &str)| {
        let mut chars = text[at + 1..].chars();
        let letter = chars.next()?;
        (chars.next() == Some(')') && letter.is_ascii_uppercase() && format.admits(letter)).then_some(letter)
    };
    let letters = || text.match_indices('(').filter_map(lettered);
    let first = choice(&latex::clean(text.lines().next().unwrap_or_default()), format);
    let leading = first.filter(|first| letters().all(|letter| letter == *first));
    if let Some(letter) = leading.or_else(|| letters().next_back()) {
        return Some(format!("({letter})"));
    }
    let named = |line: &&str| choice(&latex::clean(line), format).is_some() || position_of(line, options).is_some();
    text.lines().rev().find(named).map(str::to_owned)
}

/// Returns the last of the options that the text names, line by line from the end.
fn last_named(text: &str, options: &[String]) -> Option<String> {
    text.lines().rev().find(|line| position_of(line, options).is_some()).map(str::to_owned)
}

/// Without a format: a short last line is the answer; of a long one the result is, if it calculates, else its last sentence.
fn by_look(text: &str) -> Option<String> {
    let line = last_line(text);
    if line.split_whitespace().count() <= MAX_PLAIN_WORDS && !line.contains(" = ") {
        return Some(line);
    }
    if let Some(at) = line.rfind(" = ") {
        return Some(sentence(line[at + 3..].trim()).to_owned());
    }
    let therefore = ["therefore", "so ", "thus", "hence", "in total"];
    let lower = line.to_lowercase();
    let result = therefore.iter().any(|word| lower.starts_with(word)).then(|| number::last_in(&line)).flatten();
    result.or_else(|| line.trim_end_matches(['.', ' ']).rsplit(". ").next().map(str::to_owned))
}

/// Returns the last line that says something: no code fence, no echo of the instruction.
fn last_line(text: &str) -> String {
    let says = |line: &&str| {
        let echo =
            line.to_ascii_lowercase().rfind("answer:").is_some_and(|at| is_placeholder(&line[at + "answer:".len()..]));
        line.contains(|c: char| c != '`') && !echo
    };
    let lines = || text.lines().rev().map(str::trim).filter(|line| !line.is_empty());
    lines().find(says).or_else(|| lines().next()).unwrap_or_default().to_owned()
}
