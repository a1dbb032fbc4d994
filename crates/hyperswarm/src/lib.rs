//! Hyperswarm for Rust, compatible on the wire with the Node packages `hyperdht` and `@hyperswarm/rpc`.
//!
//! Knows nothing of Tether. From the ground up:
//!
//! - [`compact_encoding`]: how values become bytes; [`crypto`]: keys, hashes, Noise, sealed messages
//! - [`udx`]: reliable streams over UDP datagrams; [`secret_stream`]: the same, encrypted, in messages
//! - [`dht_rpc`]: requests between nodes of a Kademlia table; [`hyperdht`]: records, announcements, connections by key
//! - [`protomux`]: many protocols on one connection; [`rpc`]: requests and responses on it

#![warn(missing_docs)]

pub mod compact_encoding;
pub mod crypto;
pub mod dht_rpc;
pub mod hyperdht;
pub mod protomux;
pub mod rpc;
pub mod secret_stream;
pub mod udx;
