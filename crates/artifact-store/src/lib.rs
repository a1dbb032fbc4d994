//! Bytes by their SHA-256 digest: put once, verified at each opening.
//!
//! The store blocks: it reads, hashes and syncs files. Asynchronous callers use it within `spawn_blocking`.

mod artifact_store;
mod copy;
mod embedded;
mod local_folder;

pub use artifact_store::{ArtifactStore, OpenError, PutError, Stored, VerifiedFile, Way};
pub use copy::hash;
