//! Answers as server-sent events, the way OpenAI's clients read them.

use std::fmt::Write as _;

use bytes::{BufMut as _, BytesMut};
use protocol::WireError;
use protocol::usage::TokenUsage;
use serde::Serialize;

use super::answer_body::Format;
use super::errors;
use crate::answer::{Answer, Piece};

/// Which of OpenAI's two endpoints an answer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Endpoint {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completion,
}

impl Endpoint {
    /// Returns what an answer's id begins with.
    pub(crate) fn id_prefix(self) -> &'static str {
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

/// What the chunks of one answer have in common.
#[derive(Debug, Clone)]
pub(crate) struct Heading {
    pub(crate) endpoint: Endpoint,
    /// The answer's id.
    pub(crate) id: String,
    /// Seconds since 1970.
    pub(crate) created: u64,
    /// The model as the client named it.
    pub(crate) model: String,
    /// Whether a chunk with the usage follows the last.
    pub(crate) include_usage: bool,
}

/// Writes an answer as server-sent events.
pub(super) struct Sse {
    heading: Heading,
    /// A chunk's JSON up to its choices, the same for each, made once.
    head: Vec<u8>,
    role_sent: bool,
}

/// A chunk's JSON up to its choices; serialised, its closing brace is cut off.
#[derive(Serialize)]
struct Head<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'a str,
}

/// Usage as OpenAI's clients read it.
#[derive(Serialize)]
pub(super) struct Usage {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: PromptTokensDetails,
}

#[derive(Serialize)]
struct PromptTokensDetails {
    cached_tokens: u32,
}

impl From<TokenUsage> for Usage {
    fn from(usage: TokenUsage) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.total_tokens(),
            prompt_tokens_details: PromptTokensDetails { cached_tokens: usage.cached_tokens },
        }
    }
}

/// Returns the fingerprint of the model that answers: the beginning of its digest.
pub(super) fn fingerprint(answer: &Answer) -> String {
    format!("fp_{}", &answer.model().digest.to_string()[..12])
}

impl Sse {
    pub(super) fn new(heading: Heading) -> Self {
        Self { heading, head: vec![], role_sent: false }
    }

    fn set_head(&mut self, fingerprint: &str) {
        let Heading { endpoint, id, created, model, .. } = &self.heading;
        let (created, object) = (*created, endpoint.streamed_object());
        let head = Head { id, object, created, model, system_fingerprint: fingerprint };
        self.head = json(&head);
        self.head.pop();
        self.head.extend_from_slice(b",\"choices\":[");
    }

    fn choice(&mut self, piece: &Piece, out: &mut BytesMut) {
        let reason = piece.end.map(|end| end.reason.as_str());
        out.put_slice(b"{\"index\":0,");
        match self.heading.endpoint {
            Endpoint::Chat => {
                out.put_slice(b"\"delta\":{");
                if !self.role_sent {
                    self.role_sent = true;
                    out.put_slice(b"\"role\":\"assistant\",\"content\":");
                    put_json(&piece.text, out);
                } else if !piece.text.is_empty() {
                    out.put_slice(b"\"content\":");
                    put_json(&piece.text, out);
                }
                out.put_slice(b"}");
            }
            Endpoint::Completion => {
                out.put_slice(b"\"text\":");
                put_json(&piece.text, out);
            }
        }
        out.put_slice(b",\"logprobs\":null,\"finish_reason\":");
        put_json(&reason, out);
        out.put_slice(b"}");
    }

    fn usage(&self, usage: TokenUsage, out: &mut BytesMut) {
        out.put_slice(b"data: ");
        out.put_slice(&self.head);
        out.put_slice(b"],\"usage\":");
        put_json(&Usage::from(usage), out);
        out.put_slice(b"}\n\n");
    }
}

impl Format for Sse {
    fn begin(&mut self, answer: &Answer) {
        self.set_head(&fingerprint(answer));
    }

    fn piece(&mut self, piece: &Piece, out: &mut BytesMut) {
        // A token may be part of a character and bring no text yet. The first piece brings the role in any case.
        if !piece.text.is_empty() || piece.end.is_some() || (piece.seq == 0 && self.heading.endpoint == Endpoint::Chat)
        {
            out.reserve(64 + self.head.len() + 2 * piece.text.len() + 128);
            let written = write!(out, "id: {}\ndata: ", piece.seq);
            debug_assert!(written.is_ok(), "a buffer grows");
            out.put_slice(&self.head);
            self.choice(piece, out);
            out.put_slice(if self.heading.include_usage { b"],\"usage\":null}\n\n" } else { b"]}\n\n" });
        }
        if let Some(end) = piece.end {
            if self.heading.include_usage {
                self.usage(end.usage, out);
            }
            out.put_slice(b"data: [DONE]\n\n");
        }
    }

