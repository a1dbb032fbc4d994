//! Stores bytes under their SHA-256 digest and verifies them whenever they are opened.
//!
//! The store blocks: it reads, hashes and syncs files. Asynchronous callers use it in `spawn_blocking`.

mod artifact_store;
mod copy;
mod embedded;
mod fetched;
#[cfg(unix)]
mod known_good;
mod local_folder;
mod partial;

pub use artifact_store::{ArtifactStore, Import, OpenError, PutError, Stored, VerifiedFile};
pub use copy::hash;
pub use fetched::{Fetched, InUse};
pub use partial::{FinishError, Partial};
