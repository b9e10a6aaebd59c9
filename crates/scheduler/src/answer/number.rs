//! Numbers as people and models write them, brought to one exact form. No floating point: `0.1` stays `0.1`.

use super::date;

/// Digits of a number, beyond which it is taken for text.
const MAX_DIGITS: usize = 60;
/// The largest power of ten in scientific notation.
const MAX_EXPONENT: i32 = 40;
/// Words of a unit behind a number (`12 square metres`).
const MAX_UNIT_WORDS: usize = 3;

/// Units that may stand right behind the digits.
const UNITS: [&str; 36] = [
    "km", "m", "cm", "mm", "kg", "g", "mg", "lb", "lbs", "oz", "s", "ms", "h", "hr", "hrs", "min", "l", "ml", "ft",
    "in", "mi", "mph", "km/h", "m/s", "°", "°c", "°f", "%", "€", "£", "¥", "usd", "eur", "cm^2", "m^2", "km^2",
];

/// Words behind a number that make it something other than an amount, as a month does: times, ranks, alternatives.
const NO_UNITS: [&str; 7] = ["am", "pm", "of", "and", "or", "to", "is"];

/// Reads a number with its sign, thousands separators, decimals, exponent, fraction, currency and unit, and returns its exact
/// canonical form: `-1234.5`, or `1/3` where no finite decimal exists. A percent sign counts as a unit: `50%` is `50`.
pub(crate) fn parse(text: &str) -> Option<String> {
    let lower = text.to_lowercase();
    // An equation's result is what stands behind its last sign.
    let side = lower.rsplit('=').next()?.trim();
    let side = ["≈", "~", "about ", "approximately ", "exactly ", "around "]
        .iter()
        .fold(side, |s, mark| s.strip_prefix(mark).unwrap_or(s).trim_start());
    let (negative, body) = match side.strip_prefix('-') {
        Some(rest) => (true, rest.trim_start()),
        None => (false, side.strip_prefix('+').unwrap_or(side)),
    };
    let body = body.trim_start_matches(['€', '£', '¥']).trim_start();
    let (digits, rest) = split_digits(body);
    if digits.is_empty() { words(body, negative) } else { unit(rest).then(|| fraction(digits, negative))? }
}

/// Returns the first number that stands in a text, in canonical form.
pub(crate) fn first_in(text: &str) -> Option<String> {
    scan(text).next()
}

/// Returns the last number that stands in a text, in canonical form.
pub(crate) fn last_in(text: &str) -> Option<String> {
    scan(text).last()
}

/// Returns all numbers written in digits. What is glued to a letter (`x2`, `v1.5`) is a name, not a number.
fn scan(text: &str) -> impl Iterator<Item = String> + '_ {
    let mut at = 0;
    std::iter::from_fn(move || {
        while let Some(offset) = text[at..].find(|c: char| c.is_ascii_digit()) {
            let begin = at + offset;
            let (digits, _) = split_digits(&text[begin..]);
            let digits = digits.trim_end_matches(['.', ',', '/']);
            at = begin + digits.len().max(1);
            let before = text[..begin].trim_end_matches('.').chars().next_back();
            let glued = before.is_some_and(|c| c.is_alphanumeric() || c == '_');
            let negative = is_negative(&text[..begin]);
            match fraction(digits, negative) {
                Some(number) if !glued => return Some(number),
                _ => {}
            }
        }
        None
    })
}

/// Says whether the sign before a number belongs to it: `= -5` and `gives -5` do, `7-5` and `7 -5` do not.
fn is_negative(before: &str) -> bool {
    let Some(rest) = before.trim_end_matches(['$', '€', '£', '¥']).strip_suffix(['-', '−']) else { return false };
    !rest.ends_with(char::is_alphanumeric) && !rest.trim_end().ends_with(|c: char| c.is_ascii_digit() || c == ')')
}

