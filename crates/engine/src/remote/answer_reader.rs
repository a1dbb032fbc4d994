//! Turns the streamed JSON chunks of a server's answer into the events of a generation.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use crate::model_runtime::{EngineError, Event, FinishReason, Piece, TokenLogprob, TokenUsage, ToolCallDelta};

/// The data that servers send after the last chunk.
const DONE: &[u8] = b"[DONE]";

/// Parses the chunks of one answer, in order.
#[derive(Debug)]
pub struct AnswerReader {
    has_started: bool,
    is_done: bool,
    has_calls: bool,
    reason: Option<FinishReason>,
    reported: Option<TokenUsage>,
    /// The usage to report if the server reports none.
    guess: TokenUsage,
}

impl AnswerReader {
    /// Begins an answer. For servers that report no usage, it assumes a prompt of `prompt_tokens` and one token per
    /// chunk.
    pub fn new(prompt_tokens: u32) -> Self {
        Self {
            has_started: false,
            is_done: false,
            has_calls: false,
            reason: None,
            reported: None,
            guess: TokenUsage { prompt_tokens, completion_tokens: 0, cached_tokens: 0, reasoning_tokens: 0 },
        }
    }

    /// Parses the data of one stream event and appends the resulting events.
    pub fn read(&mut self, data: &[u8], events: &mut Vec<Event>) -> Result<(), EngineError> {
        if self.is_done {
            return Ok(());
        }
        if data.trim_ascii() == DONE {
            return self.end(events);
        }
        let chunk: Chunk = serde_json::from_slice(data).map_err(|_| failed("a chunk is not as it should be"))?;
        if let Some(error) = chunk.error {
            return Err(failed(error_message(&error)));
        }
        if let Some(usage) = chunk.usage {
            self.reported = Some(usage.into());
        }
        if let Some(progress) = chunk.prompt_progress {
            self.guess = TokenUsage { prompt_tokens: progress.total, cached_tokens: progress.cache, ..self.guess };
        }
        if !std::mem::replace(&mut self.has_started, true) {
            let TokenUsage { prompt_tokens, cached_tokens, .. } = self.reported.unwrap_or(self.guess);
            events.push(Event::Started { prompt_tokens, cached_tokens });
        }
        for choice in chunk.choices.unwrap_or_default() {
            self.take(choice, events)?;
        }
        Ok(())
    }

    /// Ends the answer, whether or not the stream ended with `[DONE]`.
    pub fn end(&mut self, events: &mut Vec<Event>) -> Result<(), EngineError> {
        if std::mem::replace(&mut self.is_done, true) {
            return Ok(());
        }
        let reason = self.reason.ok_or_else(|| failed("the answer broke off"))?;
        if !std::mem::replace(&mut self.has_started, true) {
            let TokenUsage { prompt_tokens, cached_tokens, .. } = self.reported.unwrap_or(self.guess);
            events.push(Event::Started { prompt_tokens, cached_tokens });
        }
        let reason = if self.has_calls && reason == FinishReason::Stop { FinishReason::ToolCalls } else { reason };
        let usage = self.reported.unwrap_or(self.guess);
        events.push(Event::Done { reason, usage, rest: Piece::default() });
        Ok(())
    }

    /// Returns whether any part of the answer has arrived.
    pub fn has_started(&self) -> bool {
        self.has_started
    }

    /// Returns whether the answer is complete.
    pub fn is_done(&self) -> bool {
        self.is_done
    }

    fn take(&mut self, choice: Choice, events: &mut Vec<Event>) -> Result<(), EngineError> {
        let Choice { delta, text, logprobs, finish_reason } = choice;
        let Delta { content, reasoning_content, reasoning, tool_calls } = delta.unwrap_or_default();
        let calls = tool_calls.unwrap_or_default().into_iter().map(ToolCallDelta::from);
        let piece = Piece {
            text: content.or(text).unwrap_or_default(),
            reasoning: reasoning_content.or(reasoning).unwrap_or_default(),
            tool_calls: calls.collect(),
            tokens: Vec::new(),
            logprobs: logprobs.map(Logprobs::into_list).unwrap_or_default(),
        };
        self.has_calls |= !piece.tool_calls.is_empty();
        if !piece.is_empty() {
            self.guess.completion_tokens = self.guess.completion_tokens.saturating_add(1);
            events.push(Event::Piece(piece));
        }
        match finish_reason.as_deref() {
            None | Some("") => {}
            Some("stop") => self.reason = Some(FinishReason::Stop),
            Some("length") => self.reason = Some(FinishReason::Length),
            Some("tool_calls" | "function_call") => self.reason = Some(FinishReason::ToolCalls),
            Some(_) => return Err(failed("the server gave the answer up")),
        }
        Ok(())
    }
}

fn failed(reason: impl Into<String>) -> EngineError {
    EngineError::Failed { reason: reason.into() }
}

