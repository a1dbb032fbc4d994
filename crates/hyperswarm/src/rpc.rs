//! Requests and responses on a connection.
