//! `tether/stream/1`: one request, then messages back under credit (`docs/wire/tether-stream-1.md`).
//!
//! The caller opens with the request and a window in bytes. The callee accepts or refuses, then sends messages
//! while it has credit; the caller grants more as it reads. Either may end it: the callee with an end or an error,
//! the caller with a cancel, which it also sends by going away.

use std::pin::Pin;
use std::time::Duration;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use protocol::codec::MESSAGE_BYTES_MAX;
use protocol::{ErrorCode, PublicKey, WireError, codec};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::client::CallError;
use crate::client::links::Suspicion;
use crate::server::budget::{Allowance, ReservedBytes};
use crate::transport::Channel;

/// The most bytes of a payload in one frame; longer payloads are cut, so that streams share a connection fairly.
pub const FRAME_PAYLOAD_MAX: usize = 64 * 1024;
/// The window a caller opens with, in bytes.
pub const WINDOW: u32 = 256 * 1024;
/// Bytes of a request that even a slow way carries in a second.
pub const REQUEST_BYTES_PER_SEC: u32 = 1024 * 1024;
/// The version in an open frame.
const VERSION: u8 = 1;

const OPEN: u8 = 1;
const PART: u8 = 2;
const ACCEPT: u8 = 3;
const DATA: u8 = 4;
const CREDIT: u8 = 5;
const CANCEL: u8 = 6;
const END: u8 = 7;
const ERROR: u8 = 8;

/// One frame of `tether/stream/1`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// Opens a stream.
    Open {
        /// Bytes the caller is ready to take.
        credit: u32,
        /// Milliseconds the caller will wait for the whole answer; 0 for no limit.
        deadline_ms: u64,
        /// The method's name.
        method: String,
        /// Length of the whole request.
        body_bytes: u32,
        /// The beginning of the request.
        body: Bytes,
    },
    /// More of the request.
    Part(Bytes),
    /// The callee takes the call.
    Accept,
    /// A message, or its beginning where `more` follows.
    Data {
        /// Whether the message goes on in the next frame.
        more: bool,
        /// The bytes.
        payload: Bytes,
    },
    /// The caller takes this many bytes more.
    Credit(u32),
    /// The caller wants no more.
    Cancel,
    /// The answer is complete.
    End,
    /// The answer failed, or the call was refused.
    Error(WireError),
}

/// Why bytes are not a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The frame ends too early.
    #[error("the frame is cut short")]
    Short,
    /// The frame is longer than a frame may be.
    #[error("the frame is too long")]
    Long,
    /// No frame begins like this.
    #[error("no frame of kind {0}")]
    Kind(u8),
    /// Another version of the protocol.
    #[error("version {0} of tether/stream is not spoken here")]
    Version(u8),
    /// A part is malformed.
    #[error("the frame's {0} is malformed")]
    Malformed(&'static str),
}

impl Frame {
    /// Writes the frame.
    pub fn encode(&self) -> Bytes {
        let mut bytes = BytesMut::new();
        match self {
            Self::Open { credit, deadline_ms, method, body_bytes, body } => {
                bytes.reserve(24 + method.len() + body.len());
                bytes.put_u8(OPEN);
                bytes.put_u8(VERSION);
                bytes.put_u32_le(*credit);
                bytes.put_u64_le(*deadline_ms);
                bytes.put_u8(method.len() as u8);
                bytes.put_slice(method.as_bytes());
                bytes.put_u32_le(*body_bytes);
                bytes.put_slice(body);
            }
            Self::Part(payload) => return tagged(PART, payload),
            Self::Accept => return Bytes::from_static(&[ACCEPT]),
            Self::Data { more, payload } => return data_frame(*more, payload),
            Self::Credit(credit) => {
                bytes.put_u8(CREDIT);
                bytes.put_u32_le(*credit);
            }
            Self::Cancel => return Bytes::from_static(&[CANCEL]),
            Self::End => return Bytes::from_static(&[END]),
            Self::Error(error) => return tagged(ERROR, &codec::encode(error)),
        }
        bytes.freeze()
    }

