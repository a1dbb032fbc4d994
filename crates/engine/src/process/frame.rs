//! The frames between a worker and its engine processes: a length (4 bytes, little endian), then that much JSON.

use bytes::{Buf, BytesMut};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::hardware::Hardware;
use crate::model_runtime::{
    AdapterId, Embeddings, EngineError, Event, GenerateRequest, LoadOptions, LoadSnapshot, LoadedModel, PromptInput,
    RuntimeInfo,
};

/// The longest frame, without its length.
pub const FRAME_BYTES_MAX: usize = 16 << 20;

const LENGTH_BYTES: usize = 4;

/// What a worker tells its engine process. The files that a message speaks of come before it; see [`super::handover`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToChild {
    /// Load the model; comes once, first.
    Load {
        /// How to load it.
        options: LoadOptions,
        /// The files of the model, in their order.
        files: Vec<FileInfo>,
    },
    /// Start a generation; the model named in the request is ignored.
    Generate {
        /// Its number, never used before.
        id: u64,
        /// What to generate.
        request: Box<GenerateRequest>,
    },
    /// Stop a generation, or forget a question.
    Cancel {
        /// Its number.
        id: u64,
    },
    /// This many more events of a generation were consumed.
    Acknowledge {
        /// Its number.
        id: u64,
        /// How many.
        events: u32,
    },
    /// Attach an adapter, which is answered with its name.
    AddAdapter {
        /// The number of the question, never used before.
        id: u64,
        /// The adapter's file.
        file: FileInfo,
    },
    /// Answer a question.
    Ask {
        /// Its number, never used before.
        id: u64,
        /// The question.
        question: Question,
    },
    /// Free the model and end.
    Unload,
}

/// A file that is handed over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileInfo {
    /// The digest that it was checked against.
    pub sha256: String,
    /// Its length.
    pub bytes: u64,
}

/// What has one answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Question {
    /// How many tokens has this input?
    CountTokens(PromptInput),
    /// Which vectors have these texts?
    Embed(Vec<PromptInput>),
    /// Is this adapter freed?
    RemoveAdapter(AdapterId),
}

/// What is answered to a question, or to a new adapter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// The tokens of an input.
    Tokens(u32),
    /// The vectors of texts.
    Vectors(Embeddings),
    /// The name of a new adapter.
    Adapter(AdapterId),
    /// An adapter is freed.
    Removed,
}

/// What an engine process tells its worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToParent {
    /// The process runs; comes once, first.
    Hello {
        /// The runtime it serves.
        info: RuntimeInfo,
        /// What that computes with.
        hardware: Hardware,
    },
    /// A share of the load is done.
    Progress {
        /// From 0 to 1.
        share: f32,
    },
    /// The model is ready.
    Loaded {
        /// The model, under the number it has in that process.
        model: LoadedModel,
        /// Its first snapshot.
        state: LoadSnapshot,
    },
    /// The model could not be loaded; the process ends.
    NotLoaded {
        /// Why.
        error: EngineError,
    },
    /// A generation was admitted.
    Accepted {
        /// Its number.
        id: u64,
    },
    /// A generation was not admitted.
    Refused {
        /// Its number.
        id: u64,
        /// Why.
        error: EngineError,
    },
    /// An event of a generation.
    Event {
        /// Its number.
        id: u64,
        /// The event.
        event: Event,
    },
    /// A generation failed.
    Failed {
        /// Its number.
        id: u64,
        /// Why.
        error: EngineError,
    },
    /// The answer to a question.
    Answer {
        /// Its number.
        id: u64,
        /// The answer.
        answer: Result<Answer, EngineError>,
    },
    /// How busy the model is; comes before each end of a generation as well.
    State {
        /// The snapshot.
        state: LoadSnapshot,
    },
}

/// Why bytes are not a frame.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The frame is longer than [`FRAME_BYTES_MAX`].
    #[error("a frame of {bytes} bytes is too long")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// The frame does not hold the expected message.
    #[error("a frame cannot be read")]
    Malformed(#[from] serde_json::Error),
}

/// Returns the frame of a message.
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

/// Takes the first message off the buffer, or returns `None` when it is not all there yet.
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