/// Returns an error's message for this node's log. Servers write an error as a string, or as an object with a
/// `message`.
pub(super) fn error_message(error: &Value) -> String {
    let text = error.as_str().or_else(|| error.get("message")?.as_str()).unwrap_or("an error without words");
    text.chars().take(300).collect()
}

#[derive(Deserialize)]
struct Chunk {
    choices: Option<Vec<Choice>>,
    usage: Option<UsageJson>,
    error: Option<Value>,
    prompt_progress: Option<Progress>,
}

#[derive(Deserialize)]
struct Choice {
    delta: Option<Delta>,
    text: Option<String>,
    logprobs: Option<Logprobs>,
    finish_reason: Option<String>,
}

#[derive(Default, Deserialize)]
struct Delta {
    content: Option<String>,
    reasoning_content: Option<String>,
    reasoning: Option<String>,
    tool_calls: Option<Vec<CallDelta>>,
}

#[derive(Deserialize)]
struct CallDelta {
    #[serde(default)]
    index: u32,
    id: Option<String>,
    function: Option<FunctionDelta>,
}

#[derive(Default, Deserialize)]
struct FunctionDelta {
    name: Option<String>,
    arguments: Option<String>,
}

impl From<CallDelta> for ToolCallDelta {
    fn from(delta: CallDelta) -> Self {
        let FunctionDelta { name, arguments } = delta.function.unwrap_or_default();
        Self { index: delta.index, id: delta.id, name, arguments: arguments.unwrap_or_default() }
    }
}

/// The prefill progress that llama-server reports.
#[derive(Deserialize)]
struct Progress {
    total: u32,
    #[serde(default)]
    cache: u32,
}

#[derive(Deserialize)]
struct UsageJson {
    #[serde(default)]
    prompt_tokens: u32,
    completion_tokens: Option<u32>,
    prompt_tokens_details: Option<PromptDetails>,
    completion_tokens_details: Option<CompletionDetails>,
}

#[derive(Deserialize)]
struct PromptDetails {
    cached_tokens: Option<u32>,
}

#[derive(Deserialize)]
struct CompletionDetails {
    reasoning_tokens: Option<u32>,
}

impl From<UsageJson> for TokenUsage {
    fn from(usage: UsageJson) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens.unwrap_or_default(),
            cached_tokens: usage.prompt_tokens_details.and_then(|details| details.cached_tokens).unwrap_or_default(),
            reasoning_tokens: usage
                .completion_tokens_details
                .and_then(|details| details.reasoning_tokens)
                .unwrap_or_default(),
        }
    }
}

/// Chat completions have one list with an entry for each token. Plain completions have parallel lists, except those
/// of llama-server, which uses the same form for both.
#[derive(Deserialize)]
struct Logprobs {
    content: Option<Vec<LogprobJson>>,
    tokens: Option<Vec<String>>,
    token_logprobs: Option<Vec<Option<f32>>>,
    top_logprobs: Option<Vec<Option<BTreeMap<String, f32>>>>,
}

#[derive(Deserialize)]
struct LogprobJson {
    id: Option<u32>,
    #[serde(default)]
    token: String,
    bytes: Option<Vec<u8>>,
    #[serde(default)]
    logprob: f32,
    top_logprobs: Option<Vec<LogprobJson>>,
}

impl Logprobs {
    fn into_list(self) -> Vec<TokenLogprob> {
        if let Some(content) = self.content {
            return content.into_iter().map(TokenLogprob::from).collect();
        }
        let mut tops = self.top_logprobs.unwrap_or_default().into_iter();
        let logprobs = self.token_logprobs.unwrap_or_default();
        let tokens = self.tokens.unwrap_or_default().into_iter().zip(logprobs);
        let list = tokens.map(|(token, logprob)| {
            let mut top: Vec<_> = tops.next().flatten().unwrap_or_default().into_iter().map(named_logprob).collect();
            top.sort_by(|one, other| other.logprob.total_cmp(&one.logprob));
            TokenLogprob { top, ..named_logprob((token, logprob.unwrap_or_default())) }
        });
        list.collect()
    }
}

/// A token without its id, which most servers do not report.
fn named_logprob((token, logprob): (String, f32)) -> TokenLogprob {
    TokenLogprob { token: 0, bytes: token.into_bytes(), logprob: finite(logprob), top: Vec::new() }
}

impl From<LogprobJson> for TokenLogprob {
    fn from(logprob: LogprobJson) -> Self {
        Self {
            token: logprob.id.unwrap_or_default(),
            bytes: logprob.bytes.unwrap_or_else(|| logprob.token.into_bytes()),
            logprob: finite(logprob.logprob),
            top: logprob.top_logprobs.unwrap_or_default().into_iter().map(Self::from).collect(),
        }
    }
}