    /// Reads a frame. Never panics, whatever the bytes.
    pub fn decode(mut bytes: Bytes) -> Result<Self, FrameError> {
        // The longest head is that of an open frame: 19 bytes and a method of at most 255.
        if bytes.len() > FRAME_PAYLOAD_MAX + 512 {
            return Err(FrameError::Long);
        }
        let kind = bytes.try_get_u8().map_err(|_| FrameError::Short)?;
        match kind {
            OPEN => {
                let version = bytes.try_get_u8().map_err(|_| FrameError::Short)?;
                if version != VERSION {
                    return Err(FrameError::Version(version));
                }
                let credit = bytes.try_get_u32_le().map_err(|_| FrameError::Short)?;
                let deadline_ms = bytes.try_get_u64_le().map_err(|_| FrameError::Short)?;
                let length = bytes.try_get_u8().map_err(|_| FrameError::Short)?.into();
                if bytes.len() < length {
                    return Err(FrameError::Short);
                }
                let method =
                    String::from_utf8(bytes.split_to(length).to_vec()).map_err(|_| FrameError::Malformed("method"))?;
                let body_bytes = bytes.try_get_u32_le().map_err(|_| FrameError::Short)?;
                if body_bytes as usize > MESSAGE_BYTES_MAX || (body_bytes as usize) < bytes.len() {
                    return Err(FrameError::Malformed("body length"));
                }
                Ok(Self::Open { credit, deadline_ms, method, body_bytes, body: bytes })
            }
            PART => Ok(Self::Part(bytes)),
            ACCEPT => Ok(Self::Accept),
            DATA => {
                let flags = bytes.try_get_u8().map_err(|_| FrameError::Short)?;
                Ok(Self::Data { more: flags & 1 != 0, payload: bytes })
            }
            CREDIT => Ok(Self::Credit(bytes.try_get_u32_le().map_err(|_| FrameError::Short)?)),
            CANCEL => Ok(Self::Cancel),
            END => Ok(Self::End),
            ERROR => codec::decode(&bytes).map(Self::Error).map_err(|_| FrameError::Malformed("error")),
            other => Err(FrameError::Kind(other)),
        }
    }
}

fn tagged(kind: u8, payload: &[u8]) -> Bytes {
    let mut bytes = BytesMut::with_capacity(1 + payload.len());
    bytes.put_u8(kind);
    bytes.put_slice(payload);
    bytes.freeze()
}

fn data_frame(more: bool, payload: &[u8]) -> Bytes {
    let mut bytes = BytesMut::with_capacity(2 + payload.len());
    bytes.put_u8(DATA);
    bytes.put_u8(u8::from(more));
    bytes.put_slice(payload);
    bytes.freeze()
}

/// How long to wait, and for what.
#[derive(Debug, Clone, Copy)]
pub struct StreamOptions {
    /// For the callee to accept or refuse a request of a single frame; a longer one takes a second more for each
    /// [`REQUEST_BYTES_PER_SEC`].
    pub accept_within: Duration,
    /// For the whole answer, until [`AnswerStream::lift_deadline`]; the callee is told. `None` waits as long as messages
    /// come.
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
        // The patience for a callee is not used up by the length of its request.
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

