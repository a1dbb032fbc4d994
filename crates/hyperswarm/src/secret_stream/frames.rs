//! Frames: three bytes of length, then a sealed message. Does no I/O.
//!
//! The first frame in each direction identifies the connection and carries the header that starts the cipher.

use bytes::{Buf, Bytes, BytesMut};

use super::cipher::{Cipher, HEADER_BYTES, OVERHEAD_BYTES};
use crate::compact_encoding::Encoder;
use crate::crypto::noise::Session;
use crate::crypto::{keyed_hash, namespace};

/// The maximum length of a message.
pub const MESSAGE_BYTES_MAX: usize = 0xff_ffff - OVERHEAD_BYTES;
/// The length of the first frame.
pub const FIRST_FRAME_BYTES: usize = LENGTH_BYTES + FIRST_BODY_BYTES;

const LENGTH_BYTES: usize = 3;
const FIRST_BODY_BYTES: usize = 32 + HEADER_BYTES;
/// How much memory is allocated at once. Small messages share it.
const CHUNK_BYTES: usize = 16 * 1024;
/// The same for streams with limits, of which there may be many.
const SMALL_CHUNK_BYTES: usize = 2 * 1024;
/// A message up to this size is copied to memory of its own, because a slice would keep its whole chunk from being
/// freed.
const COPIED_BYTES_MAX: usize = CHUNK_BYTES / 4;
/// The largest frame for which memory is allocated when only its length has arrived. For a larger one, memory grows
/// with the bytes received.
const TRUSTED_BYTES: usize = 256 * 1024;

/// The message exceeds [`MESSAGE_BYTES_MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a message of {0} bytes exceeds the limit of {MESSAGE_BYTES_MAX}")]
pub struct TooLong(pub usize);

/// Why the received bytes are not a valid stream of sealed messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecryptError {
    /// The first frame has the wrong length or identifies another connection.
    #[error("the first frame is not of this connection")]
    WrongHeader,
    /// A frame is too short for a sealed message.
    #[error("the frame is shorter than any sealed message")]
    TooShort,
    /// The bytes were modified on the way or are out of order.
    #[error("the message is not genuine")]
    Forged,
}

/// Encodes the messages that this side sends as frames.
pub struct Sealer {
    cipher: Cipher,
    chunk_bytes: usize,
}

impl Sealer {
    /// Starts with a random header. Also returns the frame that must be sent first.
    pub fn new(session: &Session, header: [u8; HEADER_BYTES]) -> (Self, [u8; FIRST_FRAME_BYTES]) {
        let mut frame = [0; FIRST_FRAME_BYTES];
        frame[0] = FIRST_BODY_BYTES as u8;
        frame[LENGTH_BYTES..LENGTH_BYTES + 32].copy_from_slice(&stream_id(&session.hash, session.is_initiator));
        frame[LENGTH_BYTES + 32..].copy_from_slice(&header);
        (Self { cipher: Cipher::new(&session.tx, &header), chunk_bytes: CHUNK_BYTES }, frame)
    }

    /// Sets whether to allocate little memory at once.
    pub fn set_small(&mut self, is_small: bool) {
        self.chunk_bytes = if is_small { SMALL_CHUNK_BYTES } else { CHUNK_BYTES };
    }

    /// Appends the frame of one message, which consists of `head` and then `parts`.
    pub fn seal(&mut self, head: &[u8], parts: &[&[u8]], frames: &mut BytesMut) -> Result<(), TooLong> {
        let length = parts.iter().fold(head.len(), |sum, part| sum.saturating_add(part.len()));
        if length > MESSAGE_BYTES_MAX {
            return Err(TooLong(length));
        }
        let frame_bytes = LENGTH_BYTES + length + OVERHEAD_BYTES;
        if frames.capacity() - frames.len() < frame_bytes {
            frames.reserve(frame_bytes.max(self.chunk_bytes));
        }
        let start = frames.len();
        frames.write_raw(&((length + OVERHEAD_BYTES) as u32).to_le_bytes()[..LENGTH_BYTES]);
        frames.write_byte(0);
        frames.write_raw(head);
        for part in parts {
            frames.write_raw(part);
        }
        frames.write_raw(&[0; OVERHEAD_BYTES - 1]);
        self.cipher.seal(&mut frames[start + LENGTH_BYTES..]);
        Ok(())
    }
}

/// Decodes the bytes that the other side sent, in pieces of any size, into messages.
pub struct Opener {
    key: zeroize::Zeroizing<[u8; 32]>,
    stream_id: [u8; 32],
    cipher: Option<Cipher>,
    received: BytesMut,
    /// At most how much memory `received` occupies, apart from messages that were taken from it.
    allocated: usize,
    message_bytes_max: usize,
    is_small: bool,
}