/// Splits off the leading run of digits, separators, exponent and slash.
fn split_digits(text: &str) -> (&str, &str) {
    let bytes = text.as_bytes();
    let mut end = 0;
    while end < bytes.len() {
        let next = bytes.get(end + 1).copied().unwrap_or(b' ');
        let after_digit = end > 0 && bytes[end - 1].is_ascii_digit();
        let belongs = match bytes[end] {
            b'0'..=b'9' => true,
            b'.' => next.is_ascii_digit() || after_digit,
            b',' | b'/' => after_digit && next.is_ascii_digit(),
            b'e' | b'E' => after_digit && exponent_follows(&bytes[end + 1..]),
            b'-' | b'+' => end > 0 && matches!(bytes[end - 1], b'e' | b'E'),
            _ => false,
        };
        if !belongs {
            break;
        }
        end += 1;
    }
    text.split_at(end)
}

fn exponent_follows(bytes: &[u8]) -> bool {
    let digits = bytes.strip_prefix(b"-").or_else(|| bytes.strip_prefix(b"+")).unwrap_or(bytes);
    let len = digits.iter().take_while(|b| b.is_ascii_digit()).count();
    // `5e` followed by a word is no exponent.
    len > 0 && !digits.get(len).is_some_and(u8::is_ascii_alphabetic)
}

/// Says whether what stands behind the digits is nothing, or a unit.
fn unit(rest: &str) -> bool {
    let rest = rest.trim_end_matches('.');
    if rest.trim().is_empty() || UNITS.contains(&rest.trim()) {
        return true;
    }
    let Some(words) = rest.strip_prefix(' ').or_else(|| rest.strip_prefix('-')) else { return false };
    let words: Vec<&str> = words.split_whitespace().collect();
    words.len() <= MAX_UNIT_WORDS
        && words.iter().all(|word| {
            word.chars().all(char::is_alphabetic) && !NO_UNITS.contains(word) && date::month(word).is_none()
        })
}

/// Brings `a/b`, or a plain decimal, to its canonical form.
fn fraction(text: &str, negative: bool) -> Option<String> {
    let Some((above, below)) = text.split_once('/') else { return decimal(text, negative) };
    let (above, below) = (integer(above)?, integer(below)?);
    if below == 0 {
        return None;
    }
    let divisor = gcd(above, below);
    let (above, below) = (above / divisor, below / divisor);
    match finite_decimal(above, below) {
        Some(text) => decimal(&text, negative),
        None => Some(format!("{}{above}/{below}", if negative { "-" } else { "" })),
    }
}

fn integer(text: &str) -> Option<u128> {
    let digits = ungroup(text)?;
    (digits.len() <= 18).then(|| digits.parse().ok())?
}

fn gcd(a: u128, b: u128) -> u128 {
    if b == 0 { a.max(1) } else { gcd(b, a % b) }
}

/// Divides, if the result has at most 18 decimals.
fn finite_decimal(above: u128, below: u128) -> Option<String> {
    let places = (0..=18u32).find(|&places| 10u128.checked_pow(places).is_some_and(|scale| scale % below == 0))?;
    let scale = 10u128.pow(places);
    let scaled = above.checked_mul(scale / below)?;
    let width = usize::try_from(places).ok()?;
    Some(format!("{}.{:0>width$}", scaled / scale, scaled % scale))
}

/// Takes thousands separators out of an integer: `1,000` becomes `1000`, `1,00` is none.
fn ungroup(text: &str) -> Option<String> {
    let mut groups = text.split(',');
    let first = groups.next()?;
    let rest: Vec<&str> = groups.collect();
    let grouped = rest.is_empty() || (1..=3).contains(&first.len());
    let all_digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    let whole = grouped && all_digits(first) && rest.iter().all(|group| group.len() == 3 && all_digits(group));
    whole.then(|| std::iter::once(first).chain(rest).collect())
}

/// Brings a decimal with an optional exponent to `[-]digits[.digits]` without idle zeros.
fn decimal(text: &str, negative: bool) -> Option<String> {
    let (mantissa, exponent) = match text.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, exponent.parse::<i32>().ok()?),
        None => (text, 0),
    };
    if exponent.abs() > MAX_EXPONENT {
        return None;
    }
    let (whole, part) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let whole = ungroup(whole)?;
    if !part.bytes().all(|b| b.is_ascii_digit()) || (whole.is_empty() && part.is_empty()) {
        return None;
    }
    let digits = format!("{whole}{part}");
    if digits.len() > MAX_DIGITS {
        return None;
    }
    let point = i32::try_from(whole.len()).ok()? + exponent;
    let (whole, part) = place_point(&digits, point);
    let whole = whole.trim_start_matches('0');
    let part = part.trim_end_matches('0');
    let sign = if negative && !(whole.is_empty() && part.is_empty()) { "-" } else { "" };
    let whole = if whole.is_empty() { "0" } else { whole };
    Some(if part.is_empty() { format!("{sign}{whole}") } else { format!("{sign}{whole}.{part}") })
}

