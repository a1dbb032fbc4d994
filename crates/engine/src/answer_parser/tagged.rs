//! Parses answers whose reasoning and tool calls are enclosed in tags.

use serde_json::Value;

use super::call_head::{self, CallHead};
use super::call_syntax::CallSyntax;
use super::json_span::JsonSpan;
use super::markers::{self, Search};
use super::{Input, Output};
use crate::model_runtime::Tool;

/// Names longer than this are rejected.
const NAME_BYTES_MAX: usize = 256;
const FUNCTION: &str = "<function=";
const PARAMETER: &str = "<parameter=";

/// A parser for tags.
#[derive(Debug, Clone)]
pub(super) struct Tagged {
    thought: Option<(&'static str, &'static str)>,
    syntax: Option<CallSyntax>,
    tools: Vec<Tool>,
    state: State,
    /// Whether any text was output.
    has_spoken: bool,
    /// The whitespace since the last text: the part before the calls and the part after them. One of the two is output
    /// before the next text.
    space: (String, String),
}

#[derive(Debug, Clone)]
enum State {
    /// No text was output yet, so reasoning may follow, or a call without a tag.
    Begin {
        thought: bool,
    },
    Thought {
        is_fresh: bool,
    },
    Text,
    /// After the opening of a call. `tag` is output as text if no call follows.
    Opened {
        tag: String,
    },
    /// Inside arguments that are a JSON object.
    Arguments {
        span: JsonSpan,
        wrapper: Wrapper,
    },
    /// Inside arguments that are written as tags.
    Parameters {
        name: String,
        count: usize,
    },
    Closing {
        wrapper: Wrapper,
    },
    Between,
}

/// What encloses the arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wrapper {
    /// An object that holds the name as well.
    Object,
    /// `<function=…>`.
    Function,
    None,
}

impl Tagged {
    pub(super) fn new(
        thought: Option<(&'static str, &'static str)>,
        is_thinking: bool,
        syntax: Option<CallSyntax>,
        tools: &[Tool],
    ) -> Self {
        let state = if is_thinking { State::Thought { is_fresh: true } } else { State::Begin { thought: true } };
        let tools = if syntax.is_some() { tools.to_vec() } else { Vec::new() };
        Self { thought, syntax, tools, state, has_spoken: false, space: Default::default() }
    }

    pub(super) fn is_thinking(&self) -> bool {
        matches!(self.state, State::Thought { .. })
    }

    pub(super) fn is_behind_call(&self) -> bool {
        matches!(self.state, State::Closing { .. } | State::Between)
    }

    /// Parses the next part. Returns whether there is more to do.
    pub(super) fn step(&mut self, input: &mut Input<'_>, output: &mut Output<'_>) -> bool {
        let next = match &mut self.state {
            State::Begin { thought } => {
                let thought = *thought;
                self.begin(thought, input)
            }
            State::Thought { is_fresh } => {
                let is_fresh = *is_fresh;
                self.think(is_fresh, input, output)
            }
            State::Text => self.speak(input, output),
            State::Opened { tag } => {
                let tag = std::mem::take(tag);
                self.open(tag, input, output)
            }
            State::Arguments { span, wrapper } => {
                let (end, wrapper) = (span.read(input.rest), *wrapper);
                if !input.rest.is_empty() {
                    output.arguments(input.take(end.unwrap_or(input.rest.len())));
                }
                end.map(|_| State::Closing { wrapper })
            }
            State::Parameters { name, count } => read_parameter(name, count, &self.tools, input, output),
            State::Closing { wrapper } => close(*wrapper, input),
            State::Between => self.between(input),
        };
        let goes_on = next.is_some();
        if let Some(next) = next {
            self.state = next;
        }
        goes_on
    }

    fn begin(&mut self, thought: bool, input: &mut Input<'_>) -> Option<State> {
        let mut ahead = *input;
        ahead.take_space();
        if ahead.rest.is_empty() && !input.at_end {
            return None;
        }
        if let Some((open, _)) = self.thought.filter(|_| thought)
            && ahead.begins(open)?
        {
            ahead.take(open.len());
            *input = ahead;
            return Some(State::Thought { is_fresh: true });
        }
        // The blank lines between reasoning and the answer belong to neither.
        if !thought {
            *input = ahead;
        }
        if self.syntax == Some(CallSyntax::Llama) && ahead.rest.starts_with('{') {
            self.space.0.push_str(input.take_space());
            return Some(State::Opened { tag: String::new() });
        }
        Some(State::Text)
    }

    fn think(&self, is_fresh: bool, input: &mut Input<'_>, output: &mut Output<'_>) -> Option<State> {
        let (_, close) = self.thought?;
        if is_fresh {
            input.take_space();
            return (!input.rest.is_empty()).then_some(State::Thought { is_fresh: false });
        }
        match markers::find(input.rest, &[close], input.is_whole()) {
            Search::Found { at, length } => {
                output.reasoning(input.take(at).trim_end());
                input.take(length);
                Some(State::Begin { thought: false })
            }
            Search::Safe(length) => {
                output.reasoning(input.take(without_space(input, length)));
                None
            }
        }
    }

