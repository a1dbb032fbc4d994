//! Takes requests from HTTP and RPC clients, checks them, and streams answers.
//!
//! Every request, whatever it came in by, passes [`Gateway::admit`] (whose is it, is there room) and then
//! [`Gateway::submit`] (which model, which orchestrator), and gets an [`Answer`]. [`http_bridge`] translates between
//! that and the OpenAI API, [`rpc_gateway`] between that and RPC.

mod answer;
mod authentication;
mod builds;
mod cached;
mod catalog;
mod config;
mod gateway;
mod http_bridge;
mod openai;
mod prompt_size;
mod rate_limit;
mod request_record;
mod rpc_gateway;
mod upstream;

pub use answer::{Answer, Content, End, Piece, parse_chunk};
pub use config::{Config, RateLimitConfig};
pub use gateway::{Admission, Gateway, GatewayError, GatewayParts, Job, OpenGateway, Origin, RequestContext};
pub use openai::request::{Encoding, Generation, Vectors, parse_chat, parse_completion, parse_embeddings, parse_infer};
pub use rpc_gateway::submission::{Asked, Read, Submission, parse_submission};
