//! Hyperswarm for Rust, compatible on the wire with the Node packages `hyperdht` and `@hyperswarm/rpc`.
//!
//! This crate does not depend on the rest of Tether. Its modules, from the lowest layer up:
//!
//! - [`compact_encoding`]: the encoding of values as bytes; [`crypto`]: keys, hashes, Noise, authenticated encryption
//! - [`udx`]: reliable streams over UDP; [`secret_stream`]: encrypted messages on such a stream
//! - [`dht_rpc`]: requests between the nodes of a Kademlia DHT; [`hyperdht`]: records, announcements, connections by
//!   key
//! - [`protomux`]: many protocols on one connection; [`rpc`]: requests and responses on a channel

#![warn(missing_docs)]

pub mod compact_encoding;
pub mod crypto;
pub mod dht_rpc;
pub mod hyperdht;
pub mod protomux;
pub mod rpc;
pub mod secret_stream;
pub mod udx;
