//! The OpenAI API's words: its requests as jobs, and the answers of jobs as its responses. No HTTP, no RPC.

pub(crate) mod request;
pub(crate) mod response;
