//! Turns the streamed JSON chunks of a server's answer into the events of a generation.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::continuation::Delivered;
use crate::model_runtime::{
    EngineError, Event, FinishReason, Piece, Progress, TokenLogprob, TokenUsage, ToolCallDelta,
};

/// The data that servers send after the last chunk.
const DONE: &[u8] = b"[DONE]";
/// The most bytes of function calls in one answer.
const CALL_BYTES_MAX: usize = 4 << 20;

/// Parses the chunks of one answer, in order.
///
/// Function calls come with the end of the answer. So an answer that breaks off within a call has delivered only text,
/// and another server continues after it.
#[derive(Debug)]
pub struct AnswerReader {
    has_started: bool,
    is_done: bool,
    calls: Vec<ToolCallDelta>,
    call_bytes: usize,
    /// The number of chunks with a part of a call.
    call_chunks: u32,
    /// What the caller already has of the answer, if another server began it.
    delivered: Option<Delivered>,
    reason: Option<FinishReason>,
    /// The stop sequences that were requested. Some servers report those of their templates as well.
    stops: Vec<String>,
    stop_sequence: Option<String>,
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
            calls: Vec::new(),
            call_bytes: 0,
            call_chunks: 0,
            delivered: None,
            reason: None,
            stops: vec![],
            stop_sequence: None,
            reported: None,
            guess: TokenUsage { prompt_tokens, completion_tokens: 0, cached_tokens: 0, reasoning_tokens: 0 },
        }
    }

    /// Recognises which of these stop sequences ended the answer.
    #[must_use]
    pub fn stopping_at(self, stops: Vec<String>) -> Self {
        Self { stops, ..self }
    }

    /// Begins the rest of an answer. `delivered` is part of its prompt, and counts as part of the answer.
    #[must_use]
    pub fn after(self, delivered: Delivered) -> Self {
        Self { delivered: Some(delivered), ..self }
    }

    /// Returns the usage of the whole answer.
    fn usage(&self) -> TokenUsage {
        let usage = self.reported.unwrap_or(self.guess);
        let delivered = self.delivered.as_ref().map_or(0, |delivered| delivered.tokens);
        let prompt_tokens = usage.prompt_tokens.saturating_sub(delivered);
        TokenUsage {
            prompt_tokens,
            completion_tokens: usage.completion_tokens.saturating_add(delivered),
            cached_tokens: usage.cached_tokens.min(prompt_tokens),
            ..usage
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
            let TokenUsage { prompt_tokens, cached_tokens, .. } = self.usage();
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
            let TokenUsage { prompt_tokens, cached_tokens, .. } = self.usage();
            events.push(Event::Started { prompt_tokens, cached_tokens });
        }
        let tool_calls = std::mem::take(&mut self.calls);
        let has_called = !tool_calls.is_empty() && reason == FinishReason::Stop;
        let reason = if has_called { FinishReason::ToolCalls } else { reason };
        let rest = Piece { tool_calls, stop_sequence: self.stop_sequence.take(), ..Piece::default() };
        events.push(Event::Done { reason, usage: self.usage(), rest });
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
        let Choice { delta, text, logprobs, finish_reason, stop_reason, matched_stop } = choice;
        let Delta { content, reasoning_content, reasoning, tool_calls } = delta.unwrap_or_default();
        let mut piece = Piece {
            text: content.or(text).unwrap_or_default(),
            reasoning: reasoning_content.or(reasoning).unwrap_or_default(),
            logprobs: logprobs.map(Logprobs::into_list).unwrap_or_default(),
            ..Piece::default()
        };
        let calls = tool_calls.unwrap_or_default();
        if !piece.is_empty() || !calls.is_empty() {
            self.guess.completion_tokens = self.guess.completion_tokens.saturating_add(1);
        }
        if let Some(delivered) = &mut self.delivered {
            if !piece.reasoning.is_empty() {
                return Err(failed("the server took the rest of an answer for reasoning"));
            }
            delivered.cut(&mut piece.text);
        }
        if !calls.is_empty() {
            self.hold_back(calls)?;
            events.push(Event::Progress(self.progress()));
        }
        if !piece.is_empty() {
            events.push(Event::Piece(piece));
        }
        // Other ends of an answer are token ids.
        if let Some(Value::String(stop)) = stop_reason.or(matched_stop) {
            self.stop_sequence = Some(stop).filter(|stop| self.stops.contains(stop));
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

    /// Keeps parts of calls until the end of the answer.
    fn hold_back(&mut self, parts: Vec<CallDelta>) -> Result<(), EngineError> {
        self.call_chunks = self.call_chunks.saturating_add(1);
        for part in parts.into_iter().map(ToolCallDelta::from) {
            let name_bytes = part.name.as_ref().map_or(0, String::len) + part.id.as_ref().map_or(0, String::len);
            self.call_bytes += part.arguments.len() + name_bytes + size_of::<ToolCallDelta>();
            let is_further = |call: &&mut ToolCallDelta| call.index == part.index && part.name.is_none();
            match self.calls.last_mut().filter(is_further) {
                Some(call) if part.id.is_none() => call.arguments.push_str(&part.arguments),
                _ => self.calls.push(part),
            }
        }
        if self.call_bytes > CALL_BYTES_MAX { Err(failed("the calls are too long")) } else { Ok(()) }
    }

    /// Returns a sign of life while calls are held back: each part counts as a token that was read.
    fn progress(&self) -> Progress {
        let tokens = self.usage().prompt_tokens.saturating_add(self.call_chunks);
        Progress { tokens_read: tokens, tokens_total: tokens }
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
    prompt_progress: Option<PromptProgress>,
}

#[derive(Deserialize)]
struct Choice {
    delta: Option<Delta>,
    text: Option<String>,
    logprobs: Option<Logprobs>,
    finish_reason: Option<String>,
    /// The stop sequence that ended the answer, from vLLM.
    stop_reason: Option<Value>,
    /// The same from SGLang.
    matched_stop: Option<Value>,
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
struct PromptProgress {
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
        let mut reader = AnswerReader::new(9).stopping_at(vec!["END".to_owned()]);
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
    fn a_stop_sequence_is_read_where_the_server_tells_it_and_a_token_is_none() {
        for (told, expected) in [
            (r#""stop_reason":"END""#, Some("END")),
            (r#""matched_stop":"END""#, Some("END")),
            (r#""matched_stop":"<|im_end|>""#, None),
            (r#""matched_stop":2"#, None),
        ] {
            let last = format!(r#"{{"choices":[{{"text":"a","finish_reason":"stop",{told}}}]}}"#);
            let events = read(&[&last, "[DONE]"]).expect("read");
            let Some(Event::Done { rest, .. }) = events.last() else { panic!("an end") };
            assert_eq!(rest.stop_sequence.as_deref(), expected, "{told}");
        }
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
            if let Event::Piece(piece) | Event::Done { rest: piece, .. } = event {
                whole.append(piece.clone());
            }
        }
        assert_eq!((whole.text.as_str(), whole.reasoning.as_str()), ("", "hmso"));
        let call = ToolCallDelta { index: 0, id: Some("c1".into()), name: Some("add".into()), arguments: "{}".into() };
        assert_eq!(whole.tool_calls, [call]);
        assert!(matches!(events.last(), Some(Event::Done { reason: FinishReason::ToolCalls, .. })));
    }

    #[test]
    fn calls_come_whole_and_with_the_end() {
        let part = |index: u32, rest: &str| {
            format!(r#"{{"choices":[{{"delta":{{"tool_calls":[{{"index":{index},"function":{{{rest}}}}}]}}}}]}}"#)
        };
        let mut reader = AnswerReader::new(9);
        let mut events = Vec::new();
        for chunk in [
            r#"{"choices":[{"delta":{"content":"Let me see. "}}]}"#.to_owned(),
            part(0, r#""name":"add","arguments":"{\"a\":""#),
            part(0, r#""arguments":"1}""#),
            part(1, r#""name":"sub""#),
            part(1, r#""arguments":"{}""#),
        ] {
            reader.read(chunk.as_bytes(), &mut events).expect("read");
        }
        let pieces = events.iter().filter(|event| matches!(event, Event::Piece(_)));
        assert_eq!(pieces.collect::<Vec<_>>(), [&text("Let me see. ")]);
        let progress = |tokens| Event::Progress(Progress { tokens_read: tokens, tokens_total: tokens });
        assert_eq!(events[2..], [progress(10), progress(11), progress(12), progress(13)]);
        reader.read(br#"{"choices":[{"delta":{},"finish_reason":"tool_calls"}]}"#, &mut events).expect("read");
        reader.end(&mut events).expect("it ends");
        let Some(Event::Done { rest, .. }) = events.pop() else { panic!("an end") };
        let calls: Vec<_> = rest.tool_calls.iter().map(|call| (call.index, call.arguments.as_str())).collect();
        assert_eq!(calls, [(0, r#"{"a":1}"#), (1, "{}")]);
    }

    #[test]
    fn calls_without_end_are_refused() {
        let chunk = format!(
            r#"{{"choices":[{{"delta":{{"tool_calls":[{{"function":{{"arguments":"{}"}}}}]}}}}]}}"#,
            "x".repeat(1 << 19)
        );
        let mut reader = AnswerReader::new(9);
        let read = (0..9).map(|_| reader.read(chunk.as_bytes(), &mut Vec::new()));
        assert!(read.collect::<Result<Vec<_>, _>>().is_err());
    }

    #[test]
    fn the_rest_of_an_answer_counts_what_was_delivered_as_answer() {
        let mut reader = AnswerReader::new(9).after(Delivered::new("To be ", 4));
        let mut events = Vec::new();
        for chunk in [
            r#"{"choices":[{"delta":{"content":" or"}}],"usage":{"prompt_tokens":12,"completion_tokens":1,"prompt_tokens_details":{"cached_tokens":11}}}"#,
            r#"{"choices":[{"delta":{},"finish_reason":"stop"}],"usage":{"prompt_tokens":12,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":11}}}"#,
            "[DONE]",
        ] {
            reader.read(chunk.as_bytes(), &mut events).expect("read");
        }
        let usage = TokenUsage { prompt_tokens: 8, completion_tokens: 6, cached_tokens: 8, reasoning_tokens: 0 };
        let started = Event::Started { prompt_tokens: 8, cached_tokens: 8 };
        let done = Event::Done { reason: FinishReason::Stop, usage, rest: Piece::default() };
        assert_eq!(events, [started, text("or"), done]);
    }

    #[test]
    fn a_rest_that_is_taken_for_reasoning_is_none() {
        let mut reader = AnswerReader::new(9).after(Delivered::new("To be", 4));
        let read = reader.read(br#"{"choices":[{"delta":{"reasoning":"hm"}}]}"#, &mut Vec::new());
        assert!(matches!(read, Err(EngineError::Failed { .. })), "{read:?}");
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
