//! Parses RPC submissions: a token, and a job in the format of our own API or of one of `OpenAI`'s endpoints.

use protocol::WireError;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::infer_request::parse_infer;
use crate::job::Job;
use crate::json_body::{invalid, read, unsupported};
use crate::openai::Endpoint;
use crate::openai::request::{Encoding, Generation, Vectors, parse_chat, parse_completion, parse_embeddings};

/// An RPC submission whose job is not parsed yet: jobs are parsed only after the token was checked.
pub struct Submission {
    pub token: Option<String>,
    /// The W3C trace context that the job continues.
    pub traceparent: Option<String>,
    pub job: UnreadJob,
}

/// A job that is not parsed yet.
pub struct UnreadJob {
    kind: Kind,
    text: Box<RawValue>,
}

#[derive(Clone, Copy)]
enum Kind {
    Native,
    Chat,
    Completion,
    Embedding,
}

/// A job, and the format of the answer that its client expects.
pub struct Read {
    pub job: Job,
    pub(crate) words: Words,
}

/// The API in whose format a job was written.
pub(crate) enum Words {
    Native,
    /// `OpenAI`'s, for generated text.
    Generation {
        endpoint: Endpoint,
        /// The model as the client named it.
        model: String,
        /// Whether the client asked for a streamed answer.
        stream: bool,
        /// Whether the request names a service tier.
        names_tier: bool,
        /// Whether the answer calls functions in the older form.
        calls_functions: bool,
    },
    /// `OpenAI`'s, for embedding vectors.
    Vectors {
        /// The model as the client named it.
        model: String,
        encoding: Encoding,
    },
}

/// Mirrors `protocol::gateway::GatewaySubmission`, with each job as raw JSON.
#[derive(Deserialize)]
struct Envelope {
    token: Option<String>,
    request: Option<Box<RawValue>>,
    chat: Option<Box<RawValue>>,
    completion: Option<Box<RawValue>>,
    embedding: Option<Box<RawValue>>,
    traceparent: Option<String>,
}

/// Parses the body of `infer.submit`, except for the job.
pub fn parse_submission(bytes: &[u8]) -> Result<Submission, WireError> {
    let Envelope { token, request, chat, completion, embedding, traceparent } = read(bytes)?;
    let given =
        [(Kind::Native, request), (Kind::Chat, chat), (Kind::Completion, completion), (Kind::Embedding, embedding)];
    let mut given = given.into_iter().filter_map(|(kind, text)| Some(UnreadJob { kind, text: text? }));
    let (Some(job), None) = (given.next(), given.next()) else {
        let what = "or chat, completion or embedding must be given, and only one of them";
        return Err(invalid("request", what));
    };
    Ok(Submission { token, traceparent, job })
}

impl UnreadJob {
    /// Parses the job as the HTTP endpoints do.
    pub fn read(&self) -> Result<Read, WireError> {
        let text = self.text.get().as_bytes();
        let (endpoint, generation) = match self.kind {
            Kind::Native => return Ok(Read { job: parse_infer(text)?, words: Words::Native }),
            Kind::Embedding => {
                let Vectors { job, model, encoding } = parse_embeddings(text)?;
                return Ok(Read { job, words: Words::Vectors { model, encoding } });
            }
            Kind::Chat => (Endpoint::Chat, parse_chat(text)?),
            Kind::Completion => (Endpoint::Completion, parse_completion(text)?),
        };
        let Generation { job, model, stream, include_usage: _, names_tier, calls_functions } = generation;
        Ok(Read { job, words: Words::Generation { endpoint, model, stream, names_tier, calls_functions } })
    }
}

impl Read {
    /// Checks that the answer can be sent as one value, that is, that no stream was requested.
    pub(crate) fn for_one_value(self) -> Result<Self, WireError> {
        if let Words::Generation { stream: true, .. } = self.words {
            let error = unsupported("stream");
            let message = "stream is not supported in a unary call; open infer.submit as a tether/stream/1 stream";
            return Err(WireError { message: message.to_owned(), ..error });
        }
        Ok(self)
    }
}

impl std::fmt::Debug for Submission {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The token is a secret and never printed.
        formatter.debug_struct("Submission").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use protocol::ErrorCode;

    use super::*;

    fn read_job(text: &str) -> Result<Read, WireError> {
        parse_submission(text.as_bytes())?.job.read()
    }

    #[test]
    fn a_job_is_read_in_whichever_words_it_comes() {
        let native = read_job(r#"{"token":"t","request":{"modelId":"m","input":"hi"}}"#).expect("ours");
        let chat = r#"{"token":"t","chat":{"model":"m","messages":[{"role":"user","content":"hi"}]}}"#;
        let chat = read_job(chat).expect("OpenAI's");
        let completion = read_job(r#"{"token":"t","completion":{"model":"m","prompt":"hi"}}"#).expect("OpenAI's");
        assert_eq!(native.job.model, chat.job.model);
        assert_eq!((matches!(native.words, Words::Native), completion.job.input.prompt.as_deref()), (true, Some("hi")));
    }

    #[test]
    fn a_field_at_fault_is_named_as_http_names_it() {
        for (text, code, param) in [
            ("[]", ErrorCode::InvalidJson, None),
            (r#"{"token":"t"}"#, ErrorCode::InvalidValue, Some("request")),
            (r#"{"token":"t","request":{},"chat":{}}"#, ErrorCode::InvalidValue, Some("request")),
            (r#"{"token":7,"request":{}}"#, ErrorCode::InvalidValue, Some("token")),
            (r#"{"token":"t","request":{"input":"hi"}}"#, ErrorCode::MissingModel, Some("modelId")),
            (
                r#"{"token":"t","request":{"modelId":"m","input":{"prompt":"x","topP":7}}}"#,
                ErrorCode::InvalidValue,
                Some("input.topP"),
            ),
            (r#"{"token":"t","chat":{"messages":[]}}"#, ErrorCode::MissingModel, Some("model")),
            (r#"{"token":"t","chat":[1]}"#, ErrorCode::InvalidJson, None),
            (
                r#"{"token":"t","chat":{"model":"m","n":17,"messages":[{"role":"user","content":"hi"}]}}"#,
                ErrorCode::InvalidValue,
                Some("n"),
            ),
            (r#"{"token":"t","embedding":{"model":"m","input":[]}}"#, ErrorCode::InvalidValue, Some("input")),
        ] {
            let error = read_job(text).err().unwrap_or_else(|| panic!("{text}"));
            assert_eq!((error.code, error.param.as_deref()), (code, param), "{text}: {error}");
        }
    }

    #[test]
    fn debug_output_keeps_the_token() {
        let submission = parse_submission(br#"{"token":"secret","request":{}}"#).expect("read so far");
        assert!(!format!("{submission:?}").contains("secret"));
    }
}
