//! Sends the events of a generation to its reader without blocking. Text for a slow reader is merged until the
//! generation has to pause.

use std::sync::Arc;

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::mpsc::{OwnedPermit, Sender};
use tokio_util::sync::CancellationToken;

use super::pulse::Reading;
use crate::model_runtime::{EngineError, Event, FinishReason, GenerateSink, GenerateStream, Piece, TokenUsage};

/// The number of unread events that a stream holds before pieces are merged.
const EVENTS_MAX: usize = 256;
/// The number of tokens merged for a slow reader before its generation pauses (backpressure).
const MERGED_TOKENS_MAX: usize = 128;

type Item = Result<Event, EngineError>;

/// The engine's side of one stream.
///
/// Capacity for the start, the last piece and the end is reserved at creation, so that a generation can always end,
/// however many progress events an unread stream holds.
#[derive(Debug)]
pub(super) struct Outbox {
    events: Sender<Item>,
    start: Option<OwnedPermit<Item>>,
    last_piece: Option<OwnedPermit<Item>>,
    end: Option<OwnedPermit<Item>>,
    cancelled: CancellationToken,
    /// Text that did not fit into the stream yet.
    merged: Piece,
    reading: Arc<Reading>,
}

impl Outbox {
    /// Creates a stream and the outbox that feeds it, for a prompt of `tokens_total` tokens.
    pub(super) fn new(tokens_total: u32) -> (Self, GenerateStream) {
        Self::with_capacity(EVENTS_MAX, tokens_total)
    }

    fn with_capacity(capacity: usize, tokens_total: u32) -> (Self, GenerateStream) {
        let (GenerateSink { events, cancelled }, stream) = GenerateStream::channel(capacity.max(3));
        let start = events.clone().try_reserve_owned().ok();
        let last_piece = events.clone().try_reserve_owned().ok();
        let end = events.clone().try_reserve_owned().ok();
        let reading = Arc::new(Reading::new(events.clone(), tokens_total));
        (Self { events, start, last_piece, end, cancelled, merged: Piece::default(), reading }, stream)
    }

    /// Returns the prefill progress of the prompt.
    pub(super) fn reading(&self) -> &Arc<Reading> {
        &self.reading
    }

