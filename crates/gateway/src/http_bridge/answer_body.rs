//! A streamed answer as a response body.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body::Frame;
use protocol::WireError;
use tokio::time::{self, Instant, Sleep};
use tokio_util::sync::{CancellationToken, ReusableBoxFuture, WaitForCancellationFutureOwned};

use crate::answer::{Answer, Piece, StreamFormat};
use crate::upstream;

/// Pieces that are ready are written in one frame, up to about this many bytes.
const COALESCED_BYTES: usize = 16 * 1024;

/// A streamed answer as a response body. Dropping it cancels the job.
pub(super) struct AnswerBody<F> {
    format: F,
    /// The pending step. It owns the answer meanwhile, so that a wait is never abandoned halfway.
    wait: ReusableBoxFuture<'static, Step>,
    buffer: BytesMut,
    finished: bool,
    silent_since: Instant,
    /// How often a silent stream sends a keep-alive.
    keep_alive_every: Duration,
    keep_alive: Pin<Box<Sleep>>,
    /// Resolves when the stream must end, because the gateway stops.
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
}

/// An event, and the answer it came from.
struct Step {
    answer: Option<Box<Answer>>,
    event: Event,
}

#[expect(clippy::large_enum_variant, reason = "nearly every event is a piece")]
enum Event {
    /// The job was accepted.
    Begun,
    Piece(Piece),
    Failed(WireError),
    Ended,
}

impl<F: StreamFormat> AnswerBody<F> {
    /// Creates the body of an answer that has begun.
    pub(super) fn new(mut format: F, answer: Box<Answer>, keep_alive_every: Duration, cut: &CancellationToken) -> Self {
        format.begin(&answer);
        Self::waiting(format, ReusableBoxFuture::new(next(answer)), keep_alive_every, cut)
    }

    /// Creates the body of an answer that has not begun yet.
    pub(super) fn pending(
        format: F,
        opening: impl Future<Output = Result<Box<Answer>, WireError>> + Send + 'static,
        keep_alive_every: Duration,
        cut: &CancellationToken,
    ) -> Self {
        let begun = async move {
            match opening.await {
                Ok(answer) => Step { answer: Some(answer), event: Event::Begun },
                Err(error) => Step { answer: None, event: Event::Failed(error) },
            }
        };
        Self::waiting(format, ReusableBoxFuture::new(begun), keep_alive_every, cut)
    }

    fn waiting(
        format: F,
        wait: ReusableBoxFuture<'static, Step>,
        keep_alive_every: Duration,
        cut: &CancellationToken,
    ) -> Self {
        Self {
            cut: Box::pin(cut.child_token().cancelled_owned()),
            format,
            wait,
            buffer: BytesMut::new(),
            finished: false,
            silent_since: Instant::now(),
            keep_alive_every,
            keep_alive: Box::pin(time::sleep(keep_alive_every)),
        }
    }

    /// Writes the pieces that are ready into the buffer.
    fn gather(&mut self, context: &mut Context<'_>) {
        while !self.finished && self.buffer.len() < COALESCED_BYTES {
            let Poll::Ready(Step { answer, event }) = self.wait.poll(context) else { return };
            match event {
                Event::Begun => {
                    if let Some(answer) = &answer {
                        self.format.begin(answer);
                    }
                }
                Event::Piece(piece) => {
                    self.format.piece(&piece, &mut self.buffer);
                    self.finished = piece.end.is_some();
                }
                Event::Failed(error) => {
                    self.format.failure(&error, &mut self.buffer);
                    self.finished = true;
                }
                Event::Ended => self.finished = true,
            }
            match answer {
                Some(answer) if !self.finished => self.wait.set(next(answer)),
                _ => self.finished = true,
            }
        }
    }

    /// Ends the stream with an error if the gateway must stop now.
    fn cut_if_stopping(&mut self, context: &mut Context<'_>) {
        if !self.finished && self.cut.as_mut().poll(context).is_ready() {
            self.format.failure(&upstream::stopping(), &mut self.buffer);
            self.finished = true;
            // Drops the answer, which cancels the job.
            self.wait.set(std::future::pending());
        }
    }

    /// Returns `Ready` when the stream has been silent for so long that a keep-alive is due.
    fn poll_silence(&mut self, context: &mut Context<'_>) -> Poll<()> {
        loop {
            std::task::ready!(self.keep_alive.as_mut().poll(context));
            let now = Instant::now();
            // Resetting the timer for each piece would cost more than the piece itself, so it catches up here.
            let silent = now - self.silent_since >= self.keep_alive_every;
            let from = if silent { now } else { self.silent_since };
            self.keep_alive.as_mut().reset(from + self.keep_alive_every);
            if silent {
                return Poll::Ready(());
            }
        }
    }
}

async fn next(mut answer: Box<Answer>) -> Step {
    let event = match answer.next().await {
        Some(Ok(piece)) => Event::Piece(piece),
        Some(Err(error)) => Event::Failed(error),
        None => Event::Ended,
    };
    Step { answer: Some(answer), event }
}

impl<F: StreamFormat> http_body::Body for AnswerBody<F> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let body = self.get_mut();
        body.gather(context);
        body.cut_if_stopping(context);
        if !body.buffer.is_empty() {
            body.silent_since = Instant::now();
            return Poll::Ready(Some(Ok(Frame::data(body.buffer.split().freeze()))));
        }
        if body.finished {
            return Poll::Ready(None);
        }
        std::task::ready!(body.poll_silence(context));
        body.silent_since = Instant::now();
        Poll::Ready(Some(Ok(Frame::data(body.format.keep_alive()))))
    }

    fn is_end_stream(&self) -> bool {
        self.finished && self.buffer.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;

    use super::*;

    struct Marks;

    impl StreamFormat for Marks {
        fn begin(&mut self, _: &Answer) {}

        fn piece(&mut self, _: &Piece, _: &mut BytesMut) {}

        fn failure(&mut self, error: &WireError, out: &mut BytesMut) {
            out.extend_from_slice(error.code.as_str().as_bytes());
        }

        fn keep_alive(&self) -> Bytes {
            Bytes::from_static(b"alive")
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_has_to_wait_says_again_and_again_that_it_lives() {
        let opening = async {
            time::sleep(Duration::from_secs(25)).await;
            Err(WireError::new(protocol::ErrorCode::NoCapacity, "full"))
        };
        let begun = Instant::now();
        let mut body = AnswerBody::pending(Marks, opening, Duration::from_secs(10), &CancellationToken::new());
        let mut seen = vec![];
        while let Some(frame) = body.frame().await {
            let data = frame.expect("infallible").into_data().expect("data");
            seen.push((begun.elapsed().as_secs(), String::from_utf8(data.to_vec()).expect("text")));
        }
        let expected = [(10, "alive"), (20, "alive"), (25, "no_capacity")];
        assert_eq!(seen, expected.map(|(at, text)| (at, text.to_owned())));
    }
}
