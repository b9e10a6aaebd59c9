//! One form for all the ways to write an answer.

use std::collections::BTreeSet;
use std::fmt;

use super::format::{AnswerFormat, letter};
use super::{date, latex, number};

/// Rounds until an answer no longer changes. Each takes something off, so two or three do in practice.
const MAX_ROUNDS: usize = 8;
/// Bytes of an answer that are looked at. Longer ones are prose, and no two of them are alike anyway.
const MAX_BYTES: usize = 8 * 1024;
/// Elements of a list or set.
const MAX_ELEMENTS: usize = 256;

/// A normalised answer: what two chains must share to vote for the same. Its text form normalises to itself.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Answer {
    /// An exact number: digits with an optional sign and decimals, or a fraction that has no finite decimal.
    Number(String),
    /// A lettered option, `A` to `Z`.
    Choice(char),
    /// Yes, true, valid, correct; or the contrary.
    Bool(bool),
    /// A date: year-month-day where the month was named or the order is ISO's, else as written, without idle zeros.
    Date(String),
    /// Values in order.
    List(Vec<String>),
    /// Values without order.
    Set(BTreeSet<String>),
    /// Anything else: lower case, without articles, punctuation and idle spaces.
    Text(String),
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(text) | Self::Date(text) | Self::Text(text) => f.write_str(text),
            Self::Choice(letter) => write!(f, "({letter})"),
            Self::Bool(yes) => f.write_str(if *yes { "yes" } else { "no" }),
            Self::List(items) => write!(f, "[{}]", items.join(", ")),
            Self::Set(items) => write!(f, "{{{}}}", items.iter().map(String::as_str).collect::<Vec<_>>().join(", ")),
        }
    }
}

/// Normalises an answer that [`super::extract()`] found. Doing it twice changes nothing.
#[must_use]
pub fn normalise(raw: &str, format: &AnswerFormat) -> Answer {
    let mut answer = once(&raw[..raw.floor_char_boundary(MAX_BYTES)], format);
    for _ in 0..MAX_ROUNDS {
        let next = once(&answer.to_string(), format);
        if next == answer {
            break;
        }
        answer = next;
    }
    answer
}

fn once(raw: &str, format: &AnswerFormat) -> Answer {
    if *format == AnswerFormat::Json {
        return Answer::Text(json(raw).unwrap_or_else(|| raw.trim().to_owned()));
    }
    let text = latex::clean(raw);
    let found = match format {
        AnswerFormat::Prose => Some(Answer::Text(text.to_lowercase())),
        AnswerFormat::Auto | AnswerFormat::Json => None,
        AnswerFormat::Number => number::parse(&text).or_else(|| number::first_in(&text)).map(Answer::Number),
        AnswerFormat::YesNo => polarity(&text).or_else(|| leading_polarity(&text)).map(Answer::Bool),
        AnswerFormat::Options(options) => option_of(&text, options, format).map(Answer::Choice),
        AnswerFormat::OneOf(options) => one_of(&text, options).map(Answer::Text),
        AnswerFormat::List => collection(&text).map(|(items, _)| Answer::List(items)),
        AnswerFormat::Set => collection(&text).map(|(items, _)| Answer::Set(items.into_iter().collect())),
    };
    found.unwrap_or_else(|| auto(&text))
}

/// Brings JSON to one form: keys in order, no idle spaces.
pub(super) fn json(text: &str) -> Option<String> {
    let mut value: serde_json::Value = serde_json::from_str(text.trim()).ok()?;
    value.sort_all_objects();
    Some(value.to_string())
}

fn auto(text: &str) -> Answer {
    if let Some(letter) = choice(text, &AnswerFormat::Auto) {
        return Answer::Choice(letter);
    }
    if let Some(inner) = sole_element(text) {
        return auto(&latex::clean(inner));
    }
    if let Some(answer) = scalar(text) {
        return answer;
    }
    match collection(text) {
        Some((items, true)) => Answer::Set(items.into_iter().collect()),
        Some((items, false)) => Answer::List(items),
        None => Answer::Text(plain(text)),
    }
}