/// Clamps a log-probability to finite values, since JSON has no other numbers and they would break the answer later.
fn finite(logprob: f32) -> f32 {
    logprob.clamp(f32::MIN, f32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(chunks: &[&str]) -> Result<Vec<Event>, EngineError> {
        let mut reader = AnswerReader::new(9);
        let mut events = Vec::new();
        for chunk in chunks {
            reader.read(chunk.as_bytes(), &mut events)?;
        }
        Ok(events)
    }

    fn text(text: &str) -> Event {
        Event::Piece(Piece { text: text.into(), ..Piece::default() })
    }

    #[test]
    fn usage_is_what_the_server_tells() {
        let events = read(&[
            r#"{"choices":[{"index":0,"delta":{"role":"assistant","content":null},"finish_reason":null}],"prompt_progress":{"total":12,"cache":4,"processed":4}}"#,
            r#"{"choices":[{"index":0,"delta":{"content":"To"}}]}"#,
            r#"{"choices":[{"index":0,"delta":{"content":"kyo"},"finish_reason":"stop"}],"usage":null}"#,
            r#"{"choices":[],"usage":{"prompt_tokens":12,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":4},"completion_tokens_details":{"reasoning_tokens":2}}}"#,
            "[DONE]",
        ]);
        let usage = TokenUsage { prompt_tokens: 12, completion_tokens: 3, cached_tokens: 4, reasoning_tokens: 2 };
        let started = Event::Started { prompt_tokens: 12, cached_tokens: 4 };
        let done = Event::Done { reason: FinishReason::Stop, usage, rest: Piece::default() };
        assert_eq!(events, Ok(vec![started, text("To"), text("kyo"), done]));
    }

    #[test]
    fn without_usage_chunks_are_counted_and_the_prompt_is_guessed() {
        let events = read(&[
            r#"{"choices":[{"text":"a"}]}"#,
            r#"{"choices":[{"text":"b","finish_reason":"length"}]}"#,
            "[DONE]",
        ]);
        let usage = TokenUsage { prompt_tokens: 9, completion_tokens: 2, cached_tokens: 0, reasoning_tokens: 0 };
        let done = Event::Done { reason: FinishReason::Length, usage, rest: Piece::default() };
        assert_eq!(events.expect("read").last(), Some(&done));
    }

    #[test]
    fn reasoning_and_calls_are_kept_apart_from_the_text() {
        let events = read(&[
            r#"{"choices":[{"delta":{"reasoning_content":"hm"}}]}"#,
            r#"{"choices":[{"delta":{"reasoning":"so"}}]}"#,
            r#"{"choices":[{"delta":{"tool_calls":[{"index":0,"id":"c1","type":"function","function":{"name":"add","arguments":""}}]}}]}"#,
            r#"{"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{}"}}]},"finish_reason":"stop"}]}"#,
            "[DONE]",
        ])
        .expect("read");
        let mut whole = Piece::default();
        for event in &events {
            if let Event::Piece(piece) = event {
                whole.append(piece.clone());
            }
        }
        assert_eq!((whole.text.as_str(), whole.reasoning.as_str()), ("", "hmso"));
        let name =
            ToolCallDelta { index: 0, id: Some("c1".into()), name: Some("add".into()), arguments: String::new() };
        let arguments = ToolCallDelta { arguments: "{}".into(), ..ToolCallDelta::default() };
        assert_eq!(whole.tool_calls, [name, arguments]);
        assert!(matches!(events.last(), Some(Event::Done { reason: FinishReason::ToolCalls, .. })));
    }

    #[test]
    fn log_probabilities_are_read_in_both_of_their_forms() {
        let listed = r#"{"choices":[{"text":"a","logprobs":{"content":[{"id":7,"token":"a","bytes":[97],"logprob":-1e39,"top_logprobs":[]}]}}]}"#;
        let aligned = r#"{"choices":[{"text":"a","logprobs":{"tokens":["a"],"token_logprobs":[-0.5],"top_logprobs":[{"b":-2.0,"a":-0.5}]}}]}"#;
        let logprobs = |chunk| match read(&[chunk]).expect("read").pop() {
            Some(Event::Piece(piece)) => piece.logprobs,
            other => panic!("a piece was expected: {other:?}"),
        };
        let known = TokenLogprob { token: 7, bytes: vec![97], logprob: f32::MIN, top: vec![] };
        assert_eq!(logprobs(listed), [known]);
        let nameless = |text: &str, logprob| named_logprob((text.into(), logprob));
        let top = vec![nameless("a", -0.5), nameless("b", -2.0)];
        assert_eq!(logprobs(aligned), [TokenLogprob { top, ..nameless("a", -0.5) }]);
    }

    #[test]
    fn an_answer_that_fails_or_breaks_off_is_no_answer() {
        let broken_off = read(&[r#"{"choices":[{"text":"a"}]}"#, "[DONE]"]);
        let given_up = read(&[r#"{"choices":[{"text":"a","finish_reason":"abort"}]}"#]);
        let failed = read(&[r#"{"error":{"message":"out of memory","code":500}}"#]);
        let malformed = read(&["{"]);
        for outcome in [broken_off, given_up, failed, malformed] {
            assert!(matches!(outcome, Err(EngineError::Failed { .. })), "{outcome:?}");
        }
    }
}
