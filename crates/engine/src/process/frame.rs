//! The frames between a worker and its engine processes: a length (4 bytes, little endian), then that much JSON.

use std::io::{self, ErrorKind, Read};

use bytes::{Buf, BytesMut};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::hardware::Hardware;
use crate::model_runtime::{
    AdapterId, Embeddings, EngineError, Event, GenerateRequest, ListedToken, LoadOptions, LoadSnapshot, LoadedModel,
    PromptInput, RuntimeInfo, Scores, TokenListing,
};

/// The maximum length of a frame, without its length field.
pub const FRAME_BYTES_MAX: usize = 16 << 20;

const LENGTH_BYTES: usize = 4;

/// A message from a worker to its engine process. Files that a message refers to are sent before it; see
/// [`super::handover`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToChild {
    /// Loads the model. Sent once, as the first message.
    Load {
        options: LoadOptions,
        /// The files of the model, in order.
        files: Vec<FileInfo>,
    },
    /// Starts a generation. The model id in the request is ignored.
    Generate {
        /// Its id, never reused.
        id: u64,
        request: Box<GenerateRequest>,
    },
    /// Cancels a generation or a query.
    Cancel { id: u64 },
    /// Reports that more events of a generation were consumed.
    Acknowledge {
        /// The id of the generation.
        id: u64,
        /// The number of events.
        events: u32,
    },
    /// Attaches an adapter. The reply is its id.
    AddAdapter {
        /// The id of the query, never reused.
        id: u64,
        file: FileInfo,
    },
    Ask {
        /// Its id, never reused.
        id: u64,
        #[serde(rename = "question")]
        query: Query,
    },
    /// Unloads the model and ends the process.
    Unload,
}

/// A file that is handed over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileInfo {
    /// The digest that it was verified against.
    pub sha256: String,
    pub bytes: u64,
}

/// A request with exactly one reply.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Query {
    /// Counts the tokens of an input.
    CountTokens(PromptInput),
    ListTokens {
        input: PromptInput,
        listing: TokenListing,
    },
    Embed(Vec<PromptInput>),
    Rerank {
        query: String,
        texts: Vec<String>,
    },
    RemoveAdapter(AdapterId),
}

/// The reply to a query, or to a new adapter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// The number of tokens in the input.
    Tokens(u32),
    Listed(Vec<ListedToken>),
    Vectors(Embeddings),
    Scores(Scores),
    /// The id of the new adapter.
    Adapter(AdapterId),
    /// The adapter is freed.
    Removed,
}

/// A message from an engine process to its worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToParent {
    /// The process is running. Sent once, as the first message.
    Hello {
        /// The runtime that it serves.
        info: RuntimeInfo,
        /// The devices of that runtime.
        hardware: Hardware,
    },
    Progress {
        /// The completed share of the load, from 0 to 1.
        share: f32,
    },
    Loaded {
        /// The model, with its id in that process.
        model: LoadedModel,
        state: LoadSnapshot,
    },
    /// The model could not be loaded. The process ends.
    NotLoaded { error: EngineError },
    Accepted {
        /// The id of the generation.
        id: u64,
    },
    Refused {
        /// The id of the generation.
        id: u64,
        error: EngineError,
    },
    Event {
        /// The id of the generation.
        id: u64,
        event: Event,
    },
    Failed {
        /// The id of the generation.
        id: u64,
        error: EngineError,
    },
    #[serde(rename = "answer")]
    Reply {
        /// The id of the query.
        id: u64,
        #[serde(rename = "answer")]
        reply: Result<Reply, EngineError>,
    },
    /// The load of the model; also sent before each end of a generation.
    State { state: LoadSnapshot },
}

/// Why bytes are not a valid frame.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The frame is longer than [`FRAME_BYTES_MAX`].
    #[error("a frame of {bytes} bytes is too long")]
    TooLong { bytes: usize },
    /// The frame does not contain the expected message.
    #[error("a frame cannot be read")]
    Malformed(#[from] serde_json::Error),
    #[error("a frame did not arrive")]
    Stream(#[from] io::Error),
}

/// Encodes a message as a frame.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let mut frame = vec![0; LENGTH_BYTES];
    serde_json::to_writer(&mut frame, message)?;
    let bytes = frame.len() - LENGTH_BYTES;
    if bytes > FRAME_BYTES_MAX {
        return Err(FrameError::TooLong { bytes });
    }
    frame[..LENGTH_BYTES].copy_from_slice(&(bytes as u32).to_le_bytes());
    Ok(frame)
}

