//! Refuses prompts that cannot fit into the model's context, before they reach a worker. Pure functions.

use protocol::infer::{EmbedInput, Input, Message};
use protocol::{ErrorCode, WireError};

/// Upper bound on the bytes of one token. The longest tokens of current models are about a hundred blanks.
const TOKEN_BYTES_MAX: usize = 1024;

/// Checks a prompt's size, as far as possible without the model's vocabulary. A `context_length` or `messages_max` of 0
/// means no limit.
pub(crate) fn check(input: &Input, messages_max: usize, context_length: u32) -> Result<(), WireError> {
    let count = input.messages.as_ref().map_or(0, Vec::len);
    if messages_max > 0 && count > messages_max {
        let message = format!("messages has {count} messages, and at most {messages_max} are taken");
        return Err(WireError::new(ErrorCode::InvalidValue, message).with_param("messages"));
    }
    let context = context_length as usize;
    let (tokens, param) = tokens_min(input, context);
    if context_length > 0 && tokens > context {
        let message = format!(
            "This model's maximum context length is {context_length} tokens. However, your {param} resulted in at least \
             {tokens} tokens. Please reduce the length of the {param}."
        );
        return Err(WireError::new(ErrorCode::ContextLengthExceeded, message).with_param(param));
    }
    Ok(())
}

/// Returns a lower bound on the tokens of an input's longest text, and the name of its field. A query that exceeds the
/// context by itself is blamed alone.
fn tokens_min(input: &Input, context: usize) -> (usize, &'static str) {
    let of_text = |text: &str| text.len().div_ceil(TOKEN_BYTES_MAX);
    let of_embed = |text: &EmbedInput| match text {
        EmbedInput::Text(text) => of_text(text),
        EmbedInput::Tokens(tokens) => tokens.len(),
    };
    if let Some(messages) = &input.messages {
        // No token spans two messages. An empty message counts as 0, because a template may omit it.
        let of_message = |message: &Message| of_text(&message.content);
        (messages.iter().map(of_message).sum(), "messages")
    } else if let Some(texts) = &input.embed {
        let longest = texts.iter().map(of_embed).max().unwrap_or_default();
        match input.query.as_deref().map(of_text) {
            Some(query) if query > context => (query, "query"),
            Some(query) => (longest + query, "documents"),
            None => (longest, "input"),
        }
    } else if let Some(prompts) = &input.prompts {
        (prompts.iter().map(of_embed).max().unwrap_or_default(), "prompt")
    } else {
        let of_prompt = input.prompt.as_deref().map_or(0, of_text) + input.suffix.as_deref().map_or(0, of_text);
        (of_prompt.max(input.prompt_tokens.as_ref().map_or(0, Vec::len)), "prompt")
    }
}

#[cfg(test)]
mod tests {
    use protocol::infer::Role;

    use super::*;

    fn chat(count: usize, content: &str) -> Input {
        Input { messages: Some(vec![Message::new(Role::User, content); count]), ..Input::default() }
    }

    fn refused(input: &Input, messages_max: usize, context_length: u32) -> Option<(ErrorCode, Option<String>)> {
        check(input, messages_max, context_length).err().map(|error| (error.code, error.param))
    }

    #[test]
    fn messages_are_counted() {
        let too_many = Some((ErrorCode::InvalidValue, Some("messages".to_owned())));
        assert_eq!(refused(&chat(2_048, ""), 2_048, 4_096), None);
        assert_eq!(refused(&chat(2_049, ""), 2_048, 4_096), too_many);
        assert_eq!(refused(&chat(250_000, ""), 0, 4_096), None);
    }

    #[test]
    fn what_cannot_fit_the_context_is_refused_and_what_may_fit_is_not() {
        let too_long = |param: &str| Some((ErrorCode::ContextLengthExceeded, Some(param.to_owned())));
        let text = |bytes: usize| "x".repeat(bytes);
        let prompt = |bytes| Input { prompt: Some(text(bytes)), ..Input::default() };
        let embed = |texts| Input { embed: Some(texts), ..Input::default() };
        let rank = |query: usize, document: usize| {
            let query = Some(text(query * TOKEN_BYTES_MAX));
            Input { query, ..embed(vec![EmbedInput::Text(text(document * TOKEN_BYTES_MAX))]) }
        };
        for (input, expected) in [
            // Each message is at least one token, and a token may be long.
            (chat(512, "a"), None),
            (chat(513, "a"), too_long("messages")),
            (chat(1, &text(512 * 1024)), None),
            (chat(1, &text(512 * 1024 + 1)), too_long("messages")),
            (prompt(512 * 1024), None),
            (prompt(512 * 1024 + 1), too_long("prompt")),
            (Input { prompt_tokens: Some(vec![1; 512]), ..Input::default() }, None),
            (Input { prompt_tokens: Some(vec![1; 513]), ..Input::default() }, too_long("prompt")),
            // Texts to embed are evaluated one by one.
            (embed(vec![EmbedInput::Text(text(512 * 1024)); 3]), None),
            (embed(vec![EmbedInput::Text(text(512 * 1024 + 1))]), too_long("input")),
            (embed(vec![EmbedInput::Tokens(vec![1; 513])]), too_long("input")),
            // A query is read with each document.
            (rank(256, 256), None),
            (rank(256, 257), too_long("documents")),
            (rank(512, 1), too_long("documents")),
            (rank(513, 1), too_long("query")),
        ] {
            assert_eq!(refused(&input, 2_048, 512), expected);
            assert_eq!(refused(&input, 2_048, 0), None, "nobody knows the context");
        }
    }

    #[test]
    fn the_refusal_reads_as_openais_does() {
        let error = check(&chat(600, "a"), 2_048, 512).expect_err("too long");
        // LiteLLM, aider and Cline recognize a full context by these words.
        assert!(error.message.starts_with("This model's maximum context length is 512 tokens. However, your messages"));
    }
}
