//! Translates Anthropic's Messages API: its requests to jobs, and answers to its responses. Independent of HTTP and
//! RPC.

pub(crate) mod request;
pub(crate) mod response;

/// The field by which a client leaves the conversation to the server.
const THREAD: &str = "thread";
