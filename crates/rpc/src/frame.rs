//! Frames of `tether/stream/1`: one request, then messages in return under credit (`docs/wire/tether-stream-1.md`).
//!
//! The caller opens the stream with the request and a window in bytes. The callee accepts or refuses it, then sends
//! messages while it has credit. The caller grants more credit as it reads, which acknowledges what it has read; the
//! callee may ask for that at any time. Either side may end the stream: the callee with an end or an error, the caller
//! with a cancel, which it also sends when it is dropped.
//!
//! [`crate::client::ResponseStream`] is the caller's half, [`crate::server::ResponseSink`] the callee's.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use protocol::codec::MESSAGE_BYTES_MAX;
use protocol::{WireError, codec};

/// The maximum payload of a frame. Longer payloads are split, so that streams share a connection fairly.
pub const FRAME_PAYLOAD_MAX: usize = 64 * 1024;
/// The initial window of a caller, in bytes.
pub const WINDOW: u32 = 256 * 1024;
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

/// Flags of a data frame.
const MORE: u8 = 1;
const ACKNOWLEDGE: u8 = 2;

/// One frame of `tether/stream/1`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// Opens a stream.
    Open {
        /// How many bytes the caller accepts.
        credit: u32,
        /// How many milliseconds the caller waits for the whole response. 0 means no limit.
        deadline_ms: u64,
        /// The method's name.
        method: String,
        /// The length of the whole request.
        body_bytes: u32,
        /// The beginning of the request.
        body: Bytes,
    },
    /// More of the request.
    Part(Bytes),
    /// The callee accepts the call.
    Accept,
    /// A message, or a part of it if `more` is set.
    Data {
        /// Whether the message continues in the next frame.
        more: bool,
        /// Whether the caller is to grant at once the credit for what it has read.
        acknowledge: bool,
        /// The bytes.
        payload: Bytes,
    },
    /// The caller accepts this many more bytes.
    Credit(u32),
    /// The caller cancels the call.
    Cancel,
    /// The answer is complete.
    End,
    /// The response failed, or the call was refused.
    Error(WireError),
}

/// Why bytes could not be decoded as a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The frame is truncated.
    #[error("the frame is cut short")]
    Short,
    /// The frame exceeds the maximum length.
    #[error("the frame is too long")]
    Long,
    /// The kind of frame is unknown.
    #[error("no frame of kind {0}")]
    Kind(u8),
    /// The frame has another version of the protocol.
    #[error("version {0} of tether/stream is not spoken here")]
    Version(u8),
    /// A field is malformed.
    #[error("the frame's {0} is malformed")]
    Malformed(&'static str),
}

impl Frame {
    /// Encodes the frame.
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
            Self::Data { more, acknowledge, payload } => return flagged(flags(*more, *acknowledge), payload),
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

    /// Decodes a frame. Never panics, whatever the bytes.
    pub fn decode(mut bytes: Bytes) -> Result<Self, FrameError> {
        // The longest header is that of an open frame: 19 bytes and a method of at most 255.
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
                Ok(Self::Data { more: flags & MORE != 0, acknowledge: flags & ACKNOWLEDGE != 0, payload: bytes })
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

pub(crate) fn data_frame(more: bool, payload: &[u8]) -> Bytes {
    flagged(flags(more, false), payload)
}

/// Returns a data frame that asks for acknowledgement. It has no bytes and ends no message, so callers that know
/// nothing of acknowledgements ignore it.
pub(crate) fn acknowledge_frame() -> Bytes {
    Bytes::from_static(&[DATA, MORE | ACKNOWLEDGE])
}

fn flags(more: bool, acknowledge: bool) -> u8 {
    (u8::from(more) * MORE) | (u8::from(acknowledge) * ACKNOWLEDGE)
}

fn flagged(flags: u8, payload: &[u8]) -> Bytes {
    let mut bytes = BytesMut::with_capacity(2 + payload.len());
    bytes.put_u8(DATA);
    bytes.put_u8(flags);
    bytes.put_slice(payload);
    bytes.freeze()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use protocol::ErrorCode;

    use super::*;

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
            Frame::Data { more: true, acknowledge: false, payload: Bytes::from_static(b"chunk") },
            Frame::Data { more: false, acknowledge: false, payload: Bytes::new() },
            Frame::Credit(u32::MAX),
            Frame::Cancel,
            Frame::End,
            Frame::Error(WireError::new(ErrorCode::WorkerFull, "full")),
            Frame::Data { more: true, acknowledge: true, payload: Bytes::new() },
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
        assert_eq!((&written[9][..], acknowledge_frame()), (&[4, 3][..], Bytes::from_static(&[4, 3])));
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
        fn a_frame_cut_short_or_bent_is_never_mistaken_for_a_longer_one(index in 0usize..10, cut in 0usize..40) {
            let whole = samples()[index].encode();
            let cut = cut.min(whole.len());
            if let Ok(frame) = Frame::decode(whole.slice(..cut)) {
                prop_assert_eq!(frame.encode(), whole.slice(..cut));
            }
        }
    }
}
