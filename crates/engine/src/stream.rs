//! An answer as it grows: where it stops, what may be shown, and handing it to a slow reader.
//!
//! Text that may be the beginning of a stop text is held back until it is certain. What the reader
//! has not room for is merged with what follows, so neither the engine nor memory waits for a reader.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::Chunk;

/// How long an answer that is complete waits for its reader.
const FLUSH_LIMIT: Duration = Duration::from_secs(30);

/// The text of one answer.
#[derive(Debug)]
pub(crate) struct Answer {
    text: String,
    stops: Vec<String>,
    pieces: usize,
    /// Tokens made so far.
    tokens: u32,
    /// Where the last piece began.
    last_piece: usize,
    /// Where the text ends because a stop text begins there, and where that one ends.
    stopped: Option<(usize, usize)>,
    /// Bytes handed to the reader.
    sent: usize,
    reader: Option<mpsc::Sender<Chunk>>,
}

impl Answer {
    pub(crate) fn new(stops: Vec<String>, reader: mpsc::Sender<Chunk>) -> Self {
        Self {
            text: String::new(),
            stops: stops.into_iter().filter(|stop| !stop.is_empty()).collect(),
            pieces: 0,
            tokens: 0,
            last_piece: 0,
            stopped: None,
            sent: 0,
            reader: Some(reader),
        }
    }

    /// Appends a piece, which may be empty. `tokens` is how many were made from the answer's first on.
    pub(crate) fn push(&mut self, piece: &str, tokens: u32) {
        self.pieces += 1;
        self.tokens = self.tokens.max(tokens);
        self.last_piece = self.text.len();
        self.text.push_str(piece);
        if self.stopped.is_some() {
            return;
        }
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let mut from = self.last_piece.saturating_sub(longest);
        while !self.text.is_char_boundary(from) {
            from -= 1;
        }
        let tail = &self.text[from..];
        // The stop text that ends first is the one reached first.
        self.stopped = (self.stops.iter())
            .filter_map(|stop| tail.find(stop.as_str()).map(|at| (at, at + stop.len())))
            .min_by_key(|&(_, end)| end)
            .map(|(begin, end)| (from + begin, from + end));
    }

    /// Returns how many pieces there were.
    pub(crate) fn pieces(&self) -> usize {
        self.pieces
    }

