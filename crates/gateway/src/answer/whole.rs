//! Collects the pieces of an answer for clients that do not stream.

use protocol::gateway::Choice;
use protocol::infer::{Embedding, FinishReason, ListedToken, ToolCall, ToolCallDelta};
use protocol::usage::TokenUsage;

use super::{Expected, Piece};

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Whole {
    /// As many as were requested.
    pub(crate) choices: Vec<Choice>,
    /// In the order of the input texts.
    pub(crate) embeddings: Vec<Embedding>,
    /// The number of prompt tokens, if the job only counts them.
    pub(crate) input_tokens: Option<u32>,
    /// The prompt tokens, if the job lists them.
    pub(crate) listed_tokens: Vec<ListedToken>,
    pub(crate) usage: TokenUsage,
}

/// The most bytes of an answer that are collected, in its chunks. A job's orchestrator has its own, tighter bounds.
const BYTES_MAX: usize = 64 * 1024 * 1024;

/// The part of an answer that has arrived.
pub(super) struct Gathering {
    bytes: usize,
    choices: Vec<OpenChoice>,
    embeddings: Vec<Embedding>,
    input_tokens: Option<u32>,
    listed_tokens: Vec<ListedToken>,
    expected: Expected,
    usage: Option<TokenUsage>,
}

#[derive(Default)]
struct OpenChoice {
    text: String,
    reasoning: String,
    tool_calls: Vec<ToolCall>,
    logprobs: Vec<protocol::infer::TokenLogprob>,
    finish_reason: Option<FinishReason>,
    stop_sequence: Option<Box<str>>,
}

impl Gathering {
    pub(super) fn new(expected: Expected) -> Self {
        let choices = (0..expected.choices).map(|_| OpenChoice::default()).collect();
        Self { bytes: 0, choices, embeddings: vec![], input_tokens: None, listed_tokens: vec![], expected, usage: None }
    }

    /// Adds a piece. Returns what is wrong with it if it is invalid.
    pub(super) fn add(&mut self, piece: Piece) -> Result<(), &'static str> {
        self.bytes = self.bytes.saturating_add(piece.raw.len());
        if self.bytes > BYTES_MAX {
            return Err("the answer is too long to be collected");
        }
        let content = piece.content;
        let choice = self.choices.get_mut(content.index as usize).ok_or("a chunk is of an answer too many")?;
        choice.text += &content.text;
        choice.reasoning += &content.reasoning;
        choice.logprobs.extend(content.logprobs);
        choice.finish_reason = content.finish_reason.or(choice.finish_reason);
        choice.stop_sequence = content.stop_sequence.or(choice.stop_sequence.take());
        for delta in content.tool_calls {
            choice.call(delta)?;
        }
        for embedding in content.embeddings {
            if embedding.index as usize != self.embeddings.len() {
                return Err("a vector is out of order");
            }
            self.embeddings.push(embedding);
        }
        self.input_tokens = content.input_tokens.or(self.input_tokens);
        self.listed_tokens.extend(content.listed_tokens);
        self.usage = piece.end.map(|end| end.usage);
        Ok(())
    }

    /// Returns the whole answer, or what is missing from it.
    pub(super) fn finish(self) -> Result<Whole, &'static str> {
        if self.embeddings.len() != self.expected.embeddings as usize {
            return Err("vectors are missing");
        }
        let choices = self.choices.into_iter().map(OpenChoice::finish).collect::<Option<_>>();
        Ok(Whole {
            choices: choices.ok_or("an answer has no end")?,
            embeddings: self.embeddings,
            input_tokens: self.input_tokens,
            listed_tokens: self.listed_tokens,
            usage: self.usage.ok_or("the answer has no end")?,
        })
    }
}

