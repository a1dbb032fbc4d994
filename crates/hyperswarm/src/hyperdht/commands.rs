//! Command numbers of the `hyperdht` protocol.

/// Carries a Noise handshake message between a client and a server.
pub const PEER_HANDSHAKE: u64 = 0;
/// Carries a hole punch message between a client and a server.
pub const PEER_HOLEPUNCH: u64 = 1;
/// Asks for the record of a server.
pub const FIND_PEER: u64 = 2;
/// Asks which peers announced a topic.
pub const LOOKUP: u64 = 3;
/// Announces a peer.
pub const ANNOUNCE: u64 = 4;
/// Removes an announcement.
pub const UNANNOUNCE: u64 = 5;
/// Stores a signed, mutable value.
pub const MUTABLE_PUT: u64 = 6;
/// Asks for a signed, mutable value.
pub const MUTABLE_GET: u64 = 7;
/// Stores a value under its hash.
pub const IMMUTABLE_PUT: u64 = 8;
/// Asks for a value by its hash.
pub const IMMUTABLE_GET: u64 = 9;