    fn speak(&mut self, input: &mut Input<'_>, output: &mut Output<'_>) -> Option<State> {
        let Some(syntax) = self.syntax else {
            output.text(input.take(input.rest.len()));
            return None;
        };
        match markers::find(input.rest, syntax.openers(), input.is_whole()) {
            Search::Found { at, length } => {
                self.say(input.take(at - trailing_space(&input.rest[..at])), output);
                self.space.0.push_str(input.take_space());
                // The tag of a function is parsed together with its name.
                let tag = if input.rest.starts_with(FUNCTION) { "" } else { input.take(length) };
                Some(State::Opened { tag: tag.to_owned() })
            }
            Search::Safe(length) => {
                self.say(input.take(without_space(input, length)), output);
                None
            }
        }
    }

    /// Outputs text, and before it the whitespace since the last text. Whitespace around calls that come first is
    /// dropped.
    fn say(&mut self, text: &str, output: &mut Output<'_>) {
        if text.is_empty() {
            return;
        }
        let (before, after) = std::mem::take(&mut self.space);
        if self.has_spoken || output.calls.count == 0 {
            output.text(if before.is_empty() { &after } else { &before });
        }
        output.text(text);
        self.has_spoken = true;
    }

    /// Parses what follows the opening of a call.
    fn open(&mut self, tag: String, input: &mut Input<'_>, output: &mut Output<'_>) -> Option<State> {
        let opened = self.read_opening(&tag, input, output);
        if opened.is_none() {
            self.state = State::Opened { tag };
        }
        opened
    }

    /// Outputs an opening that no call follows.
    fn no_call(&mut self, tag: &str, input: &mut Input<'_>, output: &mut Output<'_>) -> State {
        // Without a tag, a character is taken, so that the same place is not tried again.
        let first = input.rest.chars().next().filter(|_| tag.is_empty());
        self.say(tag, output);
        self.say(input.take(first.map_or(0, char::len_utf8)), output);
        State::Text
    }

    fn read_opening(&mut self, tag: &str, input: &mut Input<'_>, output: &mut Output<'_>) -> Option<State> {
        let syntax = self.syntax?;
        let mut ahead = *input;
        ahead.take_space();
        let Some(first) = ahead.rest.chars().next() else {
            return if input.is_whole() { Some(self.no_call(tag, input, output)) } else { None };
        };
        if first == '[' && matches!(syntax, CallSyntax::Mistral { .. }) {
            ahead.take(1);
            ahead.take_space();
            if ahead.rest.is_empty() && !input.is_whole() {
                return None;
            }
        }
        if ahead.rest.starts_with('{') {
            return match call_head::read(ahead.rest, ahead.is_whole(), syntax == CallSyntax::Llama) {
                CallHead::Open => None,
                CallHead::NoCall => Some(self.no_call(tag, input, output)),
                CallHead::Begun { name, .. } | CallHead::Whole { name, .. } if !self.allows(&name) => {
                    Some(self.no_call(tag, input, output))
                }
                CallHead::Begun { name, arguments_at } => {
                    ahead.take(arguments_at);
                    *input = ahead;
                    output.begin_call(&name);
                    Some(State::Arguments { span: JsonSpan::default(), wrapper: Wrapper::Object })
                }
                CallHead::Whole { name, arguments, end } => {
                    ahead.take(end);
                    *input = ahead;
                    output.begin_call(&name);
                    output.arguments(&arguments);
                    Some(State::Closing { wrapper: Wrapper::None })
                }
            };
        }
        let window = &ahead.rest[..ahead.rest.floor_char_boundary(NAME_BYTES_MAX)];
        let is_decided = input.is_whole() || ahead.rest.len() >= NAME_BYTES_MAX;
        if matches!(syntax, CallSyntax::Mistral { .. }) {
            // The name, an optional id, and then the arguments.
            let name = window.find(['[', '{']).map(|end| window[..end].trim_end());
            let begins = window.find('{');
            return match (name, begins) {
                (Some(name), _) if !is_name(name) => Some(self.no_call(tag, input, output)),
                (Some(name), Some(begins)) => {
                    output.begin_call(name);
                    ahead.take(begins);
                    *input = ahead;
                    Some(State::Arguments { span: JsonSpan::default(), wrapper: Wrapper::None })
                }
                _ if is_decided => Some(self.no_call(tag, input, output)),
                _ => None,
            };
        }
        if !ahead.begins(FUNCTION)? {
            return Some(self.no_call(tag, input, output));
        }
        match window[FUNCTION.len()..].split_once('>') {
            Some((name, after)) if is_name(name) => {
                let first = after.trim_start().chars().next();
                let is_tag = first == Some('<');
                if first.is_none() && !is_decided {
                    return None;
                }
                if !is_tag && first != Some('{') {
                    return Some(self.no_call(tag, input, output));
                }
                output.begin_call(name);
                ahead.take(FUNCTION.len() + name.len() + 1);
                ahead.take_space();
                *input = ahead;
                Some(if is_tag {
                    State::Parameters { name: name.to_owned(), count: 0 }
                } else {
                    State::Arguments { span: JsonSpan::default(), wrapper: Wrapper::Function }
                })
            }
            Some(_) => Some(self.no_call(tag, input, output)),
            None if is_decided => Some(self.no_call(tag, input, output)),
            None => None,
        }
    }

