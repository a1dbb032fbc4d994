//! The trait for formats of streamed answers.

use bytes::{Bytes, BytesMut};
use protocol::WireError;

use super::{Answer, Piece};

/// Writes the pieces of an answer in some format.
pub(crate) trait StreamFormat: Send + Unpin + 'static {
    /// Called once, before the first piece.
    fn begin(&mut self, answer: &Answer);

    /// Writes a piece and, after the last one, the end of the stream.
    fn piece(&mut self, piece: &Piece, out: &mut BytesMut);

    /// Writes an error, which ends the stream.
    fn failure(&mut self, error: &WireError, out: &mut BytesMut);

    /// Returns the bytes to write when no piece has arrived for a while.
    fn keep_alive(&self) -> Bytes;
}
