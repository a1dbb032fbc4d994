//! The request bodies of `POST /tokenize` and `POST /detokenize`, as vLLM's and llama-server's clients send them.

use protocol::WireError;
use protocol::infer::{Input, TokenListing};
use protocol::model::ModelRef;
use serde::Deserialize;
use serde::de::IgnoredAny;
use utoipa::ToSchema;

use super::parse_chat;
use crate::catalog;
use crate::job::Job;
use crate::json_body::{invalid, missing, read, renamed};

/// The field of `POST /detokenize` that contains the tokens.
pub(crate) const DETOKENIZE_PARAM: &str = "tokens";

/// A parsed request for the tokens of a prompt.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tokenizing {
    pub(crate) job: Job,
    /// The field that contains the text or the conversation.
    pub(crate) param: &'static str,
    /// Whether each token comes in an object with its text, as in llama-server.
    pub(crate) with_pieces: bool,
    /// Whether the texts of the tokens come in a list of their own, as in vLLM.
    pub(crate) with_texts: bool,
}

/// A text or a conversation whose tokens are listed. Exactly one of `content`, `prompt` and `messages` must be given.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct TokenizeRequest {
    /// `name[@MAJOR.MINOR][:adapter]`. Without a version it is the newest.
    #[schema(value_type = String)]
    model: Option<String>,
    /// The text, as clients of llama-server name it.
    content: Option<String>,
    /// The text, as clients of vLLM name it.
    prompt: Option<String>,
    /// A conversation, with the fields of chat completions on which its prompt depends, such as `tools`.
    #[schema(value_type = Option<Vec<Object>>)]
    messages: Option<IgnoredAny>,
    /// Whether to add tokens such as BOS to a text. The default is false with `content` and true with `prompt`.
    add_special: Option<bool>,
    /// The same, as clients of vLLM name it.
    add_special_tokens: Option<bool>,
    /// Whether the text of a special token becomes that token.
    #[schema(default = true)]
    parse_special: Option<bool>,
    /// Whether to return each token in an object with its text.
    #[schema(default = false)]
    with_pieces: Option<bool>,
    /// Whether to return the texts of the tokens in `token_strs`.
    #[schema(default = false)]
    return_token_strs: Option<bool>,
}

/// Tokens to convert to a text.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct DetokenizeRequest {
    /// `name[@MAJOR.MINOR]`. Without a version it is the newest.
    #[schema(value_type = String)]
    model: Option<String>,
    /// Ids of the model's vocabulary.
    #[schema(value_type = Vec<u32>, min_items = 1)]
    tokens: Option<Vec<u32>>,
}

/// Parses the body of `POST /tokenize`.
pub(crate) fn parse_tokenize(bytes: &[u8]) -> Result<Tokenizing, WireError> {
    let request: TokenizeRequest = read(bytes)?;
    let TokenizeRequest { model, content, prompt, messages, .. } = request;
    let add_special = request.add_special.or(request.add_special_tokens).unwrap_or(content.is_none());
    let listing = TokenListing { add_special, parse_special: request.parse_special.unwrap_or(true) };
    let of_text = |text: String| {
        let (model, _) = catalog::parse_named(model.as_deref())?;
        listed(model, Input { prompt: Some(text), ..Input::default() }, listing)
    };
    let (param, job) = match (content, prompt, messages) {
        (None, None, Some(_)) => {
            let job = parse_chat(bytes)?.job;
            ("messages", listed(job.model, job.input, listing))
        }
        (Some(text), None, None) => ("content", of_text(text)),
        (None, Some(text), None) => ("prompt", of_text(text)),
        _ => return Err(invalid("prompt", "or content or messages must be given, and only one of them")),
    };
    Ok(Tokenizing {
        job: job.map_err(|problem| of_param(problem, param))?,
        param,
        with_pieces: request.with_pieces.unwrap_or(false),
        with_texts: request.return_token_strs.unwrap_or(false),
    })
}

/// Blames the field that contains the prompt of a request for tokens, as its client names it.
pub(crate) fn of_param(error: WireError, param: &str) -> WireError {
    ["prompt", "input"].into_iter().fold(error, |error, ours| renamed(error, ours, param))
}

