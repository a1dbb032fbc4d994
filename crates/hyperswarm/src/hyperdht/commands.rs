//! The numbers of the commands.

/// Carries a Noise message between a client and a server.
pub const PEER_HANDSHAKE: u64 = 0;
/// Carries notes between a client and a server that punch holes.
pub const PEER_HOLEPUNCH: u64 = 1;
/// Asks for a server.
pub const FIND_PEER: u64 = 2;
/// Asks who announced a topic.
pub const LOOKUP: u64 = 3;
/// Announces a peer.
pub const ANNOUNCE: u64 = 4;
/// Takes an announcement back.
pub const UNANNOUNCE: u64 = 5;
/// Stores a signed value.
pub const MUTABLE_PUT: u64 = 6;
/// Asks for a signed value.
pub const MUTABLE_GET: u64 = 7;
/// Stores a value under its hash.
pub const IMMUTABLE_PUT: u64 = 8;
/// Asks for a value by its hash.
pub const IMMUTABLE_GET: u64 = 9;
