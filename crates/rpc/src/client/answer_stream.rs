//! The caller's half of a stream.

use std::pin::Pin;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use protocol::codec::MESSAGE_BYTES_MAX;
use tokio::time::{Instant, Sleep, sleep_until};

use super::CallError;
use super::links::Suspicion;
use crate::frame::{FRAME_PAYLOAD_MAX, Frame, WINDOW};
use crate::transport::Channel;

/// Bytes of a request that even a slow way carries in a second.
pub const REQUEST_BYTES_PER_SEC: u32 = 1024 * 1024;
/// How long to wait, and for what.
#[derive(Debug, Clone, Copy)]
pub struct StreamOptions {
    /// For the callee to accept or refuse a request of a single frame; a longer one takes a second more for each
    /// [`REQUEST_BYTES_PER_SEC`].
    pub accept_within: Duration,
    /// For the whole answer, until [`AnswerStream::lift_deadline`]; the callee is told. `None` waits as long as
    /// messages come.
    pub deadline: Option<Duration>,
    /// For each message after the acceptance.
    pub stall: Duration,
}

/// The caller's end of a stream: messages that a peer sends. Dropping it cancels the call.
#[derive(Debug)]
pub struct AnswerStream {
    channel: Box<dyn Channel>,
    options: StreamOptions,
    /// Raised when the callee falls silent.
    suspicion: Suspicion,
    deadline: Option<Instant>,
    /// When the last message came.
    heard_at: Instant,
    /// Fires at the deadline, or when the stall time may be over. It is not moved at each message, which would cost
    /// more than the message: it catches up when it fires.
    timer: Option<Pin<Box<Sleep>>>,
    /// The beginning of a message that comes in several frames.
    partial: BytesMut,
    /// Bytes read since the last grant.
    ungranted: u32,
    finished: bool,
}

impl AnswerStream {
    /// Sends the request and waits until the callee accepts it.
    pub(crate) async fn open(
        channel: Box<dyn Channel>,
        method: &str,
        body: Bytes,
        options: StreamOptions,
        suspicion: Suspicion,
    ) -> Result<Self, CallError> {
        let heard_at = Instant::now();
        let deadline = options.deadline.map(|wait| heard_at + wait);
        let mut stream = Self {
            channel,
            options,
            suspicion,
            deadline,
            heard_at,
            timer: None,
            partial: BytesMut::new(),
            ungranted: 0,
            finished: false,
        };
        // A long request does not shorten the time that the callee has to accept it.
        let length = body.len().saturating_sub(FRAME_PAYLOAD_MAX) as f64;
        let within = options.accept_within + Duration::from_secs_f64(length / f64::from(REQUEST_BYTES_PER_SEC));
        let within = options.deadline.map_or(within, |deadline| within.min(deadline.max(options.accept_within)));
        let accepted = stream.send_request(method, body);
        tokio::time::timeout(within, accepted).await.map_err(|_| CallError::NotAccepted)??;
        Ok(stream)
    }

    async fn send_request(&mut self, method: &str, mut body: Bytes) -> Result<(), CallError> {
        if body.len() > MESSAGE_BYTES_MAX {
            return Err(CallError::TooLarge { bytes: body.len() });
        }
        let open = Frame::Open {
            credit: WINDOW,
            deadline_ms: self.options.deadline.map_or(0, |deadline| deadline.as_millis() as u64),
            method: method.to_owned(),
            body_bytes: body.len() as u32,
            body: body.split_to(body.len().min(FRAME_PAYLOAD_MAX)),
        };
        self.send(open.encode()).await?;
        while !body.is_empty() {
            let part = body.split_to(body.len().min(FRAME_PAYLOAD_MAX));
            if self.send(Frame::Part(part).encode()).await.is_err() {
                // A callee that wants no more of the request has said why.
                break;
            }
        }
        match self.receive().await? {
            Frame::Accept => Ok(()),
            Frame::Error(error) => Err(self.finish(CallError::Remote(error))),
            _ => Err(self.finish(CallError::Garbled)),
        }
    }

