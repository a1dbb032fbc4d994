//! The built-in demonstration model `tether-tiny`, and its adapter `pirate`; see `models/README.md`.

use std::sync::LazyLock;

use artifact_store::ArtifactStore;
use protocol::model::{AdapterEntry, AdapterKey, ModelEntry, ModelKey};
use protocol::{AdapterName, Digest, UnixMillis};
use worker::{ServedAdapter, ServedModel};

pub static BYTES: &[u8] = include_bytes!("../../../models/tiny.gguf");
pub static ADAPTER_BYTES: &[u8] = include_bytes!("../../../models/tiny-lora-pirate.gguf");

static DIGEST: LazyLock<Digest> = LazyLock::new(|| Digest::of(BYTES));
static ADAPTER_DIGEST: LazyLock<Digest> = LazyLock::new(|| Digest::of(ADAPTER_BYTES));

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

fn adapter_name() -> AdapterName {
    "pirate".parse().expect("a well-formed name")
}

/// Returns the settings with which workers serve it.
pub fn served() -> ServedModel {
    let pirate = ServedAdapter { name: adapter_name(), digest: *ADAPTER_DIGEST };
    // One thread: the model is so small that more threads would only wait for each other.
    ServedModel { threads: 1, adapters: vec![pirate], ..ServedModel::new(key(), digest()) }
}

/// Embeds the files in a store.
pub fn embedded_in(artifacts: ArtifactStore) -> ArtifactStore {
    artifacts.with_embedded(digest(), BYTES).with_embedded(*ADAPTER_DIGEST, ADAPTER_BYTES)
}

/// Returns the model's entry in the catalogue.
pub fn entry(created_at: UnixMillis) -> ModelEntry {
    ModelEntry {
        facts: None,
        added: false,
        pin: false,
        keep_alive_secs: None,
        key: key(),
        digest: digest(),
        bytes: BYTES.len() as u64,
        context_length: 512,
        description: "Demonstration model of 1.5 M parameters; it knows a few capitals and sums.".to_owned(),
        created_at,
    }
}

/// Returns the adapter's entry in the catalogue.
pub fn adapter_entry(created_at: UnixMillis) -> AdapterEntry {
    AdapterEntry {
        key: AdapterKey { model: key(), adapter: adapter_name() },
        digest: *ADAPTER_DIGEST,
        bytes: ADAPTER_BYTES.len() as u64,
        description: "Makes tether-tiny talk like a pirate.".to_owned(),
        created_at,
    }
}