impl Opener {
    /// Starts to wait for the other side's first frame.
    pub fn new(session: &Session) -> Self {
        Self {
            key: zeroize::Zeroizing::new(session.rx),
            stream_id: stream_id(&session.hash, !session.is_initiator),
            cipher: None,
            received: BytesMut::new(),
            allocated: 0,
            message_bytes_max: MESSAGE_BYTES_MAX,
            is_small: false,
        }
    }

    /// Limits the length of messages. A longer one is not returned until the limit is raised.
    pub fn set_message_bytes_max(&mut self, bytes: usize) {
        self.message_bytes_max = bytes.min(MESSAGE_BYTES_MAX);
    }

    /// Sets whether to hold little more memory than the bytes that are buffered.
    pub fn set_small(&mut self, is_small: bool) {
        self.is_small = is_small;
    }

    /// Returns whether the next message is longer than the limit.
    pub fn is_next_too_long(&self) -> bool {
        self.cipher.is_some() && self.frame_bytes().is_some_and(|frame_bytes| self.exceeds_limit(frame_bytes))
    }

    /// Returns how many bytes are buffered.
    pub fn buffered_bytes(&self) -> usize {
        self.received.len()
    }

    fn exceeds_limit(&self, frame_bytes: usize) -> bool {
        frame_bytes > LENGTH_BYTES + self.message_bytes_max + OVERHEAD_BYTES
    }

    /// Adds the next bytes of the stream.
    pub fn feed(&mut self, bytes: &[u8]) {
        let free = self.received.capacity() - self.received.len();
        if free < bytes.len() {
            let expected = self.frame_bytes().unwrap_or(0).min(TRUSTED_BYTES).saturating_sub(self.received.len());
            self.grow(bytes.len(), expected);
        }
        self.received.write_raw(bytes);
    }

    /// Makes room for so many bytes, and for more that are expected.
    fn grow(&mut self, bytes: usize, expected: usize) {
        if self.is_small {
            // Memory at most doubles, so that a length alone takes none.
            let buffered = self.received.len();
            let doubled = if buffered < TRUSTED_BYTES { buffered.min(expected) } else { buffered };
            return self.move_to(buffered + bytes.max(doubled).max(SMALL_CHUNK_BYTES));
        }
        let needed = bytes.max(expected);
        // Memory that earlier messages have freed is often large enough.
        if !self.received.try_reclaim(needed) {
            self.received.reserve(needed.max(CHUNK_BYTES));
        }
    }

    /// Moves the buffered bytes to memory of this size, because they would keep all of the old one from being freed.
    fn move_to(&mut self, capacity: usize) {
        let mut moved = BytesMut::with_capacity(capacity);
        moved.extend_from_slice(&self.received);
        self.received = moved;
        self.allocated = capacity;
    }

    /// Returns the next message if it is complete. Empty messages are keep-alives and are skipped.
    ///
    /// After an error the stream cannot be used any more.
    pub fn pop(&mut self) -> Result<Option<Bytes>, DecryptError> {
        let message = self.pop_frame();
        // At most as much is moved as is freed, so that moving costs little.
        if self.is_small && self.allocated > SMALL_CHUNK_BYTES && 2 * self.received.len() <= self.allocated {
            self.move_to(self.received.len());
        }
        message
    }

    fn pop_frame(&mut self) -> Result<Option<Bytes>, DecryptError> {
        while let Some(frame_bytes) = self.frame_bytes() {
            let body_bytes = frame_bytes - LENGTH_BYTES;
            let exceeds_limit = self.exceeds_limit(frame_bytes);
            let Some(cipher) = &mut self.cipher else {
                if body_bytes != FIRST_BODY_BYTES {
                    return Err(DecryptError::WrongHeader);
                }
                if self.received.len() < frame_bytes {
                    return Ok(None);
                }
                self.start(frame_bytes)?;
                continue;
            };
            if body_bytes < OVERHEAD_BYTES {
                return Err(DecryptError::TooShort);
            }
            if self.received.len() < frame_bytes || exceeds_limit {
                return Ok(None);
            }
            if body_bytes <= COPIED_BYTES_MAX || self.is_small && 2 * frame_bytes < self.allocated {
                let body = &mut self.received[LENGTH_BYTES..frame_bytes];
                cipher.open(body).map_err(|_| DecryptError::Forged)?;
                let message = Bytes::copy_from_slice(&body[1..=body_bytes - OVERHEAD_BYTES]);
                self.received.advance(frame_bytes);
                if message.is_empty() {
                    continue;
                }
                return Ok(Some(message));
            }
            let mut frame = self.received.split_to(frame_bytes);
            cipher.open(&mut frame[LENGTH_BYTES..]).map_err(|_| DecryptError::Forged)?;
            frame.advance(LENGTH_BYTES + 1);
            frame.truncate(body_bytes - OVERHEAD_BYTES);
            return Ok(Some(frame.freeze()));
        }
        Ok(None)
    }

