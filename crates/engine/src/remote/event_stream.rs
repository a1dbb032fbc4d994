//! Splits a server's event stream (`text/event-stream`) into the data of its events.

use bytes::{Buf as _, BytesMut};

/// The maximum length of an event in bytes, which leaves ample space for the log-probabilities of many tokens.
pub const EVENT_BYTES_MAX: usize = 1 << 20;

/// Parses an event stream, however its bytes are split.
#[derive(Debug, Default)]
pub struct EventReader {
    unread: BytesMut,
    /// The number of bytes in `unread` that were searched without finding a line end.
    searched: usize,
    /// The data of the current event.
    data: Vec<u8>,
    has_data: bool,
}

/// An event is longer than [`EVENT_BYTES_MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an event is longer than {EVENT_BYTES_MAX} bytes")]
pub struct TooLong;

impl EventReader {
    /// Appends more of the stream.
    pub fn push(&mut self, bytes: &[u8]) {
        self.unread.extend_from_slice(bytes);
    }

    /// Returns the data of the next complete event.
    pub fn next_event(&mut self) -> Result<Option<Vec<u8>>, TooLong> {
        while let Some(length) = self.unread[self.searched..].iter().position(|byte| *byte == b'\n') {
            let mut line = self.unread.split_to(self.searched + length);
            self.unread.advance(1);
            self.searched = 0;
            if line.last() == Some(&b'\r') {
                line.truncate(line.len() - 1);
            }
            if line.is_empty() && std::mem::take(&mut self.has_data) {
                return Ok(Some(std::mem::take(&mut self.data)));
            }
            self.take_line(&line)?;
        }
        self.searched = self.unread.len();
        if self.searched > EVENT_BYTES_MAX { Err(TooLong) } else { Ok(None) }
    }

    /// Keeps the text after `data:`. Other fields are ignored, and so are comments, which servers send to keep a
    /// connection alive.
    fn take_line(&mut self, line: &[u8]) -> Result<(), TooLong> {
        let Some(value) = line.strip_prefix(b"data:") else { return Ok(()) };
        if std::mem::replace(&mut self.has_data, true) {
            self.data.push(b'\n');
        }
        self.data.extend_from_slice(value.strip_prefix(b" ").unwrap_or(value));
        if self.data.len() > EVENT_BYTES_MAX { Err(TooLong) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &[u8], step: usize) -> Vec<String> {
        let mut reader = EventReader::default();
        let mut events = Vec::new();
        for piece in text.chunks(step) {
            reader.push(piece);
            while let Some(event) = reader.next_event().expect("short") {
                events.push(String::from_utf8(event).expect("text"));
            }
        }
        events
    }

    #[test]
    fn events_are_the_same_however_the_stream_is_cut() {
        let text = b": ping\n\ndata: {\"a\":1}\r\n\r\nevent: x\nid: 7\ndata:one\ndata: two\n\n\ndata: [DONE]\n\ndata: unfinished\n";
        for step in [1, 2, 3, 7, text.len()] {
            assert_eq!(read(text, step), ["{\"a\":1}", "one\ntwo", "[DONE]"], "cut every {step} bytes");
        }
    }

    #[test]
    fn an_event_without_end_is_refused() {
        let mut line = EventReader::default();
        line.push(&vec![b'x'; EVENT_BYTES_MAX + 1]);
        assert_eq!(line.next_event(), Err(TooLong));
        let mut event = EventReader::default();
        let many = b"data: some more of it\n".repeat(EVENT_BYTES_MAX / 8);
        event.push(&many);
        assert_eq!(event.next_event(), Err(TooLong));
    }
}
