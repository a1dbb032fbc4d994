//! Requests to models and their answers, shared by the engine and the nodes.
//!
//! This crate does no I/O. Nodes exchange these types as JSON: `protocol` versions the messages around them and
//! publishes their schemas. A worker and its engine processes exchange them in the same form.

#![warn(missing_docs)]

pub mod answer;
pub mod constraint;
pub mod limits;
pub mod message;
pub mod name;
pub mod request;
pub mod sampling;
pub mod tool;
pub mod usage;

pub use answer::{FinishReason, ListedToken, Progress, TokenLogprob};
pub use constraint::OutputFormat;
pub use limits::*;
pub use message::{Message, Role};
pub use name::AdapterName;
pub use request::{EmbedInput, Input, TokenListing};
pub use sampling::{LeftToModel, Sampling, SamplingDefaults};
pub use tool::{Tool, ToolCall, ToolCallDelta, ToolChoice};
pub use usage::TokenUsage;
