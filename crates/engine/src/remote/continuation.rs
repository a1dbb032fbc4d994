//! Continues an answer after its text, which another server began. Pure.
//!
//! Templates and tokenizers treat spaces at the end of a text each in their own way. So the server gets the text
//! without them, and what it repeats of them is left out.

use crate::model_runtime::{
    Chat, ContinuedText, EngineError, GenerateRequest, Message, OutputFormat, PromptInput, Role, ToolChoice,
    unsupported,
};

/// The part of an answer that the caller already has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Delivered {
    /// Number of its tokens.
    pub tokens: u32,
    /// The whitespace at its end, as far as the rest of the answer has not repeated it.
    spaces: String,
}

impl Delivered {
    pub fn new(text: &str, tokens: u32) -> Self {
        Self { tokens, spaces: text[text.trim_end().len()..].to_owned() }
    }

    /// Removes from the next text of the answer what the caller already has.
    pub(super) fn cut(&mut self, text: &mut String) {
        let shared = self.spaces.chars().zip(text.chars()).take_while(|(one, other)| one == other);
        let length = shared.map(|(one, _)| one.len_utf8()).sum::<usize>();
        if length == text.len() {
            self.spaces.drain(..length);
        } else {
            self.spaces.clear();
        }
        text.drain(..length);
    }
}

/// Returns the request for the rest of an answer, without its limit of tokens.
pub(super) fn rest_of(mut request: GenerateRequest, text: &str) -> Result<GenerateRequest, EngineError> {
    let cannot = |what: &str| Err(unsupported("delivered", format!("a server cannot continue {what} after its text")));
    if request.format != OutputFormat::Text {
        return cannot("an answer of a given format");
    }
    if request.logprobs.is_some() || request.echo || request.suffix.is_some() {
        return cannot("log-probabilities, an echo or a text with a suffix");
    }
    let text = text.trim_end();
    match &mut request.input {
        PromptInput::Tokens(_) => return cannot("a prompt of tokens"),
        PromptInput::Text(prompt) => prompt.push_str(text),
        PromptInput::Chat(Chat { tool_choice: ToolChoice::Required | ToolChoice::Function(_), .. }) => {
            return cannot("an answer that must be a call");
        }
        PromptInput::Chat(_) if text.is_empty() => {}
        PromptInput::Chat(chat) => {
            match chat.messages.last_mut().filter(|_| chat.continue_last) {
                Some(last) => last.content.push_str(text),
                None => chat.messages.push(Message::new(Role::Assistant, text)),
            }
            chat.continue_last = true;
        }
    }
    Ok(request)
}

/// Returns the request for the rest of an answer with the limit that is left, or `None` if nothing is left.
pub(super) fn within_limit(request: GenerateRequest, continued: &ContinuedText) -> Option<GenerateRequest> {
    let max_tokens = request.max_tokens.map(|most| most.saturating_sub(continued.tokens));
    (max_tokens != Some(0)).then_some(GenerateRequest { max_tokens, ..request })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model_runtime::ModelId;

    fn of(input: PromptInput) -> GenerateRequest {
        GenerateRequest::new(ModelId(1), input)
    }

    fn chat(continue_last: bool, last: Message) -> GenerateRequest {
        of(PromptInput::Chat(Chat { continue_last, ..vec![last].into() }))
    }

    fn messages(request: GenerateRequest, text: &str) -> (Vec<(Role, String)>, bool) {
        let PromptInput::Chat(chat) = rest_of(request, text).expect("it can").input else { panic!("a conversation") };
        (chat.messages.into_iter().map(|message| (message.role, message.content)).collect(), chat.continue_last)
    }

    #[test]
    fn the_text_becomes_the_last_message_or_its_end() {
        let asked = || Message::new(Role::User, "hi");
        let both = vec![(Role::User, "hi".to_owned()), (Role::Assistant, "To be".to_owned())];
        assert_eq!(messages(chat(false, asked()), "To be "), (both, true));
        let begun = chat(true, Message::new(Role::Assistant, "Well, "));
        assert_eq!(messages(begun, "yes"), (vec![(Role::Assistant, "Well, yes".to_owned())], true));
        assert_eq!(messages(chat(false, asked()), " \n"), (vec![(Role::User, "hi".to_owned())], false));
    }

    #[test]
    fn the_text_is_appended_to_a_prompt() {
        let rest = rest_of(of(PromptInput::Text("Once ".into())), "upon a").expect("it can");
        assert_eq!(rest.input, PromptInput::Text("Once upon a".into()));
    }

    #[test]
    fn what_is_more_than_text_is_refused() {
        let prompt = || of(PromptInput::Text("x".into()));
        let forced = Chat { tool_choice: ToolChoice::Required, ..Chat::default() };
        for request in [
            of(PromptInput::Tokens(vec![1])),
            of(PromptInput::Chat(forced)),
            GenerateRequest { format: OutputFormat::Json, ..prompt() },
            GenerateRequest { logprobs: Some(0), ..prompt() },
            GenerateRequest { echo: true, ..prompt() },
            GenerateRequest { suffix: Some("y".into()), ..prompt() },
        ] {
            let refused = rest_of(request, "a");
            assert!(matches!(refused, Err(EngineError::Unsupported { .. })), "{refused:?}");
        }
    }

    #[test]
    fn what_was_delivered_counts_towards_the_limit() {
        let limited = |most| GenerateRequest { max_tokens: most, ..of(PromptInput::Text("x".into())) };
        let left = |most| within_limit(limited(most), &ContinuedText { text: "a b c".into(), tokens: 3 });
        assert_eq!(left(Some(5)).map(|request| request.max_tokens), Some(Some(2)));
        assert_eq!(left(None).map(|request| request.max_tokens), Some(None));
        assert_eq!((left(Some(3)), left(Some(2))), (None, None));
    }

    #[test]
    fn spaces_at_the_cut_are_sent_once_however_the_server_repeats_them() {
        for (delivered, pieces, expected) in [
            ("a ", vec![" b", " c"], "b c"),
            ("a ", vec!["b", " c"], "b c"),
            ("a", vec![" b"], " b"),
            ("a \n", vec![" ", "\n", "\nb"], "\nb"),
            ("a \n", vec![" b"], "b"),
            ("a ", vec!["", " ", " b"], " b"),
        ] {
            let mut left = Delivered::new(delivered, 1);
            let mut rest = String::new();
            for piece in pieces {
                let mut piece = piece.to_owned();
                left.cut(&mut piece);
                rest.push_str(&piece);
            }
            assert_eq!(rest, expected, "{delivered:?}");
        }
    }
}
