//! Splits an answer into reasoning, text and tool calls while it is generated.
//!
//! Model families write these in different formats. [`AnswerFormat::detect`] finds the format of a model in its chat
//! template. The result does not depend on how the text was split into pieces. Only text that may still become a
//! marker or the head of a call is held back. Text that turns out not to be a call is returned as text.

mod call_head;
mod call_syntax;
mod harmony;
mod json_span;
mod markers;
mod tagged;

use crate::json_form::with_options;
use crate::model_runtime::{Chat, OutputFormat, ToolCallDelta, ToolChoice};
use crate::sampler;
use call_syntax::CallSyntax;
use harmony::Harmony;
use tagged::Tagged;

/// The known tags around reasoning.
const THOUGHT_TAGS: [(&str, &str); 4] = [
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
];

/// The format in which a model writes its answers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AnswerFormat {
    thought: Option<(&'static str, &'static str)>,
    calls: Option<CallSyntax>,
}

/// A further piece of an answer, split into its parts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Delta {
    pub text: String,
    /// Text to append to the reasoning.
    pub reasoning: String,
    /// Further pieces of the tool calls.
    pub tool_calls: Vec<ToolCallDelta>,
}

#[derive(Debug, Clone)]
pub struct AnswerParser {
    reader: Reader,
    one_call: bool,
    held: String,
    calls: Calls,
}

#[derive(Debug, Clone)]
enum Reader {
    Tagged(Tagged),
    Harmony(Harmony),
}

impl Reader {
    /// Returns whether the reader is between two calls, or between a call and what follows.
    fn is_behind_call(&self) -> bool {
        match self {
            Self::Tagged(reader) => reader.is_behind_call(),
            Self::Harmony(reader) => reader.is_behind_call(),
        }
    }
}

impl AnswerFormat {
    /// Detects the answer format of a model from its chat template.
    pub fn detect(template: &str) -> Self {
        let calls = CallSyntax::detect(template);
        let thought = THOUGHT_TAGS.into_iter().find(|(_, close)| template.contains(close));
        Self { thought: thought.filter(|_| calls != Some(CallSyntax::Harmony)), calls }
    }

    /// Returns whether tool calls of this model can be parsed.
    pub fn takes_tools(&self) -> bool {
        self.calls.is_some()
    }

    /// Returns whether reasoning of this model can be parsed.
    pub fn thinks(&self) -> bool {
        self.thought.is_some() || self.calls == Some(CallSyntax::Harmony)
    }

    /// Returns the texts that must reach the parser and the grammars as text, although they may be special tokens.
    pub fn preserved_tokens(&self) -> Vec<&'static str> {
        let thought = self.thought.into_iter().flat_map(|(open, close)| [open, close]);
        thought.chain(self.calls.into_iter().flat_map(CallSyntax::markers).copied()).collect()
    }

    /// Returns the constraint that replaces the requested one: a tool call if one is required, and optional reasoning
    /// before JSON output. The answer continues `prompt`.
    pub fn constraint(&self, chat: &Chat, format: &OutputFormat, prompt: &str) -> Option<OutputFormat> {
        let before = self.thought.map_or_else(String::new, |(open, close)| thought_rule(open, close, prompt));
        let start = if before.is_empty() { "" } else { "thought " };
        if let Some(calls) = self.calls
            && let Some(rules) = calls.required(chat)
        {
            return Some(OutputFormat::Lark(format!("start: {start}calls\n{before}{rules}")));
        }
        let schema = match format {
            OutputFormat::Json => &serde_json::json!({ "type": "object" }),
            OutputFormat::JsonSchema(schema) => schema,
            _ => return None,
        };
        let rules = format!("start: {start}json\n{before}json: %json {}\n", with_options(schema));
        (!before.is_empty()).then_some(OutputFormat::Lark(rules))
    }

    /// Returns the constraints on the arguments of the tools if a call is required, in the order of the tools.
    pub fn argument_forms<'a>(&self, chat: &'a Chat) -> impl Iterator<Item = OutputFormat> + use<'a> {
        chat.tools.iter().map(|tool| OutputFormat::JsonSchema(call_syntax::arguments(tool)))
    }

    fn is_thinking(&self, prompt: &str) -> bool {
        self.thought.is_some_and(|(open, _)| prompt.trim_end().ends_with(open))
    }
}

/// Returns the grammar rule for reasoning that may come, or that the prompt has already begun.
fn thought_rule(open: &str, close: &str, prompt: &str) -> String {
    let prompt = prompt.trim_end();
    if prompt.ends_with(close) {
        return String::new();
    }
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    let rest = format!("within[suffix={}]: /(.|\\n)*/\nspace: /\\s*/\n", quoted(close));
    if prompt.ends_with(open) {
        format!("thought: within space\n{rest}")
    } else {
        format!("thought: ({} within space)?\n{rest}", quoted(open))
    }
}