/// Splits digits at a decimal point that may lie outside of them.
fn place_point(digits: &str, point: i32) -> (String, String) {
    match usize::try_from(point) {
        Err(_) => {
            let zeros = usize::try_from(point.unsigned_abs()).unwrap_or_default();
            (String::new(), format!("{}{digits}", "0".repeat(zeros)))
        }
        Ok(point) if point >= digits.len() => (format!("{digits:0<point$}"), String::new()),
        Ok(point) => (digits[..point].to_owned(), digits[point..].to_owned()),
    }
}

/// Reads an English number in words: `twelve`, `minus one hundred and five`, `two thousand three hundred`.
fn words(text: &str, negative: bool) -> Option<String> {
    let (negative, text) = match text.strip_prefix("minus ").or_else(|| text.strip_prefix("negative ")) {
        Some(rest) => (true, rest),
        None => (negative, text),
    };
    let text = ["thousand", "million", "billion"]
        .iter()
        .fold(text.replace('-', " "), |text, scale| text.replace(&format!("{scale},"), scale));
    let mut total = 0u64;
    let mut last_scale = u64::MAX;
    let mut group = Group::default();
    let mut any = false;
    for word in text.split_whitespace() {
        any = true;
        if let Some(scale) = scale(word) {
            if scale >= last_scale || group.value == 0 {
                return None;
            }
            total = total.checked_add(group.value.checked_mul(scale)?)?;
            (last_scale, group) = (scale, Group { after_scale: true, ..Group::default() });
        } else if !group.push(word) {
            return None;
        }
    }
    let zero = group.zero && total == 0;
    let number = total.checked_add(group.value)?;
    let whole = any && (number > 0 || zero) && !group.open_and;
    whole.then(|| decimal(&number.to_string(), negative))?
}

/// A number below a thousand, while its words come.
#[derive(Default)]
struct Group {
    value: u64,
    /// Whether `zero` was said.
    zero: bool,
    /// What may still follow: 2 anything, 1 a unit, 0 nothing but `hundred`.
    used: u8,
    hundred: bool,
    after_scale: bool,
    /// Whether an `and` waits for its number.
    open_and: bool,
}

impl Group {
    fn push(&mut self, word: &str) -> bool {
        if word == "and" {
            let allowed = (self.hundred && self.used == 0 || self.after_scale && self.value == 0) && !self.open_and;
            self.open_and = true;
            return allowed;
        }
        if word == "hundred" {
            let allowed = !self.hundred && (1..10).contains(&self.value) && !self.open_and;
            (self.value, self.hundred, self.used) = (self.value * 100, true, 0);
            return allowed;
        }
        let Some(value) = small(word) else { return false };
        self.open_and = false;
        // Tens may be followed by one unit; everything else closes the group but for `hundred`.
        let allowed = !self.zero && (self.used == 0 || (self.used == 1 && (1..10).contains(&value)));
        self.zero = value == 0;
        self.used = if value >= 20 && self.used == 0 { 1 } else { 2 };
        self.value += value;
        allowed && !(self.zero && (self.value != 0 || self.after_scale))
    }
}

fn small(word: &str) -> Option<u64> {
    const UNITS: [&str; 20] = [
        "zero",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
        "thirteen",
        "fourteen",
        "fifteen",
        "sixteen",
        "seventeen",
        "eighteen",
        "nineteen",
    ];
    const TENS: [&str; 8] = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"];
    let unit = UNITS.iter().position(|unit| *unit == word);
    let ten = || TENS.iter().position(|ten| *ten == word).map(|ten| (ten + 2) * 10);
    unit.or_else(ten).and_then(|value| u64::try_from(value).ok())
}

fn scale(word: &str) -> Option<u64> {
    match word {
        "thousand" => Some(1_000),
        "million" => Some(1_000_000),
        "billion" => Some(1_000_000_000),
        _ => None,
    }
}
