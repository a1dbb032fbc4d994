//! Receives requests from HTTP and RPC clients, checks them, and streams the answers.
//!
//! Every request passes [`Gateway::admit`] (authentication, rate limit, capacity) and then [`Gateway::submit`] (choice
//! of model and orchestrator), which returns an [`Answer`]. [`http_bridge`] is the HTTP server and [`rpc_gateway`] the
//! RPC server. [`open_gateway`] runs both. The dialects [`openai`] and [`anthropic`] translate between jobs and the
//! APIs that clients speak.

mod answer;
mod anthropic;
mod authentication;
mod batches;
mod builds;
mod cached;
mod catalog;
mod class;
mod config;
mod files;
pub mod folder_proof;
mod gateway;
mod http_bridge;
mod infer_request;
mod job;
mod json_body;
pub mod metrics;
mod ollama;
mod open_gateway;
mod openai;
mod operations;
mod origin_permits;
mod prompt_size;
mod published;
mod repeats;
mod request_context;
mod request_record;
mod responses;
mod rpc_gateway;
mod upstream;

pub use answer::{Answer, Content, End, Piece, parse_chunk};
pub use anthropic::request::{MessageOrder, parse_message_count, parse_messages};
pub use config::{Config, MetricsAccess, ProxyHeader, ProxyNetwork, RateLimitConfig};
pub use gateway::{Gateway, GatewayParts};
pub use http_bridge::GatewayError;
pub use infer_request::parse_infer;
pub use job::Job;
pub use metrics::Metrics;
pub use ollama::request::{
    OllamaGeneration, OllamaVectors, parse_ollama_chat, parse_ollama_embed, parse_ollama_embedding,
    parse_ollama_generate,
};
pub use open_gateway::OpenGateway;
pub use openai::request::{Encoding, Generation, Vectors, parse_chat, parse_completion, parse_embeddings};
pub use request_context::{AdmittedRequest, Origin, RequestContext};
pub use responses::request::{ResponseRequest, parse_response};
pub use rpc_gateway::submission::{Read, Submission, UnreadJob, parse_submission};