/// Reads a value that is no list and no option.
fn scalar(text: &str) -> Option<Answer> {
    number::parse(text)
        .map(Answer::Number)
        .or_else(|| polarity(text).map(Answer::Bool))
        .or_else(|| date::parse(text).map(Answer::Date))
}

/// Reads an option's letter: `(B)`, `B`, `b)`, `B.`, `[B]`, `option B`, `(B) Paris`. Where options are expected, also
/// `B. Paris` and `B: Paris`; elsewhere that may be a name.
pub(super) fn choice(text: &str, format: &AnswerFormat) -> Option<char> {
    let lower = text.to_ascii_lowercase();
    let mut rest = text;
    for word in ["the ", "correct ", "answer ", "option ", "choice ", "letter "] {
        if lower[lower.len() - rest.len()..].starts_with(word) {
            rest = &rest[word.len()..];
        }
    }
    let named = rest.len() < text.len();
    let (open, inner) = match rest.strip_prefix(['(', '[']) {
        Some(inner) => (true, inner.trim_start()),
        None => (false, rest),
    };
    let mut chars = inner.chars();
    let first = chars.next()?;
    let letter = first.to_ascii_uppercase();
    if !format.admits(letter) {
        return None;
    }
    let after = chars.as_str();
    let closed = after.trim_start().strip_prefix([')', ']']);
    let expected = matches!(format, AnswerFormat::Options(_));
    let fits = match (open, closed) {
        (true, Some(_)) => true,
        (false, Some(tail)) => tail.is_empty() || first.is_ascii_uppercase(),
        (true, None) => false,
        (false, None) if after.is_empty() => true,
        (false, None) => {
            expected && (first.is_ascii_uppercase() || named) && after.starts_with(['.', ':', ',', ' ', '-'])
        }
    };
    // `A dog` is a phrase; `A. dog` is an option.
    let phrase =
        !open && closed.is_none() && after.starts_with(' ') && !after.trim_start().starts_with(['-', '–', '=']);
    (fits && (named || !phrase)).then_some(letter)
}

/// Finds the one option that the text names, by its letter or by its words.
fn option_of(text: &str, options: &[String], format: &AnswerFormat) -> Option<char> {
    choice(text, format).or_else(|| letter(position_of(text, options)?))
}

fn one_of(text: &str, options: &[String]) -> Option<String> {
    let by_words = position_of(text, options);
    // "Yes, it is valid" and "no" also choose between *valid* and *invalid*.
    let by_sense = || {
        let sense = polarity(text).or_else(|| leading_polarity(text))?;
        options.iter().position(|option| polarity(option) == Some(sense))
    };
    by_words.or_else(by_sense).and_then(|index| options.get(index)).map(|option| plain(option))
}

/// Finds the option that equals the text, or else the only one that occurs in it as whole words.
pub(super) fn position_of(text: &str, options: &[String]) -> Option<usize> {
    let wanted = auto(text);
    if let Some(index) = options.iter().position(|option| auto(&latex::clean(option)) == wanted) {
        return Some(index);
    }
    let words = format!(" {} ", plain(text));
    let occurs: Vec<(usize, String)> = options
        .iter()
        .enumerate()
        .map(|(index, option)| (index, format!(" {} ", plain(option))))
        .filter(|(_, option)| option.trim() != "" && words.contains(option.as_str()))
        .collect();
    // An option inside another one (`York` in `New York`) does not count beside it.
    let mut whole = occurs.iter().filter(|(index, option)| {
        !occurs.iter().any(|(other, longer)| other != index && longer.contains(option.as_str()))
    });
    match (whole.next(), whole.next()) {
        (Some((index, _)), None) => Some(*index),
        _ => None,
    }
}