    /// Processes the first frame once it is complete. Returns whether it has been processed.
    pub fn start_cipher(&mut self) -> Result<bool, DecryptError> {
        match self.frame_bytes() {
            Some(frame_bytes) if self.cipher.is_none() => {
                if frame_bytes != FIRST_FRAME_BYTES {
                    return Err(DecryptError::WrongHeader);
                }
                if self.received.len() >= frame_bytes {
                    self.start(frame_bytes)?;
                }
            }
            _ => {}
        }
        Ok(self.cipher.is_some())
    }

    /// Returns whether the stream may end here: between frames, and after the first one.
    pub fn is_between_messages(&self) -> bool {
        self.cipher.is_some() && self.received.is_empty()
    }

    fn frame_bytes(&self) -> Option<usize> {
        let length = self.received.first_chunk::<LENGTH_BYTES>()?;
        Some(LENGTH_BYTES + u32::from_le_bytes([length[0], length[1], length[2], 0]) as usize)
    }

    fn start(&mut self, frame_bytes: usize) -> Result<(), DecryptError> {
        let frame = self.received.split_to(frame_bytes);
        let (stream_id, header) = frame[LENGTH_BYTES..].split_at(32);
        let header = header.try_into().map_err(|_| DecryptError::WrongHeader)?;
        if stream_id != self.stream_id {
            return Err(DecryptError::WrongHeader);
        }
        self.cipher = Some(Cipher::new(&self.key, header));
        Ok(())
    }
}