    /// With Llama's syntax, an object with a name is a call only if the name is one of the tools.
    fn allows(&self, name: &str) -> bool {
        self.syntax != Some(CallSyntax::Llama) || self.tools.iter().any(|tool| tool.name == name)
    }

    /// Handles the text after a call: another call may follow, and then the rest of the answer.
    fn between(&mut self, input: &mut Input<'_>) -> Option<State> {
        self.space.1.push_str(input.take_space());
        let separators: &[char] = match self.syntax? {
            CallSyntax::Llama => &[';'],
            CallSyntax::Mistral { .. } => &[',', ']'],
            _ => &[],
        };
        if input.rest.starts_with(separators) {
            input.take(1);
            return Some(State::Between);
        }
        let takes_object = matches!(self.syntax, Some(CallSyntax::Llama | CallSyntax::Mistral { .. }));
        if takes_object && input.rest.starts_with('{') {
            return Some(State::Opened { tag: String::new() });
        }
        (!input.rest.is_empty()).then_some(State::Text)
    }
}

/// Parses one parameter tag of a function, or the end of the function.
fn read_parameter(
    name: &str,
    count: &mut usize,
    tools: &[Tool],
    input: &mut Input<'_>,
    output: &mut Output<'_>,
) -> Option<State> {
    const CLOSE: &str = "</parameter>";
    let mut ahead = *input;
    ahead.take_space();
    if ahead.rest.is_empty() {
        return None;
    }
    if !ahead.begins(PARAMETER)? {
        // Anything else ends the call.
        output.arguments(if *count == 0 { "{}" } else { "}" });
        *input = ahead;
        return Some(State::Closing { wrapper: Wrapper::Function });
    }
    let (key, rest) = ahead.rest[PARAMETER.len()..].split_once('>')?;
    let (value, _) = rest.split_once(CLOSE)?;
    let length = PARAMETER.len() + key.len() + 1 + value.len() + CLOSE.len();
    let value = value.strip_prefix('\n').unwrap_or(value);
    let value = value.strip_suffix('\n').unwrap_or(value);
    let schema = tools.iter().find(|tool| tool.name == name).and_then(|tool| tool.parameters.as_ref());
    let is_text = schema.is_some_and(|schema| schema["properties"][key]["type"] == "string");
    let read = if is_text { None } else { serde_json::from_str::<Value>(value).ok() };
    let value = read.unwrap_or_else(|| value.into());
    output.arguments(&format!("{}{}: {value}", if *count == 0 { "{" } else { ", " }, Value::from(key)));
    ahead.take(length);
    *input = ahead;
    *count += 1;
    Some(State::Parameters { name: name.to_owned(), count: *count })
}

/// Skips the text that ends a call.
fn close(wrapper: Wrapper, input: &mut Input<'_>) -> Option<State> {
    let mut ahead = *input;
    ahead.take_space();
    if ahead.rest.is_empty() {
        return input.at_end.then_some(State::Between);
    }
    match wrapper {
        Wrapper::Object if ahead.rest.starts_with(',') => {
            // The object has more fields than the head. They are ignored.
            let end = JsonSpan::within().read(ahead.rest)?;
            ahead.take(end);
        }
        Wrapper::Object if ahead.rest.starts_with('}') => {
            ahead.take(1);
        }
        Wrapper::Function if ahead.begins("</function>")? => {
            ahead.take("</function>".len());
        }
        Wrapper::None if ahead.begins("</tool_call>")? => {
            ahead.take("</tool_call>".len());
            *input = ahead;
            return Some(State::Between);
        }
        // The whitespace may belong before text.
        Wrapper::None => return Some(State::Between),
        Wrapper::Object | Wrapper::Function => {}
    }
    *input = ahead;
    Some(State::Closing { wrapper: Wrapper::None })
}

fn is_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.:/".contains(&byte);
    !name.is_empty() && name.bytes().all(allowed)
}

fn trailing_space(text: &str) -> usize {
    text.len() - text.trim_end().len()
}

/// Holds back trailing whitespace, since it belongs to a tag that may follow.
fn without_space(input: &Input<'_>, length: usize) -> usize {
    if input.at_end && length == input.rest.len() { length } else { length - trailing_space(&input.rest[..length]) }
}