    /// Tells whether a stop text was reached.
    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.is_some()
    }

    /// Tells whether the stop text was complete before the last piece began: then the last token is
    /// not part of the answer.
    pub(crate) fn overran(&self) -> bool {
        self.stopped.is_some_and(|(_, end)| end <= self.last_piece)
    }

    /// Returns the answer without the stop text.
    pub(crate) fn into_text(mut self) -> String {
        self.text.truncate(self.stopped.map_or(self.text.len(), |(begin, _)| begin));
        self.text
    }

    /// Returns where the text that may be shown ends, while more may follow.
    fn certain(&self) -> usize {
        if let Some((begin, _)) = self.stopped {
            return begin;
        }
        let held_back = (self.stops.iter())
            .map(|stop| {
                let possible = (1..stop.len()).rev();
                possible
                    .filter(|&len| stop.is_char_boundary(len))
                    .find(|&len| self.text.ends_with(&stop[..len]))
                    .unwrap_or(0)
            })
            .max()
            .unwrap_or(0);
        self.text.len() - held_back
    }

    /// What the reader has not seen of the text up to `end`.
    fn chunk(&self, end: usize) -> Chunk {
        Chunk { text: self.text[self.sent..end].to_owned(), tokens: self.tokens }
    }

    /// Hands over what the reader has room for now; returns whether something is left that it could
    /// take later.
    pub(crate) fn offer(&mut self) -> bool {
        let certain = self.certain();
        let Some(reader) = &self.reader else { return false };
        if certain <= self.sent {
            return false;
        }
        let chunk = self.chunk(certain);
        match reader.try_send(chunk) {
            Ok(()) => {
                self.sent = certain;
                false
            }
            Err(mpsc::error::TrySendError::Full(_)) => true,
            Err(mpsc::error::TrySendError::Closed(_)) => {
                self.reader = None;
                false
            }
        }
    }

    /// Waits until the reader has room, or is gone.
    pub(crate) async fn room(&self) {
        if let Some(reader) = &self.reader {
            // An error means that the reader is gone, which `offer` finds out.
            drop(reader.reserve().await);
        }
    }

    /// Hands over the rest, and waits for the reader for as long as it may take, or until the caller cancels.
    pub(crate) async fn finish(&mut self, cancel: &CancellationToken) {
        tokio::select! {
            () = cancel.cancelled() => {}
            _ = tokio::time::timeout(FLUSH_LIMIT, self.flush()) => {}
        }
    }

    async fn flush(&mut self) {
        let end = self.stopped.map_or(self.text.len(), |(begin, _)| begin);
        if let Some(reader) = &self.reader
            && end > self.sent
            && reader.send(self.chunk(end)).await.is_ok()
        {
            self.sent = end;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, String, bool) {
        let (sender, mut receiver) = mpsc::channel(100);
        let mut answer = Answer::new(stops.iter().map(|&s| s.to_owned()).collect(), sender);
        for piece in pieces {
            answer.push(piece, 0);
            assert!(!answer.offer());
        }
        let stopped = answer.is_stopped();
        let mut seen = Vec::new();
        while let Ok(chunk) = receiver.try_recv() {
            seen.push(chunk.text);
        }
        (seen, answer.into_text(), stopped)
    }

    #[test]
    fn a_stop_text_is_never_shown_however_it_is_cut() {
        for cut in 0..=10 {
            let whole = "one\n\nUser: two";
            let (first, second) = whole.split_at(cut);
            let (seen, text, stopped) = run(&["\n\nUser:"], &[first, second]);
            assert!(stopped);
            assert_eq!(seen.concat(), "one");
            assert_eq!(text, "one");
        }
    }

    #[test]
    fn what_only_looked_like_a_stop_text_is_shown_in_the_end() {
        let (seen, text, stopped) = run(&["END", "ENOUGH"], &["a", "EN", "T", "EN", "ough"]);
        assert!(!stopped);
        assert_eq!(seen, ["a", "ENT", "ENough"]);
        assert_eq!(text, "aENTENough");
    }

    #[test]
    fn the_stop_text_that_ends_first_wins_and_characters_stay_whole() {
        let (seen, text, _) = run(&["bcde", "cd"], &["aé", "bcde"]);
        assert_eq!(text, "aéb");
        assert_eq!(seen.concat(), "aéb");
        let (_, text, _) = run(&["é!"], &["né", "é", "!x"]);
        assert_eq!(text, "né");
    }

    #[test]
    fn it_knows_whether_the_stop_text_ended_before_the_last_piece() {
        let (sender, _receiver) = mpsc::channel(1);
        let mut answer = Answer::new(vec!["##".to_owned()], sender);
        answer.push("a##", 0);
        assert!(answer.is_stopped() && !answer.overran());
        answer.push("b", 0);
        assert!(answer.overran());
        assert_eq!(answer.into_text(), "a");
    }

    #[tokio::test]
    async fn a_slow_reader_gets_merged_chunks_and_loses_nothing() {
        let (sender, mut receiver) = mpsc::channel(1);
        let mut answer = Answer::new(Vec::new(), sender);
        let chunk = |text: &str, tokens| Chunk { text: text.to_owned(), tokens };
        answer.push("a", 1);
        assert!(!answer.offer());
        answer.push("b", 2);
        assert!(answer.offer(), "no room");
        answer.push("c", 4);
        assert_eq!(receiver.recv().await.unwrap(), chunk("a", 1));
        answer.room().await;
        assert!(!answer.offer());
        assert_eq!(receiver.recv().await.unwrap(), chunk("bc", 4));
        answer.push("d", 5);
        answer.flush().await;
        assert_eq!(receiver.recv().await.unwrap(), chunk("d", 5));
    }

    #[test]
    fn a_reader_that_left_is_forgotten() {
        let (sender, receiver) = mpsc::channel(1);
        drop(receiver);
        let mut answer = Answer::new(Vec::new(), sender);
        answer.push("a", 0);
        assert!(!answer.offer());
        assert_eq!(answer.into_text(), "a");
    }
}