    /// Returns whether the reader is gone.
    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled.is_cancelled() || self.events.is_closed()
    }

    /// Tells the reader that its prompt was accepted.
    pub(super) fn started(&mut self, prompt_tokens: u32, cached_tokens: u32) {
        self.reading.record_event();
        self.reading.reach(cached_tokens as usize);
        if let Some(permit) = self.start.take() {
            permit.send(Ok(Event::Started { prompt_tokens, cached_tokens }));
        }
    }

    /// Sends more text, merged with text that did not fit before.
    pub(super) fn piece(&mut self, piece: Piece) {
        self.merged.append(piece);
        self.flush();
    }

    /// Returns whether the reader is so far behind that its generation should pause.
    pub(super) fn is_full(&mut self) -> bool {
        if self.merged.tokens.len() < MERGED_TOKENS_MAX {
            return false;
        }
        self.flush();
        !self.merged.is_empty()
    }

    /// Waits until a paused generation may continue: the stream has capacity, or the reader is gone.
    pub(super) fn capacity(&self) -> impl Future<Output = ()> + use<> {
        let (events, cancelled) = (self.events.clone(), self.cancelled.clone());
        async move {
            tokio::select! {
                _ = events.reserve() => {}
                () = cancelled.cancelled() => {}
            }
        }
    }

    /// Waits until the reader is gone.
    pub(super) fn gone(&self) -> impl Future<Output = ()> + use<> {
        self.cancelled.clone().cancelled_owned()
    }

    /// Ends the stream successfully.
    pub(super) fn done(mut self, rest: Piece, reason: FinishReason, usage: TokenUsage) {
        self.hand_last_piece();
        self.hand_end(Ok(Event::Done { reason, usage, rest }));
    }

    /// Ends the stream with an error.
    pub(super) fn fail(mut self, error: EngineError) {
        self.hand_last_piece();
        self.hand_end(Err(error));
    }

    fn flush(&mut self) {
        if self.merged.is_empty() {
            return;
        }
        match self.events.try_reserve() {
            Ok(permit) => {
                self.reading.record_event();
                permit.send(Ok(Event::Piece(std::mem::take(&mut self.merged))));
            }
            Err(TrySendError::Full(()) | TrySendError::Closed(())) => {}
        }
    }

    fn hand_last_piece(&mut self) {
        if self.merged.is_empty() {
            return;
        }
        if let Some(permit) = self.last_piece.take() {
            permit.send(Ok(Event::Piece(std::mem::take(&mut self.merged))));
        }
    }

    fn hand_end(&mut self, item: Item) {
        if let Some(permit) = self.end.take() {
            permit.send(item);
        }
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        // If the engine panics, the stream must still end with an error.
        self.hand_end(Err(EngineError::Failed { reason: "the engine gave up the generation".into() }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(text: &str, token: u32) -> Piece {
        Piece { text: text.into(), tokens: vec![token], ..Piece::default() }
    }

    async fn read_all(mut stream: GenerateStream) -> Vec<Item> {
        let mut items = Vec::new();
        while let Some(item) = stream.next().await {
            items.push(item);
        }
        items
    }

    #[tokio::test]
    async fn a_reader_that_keeps_up_gets_each_piece_by_itself() {
        let (mut outbox, stream) = Outbox::with_capacity(8, 3);
        outbox.started(3, 0);
        outbox.piece(piece("a", 1));
        outbox.piece(piece("b", 2));
        outbox.done(Piece::default(), FinishReason::Stop, TokenUsage::default());
        let items = read_all(stream).await;
        assert_eq!(items.len(), 4);
        assert_eq!(items[2], Ok(Event::Piece(Piece { text: "b".into(), tokens: vec![2], ..Piece::default() })));
    }

    #[tokio::test]
    async fn pieces_merge_for_a_slow_reader_and_the_end_still_arrives() {
        let (mut outbox, stream) = Outbox::with_capacity(4, 3);
        outbox.started(3, 0);
        for token in 0..100 {
            outbox.piece(piece("x", token));
        }
        outbox.done(Piece { text: "!".into(), ..Piece::default() }, FinishReason::Length, TokenUsage::default());
        let items = read_all(stream).await;
        assert_eq!(items.len(), 4);
        let Ok(Event::Piece(Piece { text, tokens, .. })) = &items[2] else { panic!("{items:?}") };
        assert_eq!((text.len(), tokens.len()), (99, 99), "its text is that of its tokens");
        let Ok(Event::Done { reason: FinishReason::Length, rest, .. }) = &items[3] else { panic!("{items:?}") };
        assert_eq!(rest.text, "!");
    }

    #[tokio::test]
    async fn a_generation_pauses_until_its_reader_has_read() {
        let (mut outbox, mut stream) = Outbox::with_capacity(3, 3);
        outbox.started(1, 0);
        for token in 0..MERGED_TOKENS_MAX as u32 {
            assert!(!outbox.is_full());
            outbox.piece(piece("x", token));
        }
        assert!(outbox.is_full());
        assert!(matches!(stream.next().await, Some(Ok(Event::Started { .. }))));
        outbox.capacity().await;
        assert!(!outbox.is_full());
        assert!(
            matches!(stream.next().await, Some(Ok(Event::Piece(Piece { tokens, .. }))) if tokens.len() == MERGED_TOKENS_MAX)
        );
    }

    #[tokio::test]
    async fn an_error_ends_the_stream_after_the_text_before_it() {
        let (mut outbox, stream) = Outbox::with_capacity(3, 3);
        outbox.started(1, 0);
        outbox.piece(piece("x", 1));
        outbox.fail(EngineError::NotLoaded);
        let items = read_all(stream).await;
        assert!(matches!(&items[1], Ok(Event::Piece(Piece { text, .. })) if text == "x"));
        assert_eq!(items[2], Err(EngineError::NotLoaded));
    }

    #[tokio::test]
    async fn a_dropped_stream_cancels() {
        let (outbox, stream) = Outbox::new(1);
        assert!(!outbox.is_cancelled());
        drop(stream);
        assert!(outbox.is_cancelled());
        outbox.capacity().await;
    }
}
