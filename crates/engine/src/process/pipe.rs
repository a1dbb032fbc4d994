//! Sends and receives frames over a socket.

use std::io;

use bytes::BytesMut;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;

use super::frame::{self, FrameError};

/// The number of frames that wait to be written.
pub(super) const FRAMES_MAX: usize = 1_024;
/// The number of frames in one write.
const FRAMES_PER_WRITE: usize = 256;

/// Why no more frames arrive.
#[derive(Debug, thiserror::Error)]
pub(super) enum PipeError {
    #[error("the socket failed: {0}")]
    Socket(#[from] io::Error),
    #[error(transparent)]
    Frame(#[from] FrameError),
}

pub(super) struct FrameReader {
    socket: OwnedReadHalf,
    buffer: BytesMut,
}

impl FrameReader {
    pub(super) fn new(socket: OwnedReadHalf) -> Self {
        Self { socket, buffer: BytesMut::with_capacity(1 << 16) }
    }

    /// Returns the next message, or `None` if the other side is gone. Cancel safe.
    pub(super) async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, PipeError> {
        loop {
            if let Some(message) = frame::decode(&mut self.buffer)? {
                return Ok(Some(message));
            }
            self.buffer.reserve(1 << 14);
            match self.socket.read_buf(&mut self.buffer).await {
                Ok(0) => return Ok(None),
                // If a process dies with unread bytes, the connection is reset.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                other => other?,
            };
        }
    }
}

/// Writes frames until no sender is left or the other side is gone. All queued frames go out in one write.
pub(super) async fn write_frames(mut queue: mpsc::Receiver<Vec<u8>>, mut socket: OwnedWriteHalf) {
    let mut frames = Vec::with_capacity(FRAMES_PER_WRITE);
    let mut bytes = Vec::new();
    while queue.recv_many(&mut frames, FRAMES_PER_WRITE).await > 0 {
        bytes.clear();
        for frame in frames.drain(..) {
            bytes.extend_from_slice(&frame);
        }
        // The reading side notices the end as well and reports it.
        if socket.write_all(&bytes).await.is_err() {
            return;
        }
    }
}
