//! What a job leaves in the engine's prefix cache: its prompt and, in a conversation, the answer.

use protocol::infer::{InferRequest, Message, Payload, Role, ToolCall};
use protocol::prefix::PrefixChain;

/// A prompt, and the answer so far.
#[derive(Debug)]
pub(crate) struct Transcript {
    prompt: PrefixChain,
    /// `None` if no later prompt can continue the answer: outside conversations, and with several answers, of which the
    /// caller picks one.
    answer: Option<Message>,
}

impl Transcript {
    /// Starts with the request's prompt. The text of an answer that another worker began is not known here.
    pub(crate) fn new(request: &InferRequest) -> Self {
        let is_whole = request.delivered.is_none();
        let goes_on = is_whole && request.input.messages.is_some() && request.input.answers() == 1;
        let answer = goes_on.then(|| Message::new(Role::Assistant, ""));
        Self { prompt: PrefixChain::of(request), answer }
    }

    /// Appends a piece of the answer.
    pub(crate) fn append(&mut self, payload: &Payload) {
        let Some(Message { content, tool_calls, .. }) = &mut self.answer else { return };
        content.push_str(&payload.text);
        for delta in &payload.tool_calls {
            let index = delta.index as usize;
            if index == tool_calls.len() {
                tool_calls.push(ToolCall { id: String::new(), name: String::new(), arguments: String::new() });
            }
            // If an engine numbers its calls with gaps, the only harm is an answer that no later prompt matches.
            let Some(call) = tool_calls.get_mut(index) else { continue };
            call.id.push_str(delta.id.as_deref().unwrap_or_default());
            call.name.push_str(delta.name.as_deref().unwrap_or_default());
            call.arguments.push_str(&delta.arguments);
        }
    }

    /// Returns the prefixes of the prompt.
    pub(crate) fn prompt(&self) -> &PrefixChain {
        &self.prompt
    }

    /// Returns the prefixes of the prompt with the answer, with which the next turn begins.
    pub(crate) fn with_answer(mut self) -> PrefixChain {
        if let Some(answer) = &self.answer {
            self.prompt.push_message(answer);
        }
        self.prompt
    }
}

#[cfg(test)]
mod tests {
    use protocol::infer::{Input, ToolCallDelta};

    use super::*;

    fn request(input: Input) -> InferRequest {
        let model = protocol::model::ModelKey {
            model_id: "tether-tiny".parse().expect("model"),
            version: "1.0".parse().expect("version"),
        };
        InferRequest::new(
            "acme".parse().expect("tenant"),
            model,
            input,
            "018f3c2e-7b1a-7c3d-9e4f-5a6b7c8d9e0f".parse().expect("id"),
            "r".parse().expect("token"),
            protocol::TraceId([1; 16]),
        )
    }

    fn conversation(messages: Vec<Message>) -> Input {
        Input { messages: Some(messages), ..Input::default() }
    }

    fn question() -> Vec<Message> {
        vec![Message::new(Role::User, "how is the weather?")]
    }

    #[test]
    fn an_answer_in_pieces_is_the_message_that_the_next_turn_brings() {
        let call = |index, id: Option<&str>, name: Option<&str>, arguments: &str| ToolCallDelta {
            index,
            id: id.map(str::to_owned),
            name: name.map(str::to_owned),
            arguments: arguments.to_owned(),
        };
        let mut transcript = Transcript::new(&request(conversation(question())));
        for (text, tool_calls) in [
            ("Let me ", vec![]),
            ("look.", vec![call(0, Some("c1"), Some("look"), "{\"at\":")]),
            ("", vec![call(0, None, None, "1}"), call(1, Some("c2"), Some("wait"), "{}"), call(9, None, None, "?")]),
        ] {
            transcript.append(&Payload { text: text.to_owned(), tool_calls, ..Payload::default() });
        }
        let called = |id: &str, name: &str, arguments: &str| ToolCall {
            id: id.to_owned(),
            name: name.to_owned(),
            arguments: arguments.to_owned(),
        };
        let mut messages = question();
        messages.push(Message {
            tool_calls: vec![called("c1", "look", "{\"at\":1}"), called("c2", "wait", "{}")],
            ..Message::new(Role::Assistant, "Let me look.")
        });
        assert_eq!(transcript.with_answer(), PrefixChain::of(&request(conversation(messages))));
    }

    #[test]
    fn what_nobody_goes_on_from_is_not_remembered() {
        let several = Input { n: Some(2), ..conversation(question()) };
        let prompt = Input { prompt: Some("once".into()), ..Input::default() };
        for input in [several, prompt] {
            let job = request(input);
            let mut transcript = Transcript::new(&job);
            transcript.append(&Payload { text: "upon".into(), ..Payload::default() });
            assert_eq!(transcript.with_answer(), PrefixChain::of(&job));
        }
    }
}
