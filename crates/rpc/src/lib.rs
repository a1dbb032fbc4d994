//! Typed calls, token streams and announcements between nodes, over a [`transport::Transport`].
//!
//! A unary call carries one JSON value each way. A stream speaks `tether/stream/1` ([`frame`]): one request, then
//! messages in return under credit, until an end, an error or a cancel. Topics only serve to find peers ([`announce`]).
//! Connections are opened by public key, and all calls to a peer share one ([`client`]). Nodes prove that they belong
//! to the network by certificates, which they show each other first ([`membership`]). Nodes also copy model files from
//! each other over streams ([`artifacts`]).

#![warn(missing_docs)]

pub mod announce;
pub mod artifacts;
pub mod backoff;
pub mod client;
pub mod clock;
pub mod enrolment;
pub mod frame;
pub mod identity;
pub mod membership;
pub mod membership_task;
pub mod rate_limit;
pub mod server;
pub mod transport;

pub use announce::Directory;
pub use artifacts::{ArtifactServer, ArtifactStream};
pub use client::{CallError, Client, ResponseStream, StreamOptions};
pub use clock::SystemClock;
pub use enrolment::{Enrolment, EnrolmentError, JoinError};
pub use membership::Membership;
pub use membership_task::MembershipTask;
pub use server::{Access, Caller, Interrupted, ResponseSink, Server, ServerLimits, StreamCall};
pub use transport::Transport;
pub use transport::memory::MemoryNetwork;