/// Parses the body of `POST /detokenize`.
pub(crate) fn parse_detokenize(bytes: &[u8]) -> Result<Job, WireError> {
    let DetokenizeRequest { model, tokens } = read(bytes)?;
    let (model, _) = catalog::parse_named(model.as_deref())?;
    let input = Input { prompt_tokens: Some(tokens.ok_or_else(|| missing("tokens"))?), ..Input::default() };
    let listing = TokenListing { add_special: false, parse_special: false };
    listed(model, input, listing).map_err(|problem| of_param(problem, DETOKENIZE_PARAM))
}

fn listed(model: ModelRef, input: Input, listing: TokenListing) -> Result<Job, WireError> {
    let input = Input { count_only: true, list_tokens: Some(listing), n: None, ..input };
    input.check()?;
    Ok(Job::new(model, input))
}

#[cfg(test)]
mod tests {
    use protocol::ErrorCode;
    use serde_json::{Value, json};

    use super::*;

    fn tokenize(body: &Value) -> Result<Tokenizing, WireError> {
        parse_tokenize(body.to_string().as_bytes())
    }

    fn listing(body: &Value) -> TokenListing {
        tokenize(body).expect("well formed").job.input.list_tokens.expect("a list is asked for")
    }

    #[test]
    fn a_text_has_the_name_and_the_defaults_of_either_server() {
        let of_llama_server = listing(&json!({"model": "m", "content": "a"}));
        let of_vllm = listing(&json!({"model": "m", "prompt": "a"}));
        assert_eq!((of_llama_server.add_special, of_vllm.add_special), (false, true));
        assert!(listing(&json!({"model": "m", "content": "a", "add_special": true})).add_special);
        assert!(!listing(&json!({"model": "m", "prompt": "a", "add_special_tokens": false})).add_special);
        assert!(!listing(&json!({"model": "m", "content": "a", "parse_special": false})).parse_special);
        let input = tokenize(&json!({"model": "m", "content": ""})).expect("well formed").job.input;
        assert_eq!((input.prompt.as_deref(), input.count_only), (Some(""), true));
        for param in ["content", "prompt"] {
            assert_eq!(tokenize(&json!({"model": "m", param: "a"})).expect("well formed").param, param);
        }
    }

    #[test]
    fn a_conversation_is_read_as_in_chat_completions() {
        let messages = json!([{"role": "user", "content": "hi"}]);
        let tools = json!([{"type": "function", "function": {"name": "f"}}]);
        let asked = json!({"model": "m", "messages": messages, "tools": tools, "with_pieces": true, "n": 3});
        let Tokenizing { job, with_pieces, with_texts, .. } = tokenize(&asked).expect("well formed");
        assert_eq!((job.input.messages.map(|all| all.len()), job.input.tools.len(), job.input.n), (Some(1), 1, None));
        assert_eq!((with_pieces, with_texts), (true, false));
        let error = tokenize(&json!({"model": "m", "messages": [{"role": "user"}]})).expect_err("no content");
        assert_eq!(error.param.as_deref(), Some("messages[0].content"));
    }

    #[test]
    fn an_engines_refusal_names_the_field_of_the_client() {
        let refusal = |ours: &str| {
            let message = format!("{ours} is not supported: there is no token 7");
            of_param(WireError::new(ErrorCode::UnsupportedParameter, message).with_param(ours), DETOKENIZE_PARAM)
        };
        for (ours, named) in [("prompt", "tokens"), ("input", "tokens"), ("model", "model")] {
            let error = refusal(ours);
            assert_eq!(error.param.as_deref(), Some(named));
            assert_eq!(error.message, format!("{named} is not supported: there is no token 7"));
        }
    }

    #[test]
    fn one_prompt_is_needed() {
        for body in [json!({"model": "m"}), json!({"model": "m", "prompt": "a", "content": "a"})] {
            let error = tokenize(&body).expect_err("not one");
            assert_eq!((error.code, error.param.as_deref()), (ErrorCode::InvalidValue, Some("prompt")));
        }
        assert_eq!(tokenize(&json!({"prompt": "a"})).expect_err("no model").code, ErrorCode::MissingModel);
        for body in [json!({"model": "m"}), json!({"model": "m", "tokens": []})] {
            let error = parse_detokenize(body.to_string().as_bytes()).expect_err("no tokens");
            assert_eq!((error.code, error.param.as_deref()), (ErrorCode::InvalidValue, Some("tokens")));
        }
    }
}
