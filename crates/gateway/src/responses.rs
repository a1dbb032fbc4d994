//! Translates OpenAI's Responses API: its requests to jobs, and answers to its responses and events. Independent of
//! HTTP and RPC.

pub(crate) mod item;
pub(crate) mod item_list;
pub(crate) mod note;
pub(crate) mod request;
pub(crate) mod response;
mod tool_names;
