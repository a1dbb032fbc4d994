//! Relays one answer from a server to its reader.

use reqwest::Response;
use tokio::time::{Instant, timeout};

use super::Timeouts;
use super::answer_reader::AnswerReader;
use super::attached::RequestPermit;
use super::event_stream::EventReader;
use super::http_client::HttpError;
use crate::model_runtime::{EngineError, Event, GenerateSink};

/// Reads the answer to its end, or until its reader is gone. The connection is then closed, which tells the server to
/// stop.
pub(super) async fn relay(
    response: Response,
    reader: AnswerReader,
    sink: GenerateSink,
    permit: RequestPermit,
    timeouts: Timeouts,
) {
    let (unloaded, cancelled) = (permit.0.unloaded.clone(), sink.cancelled.clone());
    let failed = tokio::select! {
        biased;
        () = cancelled.cancelled() => return permit.count_cancelled(),
        () = unloaded.cancelled() => EngineError::NotLoaded,
        answered = answer(response, reader, &sink, &permit, timeouts) => match answered {
            Ok(()) => return,
            Err(error) => error,
        },
    };
    // The permit is released before the caller learns of the end.
    drop(permit);
    let _ = sink.events.send(Err(failed)).await;
}

async fn answer(
    mut response: Response,
    mut reader: AnswerReader,
    sink: &GenerateSink,
    permit: &RequestPermit,
    timeouts: Timeouts,
) -> Result<(), EngineError> {
    let mut stream = EventReader::default();
    let mut events = Vec::new();
    let mut first_piece = None;
    while !reader.is_done() {
        let within = if reader.has_started() { timeouts.idle } else { timeouts.begin };
        let read = timeout(within, response.chunk()).await.map_err(|_| HttpError::TooSlow);
        match read.and_then(|chunk| Ok(chunk?)) {
            Ok(Some(bytes)) => stream.push(&bytes),
            Ok(None) => reader.end(&mut events)?,
            Err(error) => return Err(EngineError::Failed { reason: error.to_string() }),
        }
        while let Some(data) = stream.next_event().map_err(|error| EngineError::Failed { reason: error.to_string() })? {
            reader.read(&data, &mut events)?;
        }
        for event in events.drain(..) {
            match &event {
                Event::Started { .. } | Event::Progress(_) => {}
                Event::Piece(_) => {
                    first_piece.get_or_insert_with(Instant::now);
                }
                Event::Done { usage, .. } => {
                    permit.count(*usage, first_piece.map(|first| first.elapsed()).unwrap_or_default());
                }
            }
            // If the reader is gone, this task is cancelled.
            let _ = sink.events.send(Ok(event)).await;
        }
    }
    Ok(())
}
