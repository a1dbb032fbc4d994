//! Loads models and generates text. This crate does not know Tether's network (nodes, jobs, certificates). An *engine*
//! is the child process that holds one loaded model.
//!
//! [`ModelRuntime`] is the one interface. [`ProcessRuntime`] runs each loaded model in a child process, because a
//! malicious model or a failed assertion in C++ can end the process. The child runs one of the other runtimes and
//! serves it through [`process::serve_child`]. `LlamaRuntime` (feature `llama`) runs GGUF models on llama.cpp, and
//! [`MockRuntime`] imitates a runtime at a fixed pace. `RemoteRuntime` (feature `remote`) uses running servers that
//! speak OpenAI's API.
//!
//! All code that parses untrusted bytes ([`gguf`], [`process::frame`], [`chat_template`], [`text_assembler`], `remote`,
//! [`answer_parser`], `grammar`) is bounded and never panics.

pub mod answer_parser;
pub mod chat_template;
pub mod gguf;
#[cfg(feature = "grammar")]
pub mod grammar;
pub mod hardware;
mod json_form;
#[cfg(feature = "llama")]
pub mod llama;
pub mod memory_plan;
pub mod merge;
pub mod mock;
pub mod model_facts;
pub mod model_runtime;
mod own_process;
pub mod process;
#[cfg(feature = "remote")]
pub mod remote;
pub mod sampler;
pub mod text_assembler;

#[cfg(feature = "llama")]
pub use llama::LlamaRuntime;
pub use mock::{MockOptions, MockRuntime};
pub use model_facts::ModelFacts;
pub use model_runtime::*;
pub use process::sandbox::{Sandbox, Target};
pub use process::{ChildCommand, ProcessRuntime};
#[cfg(feature = "remote")]
pub use remote::RemoteRuntime;
