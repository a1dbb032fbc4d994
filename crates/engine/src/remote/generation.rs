//! Reads one answer of a server, as fast as its reader wants it.

use std::vec;

use futures_util::stream;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::Timeouts;
use super::answer_reader::AnswerReader;
use super::attached::RequestPermit;
use super::event_stream::EventReader;
use super::http_client::{HttpError, Response};
use crate::model_runtime::{EngineError, Event, GenerateStream};

/// An answer that is being read. Dropping it closes the connection, which tells the server to stop.
pub(super) struct Generation {
    /// `None` once the answer has ended.
    response: Option<Response>,
    lines: EventReader,
    reader: AnswerReader,
    /// What was read and not taken yet.
    events: vec::IntoIter<Event>,
    first_piece: Option<Instant>,
    /// Held until the end of the answer.
    permit: Option<RequestPermit>,
    unloaded: CancellationToken,
    timeouts: Timeouts,
}

impl Generation {
    pub(super) fn new(response: Response, reader: AnswerReader, permit: RequestPermit, timeouts: Timeouts) -> Self {
        Self {
            response: Some(response),
            lines: EventReader::default(),
            reader,
            events: vec![].into_iter(),
            first_piece: None,
            unloaded: permit.0.unloaded.clone(),
            permit: Some(permit),
            timeouts,
        }
    }

    pub(super) fn into_stream(self) -> GenerateStream {
        GenerateStream::of(stream::unfold(Box::new(self), async |mut generation| {
            let event = generation.next().await?;
            Some((event, generation))
        }))
    }

    /// Returns the next event, or `None` after the last.
    async fn next(&mut self) -> Option<Result<Event, EngineError>> {
        loop {
            if let Some(event) = self.events.next() {
                self.note(&event);
                return Some(Ok(event));
            }
            let mut response = self.response.take()?;
            let unloaded = self.unloaded.clone();
            let read = tokio::select! {
                biased;
                () = unloaded.cancelled() => Err(EngineError::NotLoaded),
                read = self.read(&mut response) => read,
            };
            match read {
                Ok(events) => self.events = events.into_iter(),
                Err(error) => {
                    // The permit is released before the caller learns of the end.
                    self.permit = None;
                    return Some(Err(error));
                }
            }
            if self.reader.is_done() {
                response.release();
            } else {
                self.response = Some(response);
            }
        }
    }

    /// Reads the next bytes of the answer, and returns the events that they bring.
    async fn read(&mut self, response: &mut Response) -> Result<Vec<Event>, EngineError> {
        let Self { lines, reader, timeouts, .. } = self;
        let mut events = vec![];
        let within = if reader.has_started() { timeouts.idle } else { timeouts.begin };
        match timeout(within, response.chunk()).await.unwrap_or(Err(HttpError::TooSlow)) {
            Ok(Some(bytes)) => lines.push(&bytes),
            Ok(None) => reader.end(&mut events)?,
            Err(error) => return Err(failed(&error)),
        }
        while let Some(data) = lines.next_event().map_err(|error| failed(&error))? {
            reader.read(&data, &mut events)?;
        }
        Ok(events)
    }

    /// Measures the answer for the server's speed: when its first piece came, and its tokens at the end.
    fn note(&mut self, event: &Event) {
        match event {
            Event::Started { .. } | Event::Progress(_) => {}
            Event::Piece(_) => {
                self.first_piece.get_or_insert_with(Instant::now);
            }
            Event::Done { usage, .. } => {
                if let Some(permit) = self.permit.take() {
                    permit.count(*usage, self.first_piece.map(|first| first.elapsed()).unwrap_or_default());
                }
            }
        }
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if let Some(permit) = self.permit.take() {
            permit.count_cancelled();
        }
    }
}

fn failed(error: &impl ToString) -> EngineError {
    EngineError::Failed { reason: error.to_string() }
}