/// Returns the id of the stream that one side of a connection sends.
fn stream_id(handshake_hash: &[u8; 64], sent_by_initiator: bool) -> [u8; 32] {
    let role = u8::from(!sent_by_initiator);
    keyed_hash(handshake_hash, &[&namespace("hyperswarm/secret-stream", role)])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;
    use crate::crypto::PublicKey;

    fn session(is_initiator: bool) -> Session {
        let (tx, rx) = if is_initiator { ([1; 32], [2; 32]) } else { ([2; 32], [1; 32]) };
        let keys = (PublicKey([3; 32]), PublicKey([4; 32]));
        Session { is_initiator, local_key: keys.0, remote_key: keys.1, tx, rx, hash: [5; 64] }
    }

    fn opened(opener: &mut Opener) -> Result<Vec<Bytes>, DecryptError> {
        std::iter::from_fn(|| opener.pop().transpose()).collect()
    }

    #[test]
    fn stream_ids_are_those_of_the_node_package() {
        let golden: Value = serde_json::from_str(include_str!("golden.json")).unwrap();
        let hash = hex::decode(golden["handshake_hash"].as_str().unwrap()).unwrap().try_into().unwrap();
        assert_eq!(hex::encode(stream_id(&hash, true)), golden["initiator_id"].as_str().unwrap());
        assert_eq!(hex::encode(stream_id(&hash, false)), golden["responder_id"].as_str().unwrap());
    }

    #[test]
    fn the_first_frame_names_the_stream_and_starts_the_cipher() {
        let (_, frame) = Sealer::new(&session(true), [6; HEADER_BYTES]);
        assert_eq!(hex::encode(&frame[..3]), "380000");
        assert_eq!(frame[35..], [6; HEADER_BYTES]);
        let mut mine = Opener::new(&session(true));
        mine.feed(&frame);
        assert_eq!(mine.pop(), Err(DecryptError::WrongHeader), "a frame sent back is not the other side's");
    }

    #[test]
    fn a_first_frame_of_another_length_is_refused_at_once() {
        let mut opener = Opener::new(&session(true));
        opener.feed(&[0xff, 0xff, 0xff]);
        assert_eq!(opener.pop(), Err(DecryptError::WrongHeader));
    }

    #[test]
    fn a_frame_too_short_for_a_message_is_refused() {
        let (_, first) = Sealer::new(&session(false), [6; HEADER_BYTES]);
        let mut opener = Opener::new(&session(true));
        opener.feed(&first);
        opener.feed(&[16, 0, 0]);
        assert_eq!(opener.pop(), Err(DecryptError::TooShort));
    }

    #[test]
    fn one_byte_too_many_is_refused_and_the_stream_goes_on() {
        let (mut sealer, first) = Sealer::new(&session(false), [6; HEADER_BYTES]);
        let mut frames = BytesMut::from(&first[..]);
        let long = vec![8; MESSAGE_BYTES_MAX];
        assert_eq!(sealer.seal(b"1", &[&long], &mut frames), Err(TooLong(16_777_199)));
        sealer.seal(b"", &[&long], &mut frames).unwrap();
        sealer.seal(b"ne", &[b"x", b"t"], &mut frames).unwrap();
        let mut opener = Opener::new(&session(true));
        opener.feed(&frames);
        assert_eq!(opened(&mut opener).unwrap(), [&long[..], b"next"]);
        assert!(opener.is_between_messages());
    }

    #[test]
    fn a_small_message_keeps_nothing_but_itself_in_memory() {
        let (mut sealer, first) = Sealer::new(&session(false), [6; HEADER_BYTES]);
        let mut opener = Opener::new(&session(true));
        opener.feed(&first);
        for _ in 0..10 {
            let mut frames = BytesMut::new();
            for _ in 0..100 {
                sealer.seal(b"small", &[], &mut frames).unwrap();
            }
            opener.feed(&frames);
            for message in opened(&mut opener).unwrap() {
                assert!(message.try_into_mut().is_ok(), "it shares its memory");
            }
        }
        assert!(opener.received.try_reclaim(CHUNK_BYTES), "the first chunk is used all the time");
    }

    #[test]
    fn a_length_alone_makes_room_for_a_part_only() {
        let (_, first) = Sealer::new(&session(false), [6; HEADER_BYTES]);
        let mut opener = Opener::new(&session(true));
        opener.feed(&first);
        assert_eq!(opener.pop(), Ok(None));
        opener.feed(&[0xff, 0xff, 0xff]);
        for _ in 0..100 {
            opener.feed(&[0; 1000]);
        }
        assert!(opener.received.capacity() <= 2 * TRUSTED_BYTES);
    }

    #[test]
    fn a_small_opener_holds_little_more_than_what_is_buffered() {
        let (mut sealer, first) = Sealer::new(&session(false), [6; HEADER_BYTES]);
        let mut opener = Opener::new(&session(true));
        opener.set_small(true);
        opener.feed(&first);
        for length in [10, 100, 5_000, 64 * 1024, 3_000, 130 * 1024, 20, 64 * 1024, 1] {
            let mut frames = BytesMut::new();
            for _ in 0..3 {
                sealer.seal(&vec![7; length], &[], &mut frames).unwrap();
            }
            for piece in frames.chunks(10_000) {
                opener.feed(piece);
                for message in opened(&mut opener).unwrap() {
                    let message = message.try_into_mut().expect("memory of its own");
                    assert!(message.capacity() <= 3 * message.len() + SMALL_CHUNK_BYTES, "{}", message.capacity());
                }
                let (held, buffered) = (opener.received.capacity().max(opener.allocated), opener.received.len());
                assert!(held <= 2 * buffered + 10_000 + SMALL_CHUNK_BYTES, "{held} bytes for {buffered}");
            }
            assert!(opener.received.is_empty() && opener.received.capacity() <= 2 * SMALL_CHUNK_BYTES);
        }
    }

    #[test]
    fn a_length_alone_makes_a_small_opener_hold_nothing() {
        let (_, first) = Sealer::new(&session(false), [6; HEADER_BYTES]);
        let mut opener = Opener::new(&session(true));
        opener.set_small(true);
        opener.feed(&first);
        assert_eq!(opener.pop(), Ok(None));
        opener.feed(&[0xff, 0xff, 0x01]);
        opener.feed(&[0; 5_000]);
        assert!(opener.received.capacity() <= 2 * 5_003 + SMALL_CHUNK_BYTES);
    }

    proptest! {
        #[test]
        fn frames_may_be_cut_anywhere(
            is_small: bool,
            messages in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..3000), 0..12),
            cuts in proptest::collection::vec(1_usize..2000, 1..20),
        ) {
            let (mut sealer, first) = Sealer::new(&session(false), [6; HEADER_BYTES]);
            let mut frames = BytesMut::from(&first[..]);
            for message in &messages {
                sealer.seal(b"", &[message], &mut frames).unwrap();
            }
            let mut opener = Opener::new(&session(true));
            opener.set_small(is_small);
            let mut received = Vec::new();
            let mut rest = &frames[..];
            for cut in cuts.iter().cycle() {
                let (piece, after) = rest.split_at((*cut).min(rest.len()));
                opener.feed(piece);
                received.extend(opened(&mut opener).unwrap());
                rest = after;
                if rest.is_empty() { break }
            }
            let sent: Vec<_> = messages.into_iter().filter(|message| !message.is_empty()).collect();
            prop_assert_eq!(received, sent);
        }

        #[test]
        fn foreign_bytes_never_panic(pieces: Vec<Vec<u8>>, after_first: bool, is_small: bool) {
            let mut opener = Opener::new(&session(true));
            opener.set_small(is_small);
            if after_first {
                opener.feed(&Sealer::new(&session(false), [6; HEADER_BYTES]).1);
            }
            for piece in pieces {
                opener.feed(&piece);
                if opened(&mut opener).is_err() { break }
            }
        }
    }
}
