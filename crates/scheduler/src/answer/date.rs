//! Dates as people and models write them, brought to one form.

/// The months; what they are shortened to is their first three letters.
const MONTHS: [&str; 12] = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
];

/// Reads a whole date. `May 1st, 2021`, `1 May 2021` and `2021-05-01` are one. Of `05/01/2021` nobody knows which is the month,
/// so it keeps its order.
pub(super) fn parse(text: &str) -> Option<String> {
    let lower = text.to_lowercase();
    let parts: Vec<&str> = lower.split(['/', '-', '.']).map(str::trim).collect();
    if let [a, b, c] = parts.as_slice() {
        let dashes = lower.contains('-');
        return match (digits(a, 4), digits(c, 4)) {
            (Some(year), _) => iso(year, digits(b, 2)?, digits(c, 2)?),
            (None, Some(year)) if !dashes || !lower.contains('/') => {
                let (first, second) = (digits(a, 2)?, digits(b, 2)?);
                let plausible = (1..=31).contains(&first) && (1..=31).contains(&second) && first.min(second) <= 12;
                plausible.then(|| format!("{first}/{second}/{year}"))
            }
            _ => None,
        };
    }
    let words: Vec<&str> = lower
        .split([' ', ','])
        .filter(|word| !word.is_empty() && *word != "of" && *word != "the" && !word.ends_with("day"))
        .collect();
    let [a, b, year] = words.as_slice() else { return None };
    let year = digits(year, 4)?;
    match (month(a), month(b)) {
        (Some(month), None) => iso(year, month, day(b)?),
        (None, Some(month)) => iso(year, month, day(a)?),
        _ => None,
    }
}

fn iso(year: u32, month: u32, day: u32) -> Option<String> {
    ((1..=12).contains(&month) && (1..=31).contains(&day)).then(|| format!("{year:04}-{month:02}-{day:02}"))
}

/// Reads a number of one to two digits, or of exactly four.
fn digits(text: &str, len: usize) -> Option<u32> {
    let fits = if len == 4 { text.len() == 4 } else { (1..=len).contains(&text.len()) };
    (fits && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse().ok())?
}

fn day(text: &str) -> Option<u32> {
    let plain = ["st", "nd", "rd", "th"].iter().find_map(|suffix| text.strip_suffix(suffix)).unwrap_or(text);
    digits(plain, 2)
}

/// Returns the number of a month that is named or shortened in lower case, from 1.
pub(super) fn month(word: &str) -> Option<u32> {
    let word = word.trim_end_matches('.');
    let index = MONTHS.iter().position(|name| *name == word || name.get(..3) == Some(word))?;
    u32::try_from(index + 1).ok()
}