impl OpenChoice {
    /// Adds a tool call delta. A new call must have the next free index.
    fn call(&mut self, delta: ToolCallDelta) -> Result<(), &'static str> {
        let ToolCallDelta { index, id, name, arguments } = delta;
        let known = self.tool_calls.len();
        match (self.tool_calls.get_mut(index as usize), id, name) {
            (Some(call), ..) => call.arguments += &arguments,
            (None, Some(id), Some(name)) if index as usize == known => {
                self.tool_calls.push(ToolCall { id, name, arguments });
            }
            (None, ..) => return Err("a call has no beginning"),
        }
        Ok(())
    }

    fn finish(self) -> Option<Choice> {
        let Self { text, reasoning, tool_calls, logprobs, finish_reason, stop_sequence } = self;
        Some(Choice {
            text,
            reasoning,
            tool_calls,
            logprobs,
            finish_reason: finish_reason?,
            stop_sequence: stop_sequence.map(String::from),
        })
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::answer::{Content, End};

    const USAGE: TokenUsage =
        TokenUsage { prompt_tokens: 1, completion_tokens: 2, cached_tokens: 0, reasoning_tokens: 0 };

    fn piece(content: Content) -> Piece {
        Piece { raw: Bytes::new(), seq: 0, attempt: 1, model: None, content, end: None }
    }

    fn gather(expected: Expected, contents: Vec<Content>) -> Result<Whole, &'static str> {
        let mut gathering = Gathering::new(expected);
        contents.into_iter().try_for_each(|content| gathering.add(piece(content)))?;
        let end = Some(End { reason: FinishReason::Stop, usage: USAGE });
        gathering.add(Piece { end, ..piece(Content::default()) })?;
        gathering.finish()
    }

    fn ended(index: u32, text: &str) -> Content {
        Content { index, text: text.into(), finish_reason: Some(FinishReason::Stop), ..Content::default() }
    }

    fn call(index: u32, name: Option<&str>, arguments: &str) -> Content {
        let delta = ToolCallDelta {
            index,
            id: name.map(|name| format!("id of {name}")),
            name: name.map(str::to_owned),
            arguments: arguments.into(),
        };
        Content { tool_calls: vec![delta], ..Content::default() }
    }

    #[test]
    fn answers_that_come_interleaved_are_told_apart() {
        let some = |index, text: &str| Content { index, text: text.into(), ..Content::default() };
        let expected = Expected { choices: 2, embeddings: 0 };
        let contents = vec![some(0, "a"), some(1, "x"), some(0, "b"), ended(1, "y"), ended(0, "c")];
        let whole = gather(expected, contents).expect("whole");
        let texts: Vec<_> = whole.choices.into_iter().map(|choice| choice.text).collect();
        assert_eq!((texts, whole.usage), (vec!["abc".to_owned(), "xy".to_owned()], USAGE));
    }

    #[test]
    fn an_answer_without_end_is_a_breach() {
        let raw = Bytes::from(vec![0; 1 << 20]);
        let endless = || Piece { raw: raw.clone(), ..piece(Content { text: "x".into(), ..Content::default() }) };
        let mut gathering = Gathering::new(Expected::default());
        assert!((0..64).all(|_| gathering.add(endless()).is_ok()));
        assert!(gathering.add(endless()).is_err());
    }

    #[test]
    fn calls_are_put_together_from_their_parts() {
        let contents = vec![
            call(0, Some("f"), "{"),
            call(1, Some("g"), ""),
            call(0, None, "}"),
            call(1, None, "[]"),
            ended(0, ""),
        ];
        let whole = gather(Expected::default(), contents).expect("whole");
        let calls: Vec<_> = whole.choices[0].tool_calls.iter().map(|call| (&*call.name, &*call.arguments)).collect();
        assert_eq!(calls, [("f", "{}"), ("g", "[]")]);
    }

    #[test]
    fn what_was_not_asked_for_or_is_missing_is_a_breach() {
        let one = Expected::default();
        let vectors = Expected { choices: 1, embeddings: 2 };
        let vector = |index| {
            let embedding = Embedding { index, base64: String::new() };
            Content { embeddings: vec![embedding], ..Content::default() }
        };
        assert!(gather(one, vec![ended(1, "x")]).is_err());
        assert!(gather(one, vec![call(1, Some("f"), ""), ended(0, "")]).is_err());
        assert!(gather(one, vec![call(0, None, "{}"), ended(0, "")]).is_err());
        assert!(gather(one, vec![vector(0), ended(0, "")]).is_err());
        assert!(gather(vectors, vec![vector(0), ended(0, "")]).is_err());
        assert!(gather(vectors, vec![vector(0), vector(0), ended(0, "")]).is_err());
        assert!(gather(Expected { choices: 2, embeddings: 0 }, vec![ended(0, "x")]).is_err());
        assert!(gather(vectors, vec![vector(0), vector(1), ended(0, "")]).is_ok());
    }
}
