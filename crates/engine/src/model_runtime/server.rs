//! Servers that run models instead of an engine of our own.

use serde::{Deserialize, Serialize};

/// A server that runs a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerFacts {
    pub dialect: Dialect,
    /// Whether it continues the last message of a conversation.
    pub prefills: bool,
}

/// The software of a server. All of them speak OpenAI's API, each with extensions of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dialect {
    Vllm,
    Sglang,
    LlamaServer,
    Ollama,
    LmStudio,
    /// Any other software. Only features of OpenAI's API are used.
    Other,
}

impl Dialect {
    /// Returns the name of the software.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Vllm => "vLLM",
            Self::Sglang => "SGLang",
            Self::LlamaServer => "llama-server",
            Self::Ollama => "Ollama",
            Self::LmStudio => "LM Studio",
            Self::Other => "a server of OpenAI's API",
        }
    }
}
