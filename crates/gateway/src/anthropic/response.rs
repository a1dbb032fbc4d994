//! Serializes answers as Anthropic's responses.

pub(crate) mod error;