/// Reads a word that says yes or no.
pub(super) fn polarity(text: &str) -> Option<bool> {
    match plain(text).as_str() {
        "yes" | "true" | "valid" | "correct" | "right" | "it is valid" | "it is true" => Some(true),
        "no" | "false" | "invalid" | "incorrect" | "wrong" | "not valid" | "not true" | "not correct" | "untrue" => {
            Some(false)
        }
        _ => None,
    }
}

/// Reads the word that says yes or no at the beginning of a sentence: `Yes, because …`.
pub(super) fn leading_polarity(text: &str) -> Option<bool> {
    let words = plain(text);
    let mut words =
        words.split(' ').filter(|word| !matches!(*word, "it" | "is" | "this" | "that" | "argument" | "statement"));
    let first = words.next()?;
    match (polarity(first), first) {
        (Some(sense), _) => Some(sense),
        (None, "not") => polarity(words.next()?).map(|sense| !sense),
        _ => None,
    }
}

/// Returns what `[…]` or `{…}` holds when it is one element.
fn sole_element(text: &str) -> Option<&str> {
    let (inner, _) = bracketed(text)?;
    let one = !inner.contains([',', ';', '[', ']', '{', '}', '(', ')']) && inner.chars().any(char::is_alphanumeric);
    one.then_some(inner)
}

/// Returns what stands between brackets that enclose the whole text, and whether they are braces.
fn bracketed(text: &str) -> Option<(&str, bool)> {
    [('[', ']', false), ('(', ')', false), ('{', '}', true)].into_iter().find_map(|(open, close, braces)| {
        let inner = text.strip_prefix(open)?.strip_suffix(close)?;
        (!inner.contains([open, close])).then_some((inner, braces))
    })
}

/// Splits values at commas, semicolons and a final *and*. The flag says whether braces made it a set.
fn collection(text: &str) -> Option<(Vec<String>, bool)> {
    let (inner, set) = bracketed(text).unwrap_or((text, false));
    let separator = if inner.contains(';') { ';' } else { ',' };
    let last_and = |item: &str| {
        let item = item.trim();
        item.strip_prefix("and ").or_else(|| item.strip_prefix("or ")).unwrap_or(item).to_owned()
    };
    let items: Vec<String> = inner
        .split(separator)
        .map(|item| element(&last_and(item)))
        .filter(|item| !item.is_empty())
        .take(MAX_ELEMENTS)
        .collect();
    (items.len() >= 2).then_some((items, set))
}

fn element(item: &str) -> String {
    let item = latex::clean(item);
    match scalar(&item) {
        Some(answer) => answer.to_string(),
        None => plain(&item).replace([',', ';', '[', ']', '{', '}'], " ").trim().to_owned(),
    }
}

/// Brings free text to its plain form. Formulas keep their operators and lose their spaces; words lose case, punctuation and
/// a leading article; what is all punctuation (a bracket sequence, say) only loses its spaces.
pub(super) fn plain(text: &str) -> String {
    let lower = text.to_lowercase();
    let squeezed = || lower.split_whitespace().collect::<String>();
    let has_digit = lower.contains(|c: char| c.is_numeric());
    let formula =
        lower.contains(['+', '*', '^', '=', '<', '>', '|', '&', '\\', '/']) || (has_digit && lower.contains('-'));
    if formula || !lower.contains(char::is_alphanumeric) {
        return squeezed();
    }
    let chars: Vec<char> = lower.chars().collect();
    let digit_at = |i: Option<usize>| i.and_then(|i| chars.get(i)).is_some_and(char::is_ascii_digit);
    let mut words = String::with_capacity(lower.len());
    for (i, &c) in chars.iter().enumerate() {
        let within_digits = matches!(c, '.' | ':') && digit_at(i.checked_sub(1)) && digit_at(Some(i + 1));
        if c.is_alphanumeric() || within_digits {
            words.push(c);
        } else if !matches!(c, '\'' | '’') {
            words.push(' ');
        }
    }
    let mut words: Vec<&str> = words.split_whitespace().collect();
    while words.len() > 1 && words.first().is_some_and(|first| matches!(*first, "a" | "an" | "the")) {
        words.remove(0);
    }
    words.join(" ")
}
