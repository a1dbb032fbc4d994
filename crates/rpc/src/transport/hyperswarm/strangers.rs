//! Limits on the memory that connections take whose peers have not proven that they are members.
//!
//! All such connections of a node share the budgets, which are larger than what one of them needs. Besides, each may
//! hold a few KiB.

use hyperswarm::protomux::Protomux;
use hyperswarm::rpc::{self as hyperswarm_rpc, Rpc};
use hyperswarm::secret_stream::{self, MESSAGE_BYTES_MAX, MessageBudget};
use hyperswarm::udx::{self, Budget};

use super::PENDING_BYTES_MAX;

/// The maximum length of a stranger's message, unless the server allows longer requests. It must hold a certificate.
const MESSAGE_BYTES: usize = 136 * 1024;
/// The bytes of all messages that are incomplete, unread or in use.
const MESSAGES_BYTES: usize = 10 * 1024 * 1024;
/// The bytes of all packets that are unread or wait for an earlier one.
const PACKETS_BYTES: usize = 4 * 1024 * 1024;
/// The bytes of all responses that are not acknowledged.
const RESPONSES_BYTES: usize = 4 * 1024 * 1024;
/// The receive window of one connection.
const WINDOW_BYTES: u32 = 256 * 1024;
/// The bytes of one connection's requests that wait to be taken. One request is always accepted.
const QUEUE_BYTES: usize = 8 * 1024;
/// The bytes that one connection's peer may send on streams that are not accepted yet.
pub(super) const STREAMS_BYTES: usize = 8 * 1024;

/// The options of a node's streams, with the budgets that they share.
#[derive(Clone)]
pub(super) struct StreamLimits {
    pub(super) stream: secret_stream::Options,
    pub(super) udx: udx::StreamOptions,
}

impl StreamLimits {
    pub(super) fn new() -> Self {
        let budget = MessageBudget::new(MESSAGES_BYTES);
        let limits = secret_stream::MessageLimits { message_bytes_max: MESSAGE_BYTES, budget };
        let stream = secret_stream::Options { limits: Some(limits), ..secret_stream::Options::default() };
        let limits =
            udx::StreamLimits { received: Budget::new(PACKETS_BYTES), unacknowledged: Budget::new(RESPONSES_BYTES) };
        let options = udx::StreamOptions::default();
        let udx = udx::StreamOptions { receive_window_bytes: WINDOW_BYTES, limits: Some(limits), ..options };
        Self { stream, udx }
    }
}

/// Returns the options of the requests on a connection that a node accepts.
pub(super) fn request_options() -> hyperswarm_rpc::Options {
    hyperswarm_rpc::Options { received_bytes_max: QUEUE_BYTES, ..hyperswarm_rpc::Options::default() }
}

/// Allows requests of this length. One of up to twice the length is read as well, so that its sender gets an error.
pub(super) fn allow_requests(mux: &Protomux, bytes_max: usize) {
    let bytes_max = bytes_max.saturating_mul(2).clamp(MESSAGE_BYTES, MESSAGE_BYTES_MAX);
    mux.stream().allow_messages(bytes_max);
}

/// Lifts the limits of a connection.
pub(super) fn lift(mux: &Protomux, rpc: &Rpc) {
    mux.stream().lift_limits();
    mux.set_pending_bytes_max(PENDING_BYTES_MAX);
    rpc.set_received_bytes_max(hyperswarm_rpc::Options::default().received_bytes_max);
}
