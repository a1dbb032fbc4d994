//! `artifact.fetch`: the file of a model or an adapter, from a node that has it.
//!
//! The callee's first message is an [`ArtifactHead`]. The further messages are the bytes from the offset on, in order.
//! The stream ends with the file. The caller verifies the digest before it uses the file.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::Digest;

/// The name of the stream. Registries and workers serve it to workers. [`ArtifactFetch`] → [`ArtifactHead`], bytes.
pub const FETCH: &str = "artifact.fetch";

/// The requested bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ArtifactFetch {
    /// SHA-256 of the artifact.
    pub digest: Digest,
    /// Number of bytes that the caller already has; at most the artifact's length.
    #[serde(default)]
    pub offset: u64,
}

/// The callee's artifact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ArtifactHead {
    /// Length of the whole artifact in bytes.
    pub bytes: u64,
}