impl AnswerParser {
    /// Creates the parser for an answer to a conversation. `prompt` is the rendered prompt, which may end inside
    /// reasoning. Call ids are derived from the seed, so another worker that continues the answer generates the same
    /// ids.
    pub fn new(format: AnswerFormat, chat: &Chat, prompt: &str, seed: u64) -> Self {
        let offers_tools = !chat.tools.is_empty() && chat.tool_choice != ToolChoice::None;
        let syntax = format.calls.filter(|_| offers_tools);
        let reader = match format.calls {
            Some(CallSyntax::Harmony) => Reader::Harmony(Harmony::new(offers_tools)),
            _ => Reader::Tagged(Tagged::new(format.thought, format.is_thinking(prompt), syntax, &chat.tools)),
        };
        // Ids differ within a conversation, even if all its answers have the same seed.
        let first = (chat.messages.len() as u64) << 16;
        let short = matches!(format.calls, Some(CallSyntax::Mistral { .. }));
        let calls = Calls { seed, first, short, ..Calls::default() };
        Self { reader, one_call: chat.one_call, held: String::new(), calls }
    }

    /// Parses more text of the answer.
    pub fn push(&mut self, text: &str) -> Delta {
        self.held.push_str(text);
        self.read(false, false)
    }

    /// Ends the answer. Returns the text that was held back, and whether the answer calls functions. If the token
    /// limit cut the answer, a possible beginning of a call or a marker is dropped instead of returned as text.
    pub fn finish(&mut self, is_cut: bool) -> (Delta, bool) {
        let delta = self.read(true, is_cut);
        (delta, self.calls.count > 0)
    }

    /// Returns whether the model is in the middle of reasoning, as far as the text so far shows.
    pub fn is_thinking(&self) -> bool {
        match &self.reader {
            Reader::Tagged(reader) => reader.is_thinking(),
            Reader::Harmony(reader) => reader.is_thinking(),
        }
    }

    /// Returns whether only one call is wanted and it is complete. Anything that follows is not part of the answer.
    pub fn is_done(&self) -> bool {
        self.one_call && self.calls.count > 0 && self.reader.is_behind_call()
    }

    fn read(&mut self, at_end: bool, is_cut: bool) -> Delta {
        let mut output = Output { delta: Delta::default(), calls: &mut self.calls };
        let mut input = Input { rest: &self.held, at_end, is_cut };
        loop {
            if self.one_call && output.calls.count > 0 && self.reader.is_behind_call() {
                input.take(input.rest.len());
                break;
            }
            let goes_on = match &mut self.reader {
                Reader::Tagged(reader) => reader.step(&mut input, &mut output),
                Reader::Harmony(reader) => reader.step(&mut input, &mut output),
            };
            if !goes_on {
                break;
            }
        }
        let read = self.held.len() - input.rest.len();
        let delta = output.delta;
        self.held.drain(..read);
        delta
    }
}

/// The unread part of the text.
#[derive(Debug, Clone, Copy)]
struct Input<'a> {
    rest: &'a str,
    /// No more text will come.
    at_end: bool,
    /// The token limit cut the answer.
    is_cut: bool,
}

impl<'a> Input<'a> {
    fn take(&mut self, bytes: usize) -> &'a str {
        let (text, rest) = self.rest.split_at(bytes);
        self.rest = rest;
        text
    }

    fn take_space(&mut self) -> &'a str {
        self.take(self.rest.len() - self.rest.trim_start().len())
    }

    /// Returns whether the text is complete and was not cut.
    fn is_whole(&self) -> bool {
        self.at_end && !self.is_cut
    }

    /// Returns whether the input starts with `text`, or `None` while more input may decide it.
    fn begins(&self, text: &str) -> Option<bool> {
        if self.rest.starts_with(text) {
            Some(true)
        } else if !self.is_whole() && text.starts_with(self.rest) {
            None
        } else {
            Some(false)
        }
    }
}

/// The parsed part of the answer.
#[derive(Debug)]
struct Output<'a> {
    delta: Delta,
    calls: &'a mut Calls,
}

/// The calls of an answer so far.
#[derive(Debug, Clone, Default)]
struct Calls {
    count: u32,
    seed: u64,
    first: u64,
    /// Mistral's templates accept only ids of nine letters and digits.
    short: bool,
}

impl Output<'_> {
    fn text(&mut self, text: &str) {
        self.delta.text.push_str(text);
    }

    fn reasoning(&mut self, text: &str) {
        self.delta.reasoning.push_str(text);
    }

    fn begin_call(&mut self, name: &str) {
        let calls = &mut *self.calls;
        let hash = sampler::hash(calls.seed, calls.first + u64::from(calls.count));
        let id = if calls.short { format!("{:09x}", hash >> 28) } else { format!("call_{hash:016x}") };
        let index = calls.count;
        calls.count += 1;
        let (id, name) = (Some(id), Some(name.to_owned()));
        self.delta.tool_calls.push(ToolCallDelta { index, id, name, arguments: String::new() });
    }

    /// Appends to the arguments of the last call.
    fn arguments(&mut self, text: &str) {
        let index = self.calls.count.saturating_sub(1);
        match self.delta.tool_calls.last_mut() {
            Some(call) if call.index == index => call.arguments.push_str(text),
            _ => {
                let more = ToolCallDelta { index, arguments: text.to_owned(), ..ToolCallDelta::default() };
                self.delta.tool_calls.push(more);
            }
        }
    }
}

#[cfg(test)]
mod tests;
