//! Takes the mark-up off an answer: LaTeX, Markdown, quotes, bullets, final punctuation.

/// Rounds of tidying; each one takes something off, so a handful settles everything that people write.
const MAX_ROUNDS: usize = 8;

/// Commands that only wrap their argument.
const WRAPPERS: [&str; 8] =
    ["\\boxed{", "\\fbox{", "\\text{", "\\textbf{", "\\mathrm{", "\\mathbf{", "\\textit{", "\\operatorname{"];

/// Commands and marks that are replaced, longest first where one begins with another.
const REPLACED: [(&str, &str); 21] = [
    ("\\left", ""),
    ("\\right", ""),
    ("\\cdot", "*"),
    ("\\times", "*"),
    ("\\degree", "°"),
    ("^\\circ", "°"),
    ("^{\\circ}", "°"),
    ("\\%", "%"),
    ("\\$", ""),
    ("\\{", "{"),
    ("\\}", "}"),
    ("\\(", ""),
    ("\\)", ""),
    ("\\[", ""),
    ("\\]", ""),
    ("\\,", ""),
    ("\\;", ""),
    ("\\!", ""),
    ("{,}", ","),
    ("__", ""),
    ("`", ""),
];

/// Returns the answer without its mark-up.
pub(crate) fn clean(raw: &str) -> String {
    let mut text = raw.trim().to_owned();
    for _ in 0..MAX_ROUNDS {
        let next = round(&text);
        if next == text {
            break;
        }
        text = next;
    }
    text
}

fn round(raw: &str) -> String {
    let mut text = fractions(&unwrap_commands(raw));
    for (mark, plain) in REPLACED {
        if text.contains(mark) {
            text = text.replace(mark, plain);
        }
    }
    let text = unbold(&text).replace('$', "").replace(['−', '–'], "-").replace(['\u{a0}', '\u{202f}'], " ");
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    unquote(unbullet(&text)).trim_end_matches(['.', ',', ';', ':', '!', '?']).trim().to_owned()
}

/// Takes Markdown's `**` away, but leaves a power such as `2**3`.
fn unbold(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut parts = text.split("**").peekable();
    while let Some(part) = parts.next() {
        out.push_str(part);
        let power = |next: &&str| part.ends_with(char::is_alphanumeric) && next.starts_with(char::is_alphanumeric);
        if parts.peek().is_some_and(power) {
            out.push_str("**");
        }
    }
    out
}

/// Replaces `\text{…}` and its kin by what they hold. A brace that is never closed is taken to close at the end.
fn unwrap_commands(raw: &str) -> String {
    let mut text = raw.to_owned();
    for command in WRAPPERS {
        while let Some(at) = text.find(command) {
            let inner = at + command.len();
            let (end, after) =
                closing(&text[inner..]).map_or((text.len(), text.len()), |len| (inner + len, inner + len + 1));
            text = format!("{}{}{}", &text[..at], &text[inner..end], &text[after..]);
        }
    }
    text
}

/// Replaces `\frac{a}{b}` by `a/b`.
fn fractions(raw: &str) -> String {
    let mut text = raw.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac");
    while let Some((at, above, below, end)) = text.find("\\frac{").and_then(|at| fraction(&text, at)) {
        text = format!("{}{above}/{below}{}", &text[..at], &text[end..]);
    }
    text
}

fn fraction(text: &str, at: usize) -> Option<(usize, String, String, usize)> {
    let above = at + "\\frac{".len();
    let above_end = above + closing(text.get(above..)?)?;
    let below = above_end + 1;
    let rest = text.get(below..)?.strip_prefix('{')?;
    let below_end = closing(rest)?;
    Some((at, text[above..above_end].to_owned(), rest[..below_end].to_owned(), below + 1 + below_end + 1))
}

/// Returns where the brace that stands before `text` is closed.
pub(crate) fn closing(text: &str) -> Option<usize> {
    let mut depth = 0usize;
    for (at, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => return Some(at),
            '}' => depth -= 1,
            _ => {}
        }
    }
    None
}

/// Takes a list mark off: `- yes`, `* yes`, `• yes`, `# yes`. A minus before a number is no list mark.
fn unbullet(text: &str) -> &str {
    for mark in ["- ", "* ", "• ", "# ", "## ", "### ", "> "] {
        match text.strip_prefix(mark) {
            Some(rest) if rest.trim_start().starts_with(|c: char| !c.is_ascii_digit()) => return rest.trim_start(),
            _ => {}
        }
    }
    text
}

fn unquote(text: &str) -> &str {
    for (open, close) in [('"', '"'), ('\'', '\''), ('“', '”'), ('‘', '’'), ('«', '»'), ('*', '*'), ('_', '_')]
    {
        let inner = text.strip_prefix(open).and_then(|rest| rest.strip_suffix(close));
        match inner {
            Some(inner) if !inner.is_empty() && !inner.contains([open, close]) => return inner,
            _ => {}
        }
    }
    text
}