/// Removes the first message from the buffer. Returns `None` if it is not complete yet.
pub fn decode<T: DeserializeOwned>(buffer: &mut BytesMut) -> Result<Option<T>, FrameError> {
    let Some(length) = buffer.first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
    let bytes = u32::from_le_bytes(*length) as usize;
    if bytes > FRAME_BYTES_MAX {
        return Err(FrameError::TooLong { bytes });
    }
    if buffer.len() - LENGTH_BYTES < bytes {
        return Ok(None);
    }
    buffer.advance(LENGTH_BYTES);
    let body = buffer.split_to(bytes);
    Ok(Some(serde_json::from_slice(&body)?))
}

/// Reads one message and not a byte more. Returns `None` if the stream ends instead.
pub(super) fn read<T: DeserializeOwned>(stream: &mut impl Read) -> Result<Option<T>, FrameError> {
    let mut length = [0; LENGTH_BYTES];
    match stream.read_exact(&mut length) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let bytes = u32::from_le_bytes(length) as usize;
    if bytes > FRAME_BYTES_MAX {
        return Err(FrameError::TooLong { bytes });
    }
    let mut body = vec![0; bytes];
    stream.read_exact(&mut body)?;
    Ok(Some(serde_json::from_slice(&body)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model_runtime::{ModelId, Sampling};
    use proptest::prelude::*;

    fn generate(id: u64, text: &str) -> ToChild {
        let sampling = Sampling { temperature: 0.7, seed: u64::MAX, ..Sampling::default() };
        let request = GenerateRequest {
            sampling,
            stop: vec!["\n".into()],
            max_tokens: Some(5),
            ..GenerateRequest::new(ModelId(3), PromptInput::Text(text.into()))
        };
        ToChild::Generate { id, request: Box::new(request) }
    }

    #[test]
    fn a_frame_that_claims_to_be_too_long_is_refused_at_once() {
        let mut buffer = BytesMut::from(&u32::MAX.to_le_bytes()[..]);
        assert!(matches!(decode::<ToChild>(&mut buffer), Err(FrameError::TooLong { .. })));
    }

    #[test]
    fn a_message_that_is_too_long_is_not_sent() {
        let message = generate(1, &"x".repeat(FRAME_BYTES_MAX));
        assert!(matches!(encode(&message), Err(FrameError::TooLong { .. })));
    }

    #[test]
    fn a_frame_of_something_else_is_refused() {
        let mut buffer = BytesMut::from(&encode(&"hello").expect("it encodes")[..]);
        assert!(matches!(decode::<ToParent>(&mut buffer), Err(FrameError::Malformed(_))));
    }

    proptest! {
        #[test]
        fn messages_survive_any_cut_of_the_stream(
            texts in prop::collection::vec(".{0,40}", 1..6),
            cuts in prop::collection::vec(1_usize..60, 0..40),
        ) {
            let sent: Vec<ToChild> = (0..).zip(&texts).map(|(id, text)| generate(id, text)).collect();
            let mut stream: Vec<u8> = Vec::new();
            for message in &sent {
                stream.extend(encode(message).expect("it encodes"));
            }
            let mut buffer = BytesMut::new();
            let mut received = Vec::new();
            let mut rest = stream.as_slice();
            for cut in cuts.into_iter().chain([usize::MAX]) {
                let (piece, after) = rest.split_at(cut.min(rest.len()));
                buffer.extend_from_slice(piece);
                rest = after;
                while let Some(message) = decode::<ToChild>(&mut buffer).expect("it is valid") {
                    received.push(message);
                }
            }
            prop_assert_eq!(received, sent);
            prop_assert!(buffer.is_empty());
        }

        #[test]
        fn noise_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200), length in 0_u32..220) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = decode::<ToParent>(&mut buffer) {}
            let mut framed = BytesMut::from(&length.to_le_bytes()[..]);
            framed.extend_from_slice(&bytes);
            while let Ok(Some(_)) = decode::<ToChild>(&mut framed) {}
        }
    }
}
