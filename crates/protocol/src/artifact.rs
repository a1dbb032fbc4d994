//! `artifact.fetch`: the bytes of a model's file, or of an adapter's, from a node that has it.
//!
//! The callee's first message is an [`ArtifactHead`]; each further one is the next bytes from the offset on, and the
//! stream ends with the file. Nobody believes the bytes before their digest is checked.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::Digest;

/// The name of the stream. Registries and workers answer it to workers. [`ArtifactFetch`] → [`ArtifactHead`], bytes.
pub const FETCH: &str = "artifact.fetch";

/// Which bytes are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ArtifactFetch {
    /// SHA-256 of the artifact.
    pub digest: Digest,
    /// How many bytes of it the caller has already; at most its length.
    #[serde(default)]
    pub offset: u64,
}

/// What the callee has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ArtifactHead {
    /// Length of the whole artifact in bytes.
    pub bytes: u64,
}
