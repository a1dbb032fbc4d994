//! Reliable streams over UDP datagrams.
