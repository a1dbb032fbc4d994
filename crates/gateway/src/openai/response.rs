//! The answers of jobs, written as OpenAI's clients read them.

pub(crate) mod logprobs;
pub(crate) mod sse;
pub(crate) mod tool_calls;