    fn failure(&mut self, error: &WireError, out: &mut BytesMut) {
        // No [DONE]: a client must not take what it has for the whole.
        out.put_slice(b"data: ");
        errors::write(error, out);
        out.put_slice(b"\n\n");
    }

    fn keep_alive(&self) -> &'static [u8] {
        b": keep-alive\n\n"
    }
}

fn json<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("texts and numbers are always writable")
}

fn put_json<T: Serialize>(value: &T, out: &mut BytesMut) {
    let written = serde_json::to_writer(out.writer(), value);
    debug_assert!(written.is_ok(), "texts and numbers are always writable");
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use protocol::ErrorCode;
    use protocol::infer::FinishReason;

    use super::*;
    use crate::answer::End;

    fn sse(endpoint: Endpoint, include_usage: bool) -> Sse {
        let mut sse = Sse::new(Heading {
            endpoint,
            id: format!("{}1", endpoint.id_prefix()),
            created: 7,
            model: "m\"".into(),
            include_usage,
        });
        sse.set_head("fp_abc");
        sse
    }

    fn piece(seq: u64, text: &str, end: Option<End>) -> Piece {
        Piece { raw: Bytes::new(), seq, attempt: 1, text: text.into(), end }
    }

    const END: End = End {
        reason: FinishReason::Stop,
        usage: TokenUsage { prompt_tokens: 3, completion_tokens: 2, cached_tokens: 1 },
    };

    fn written(sse: &mut Sse, pieces: &[Piece]) -> String {
        let mut out = BytesMut::new();
        for piece in pieces {
            sse.piece(piece, &mut out);
        }
        String::from_utf8(out.to_vec()).expect("text")
    }

    #[test]
    fn a_chat_answer_is_written_as_openai_writes_it() {
        let pieces = [piece(0, "He\n", None), piece(1, "", None), piece(2, "llo", None), piece(3, "", Some(END))];
        let head = r#"{"id":"chatcmpl-1","object":"chat.completion.chunk","created":7,"model":"m\"","system_fingerprint":"fp_abc","choices":["#;
        let expected = format!(
            "id: 0\ndata: {head}{{\"index\":0,\"delta\":{{\"role\":\"assistant\",\"content\":\"He\\n\"}},\"logprobs\":null,\"finish_reason\":null}}]}}\n\n\
             id: 2\ndata: {head}{{\"index\":0,\"delta\":{{\"content\":\"llo\"}},\"logprobs\":null,\"finish_reason\":null}}]}}\n\n\
             id: 3\ndata: {head}{{\"index\":0,\"delta\":{{}},\"logprobs\":null,\"finish_reason\":\"stop\"}}]}}\n\n\
             data: [DONE]\n\n"
        );
        assert_eq!(written(&mut sse(Endpoint::Chat, false), &pieces), expected);
    }

    #[test]
    fn usage_comes_in_a_chunk_of_its_own_before_the_end() {
        let head = r#"{"id":"cmpl-1","object":"text_completion","created":7,"model":"m\"","system_fingerprint":"fp_abc","choices":["#;
        let expected = format!(
            "id: 0\ndata: {head}{{\"index\":0,\"text\":\"x\",\"logprobs\":null,\"finish_reason\":\"stop\"}}],\"usage\":null}}\n\n\
             data: {head}],\"usage\":{{\"prompt_tokens\":3,\"completion_tokens\":2,\"total_tokens\":5,\"prompt_tokens_details\":{{\"cached_tokens\":1}}}}}}\n\n\
             data: [DONE]\n\n"
        );
        assert_eq!(written(&mut sse(Endpoint::Completion, true), &[piece(0, "x", Some(END))]), expected);
    }

    #[test]
    fn a_failure_ends_the_stream_without_done() {
        let mut out = BytesMut::new();
        sse(Endpoint::Chat, true).failure(&WireError::new(ErrorCode::WorkerFailed, "gone"), &mut out);
        let expected = "data: {\"error\":{\"message\":\"gone\",\"type\":\"server_error\",\"param\":null,\"code\":\"worker_failed\"}}\n\n";
        assert_eq!(out, expected.as_bytes());
    }
}
