//! The caller's half of a stream.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use protocol::codec::MESSAGE_BYTES_MAX;
use tokio::time::{Instant, Sleep, sleep_until};

use super::CallError;
use super::links::Link;
use crate::frame::{FRAME_PAYLOAD_MAX, Frame, WINDOW};
use crate::transport::Channel;

/// The rate at which even a slow network carries a request.
pub const REQUEST_BYTES_PER_SEC: u32 = 1024 * 1024;
/// How often a caller that acknowledges what it reads does so by itself, at most.
const ACKNOWLEDGE_EVERY: Duration = Duration::from_secs(1);

/// The timeouts of a stream.
#[derive(Debug, Clone, Copy)]
pub struct StreamOptions {
    /// How long the callee may take to accept or refuse a request of a single frame. A longer request gets one second
    /// more for each [`REQUEST_BYTES_PER_SEC`].
    pub accept_within: Duration,
    /// How long the whole response may take, until [`ResponseStream::lift_deadline`]. It is sent to the callee. `None`
    /// waits as long as messages arrive.
    pub deadline: Option<Duration>,
    /// How long each message may take after the stream was accepted.
    pub stall: Duration,
}

/// The caller's end of a stream of messages from a peer. Dropping it cancels the call.
#[derive(Debug)]
pub struct ResponseStream {
    channel: Box<dyn Channel>,
    options: StreamOptions,
    /// The connection. It is suspected when the callee becomes silent.
    link: Arc<Link>,
    deadline: Option<Instant>,
    /// When the last message arrived.
    heard_at: Instant,
    /// Fires at the deadline, or when the stall time may have passed. It is not reset with each message, which would
    /// cost more than the message itself; when it fires, it is set again if needed.
    timer: Option<Pin<Box<Sleep>>>,
    /// The beginning of a message that spans several frames.
    partial: BytesMut,
    /// Bytes read since credit was last granted.
    ungranted: u32,
    /// Bytes of the message that was returned last. It counts as read once the next one is wanted.
    returned: u32,
    /// When credit was last granted, if the caller acknowledges what it reads.
    acknowledged_at: Option<Instant>,
    /// Whether the callee waits for an acknowledgement.
    is_acknowledgement_due: bool,
    finished: bool,
}

impl ResponseStream {
    /// Sends the request and waits until the callee accepts it.
    pub(super) async fn open(
        channel: Box<dyn Channel>,
        method: &str,
        body: Bytes,
        options: StreamOptions,
        link: Arc<Link>,
    ) -> Result<Self, CallError> {
        let heard_at = Instant::now();
        let deadline = options.deadline.map(|wait| heard_at + wait);
        let mut stream = Self {
            channel,
            options,
            link,
            deadline,
            heard_at,
            timer: None,
            partial: BytesMut::new(),
            ungranted: 0,
            returned: 0,
            acknowledged_at: None,
            is_acknowledgement_due: false,
            finished: false,
        };
        // A long request does not shorten the time in which the callee must accept it.
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
                // A callee that stops reading the request has sent the reason.
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
        if self.channel.send(frame).await { Ok(()) } else { Err(self.closed()) }
    }

    async fn receive(&mut self) -> Result<Frame, CallError> {
        let bytes = self.channel.receive().await.ok_or_else(|| self.closed())?;
        Frame::decode(bytes).map_err(|_| CallError::Garbled)
    }

    fn closed(&self) -> CallError {
        if self.link.connection().has_peer_ended() { CallError::PeerEnded } else { CallError::Closed }
    }

    fn finish(&mut self, error: CallError) -> CallError {
        self.finished = true;
        error
    }

    /// Lets the callee send this many more bytes ahead of the reader, for long responses over networks with a high
    /// bandwidth-delay product. Must not exceed 2 MiB, or the transport may close the stream.
    pub fn widen(&mut self, bytes: u32) {
        if !self.channel.try_send(Frame::Credit(bytes).encode()) {
            self.ungranted = self.ungranted.saturating_add(bytes);
        }
    }

