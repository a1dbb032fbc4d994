//! Translates Ollama's API: its requests to jobs, answers to its lines, and models to its lists. Independent of HTTP
//! and RPC.

pub(crate) mod models;
pub(crate) mod request;
pub(crate) mod response;

/// The version of Ollama whose API this is. Clients look whether it is new enough for them.
pub(crate) const VERSION: &str = "0.13.0";

/// The endpoint that a request for generated text uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Endpoint {
    /// `/api/chat`, which answers a conversation with a message.
    Chat,
    /// `/api/generate`, which answers or continues a text.
    Generate,
}
