//! Takes out what a model only says back: the prompt's instruction, and the alternatives that the question gives.
//!
//! "Yes or no" is no yes, and `(A) London (B) Paris` chooses neither. Only a whole list is taken out: all alternatives, in the
//! question's order, with nothing said of any of them.

use std::borrow::Cow;
use std::ops::Range;

use super::INSTRUCTION;
use super::format::{AnswerFormat, letter};

/// The alternatives of a yes-or-no question.
const SENSES: [[&str; 2]; 5] =
    [["yes", "no"], ["true", "false"], ["valid", "invalid"], ["correct", "incorrect"], ["right", "wrong"]];

/// Returns the text without its echoes. Blank if it holds nothing else.
pub(super) fn without_echo<'a>(text: &'a str, format: &AnswerFormat) -> Cow<'a, str> {
    let text = without_instruction(text);
    let lists = alternatives(format);
    let tokens = tokens(&text);
    let mut kept = String::new();
    let (mut at, mut from) = (0, 0);
    while at < tokens.len() {
        match lists.iter().find_map(|list| list.ends_at(&text, &tokens, at)) {
            Some(end) => {
                kept.push_str(text[from..tokens[at].start].trim_end_matches(['(', '[', '-', '*', '"']));
                from = tokens[end - 1].end;
                from += text[from..].len() - text[from..].trim_start_matches([')', ']', '*', '"']).len();
                at = end;
            }
            None => at += 1,
        }
    }
    if from == 0 {
        return text;
    }
    kept.push_str(&text[from..]);
    if !kept.contains(char::is_alphanumeric) {
        kept.clear();
    }
    Cow::Owned(kept)
}

/// Takes the prompt's own instruction out, up to the end of its sentence.
pub(super) fn without_instruction(text: &str) -> Cow<'_, str> {
    if !text.contains(INSTRUCTION) {
        return Cow::Borrowed(text);
    }
    let mut parts = text.split(INSTRUCTION);
    let first = parts.next().unwrap_or_default().trim_end().trim_end_matches("Think briefly.");
    let kept = parts.map(|part| {
        let line = part.find('\n').unwrap_or(part.len());
        &part[part.find(". ").map_or(line, |stop| line.min(stop + 1))..]
    });
    Cow::Owned(std::iter::once(first).chain(kept).collect())
}

/// Alternatives in the question's order.
struct Alternatives {
    /// The ways to write each, in words of lower case, the longest first.
    each: Vec<Vec<Vec<String>>>,
    /// Whether they have letters, which tell a list from a sentence.
    lettered: bool,
}

fn alternatives(format: &AnswerFormat) -> Vec<Alternatives> {
    let plain = |options: &[&str]| Alternatives {
        each: options.iter().map(|option| vec![words(option)]).collect(),
        lettered: false,
    };
    match format {
        AnswerFormat::YesNo => SENSES.iter().map(|pair| plain(pair)).collect(),
        AnswerFormat::OneOf(options) => vec![plain(&options.iter().map(String::as_str).collect::<Vec<_>>())],
        AnswerFormat::Options(options) => {
            let ways = |(index, option): (usize, &String)| {
                let letter: Vec<String> =
                    letter(index).map(|letter| letter.to_lowercase().to_string()).into_iter().collect();
                vec![letter.iter().cloned().chain(words(option)).collect(), words(option), letter]
            };
            vec![Alternatives { each: options.iter().enumerate().map(ways).collect(), lettered: true }]
        }
        _ => Vec::new(),
    }
}

impl Alternatives {
    /// Returns the token after the list that begins at a token, if one does.
    fn ends_at(&self, text: &str, tokens: &[Range<usize>], first: usize) -> Option<usize> {
        if self.each.len() < 2 {
            return None;
        }
        let mut at = first;
        for (index, ways) in self.each.iter().enumerate() {
            if index > 0 {
                at = self.passes_gap(text, tokens, at)?;
            }
            let fits = |way: &&Vec<String>| {
                let next = tokens.get(at..at + way.len());
                !way.is_empty()
                    && next.is_some_and(|next| next.iter().zip(way.iter()).all(|(token, word)| is(text, token, word)))
            };
            at += ways.iter().find(fits)?.len();
        }
        Some(at)
    }

    /// Returns the token after what stands between two alternatives: an *or*, a stroke, a new line. Letters and a third alternative make a
    /// list of what commas part; two words with a comma between them may be a sentence.
    fn passes_gap(&self, text: &str, tokens: &[Range<usize>], at: usize) -> Option<usize> {
        let joined = tokens.get(at).is_some_and(|token| is(text, token, "or") || is(text, token, "and"));
        let next = at + usize::from(joined);
        let gap = &text[tokens.get(at.checked_sub(1)?)?.end..tokens.get(next)?.start];
        let parts = joined || gap.contains(['/', '|', '\n']) || self.lettered || self.each.len() > 2;
        let ends = !self.lettered && gap.contains(['.', '!', '?', ':']);
        (parts && !ends).then_some(next)
    }
}

fn is(text: &str, token: &Range<usize>, word: &str) -> bool {
    text[token.clone()].to_lowercase() == word
}

fn words(text: &str) -> Vec<String> {
    tokens(text).into_iter().map(|token| text[token].to_lowercase()).collect()
}

/// Returns where the words of a text are.
fn tokens(text: &str) -> Vec<Range<usize>> {
    let mut tokens: Vec<Range<usize>> = Vec::new();
    for (at, c) in text.char_indices().filter(|(_, c)| c.is_alphanumeric()) {
        let end = at + c.len_utf8();
        match tokens.last_mut() {
            Some(last) if last.end == at => last.end = end,
            _ => tokens.push(at..end),
        }
    }
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_lists_are_taken_out() {
        let options = |texts: &[&str]| AnswerFormat::Options(texts.iter().map(|&text| text.to_owned()).collect());
        let one_of = |texts: &[&str]| AnswerFormat::OneOf(texts.iter().map(|&text| text.to_owned()).collect());
        let cities = || options(&["London", "New York", "Paris"]);
        for (text, format, kept) in [
            ("yes or no", AnswerFormat::YesNo, ""),
            ("\"Yes/No\".", AnswerFormat::YesNo, ""),
            ("Yes or no? Yes.", AnswerFormat::YesNo, "? Yes."),
            ("Yes, no bird is a fish", AnswerFormat::YesNo, "Yes, no bird is a fish"),
            ("Yes. No other bird", AnswerFormat::YesNo, "Yes. No other bird"),
            ("no or yes", AnswerFormat::YesNo, "no or yes"),
            ("- valid\n- invalid", one_of(&["valid", "invalid"]), ""),
            ("valid, not invalid", one_of(&["valid", "invalid"]), "valid, not invalid"),
            ("red, green or blue", one_of(&["red", "green", "blue"]), ""),
            ("(A) London\n(B) New York\n(C) Paris", cities(), ""),
            ("A. London, B. New York, C. Paris: it is (B)", cities(), ": it is (B)"),
            ("London, New York or Paris", cities(), ""),
            ("(A), (B) or (C)", cities(), ""),
            ("(A) no, (B) no, (C) yes", cities(), "(A) no, (B) no, (C) yes"),
            ("(A) or (C)", cities(), "(A) or (C)"),
            ("yes or no", AnswerFormat::Auto, "yes or no"),
        ] {
            assert_eq!(without_echo(text, &format), kept, "{text}");
        }
    }
}
