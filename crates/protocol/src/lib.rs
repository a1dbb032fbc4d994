//! The language of Tether's nodes: ids, topics, messages, their codec and signatures.
//!
//! This crate has no I/O, no async code and no clock: every function is a pure function of its arguments. Bytes from a
//! peer enter through [`codec`] and [`signature`], and never cause a panic.

#![warn(missing_docs)]

pub mod artifact;
pub mod batches;
pub mod clock;
pub mod codec;
pub mod control;
pub mod error_code;
pub mod files;
pub mod gateway;
pub mod health;
pub mod id;
pub mod infer;
pub mod jobs;
pub mod keep_alive;
pub mod kept;
pub mod membership;
pub mod model;
pub mod policy;
pub mod prefix;
pub mod presence;
pub mod queue;
pub mod quota;
pub mod schema;
pub mod signature;
pub mod token;
pub mod topic;

pub use inference::usage;

pub use clock::{Clock, UnixMillis};
pub use error_code::{ErrorCode, WireError};
pub use id::{
    AdapterName, CorrelationId, Digest, InviteId, MalformedId, ModelName, ModelVersion, PrefixDigest, PublicKey,
    Region, RetryToken, TenantId, TraceId, WorkerId,
};
pub use topic::Topic;
