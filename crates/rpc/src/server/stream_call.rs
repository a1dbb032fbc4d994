//! The callee's half of a stream.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use protocol::{ErrorCode, PublicKey, WireError};
use tokio::time::Instant;

use super::budget::{Allowance, ReservedBytes};
use crate::frame::{FRAME_PAYLOAD_MAX, Frame, acknowledge_frame, data_frame};
use crate::transport::Channel;

/// A call that a peer opened and that must be accepted or refused.
#[derive(Debug)]
pub struct StreamCall {
    /// The caller's public key.
    pub peer: PublicKey,
    /// The method's name.
    pub method: String,
    /// The request.
    pub body: Bytes,
    /// When the caller stops waiting.
    pub deadline: Option<Instant>,
    /// Bytes of the request that count against the server's budget.
    _reserved: ReservedBytes,
    reply: ResponseSink,
}

impl StreamCall {
    /// Reads the request that opens a stream, within the caller's limits.
    pub(crate) async fn read(peer: PublicKey, channel: Box<dyn Channel>, allowance: Allowance) -> Option<Self> {
        let first = Frame::decode(channel.receive().await?);
        let Ok(Frame::Open { credit, deadline_ms, method, body_bytes, body }) = first else {
            let error = WireError::new(ErrorCode::InvalidValue, "a tether/stream/1 opening was expected");
            channel.send(Frame::Error(error).encode()).await;
            return None;
        };
        let deadline =
            (deadline_ms > 0).then(|| Instant::now().checked_add(Duration::from_millis(deadline_ms))).flatten();
        let (body_bytes, is_strangers) = (body_bytes as usize, allowance.is_strangers());
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
            // A stranger's message would be held on the transport's budget for as long as the call waits, and the
            // oldest holders give way there. Its bytes are reserved here.
            if is_strangers { Bytes::copy_from_slice(&body) } else { body }
        } else {
            // The buffer grows as parts arrive. The announced length alone reserves nothing.
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
        let flow = Flow { credit: u64::from(credit), sent: 0, acknowledged: 0, interrupted: false };
        let reply = ResponseSink { channel, flow };
        Some(Self { peer, method, body, deadline, _reserved: reserved, reply })
    }

    /// Accepts the call.
    pub async fn accept(self) -> Result<ResponseSink, Interrupted> {
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
        // If the caller is gone, it needs no response.
        let _ = self.reply.fail(error).await;
    }
}

/// The caller cancelled or is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the caller cancelled the call")]
pub struct Interrupted;

/// The callee's end of a stream. Dropping it before the end closes the channel, which the caller treats as a failure.
#[derive(Debug)]
pub struct ResponseSink {
    channel: Box<dyn Channel>,
    flow: Flow,
}

/// How many bytes of messages went to the caller, and what it said of them.
#[derive(Debug)]
struct Flow {
    /// How many more the caller accepts.
    credit: u64,
    sent: u64,
    /// What it granted since the call was opened: as many bytes it has read.
    acknowledged: u64,
    interrupted: bool,
}

impl ResponseSink {
    /// Sends a message, waiting for credit and for space in the queue.
    pub async fn send(&mut self, message: &[u8]) -> Result<(), Interrupted> {
        let mut rest = message;
        loop {
            let cut = rest.len().min(FRAME_PAYLOAD_MAX);
            let (payload, tail) = rest.split_at(cut);
            self.drain()?;
            // Any remaining credit allows one whole frame. Otherwise a window smaller than a frame would block forever.
            while self.flow.credit == 0 {
                self.control().await?;
            }
            self.flow.credit = self.flow.credit.saturating_sub(cut as u64);
            self.flow.sent += cut as u64;
            self.push(data_frame(!tail.is_empty(), payload)).await?;
            if tail.is_empty() {
                return Ok(());
            }
            rest = tail;
        }
    }

    /// Returns how many bytes of messages were sent.
    pub fn sent(&self) -> u64 {
        self.flow.sent
    }

    /// Returns how many bytes of messages the caller has acknowledged, as known when the last message was sent or when
    /// the caller was found to be gone.
    pub fn acknowledged(&self) -> u64 {
        self.flow.acknowledged.min(self.flow.sent)
    }

    /// Waits until the caller has acknowledged all messages. A caller that does not acknowledge
    /// ([`crate::ResponseStream::acknowledge_reads`]) may never do so.
    pub async fn wait_until_acknowledged(&mut self) -> Result<(), Interrupted> {
        self.drain()?;
        if self.flow.acknowledged < self.flow.sent {
            self.push(acknowledge_frame()).await?;
        }
        while self.flow.acknowledged < self.flow.sent {
            self.control().await?;
        }
        Ok(())
    }

    /// Completes the response.
    pub async fn finish(mut self) -> Result<(), Interrupted> {
        self.push(Frame::End.encode()).await
    }

    /// Ends the response with an error.
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
                frame = self.channel.receive() => self.flow.take(frame)?,
            }
        }
    }

    async fn control(&mut self) -> Result<(), Interrupted> {
        if self.flow.interrupted {
            return Err(Interrupted);
        }
        let frame = self.channel.receive().await;
        self.flow.take(frame)
    }

    /// Processes the frames that the caller has sent so far, without waiting.
    fn drain(&mut self) -> Result<(), Interrupted> {
        if self.flow.interrupted {
            return Err(Interrupted);
        }
        while let Some(frame) = self.channel.try_receive() {
            self.flow.take(Some(frame))?;
        }
        Ok(())
    }
}

impl Flow {
    fn take(&mut self, frame: Option<Bytes>) -> Result<(), Interrupted> {
        if let Some(Ok(Frame::Credit(more))) = frame.map(Frame::decode) {
            self.credit = self.credit.saturating_add(more.into());
            self.acknowledged = self.acknowledged.saturating_add(more.into());
            Ok(())
        } else {
            // A cancel, a closed channel or an invalid frame: in each case the response has no reader any more.
            self.interrupted = true;
            Err(Interrupted)
        }
    }
}
