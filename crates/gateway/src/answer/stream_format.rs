//! How an answer is written while it comes.

use bytes::BytesMut;
use protocol::WireError;

use super::{Answer, Piece};

/// How the pieces of an answer are written.
pub(crate) trait StreamFormat: Send + Unpin + 'static {
    /// Takes note of the answer before its first piece.
    fn begin(&mut self, answer: &Answer);

    /// Writes a piece, and whatever follows the last.
    fn piece(&mut self, piece: &Piece, out: &mut BytesMut);

    /// Writes an error, after which nothing follows.
    fn failure(&mut self, error: &WireError, out: &mut BytesMut);

    /// Returns what is written when there is nothing to say.
    fn keep_alive(&self) -> &'static [u8];
}
