//! What a model is asked and what it answers, for the engine and for the nodes that pass it on.
//!
//! No I/O. The types are written in JSON as they travel between nodes (`protocol` versions the messages around them and
//! publishes their schemas), and in the same form between a worker and its engine processes.

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

pub use answer::{FinishReason, Progress, TokenLogprob};
pub use constraint::OutputFormat;
pub use limits::*;
pub use message::{Message, Role};
pub use name::AdapterName;
pub use request::{EmbedInput, Input};
pub use sampling::{LeftToModel, Sampling, SamplingDefaults};
pub use tool::{Tool, ToolCall, ToolCallDelta, ToolChoice};
pub use usage::TokenUsage;
