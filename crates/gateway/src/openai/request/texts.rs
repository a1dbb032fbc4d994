//! Fields that take one text or several, or tokens instead: `stop`, `prompt`, and the `input` of embeddings.

use std::fmt;

use protocol::WireError;
use protocol::infer::{EmbedInput, Input};
use serde::{Deserialize, Deserializer, de};
use utoipa::openapi::{OneOfBuilder, RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use crate::json_body::{TextOr, invalid, text_or};

/// `stop`: one text or several.
#[derive(Debug)]
pub(crate) struct Stop(pub(crate) Vec<String>);

impl PartialSchema for Stop {
    fn schema() -> RefOr<Schema> {
        let schema = OneOfBuilder::new().item(String::schema()).item(Vec::<String>::schema());
        schema.description(Some("One text or several.")).into()
    }
}

impl ToSchema for Stop {}

impl<'de> Deserialize<'de> for Stop {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(match text_or(deserializer, "a text or an array of texts")? {
            TextOr::Text(text) => Self(vec![text]),
            TextOr::Array(texts) => Self(texts),
        })
    }
}

/// One text or several, each as a string or as tokens.
#[derive(Debug)]
pub(crate) struct Texts(pub(crate) Vec<EmbedInput>);

impl Texts {
    /// Converts the texts to the prompt, or to the prompts if there are several.
    pub(super) fn into_prompt(mut self) -> Result<Input, WireError> {
        if self.0.len() > 1 {
            return Ok(Input { prompts: Some(self.0), ..Input::default() });
        }
        match self.0.pop() {
            Some(EmbedInput::Text(text)) => Ok(Input { prompt: Some(text), ..Input::default() }),
            Some(EmbedInput::Tokens(tokens)) => Ok(Input { prompt_tokens: Some(tokens), ..Input::default() }),
            None => Err(invalid("prompt", "must not be empty")),
        }
    }
}

impl PartialSchema for Texts {
    fn schema() -> RefOr<Schema> {
        let of_one = OneOfBuilder::new().item(String::schema()).item(Vec::<u32>::schema());
        let schema = of_one.item(Vec::<String>::schema()).item(Vec::<Vec<u32>>::schema());
        schema.description(Some("One text or several, each as a string or as tokens.")).into()
    }
}

impl ToSchema for Texts {}

impl<'de> Deserialize<'de> for Texts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneOrMany;

        impl<'de> de::Visitor<'de> for OneOrMany {
            type Value = Texts;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a text, tokens, or an array of either")
            }

            fn visit_str<E>(self, text: &str) -> Result<Texts, E> {
                Ok(Texts(vec![EmbedInput::Text(text.to_owned())]))
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut items: A) -> Result<Texts, A::Error> {
                let (mut texts, mut tokens) = (vec![], vec![]);
                while let Some(item) = items.next_element()? {
                    match item {
                        Item::Token(token) => tokens.push(token),
                        Item::Text(text) => texts.push(EmbedInput::Text(text)),
                        Item::Tokens(tokens) => texts.push(EmbedInput::Tokens(tokens)),
                    }
                }
                match (texts.is_empty(), tokens.is_empty()) {
                    (false, false) => Err(de::Error::custom("texts and single tokens do not mix")),
                    (true, false) => Ok(Texts(vec![EmbedInput::Tokens(tokens)])),
                    _ => Ok(Texts(texts)),
                }
            }
        }

        deserializer.deserialize_any(OneOrMany)
    }
}

/// An item of the array: a text, a token, or the tokens of one text.
enum Item {
    Text(String),
    Token(u32),
    Tokens(Vec<u32>),
}

impl<'de> Deserialize<'de> for Item {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextOrTokens;

        impl<'de> de::Visitor<'de> for TextOrTokens {
            type Value = Item;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a text, a token, or an array of tokens")
            }

            fn visit_str<E>(self, text: &str) -> Result<Item, E> {
                Ok(Item::Text(text.to_owned()))
            }

            fn visit_u64<E: de::Error>(self, token: u64) -> Result<Item, E> {
                let token = token.try_into().map_err(|_| E::custom("a token is a number of 32 bits"))?;
                Ok(Item::Token(token))
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut items: A) -> Result<Item, A::Error> {
                let mut tokens = vec![];
                while let Some(token) = items.next_element()? {
                    tokens.push(token);
                }
                Ok(Item::Tokens(tokens))
            }
        }

        deserializer.deserialize_any(TextOrTokens)
    }
}
