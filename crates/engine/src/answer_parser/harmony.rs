//! Parses the channels of gpt-oss (the harmony format):
//! `<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…`.

use super::markers::{self, Search};
use super::{Input, Output};

const MESSAGE: &str = "<|message|>";
const ENDS: [&str; 5] = ["<|end|>", "<|call|>", "<|return|>", "<|start|>", "<|channel|>"];
/// Longer heads are treated as text.
const HEAD_BYTES_MAX: usize = 512;

#[derive(Debug, Clone)]
pub(super) struct Harmony {
    offers_tools: bool,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The prompt ends inside a head, so the answer begins with the rest of it.
    Begin,
    Head,
    /// A head that follows a call.
    BehindCall,
    Body(Channel),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Channel {
    Analysis,
    Call,
    Final,
}

impl Harmony {
    pub(super) fn new(offers_tools: bool) -> Self {
        Self { offers_tools, state: State::Begin }
    }

    pub(super) fn is_thinking(&self) -> bool {
        self.state == State::Body(Channel::Analysis)
    }

    pub(super) fn is_behind_call(&self) -> bool {
        self.state == State::BehindCall
    }

    /// Parses the next part. Returns whether there is more to do.
    pub(super) fn step(&mut self, input: &mut Input<'_>, output: &mut Output<'_>) -> bool {
        match self.state {
            State::Begin => self.begin(input),
            State::Head | State::BehindCall => self.head(input, output),
            State::Body(channel) => self.body(channel, input, output),
        }
    }

    fn begin(&mut self, input: &Input<'_>) -> bool {
        let may_be = ["<|channel|>", "<|start|>", " to="].map(|head| input.begins(head));
        if may_be.contains(&Some(true)) {
            self.state = State::Head;
        } else if input.rest.is_empty() || may_be.contains(&None) {
            return false;
        } else {
            // A model that does not use channels answers directly.
            self.state = State::Body(Channel::Final);
        }
        true
    }

    fn head(&mut self, input: &mut Input<'_>, output: &mut Output<'_>) -> bool {
        let window = &input.rest[..input.rest.floor_char_boundary(HEAD_BYTES_MAX)];
        if let Some(at) = window.find(MESSAGE) {
            let head = input.take(at + MESSAGE.len());
            let function = head.split_once("to=functions.").map(|(_, to)| to);
            let name = function.map(|to| to.split(|letter: char| letter == '<' || letter.is_whitespace()).next());
            let channel = match name.flatten() {
                Some(name) if self.offers_tools && !name.is_empty() => {
                    output.begin_call(name);
                    Channel::Call
                }
                _ if head.contains("<|channel|>analysis") => Channel::Analysis,
                _ => Channel::Final,
            };
            self.state = State::Body(channel);
            return true;
        }
        if input.rest.is_empty() || (!input.is_whole() && input.rest.len() < HEAD_BYTES_MAX) {
            return false;
        }
        output.text(input.take(window.len()));
        self.state = State::Body(Channel::Final);
        true
    }

    fn body(&mut self, channel: Channel, input: &mut Input<'_>, output: &mut Output<'_>) -> bool {
        let (length, marker) = match markers::find(input.rest, &ENDS, input.is_whole()) {
            Search::Safe(length) => (length, None),
            Search::Found { at, length } => (at, Some(length)),
        };
        let text = input.take(length);
        match channel {
            Channel::Analysis => output.reasoning(text),
            Channel::Call if text.is_empty() => {}
            Channel::Call => output.arguments(text),
            Channel::Final => output.text(text),
        }
        if let Some(length) = marker {
            // `<|start|>` and `<|channel|>` begin the next head. Other end markers carry no information.
            if !["<|start|>", "<|channel|>"].iter().any(|head| input.rest.starts_with(head)) {
                input.take(length);
            }
            self.state = if channel == Channel::Call { State::BehindCall } else { State::Head };
        }
        marker.is_some()
    }
}
