//! Reads server-sent events from bytes as they arrive, within bounds.
//!
//! Only the `data` field matters here. See <https://html.spec.whatwg.org/multipage/server-sent-events.html>.

/// Bytes of one event's data, and of one line.
const MAX_EVENT_BYTES: usize = 256 << 10;

/// An event, or one of its lines, is longer than any sensible endpoint sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EventTooLong;

/// Collects bytes into events.
#[derive(Debug, Default)]
pub(crate) struct EventReader {
    line: Vec<u8>,
    data: Option<String>,
    /// The last byte was a carriage return: a line feed that follows belongs to it.
    after_return: bool,
}

impl EventReader {
    /// Takes bytes and returns the data of the events that they complete.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<Vec<String>, EventTooLong> {
        let mut events = Vec::new();
        for &byte in bytes {
            match byte {
                b'\n' if self.after_return => self.after_return = false,
                b'\n' | b'\r' => {
                    self.after_return = byte == b'\r';
                    events.extend(self.end_line()?);
                }
                _ => {
                    self.after_return = false;
                    if self.line.len() >= MAX_EVENT_BYTES {
                        return Err(EventTooLong);
                    }
                    self.line.push(byte);
                }
            }
        }
        Ok(events)
    }

    fn end_line(&mut self) -> Result<Option<String>, EventTooLong> {
        let line = String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned();
        if line.is_empty() {
            return Ok(self.data.take());
        }
        if let Some(value) = line.strip_prefix("data:") {
            let value = value.strip_prefix(' ').unwrap_or(value);
            match &mut self.data {
                Some(data) if data.len() + value.len() >= MAX_EVENT_BYTES => {
                    return Err(EventTooLong);
                }
                Some(data) => {
                    data.push('\n');
                    data.push_str(value);
                }
                None => self.data = Some(value.to_owned()),
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn events_survive_any_cut_and_any_line_end() {
        for end in ["\n", "\r\n", "\r"] {
            let text = ": comment\n\ndata: one\n\nevent: x\ndata:two\ndata:  three é\n\n".replace('\n', end);
            for cut in 0..=text.len() {
                let mut reader = EventReader::default();
                let mut events = reader.push(&text.as_bytes()[..cut]).unwrap();
                events.extend(reader.push(&text.as_bytes()[cut..]).unwrap());
                assert_eq!(events, ["one", "two\n three é"], "{end:?} cut at {cut}");
            }
        }
    }

    #[test]
    fn endless_lines_and_events_are_refused() {
        let mut reader = EventReader::default();
        assert_eq!(reader.push(&vec![b'x'; MAX_EVENT_BYTES + 1]), Err(EventTooLong));
        let mut reader = EventReader::default();
        let line = [b"data:".as_slice(), &vec![b'x'; MAX_EVENT_BYTES / 2], b"\n"].concat();
        assert!(reader.push(&line).is_ok());
        assert!(reader.push(&line).is_ok() || reader.push(&line).is_err());
        assert_eq!(reader.push(&line), Err(EventTooLong));
    }
}
