//! The model that comes with the program: `tether-tiny`, a demonstration, see `models/README.md`.

use std::sync::LazyLock;

use protocol::model::{ModelEntry, ModelKey};
use protocol::{Digest, UnixMillis};
use worker::ServedModel;

/// The model file.
pub static BYTES: &[u8] = include_bytes!("../../../models/tiny.gguf");

static DIGEST: LazyLock<Digest> = LazyLock::new(|| Digest::of(BYTES));

/// Returns the SHA-256 of the model file.
pub fn digest() -> Digest {
    *DIGEST
}

/// Returns the model's name and version.
pub fn key() -> ModelKey {
    ModelKey {
        model_id: "tether-tiny".parse().expect("a well-formed name"),
        version: "1.0".parse().expect("a well-formed version"),
    }
}

/// Returns how workers serve it.
pub fn served() -> ServedModel {
    let ModelKey { model_id, version } = key();
    // One thread: the model is so small that more only wait for each other.
    ServedModel {
        model_id,
        version,
        digest: Some(digest()),
        remote: None,
        server_command: Vec::new(),
        context_length: 0,
        threads: 1,
        gpu_layers: 0,
    }
}

/// Returns what the registry lists.
pub fn entry(created_at: UnixMillis) -> ModelEntry {
    ModelEntry {
        key: key(),
        digest: digest(),
        bytes: BYTES.len() as u64,
        context_length: 512,
        description: "Demonstration model of 1.5 M parameters; it knows a few capitals and sums.".to_owned(),
        created_at,
    }
}