    async fn send(&self, frame: Bytes) -> Result<(), CallError> {
        if self.channel.send(frame).await { Ok(()) } else { Err(CallError::Closed) }
    }

    async fn receive(&mut self) -> Result<Frame, CallError> {
        let bytes = self.channel.receive().await.ok_or(CallError::Closed)?;
        Frame::decode(bytes).map_err(|_| CallError::Garbled)
    }

    fn finish(&mut self, error: CallError) -> CallError {
        self.finished = true;
        error
    }

    /// Lets the callee send so many bytes more before any of them is read: for answers that are long and quick, on ways
    /// that are far. No more than 2 MiB, or the network closes the stream.
    pub fn widen(&mut self, bytes: u32) {
        if !self.channel.try_send(Frame::Credit(bytes).encode()) {
            self.ungranted = self.ungranted.saturating_add(bytes);
        }
    }

    /// Bounds only the silence between messages from here on, for answers whose deadline is for their beginning.
    pub fn lift_deadline(&mut self) {
        self.deadline = None;
    }

    /// Returns the next message, or `None` after the last.
    ///
    /// Waits at most the stall time and not past the deadline. Cancel safe.
    pub async fn next(&mut self) -> Option<Result<Bytes, CallError>> {
        if self.finished {
            return None;
        }
        // Silence counts from when somebody listens.
        self.heard_at = Instant::now();
        let mut timer = self.timer.take().unwrap_or_else(|| Box::pin(sleep_until(self.wait_until().0)));
        let message = loop {
            tokio::select! {
                biased;
                message = self.message() => break message,
                () = timer.as_mut() => {
                    let (until, late) = self.wait_until();
                    if Instant::now() >= until {
                        self.suspicion.raise();
                        // Not finished: the callee may still be at work, and is told to stop when this is dropped.
                        return Some(Err(late));
                    }
                    timer.as_mut().reset(until);
                }
            }
        };
        self.timer = Some(timer);
        match message {
            Ok(Some(message)) => Some(Ok(message)),
            Ok(None) => {
                self.finished = true;
                None
            }
            Err(error) => Some(Err(self.finish(error))),
        }
    }

    /// Returns until when to wait for the next message, and what it means when none has come by then.
    fn wait_until(&self) -> (Instant, CallError) {
        let stall = self.heard_at + self.options.stall;
        match self.deadline {
            Some(deadline) if deadline < stall => (deadline, CallError::Deadline),
            _ => (stall, CallError::Stalled),
        }
    }

    async fn message(&mut self) -> Result<Option<Bytes>, CallError> {
        loop {
            match self.receive().await? {
                Frame::Data { more, payload } => {
                    self.grant(payload.len() as u32);
                    if !more && self.partial.is_empty() {
                        return Ok(Some(payload));
                    }
                    self.partial.extend_from_slice(&payload);
                    if self.partial.len() > MESSAGE_BYTES_MAX {
                        return Err(CallError::Garbled);
                    }
                    if !more {
                        return Ok(Some(std::mem::take(&mut self.partial).freeze()));
                    }
                }
                Frame::End => return Ok(None),
                Frame::Error(error) => return Err(CallError::Remote(error)),
                _ => return Err(CallError::Garbled),
            }
        }
    }

    /// Gives credit back once half the window is read, so that few frames go the other way.
    fn grant(&mut self, bytes: u32) {
        self.ungranted = self.ungranted.saturating_add(bytes);
        if self.ungranted >= WINDOW / 2 && self.channel.try_send(Frame::Credit(self.ungranted).encode()) {
            self.ungranted = 0;
        }
    }
}

impl Drop for AnswerStream {
    fn drop(&mut self) {
        if !self.finished {
            // Where the queue is full, the closing channel says the same.
            let _ = self.channel.try_send(Frame::Cancel.encode());
        }
    }
}
