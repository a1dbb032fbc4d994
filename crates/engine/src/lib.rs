//! Model runtimes: they load a model and continue prompts, and know nothing of networks.
//!
//! [`ModelRuntime`] is the one interface. [`ProcessRuntime`] keeps each loaded model in a child process, because a
//! poisoned model or a failed assertion in C++ ends the process it happens in; the child serves any other runtime by
//! [`process::serve_child`]. `LlamaRuntime` (feature `llama`) runs GGUF models on llama.cpp, and [`MockRuntime`]
//! pretends to, at a fixed pace. `RemoteRuntime` (feature `remote`) uses servers of OpenAI's API that run already.
//!
//! Everything that reads foreign bytes ([`gguf`], [`process::frame`], [`chat_template`], [`text_assembler`],
//! [`answer_parser`], `grammar`) is bounded and never panics.

pub mod answer_parser;
pub mod chat_template;
pub mod gguf;
#[cfg(feature = "llama")]
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
pub use process::{ChildCommand, ProcessRuntime};
#[cfg(feature = "remote")]
pub use remote::RemoteRuntime;