    /// From now on acknowledges what is read, at least once a second while messages arrive, and when this is dropped. A
    /// message counts as read once the next one is wanted.
    pub fn acknowledge_reads(&mut self) {
        self.acknowledged_at = Some(self.heard_at);
    }

    /// From now on only limits the silence between messages, for answers whose deadline applies to their beginning.
    pub fn lift_deadline(&mut self) {
        self.deadline = None;
    }

    /// Returns the next message, or `None` after the last one.
    ///
    /// Waits at most for the stall time, and not past the deadline. Cancel safe.
    pub async fn next(&mut self) -> Option<Result<Bytes, CallError>> {
        if self.finished {
            return None;
        }
        // The stall time starts when the caller starts to wait.
        self.heard_at = Instant::now();
        self.grant_returned();
        let mut timer = self.timer.take().unwrap_or_else(|| Box::pin(sleep_until(self.wait_until().0)));
        let message = loop {
            tokio::select! {
                biased;
                message = self.message() => break message,
                () = timer.as_mut() => {
                    let (until, late) = self.wait_until();
                    if Instant::now() >= until {
                        self.link.suspicion().raise();
                        // The stream is not finished: the callee may still be working, and is told to stop when this is
                        // dropped.
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

    /// Returns how long to wait for the next message, and the error if it does not arrive by then.
    fn wait_until(&self) -> (Instant, CallError) {
        let stall = self.heard_at + self.options.stall;
        match self.deadline {
            Some(deadline) if deadline < stall => (deadline, CallError::Deadline),
            _ => (stall, CallError::Stalled),
        }
    }

    async fn message(&mut self) -> Result<Option<Bytes>, CallError> {
        loop {
            self.acknowledge_if_due().await;
            match self.receive().await? {
                Frame::Data { more, acknowledge, payload } => {
                    self.is_acknowledgement_due |= acknowledge;
                    if !more && self.partial.is_empty() {
                        self.returned = payload.len() as u32;
                        return Ok(Some(payload));
                    }
                    // A long message may need more than the window, so its parts count as read when they arrive.
                    self.ungranted = self.ungranted.saturating_add(payload.len() as u32);
                    self.grant_half();
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

    /// Counts the last message as read. Grants credit if enough was read, or nothing was acknowledged for a while.
    fn grant_returned(&mut self) {
        self.ungranted = self.ungranted.saturating_add(std::mem::take(&mut self.returned));
        let is_due = |last: Instant| self.heard_at.saturating_duration_since(last) >= ACKNOWLEDGE_EVERY;
        if self.ungranted > 0 && self.acknowledged_at.is_some_and(is_due) {
            self.grant();
        } else {
            self.grant_half();
        }
    }

    /// Grants credit once half the window has been read, so that few frames are sent in the other direction.
    fn grant_half(&mut self) {
        if self.ungranted >= WINDOW / 2 {
            self.grant();
        }
    }

    fn grant(&mut self) {
        if self.channel.try_send(Frame::Credit(self.ungranted).encode()) {
            self.granted();
        }
    }

    fn granted(&mut self) {
        self.ungranted = 0;
        self.acknowledged_at = self.acknowledged_at.map(|_| self.heard_at);
    }

    /// Grants credit for all that was read if the callee waits for it. Cancel safe.
    async fn acknowledge_if_due(&mut self) {
        if !self.is_acknowledgement_due {
            return;
        }
        if self.ungranted == 0 || self.channel.send(Frame::Credit(self.ungranted).encode()).await {
            self.granted();
        }
        // If the callee is gone, it needs no acknowledgement.
        self.is_acknowledgement_due = false;
    }
}

impl Drop for ResponseStream {
    fn drop(&mut self) {
        if !self.finished {
            if self.ungranted > 0 && self.acknowledged_at.is_some() {
                self.grant();
            }
            // If the queue is full, closing the channel has the same effect.
            let _ = self.channel.try_send(Frame::Cancel.encode());
        }
    }
}
