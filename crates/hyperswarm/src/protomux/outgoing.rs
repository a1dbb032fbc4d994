//! The send side of a connection: sends each message alone, or many in one batch while a caller holds them back.

use bytes::BytesMut;
use parking_lot::{Mutex, MutexGuard};

use super::head::Head;
use super::state::{BATCH, CONTROL};
use crate::compact_encoding::{Encoder, uint_size};
use crate::secret_stream::{MESSAGE_BYTES_MAX, SecretStream, SendError, TooLong};

/// A batch of this size is sent even while messages are held back.
const BATCH_BYTES_MAX: usize = 8 * 1024 * 1024;
/// What a batch may need in addition to an item: its own header and the item's id and length.
const BATCH_OVERHEAD_BYTES: usize = 32;

/// Sends the messages of channels.
pub(super) struct Outgoing {
    stream: SecretStream,
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    /// The number of guards that hold messages back.
    holders: usize,
    batch: BytesMut,
    /// The channel of the last item.
    id: u64,
}

impl Outgoing {
    pub(super) fn new(stream: SecretStream) -> Self {
        Self { stream, held: Mutex::default() }
    }

    /// Sends a message on a channel.
    pub(super) fn send(&self, id: u64, kind: u64, parts: &[&[u8]]) -> Result<(), SendError> {
        {
            // A flush seals under this lock, so no message overtakes it.
            let mut held = self.held();
            if held.holders > 0 {
                return self.hold(&mut held, id, kind, parts);
            }
        }
        self.stream.send_framed(Head::of([id, kind]).as_ref(), parts)
    }

    /// Sends a control message.
    pub(super) fn control(&self, message: &[u8]) -> Result<(), SendError> {
        let (kind, rest) = message.split_first().unwrap_or((&BATCH, &[]));
        self.send(CONTROL, u64::from(*kind), &[rest])
    }

    /// Holds messages back until [`Outgoing::uncork`] was called as many times.
    pub(super) fn cork(&self) {
        self.held().holders += 1;
    }

    /// Sends what was held back, unless another guard holds it.
    pub(super) fn uncork(&self) {
        let mut held = self.held();
        held.holders -= 1;
        if held.holders == 0 {
            // If the stream is closed, the next sender gets the error.
            let _ = self.flush(&mut held);
        }
    }

    fn hold(&self, held: &mut Held, id: u64, kind: u64, parts: &[&[u8]]) -> Result<(), SendError> {
        let content = parts.iter().fold(0_usize, |sum, part| sum.saturating_add(part.len()));
        let item_bytes = content.saturating_add(uint_size(kind));
        if item_bytes.saturating_add(uint_size(id)) > MESSAGE_BYTES_MAX {
            return Err(TooLong(item_bytes + uint_size(id)).into());
        }
        if held.batch.len() + item_bytes > BATCH_BYTES_MAX {
            self.flush(held)?;
        }
        if item_bytes + BATCH_OVERHEAD_BYTES > MESSAGE_BYTES_MAX {
            return self.stream.send_framed(Head::of([id, kind]).as_ref(), parts);
        }
        let is_first = held.batch.is_empty();
        if is_first {
            held.batch.write_uint(CONTROL);
            held.batch.write_byte(BATCH);
        } else if held.id != id {
            // An item without content announces that another channel follows.
            held.batch.write_byte(0);
        }
        if is_first || held.id != id {
            held.batch.write_uint(id);
            held.id = id;
        }
        held.batch.write_uint(item_bytes as u64);
        held.batch.write_uint(kind);
        for part in parts {
            held.batch.write_raw(part);
        }
        Ok(())
    }

    fn flush(&self, held: &mut Held) -> Result<(), SendError> {
        if held.batch.is_empty() {
            return Ok(());
        }
        let batch = held.batch.split();
        self.stream.send(&[&batch])
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock()
    }
}
