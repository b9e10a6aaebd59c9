//! Text on its way to a client, which cannot be taken back.
//!
//! [`Voice`] makes one text of what several executors write: when one is lost, and beside a hedge, another begins from the
//! start. With the same seed and the same weights it writes the same, and the client notices nothing. [`Stops`] ends a text
//! before the first of a few strings, and holds back what may be the beginning of one.

use std::collections::BTreeMap;

use chorus_protocol::{JobId, NodeId};

/// What was sent and what is written now do not agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Diverged;

/// One text of several drafts.
#[derive(Debug, Default)]
pub(crate) struct Voice {
    sent: String,
    drafts: BTreeMap<(JobId, NodeId), String>,
}

impl Voice {
    /// Takes what an executor wrote. Returns what is new for the client.
    pub(crate) fn write(&mut self, job: JobId, node: NodeId, text: &str) -> Option<String> {
        let draft = self.drafts.entry((job, node)).or_default();
        draft.push_str(text);
        let new = draft.strip_prefix(self.sent.as_str()).filter(|new| !new.is_empty())?.to_owned();
        self.sent.push_str(&new);
        Some(new)
    }

    /// An executor is lost; should it come back, it begins anew.
    pub(crate) fn lose(&mut self, job: JobId, node: NodeId) {
        self.drafts.remove(&(job, node));
    }

    /// Returns what is missing to the whole answer.
    pub(crate) fn finish(&mut self, whole: &str) -> Result<String, Diverged> {
        // Answers are trimmed at their end.
        match whole.strip_prefix(self.sent.as_str()) {
            Some(rest) => Ok(rest.to_owned()),
            None if self.sent.trim() == whole.trim() => Ok(String::new()),
            None => Err(Diverged),
        }
    }
}

/// Ends a text before the first of a few strings.
#[derive(Debug)]
pub(crate) struct Stops {
    stops: Vec<String>,
    held: String,
    hit: bool,
}

impl Stops {
    pub(crate) fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new(), hit: false }
    }

    /// Returns whether the text has ended.
    pub(crate) fn is_hit(&self) -> bool {
        self.hit
    }

    /// Begins anew, with the same stops.
    pub(crate) fn reset(&mut self) {
        self.held.clear();
        self.hit = false;
    }

    /// Takes text. Returns what certainly stands before every stop.
    pub(crate) fn push(&mut self, text: &str) -> String {
        if self.hit {
            return String::new();
        }
        self.held.push_str(text);
        if let Some(end) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.hit = true;
            self.held.truncate(end);
            return std::mem::take(&mut self.held);
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        std::mem::replace(&mut self.held, rest)
    }

    /// Returns what was held back, at the text's end.
    pub(crate) fn flush(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Returns how many bytes at the end of `text` are the beginning of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let ends = stop.char_indices().map(|(at, _)| at).skip(1);
    ends.filter(|end| text.ends_with(&stop[..*end])).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use chorus_protocol::SecretKey;

    use super::*;

    fn node(number: u8) -> NodeId {
        SecretKey::from_bytes(&[number; 32]).node_id()
    }

    #[test]
    fn a_second_executor_goes_on_where_the_first_was_lost() {
        let (mut voice, job) = (Voice::default(), JobId::default());
        assert_eq!(voice.write(job, node(1), "One, ").as_deref(), Some("One, "));
        assert_eq!(voice.write(job, node(1), "two").as_deref(), Some("two"));
        voice.lose(job, node(1));
        assert_eq!(voice.write(job, node(2), "One"), None);
        assert_eq!(voice.write(job, node(2), ", two, three").as_deref(), Some(", three"));
        assert_eq!(voice.finish("One, two, three."), Ok(".".to_owned()));
    }

    #[test]
    fn another_answer_is_not_mixed_in() {
        let (mut voice, job) = (Voice::default(), JobId::default());
        voice.write(job, node(1), "One, two").unwrap();
        voice.lose(job, node(1));
        assert_eq!(voice.write(job, node(2), "Eins, zwei, drei"), None);
        assert_eq!(voice.finish("Eins, zwei, drei"), Err(Diverged));
    }

    #[test]
    fn a_hedge_that_is_faster_takes_over() {
        let (mut voice, job) = (Voice::default(), JobId::default());
        assert_eq!(voice.write(job, node(1), "ab").as_deref(), Some("ab"));
        assert_eq!(voice.write(job, node(2), "abcd").as_deref(), Some("cd"));
        assert_eq!(voice.write(job, node(1), "c"), None);
        assert_eq!(voice.write(job, node(1), "de").as_deref(), Some("e"));
        assert_eq!(voice.finish("abcde  "), Ok("  ".to_owned()));
    }

    #[test]
    fn stops_end_a_text_however_it_is_cut() {
        let text = "Eins, zwei\n\nQ: drei. STOP vier";
        let whole = |stops: &[&str]| {
            let ends = stops.iter().filter_map(|stop| text.find(stop));
            text[..ends.min().unwrap_or(text.len())].to_owned()
        };
        for stops in [&["\n\nQ:", "STOP"][..], &["STOP"], &["never"], &["Eins"], &[", zwei\nX", "drei"], &[]] {
            for size in 1..text.len() {
                let mut scanner = Stops::new(stops.iter().map(|stop| (*stop).to_owned()).collect());
                let pieces: Vec<char> = text.chars().collect();
                let mut out = String::new();
                for piece in pieces.chunks(size) {
                    out += &scanner.push(&piece.iter().collect::<String>());
                }
                out += &scanner.flush();
                assert_eq!(out, whole(stops), "{stops:?} by {size}");
                assert_eq!(scanner.is_hit(), whole(stops) != text, "{stops:?} by {size}");
            }
        }
    }
}
