//! Encrypted messages over a reliable stream.
