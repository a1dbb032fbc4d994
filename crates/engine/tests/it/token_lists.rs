//! The tokens of texts, and the texts of tokens.

use tether_engine::{EngineError, ListedToken, Message, ModelRuntime, PromptInput, Role, TokenListing, no_progress};

use crate::process_runtime::host;
use crate::{options, tiny, within};

const PLAIN: TokenListing = TokenListing { add_special: false, parse_special: false };

fn text(text: &str) -> PromptInput {
    PromptInput::Text(text.to_owned())
}

fn joined(tokens: &[ListedToken]) -> String {
    String::from_utf8(tokens.iter().flat_map(|token| token.bytes.clone()).collect()).expect("a text")
}

#[tokio::test]
async fn a_text_becomes_tokens_and_they_become_the_text() {
    let runtime = host(&["llama"]);
    let model = within(runtime.load(tiny(), options(), no_progress())).await.expect("it loads").id;
    let listed = async |input: PromptInput, listing| within(runtime.list_tokens(model, &input, listing)).await;
    for said in ["3 + 4 = 7", "Z\u{fc}rich \u{1f600}", ""] {
        let tokens = listed(text(said), PLAIN).await.expect("tokens");
        assert_eq!(joined(&tokens), said);
        let ids = tokens.iter().map(|token| token.id).collect();
        if !said.is_empty() {
            assert_eq!(listed(PromptInput::Tokens(ids), PLAIN).await.expect("a text"), tokens);
        }
    }
    let unknown = listed(PromptInput::Tokens(vec![u32::MAX]), PLAIN).await;
    assert!(matches!(unknown, Err(EngineError::Unsupported { .. })), "{unknown:?}");
    let long = listed(text(&"x".repeat((1 << 20) + 1)), PLAIN).await;
    assert!(matches!(long, Err(EngineError::Unsupported { .. })), "{long:?}");
}

#[tokio::test]
async fn a_conversations_tokens_are_those_that_are_counted() {
    let runtime = host(&["llama"]);
    let model = within(runtime.load(tiny(), options(), no_progress())).await.expect("it loads").id;
    let chat = PromptInput::Chat(vec![Message::new(Role::User, "What is 3 + 4?")].into());
    let tokens = within(runtime.list_tokens(model, &chat, PLAIN)).await.expect("tokens");
    assert_eq!(within(runtime.count_tokens(model, &chat)).await, Ok(tokens.len() as u32));
    assert!(joined(&tokens).contains("What is 3 + 4?"));
    // The template's special tokens are read as such only where the caller wants it.
    let rendered = text(&joined(&tokens));
    let parsed = TokenListing { add_special: false, parse_special: true };
    let as_tokens = within(runtime.list_tokens(model, &rendered, parsed)).await.expect("tokens");
    let as_text = within(runtime.list_tokens(model, &rendered, PLAIN)).await.expect("tokens");
    assert_eq!(as_tokens, tokens);
    assert!(as_text.len() > tokens.len());
}
