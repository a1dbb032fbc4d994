//! Loss recovery: which packets are in flight, which of them are lost, and when a sender may send again.
//!
//! Each part implements one RFC and uses its names: [`rack`] and [`pto`] RACK-TLP (RFC 8985), [`prr`] proportional rate
//! reduction (RFC 6937), [`rto`] the retransmission timer (RFC 6298). [`super::sender`] owns the parts and passes the
//! events of a stream to them.

pub(super) mod loss_event;
pub(super) mod prr;
pub(super) mod pto;
pub(super) mod rack;
pub(super) mod rto;
pub(super) mod sent_packets;
