//! Translates the OpenAI API: its requests to jobs, and answers to its responses. Independent of HTTP and RPC.

pub(crate) mod batch;
pub(crate) mod request;
pub(crate) mod response;

/// The OpenAI endpoint that a request for generated text uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Endpoint {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completion,
}

impl Endpoint {
    /// Returns the prefix of an answer's id.
    fn id_prefix(self) -> &'static str {
        match self {
            Self::Chat => "chatcmpl-",
            Self::Completion => "cmpl-",
        }
    }

    fn streamed_object(self) -> &'static str {
        match self {
            Self::Chat => "chat.completion.chunk",
            Self::Completion => "text_completion",
        }
    }
}
