//! Typed calls, token streams and announcements between nodes, over a [`transport::Transport`].
//!
//! Unary calls carry one JSON value each way. Streams speak `tether/stream/1` ([`frame`]): one request, then messages
//! back under credit, until an end, an error or a cancel. Topics only find peers ([`announce`]); connections are opened
//! by public key and shared by all calls to a peer ([`client`]). Who belongs to the network is known by certificates
//! that nodes show each other first ([`membership`]). Models' files go from node to node by streams as well
//! ([`artifacts`]).

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
pub mod server;
pub mod transport;

pub use announce::Directory;
pub use artifacts::{ArtifactServer, ArtifactStream};
pub use client::{AnswerStream, CallError, Client, StreamOptions};
pub use clock::SystemClock;
pub use enrolment::{Enrolment, EnrolmentError, JoinError};
pub use membership::Membership;
pub use membership_task::MembershipTask;
pub use server::{Caller, Interrupted, Limits, ReplyStream, Server, StreamCall};
pub use transport::Transport;
pub use transport::memory::MemoryNetwork;