    /// Lets the callee send so many bytes more before any of them is read: for answers that are long and quick, on ways that
    /// are far. No more than 2 MiB, or the network closes the stream.
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
        let mut timer = self.timer.take().unwrap_or_else(|| Box::pin(sleep_until(self.patience().0)));
        let message = loop {
            tokio::select! {
                biased;
                message = self.message() => break message,
                () = timer.as_mut() => {
                    let (until, late) = self.patience();
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
    fn patience(&self) -> (Instant, CallError) {
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

/// A call that a peer opened and that waits to be accepted or refused.
#[derive(Debug)]
pub struct StreamCall {
    /// Who calls.
    pub peer: PublicKey,
    /// The method's name.
    pub method: String,
    /// The request.
    pub body: Bytes,
    /// When the caller stops waiting.
    pub deadline: Option<Instant>,
    /// Bytes of the request that count against the server's budget.
    _reserved: ReservedBytes,
    reply: ReplyStream,
}

impl StreamCall {
    /// Reads the opening of a stream, as far as its caller may send one.
    pub(crate) async fn read(peer: PublicKey, channel: Box<dyn Channel>, allowance: Allowance) -> Option<Self> {
        let first = Frame::decode(channel.receive().await?);
        let Ok(Frame::Open { credit, deadline_ms, method, body_bytes, body }) = first else {
            let error = WireError::new(ErrorCode::InvalidValue, "a tether/stream/1 opening was expected");
            channel.send(Frame::Error(error).encode()).await;
            return None;
        };
        let deadline =
            (deadline_ms > 0).then(|| Instant::now().checked_add(Duration::from_millis(deadline_ms))).flatten();
        let body_bytes = body_bytes as usize;
        let begun = allowance.begin(body_bytes).and_then(|mut reserved| {
            reserved.grow(body.len())?;
            Ok(reserved)
        });
        let mut reserved = match begun {
            Ok(reserved) => reserved,
            Err(error) => {
                channel.send(Frame::Error(error).encode()).await;
                return None;
            }
        };
        let body = if body.len() == body_bytes {
            body
        } else {
            // Grows as parts come: a length alone reserves nothing.
            let mut whole = BytesMut::from(&body[..]);
            while whole.len() < body_bytes {
                match Frame::decode(channel.receive().await?) {
                    Ok(Frame::Part(part)) if !part.is_empty() && whole.len() + part.len() <= body_bytes => {
                        if let Err(error) = reserved.grow(part.len()) {
                            channel.send(Frame::Error(error).encode()).await;
                            return None;
                        }
                        whole.extend_from_slice(&part);
                    }
                    _ => return None,
                }
            }
            whole.freeze()
        };
        let reply = ReplyStream { channel, credit: u64::from(credit), interrupted: false };
        Some(Self { peer, method, body, deadline, _reserved: reserved, reply })
    }

    /// Takes the call.
    pub async fn accept(self) -> Result<ReplyStream, Interrupted> {
        let mut reply = self.reply;
        reply.push(Frame::Accept.encode()).await?;
        Ok(reply)
    }

    /// Waits until the caller cancels or is gone. Cancel safe.
    pub async fn cancelled(&mut self) {
        self.reply.cancelled().await;
    }

    /// Refuses the call.
    pub async fn refuse(self, error: WireError) {
        // A caller that is gone needs no answer.
        let _ = self.reply.fail(error).await;
    }
}

/// The caller cancelled or is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the caller wants no more")]
pub struct Interrupted;

/// The callee's end of a stream. Dropping it without an end closes the channel, which the caller takes for a failure.
#[derive(Debug)]
pub struct ReplyStream {
    channel: Box<dyn Channel>,
    /// Bytes the caller still takes.
    credit: u64,
    interrupted: bool,
}

impl ReplyStream {
    /// Sends a message, waiting for credit and for space in the queue.
    pub async fn send(&mut self, message: &[u8]) -> Result<(), Interrupted> {
        let mut rest = message;
        loop {
            let cut = rest.len().min(FRAME_PAYLOAD_MAX);
            let (payload, tail) = rest.split_at(cut);
            self.drain()?;
            // A window smaller than a frame is overdrawn once rather than waited on for ever.
            while self.credit == 0 {
                self.control().await?;
            }
            self.credit = self.credit.saturating_sub(cut as u64);
            self.push(data_frame(!tail.is_empty(), payload)).await?;
            if tail.is_empty() {
                return Ok(());
            }
            rest = tail;
        }
    }

    /// Ends the answer.
    pub async fn finish(mut self) -> Result<(), Interrupted> {
        self.push(Frame::End.encode()).await
    }

    /// Ends the answer with an error.
    pub async fn fail(mut self, error: WireError) -> Result<(), Interrupted> {
        self.push(Frame::Error(error).encode()).await
    }

    /// Waits until the caller cancels or is gone. Cancel safe.
    pub async fn cancelled(&mut self) {
        while self.control().await.is_ok() {}
    }

    async fn push(&mut self, frame: Bytes) -> Result<(), Interrupted> {
        loop {
            tokio::select! {
                biased;
                sent = self.channel.send(frame.clone()) => return if sent { Ok(()) } else { Err(Interrupted) },
                frame = self.channel.receive() => Self::take(&mut self.credit, &mut self.interrupted, frame)?,
            }
        }
    }

    async fn control(&mut self) -> Result<(), Interrupted> {
        if self.interrupted {
            return Err(Interrupted);
        }
        let frame = self.channel.receive().await;
        Self::take(&mut self.credit, &mut self.interrupted, frame)
    }

    /// Takes what the caller has said so far, without waiting.
    fn drain(&mut self) -> Result<(), Interrupted> {
        if self.interrupted {
            return Err(Interrupted);
        }
        while let Some(frame) = self.channel.try_receive() {
            Self::take(&mut self.credit, &mut self.interrupted, Some(frame))?;
        }
        Ok(())
    }

    fn take(credit: &mut u64, interrupted: &mut bool, frame: Option<Bytes>) -> Result<(), Interrupted> {
        if let Some(Ok(Frame::Credit(more))) = frame.map(Frame::decode) {
            *credit = credit.saturating_add(more.into());
            Ok(())
        } else {
            // A cancel, a closed channel or nonsense: nobody useful is left at the other end.
            *interrupted = true;
            Err(Interrupted)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn samples() -> Vec<Frame> {
        vec![
            Frame::Open {
                credit: 7,
                deadline_ms: 9,
                method: "infer.start".into(),
                body_bytes: 100,
                body: Bytes::from_static(b"{}"),
            },
            Frame::Part(Bytes::from_static(b"x")),
            Frame::Accept,
            Frame::Data { more: true, payload: Bytes::from_static(b"chunk") },
            Frame::Data { more: false, payload: Bytes::new() },
            Frame::Credit(u32::MAX),
            Frame::Cancel,
            Frame::End,
            Frame::Error(WireError::new(ErrorCode::WorkerFull, "full")),
        ]
    }

    #[test]
    fn a_frame_reads_back_as_it_was_written() {
        for frame in samples() {
            assert_eq!(Frame::decode(frame.encode()), Ok(frame));
        }
    }

    #[test]
    fn the_bytes_of_each_frame_are_those_of_the_wire_document() {
        let written: Vec<Vec<u8>> = samples().iter().map(|frame| frame.encode().to_vec()).collect();
        assert_eq!(&written[0][..19], [1, 1, 7, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 11, b'i', b'n', b'f', b'e']);
        assert_eq!(&written[0][26..], [100, 0, 0, 0, b'{', b'}']);
        assert_eq!(written[1], b"\x02x");
        assert_eq!(written[3], b"\x04\x01chunk");
        assert_eq!(written[5], [5, 255, 255, 255, 255]);
        assert_eq!(written[8], b"\x08{\"code\":\"worker_full\",\"message\":\"full\"}");
    }

    #[test]
    fn a_body_longer_than_a_message_may_be_is_refused_by_its_length() {
        let mut bytes = samples()[0].encode().to_vec();
        bytes[26..30].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(Frame::decode(bytes.into()), Err(FrameError::Malformed("body length")));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Frame::decode(bytes.into());
        }

        #[test]
        fn a_frame_cut_short_or_bent_is_never_mistaken_for_a_longer_one(index in 0usize..9, cut in 0usize..40) {
            let whole = samples()[index].encode();
            let cut = cut.min(whole.len());
            if let Ok(frame) = Frame::decode(whole.slice(..cut)) {
                prop_assert_eq!(frame.encode(), whole.slice(..cut));
            }
        }
    }
}
