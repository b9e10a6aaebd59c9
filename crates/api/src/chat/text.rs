//! Text on its way to a client, which cannot be taken back.
//!
//! A [`Voice`] makes one text of what several executors write. When one is lost, and beside a hedge, another begins from the start:
//!
//! 1. With the same seed and the same weights it writes the same. What agrees with what was sent is not sent again, and the
//!    client notices nothing but a pause.
//! 2. One with other weights may write something else. Then no draft is left that goes on where the client stands, the text can
//!    only be broken off, and [`Voice::is_lost`] says so as soon as it is certain. Two answers are never mixed.
//! 3. A draft that disagrees beside one that agrees changes nothing: the client follows the one that agrees.

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
    /// Takes what an executor wrote. Returns what is new for the client. White space before the first word is not passed on:
    /// answers have none.
    pub(crate) fn write(&mut self, job: JobId, node: NodeId, text: &str) -> Option<String> {
        let draft = self.drafts.entry((job, node)).or_default();
        draft.push_str(if draft.is_empty() { text.trim_start() } else { text });
        let new = draft.strip_prefix(self.sent.as_str()).filter(|new| !new.is_empty())?.to_owned();
        self.sent.push_str(&new);
        Some(new)
    }

    /// An executor is lost; should it come back, it begins anew.
    pub(crate) fn lose(&mut self, job: JobId, node: NodeId) {
        self.drafts.remove(&(job, node));
    }

    /// Returns whether every draft disagrees with what was sent.
    pub(crate) fn is_lost(&self) -> bool {
        let agrees = |draft: &String| draft.starts_with(&self.sent) || self.sent.starts_with(draft);
        !self.drafts.is_empty() && !self.drafts.values().any(agrees)
    }

    /// Returns what is missing to the whole answer.
    pub(crate) fn finish(&mut self, whole: &str) -> Result<String, Diverged> {
        // Answers are trimmed.
        match whole.strip_prefix(self.sent.as_str()) {
            Some(rest) => Ok(rest.to_owned()),
            None if self.sent.trim_end() == whole => Ok(String::new()),
            None => Err(Diverged),
        }
    }
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
        assert!(!voice.is_lost(), "somebody else may write the same");
        assert_eq!(voice.write(job, node(2), "One"), None);
        assert!(!voice.is_lost());
        assert_eq!(voice.write(job, node(2), " and two"), None);
        assert!(voice.is_lost());
        assert_eq!(
            voice.write(job, node(3), "One, two, three").as_deref(),
            Some(", three"),
            "a third one agrees again"
        );
        assert!(!voice.is_lost());
        assert_eq!(voice.finish("One and two"), Err(Diverged));
    }

    #[test]
    fn a_hedge_that_is_faster_takes_over() {
        let (mut voice, job) = (Voice::default(), JobId::default());
        assert_eq!(voice.write(job, node(1), "ab").as_deref(), Some("ab"));
        assert_eq!(voice.write(job, node(2), "abcd").as_deref(), Some("cd"));
        assert_eq!(voice.write(job, node(1), "c"), None);
        assert_eq!(voice.write(job, node(1), "de").as_deref(), Some("e"));
        assert_eq!(voice.finish("abcde"), Ok(String::new()));
    }

    #[test]
    fn white_space_around_an_answer_is_no_difference() {
        let (mut voice, job) = (Voice::default(), JobId::default());
        assert_eq!(voice.write(job, node(1), " \n"), None);
        assert_eq!(voice.write(job, node(1), " Hello ").as_deref(), Some("Hello "));
        assert_eq!(voice.finish("Hello"), Ok(String::new()));
        assert_eq!(voice.finish("Hello there"), Ok("there".to_owned()));
    }
}
