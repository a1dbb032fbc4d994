//! One store over all the places where artifacts lie.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use protocol::Digest;
use sha2::{Digest as _, Sha256};
use tracing::warn;

use crate::embedded;
use crate::local_folder::LocalFolder;

/// Bytes read at a time.
const BUFFER_BYTES: usize = 256 * 1024;

/// Keeps artifacts by digest. Clones are the same store; processes may share a folder.
#[derive(Debug, Clone)]
pub struct ArtifactStore {
    inner: Arc<Inner>,
}

#[derive(Debug, Clone)]
struct Inner {
    folder: LocalFolder,
    embedded: BTreeMap<Digest, &'static [u8]>,
}

/// An open file whose bytes had the digest when they were read through this very descriptor.
///
/// What comes from the program itself cannot change any more. A file of the folder belongs to this user alone and is
/// never written in place, so only its owner or root could change it behind the descriptor.
#[derive(Debug)]
pub struct VerifiedFile {
    /// The file, at its beginning.
    pub file: File,
    /// SHA-256 of its bytes.
    pub digest: Digest,
    /// Its length.
    pub bytes: u64,
}

/// What was put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// SHA-256 of the bytes: their name from here on.
    pub digest: Digest,
    /// How many there are.
    pub bytes: u64,
}

/// Why an artifact could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It is not here: fetch it.
    #[error("artifact {digest} is not in the store: there is no file {}", path.display())]
    Missing {
        /// What was asked for.
        digest: Digest,
        /// Where it would lie.
        path: PathBuf,
    },
    /// It is not here any more: it was found damaged earlier.
    #[error("artifact {digest} was damaged and lies in {} now; store it again", path.display())]
    SetAside {
        /// What was asked for.
        digest: Digest,
        /// Where the damaged one lies.
        path: PathBuf,
    },
    /// Its bytes are not those of the digest; it was moved aside, to be fetched again.
    #[error(
        "artifact {digest} has other bytes than its digest says ({found}) and was moved to quarantine; store it again"
    )]
    Mismatch {
        /// What was asked for.
        digest: Digest,
        /// What the bytes really are.
        found: Digest,
    },
    /// It could not be read.
    #[error("artifact {digest} could not be read")]
    Read {
        /// What was asked for.
        digest: Digest,
        /// Why.
        source: io::Error,
    },
}

/// Why an artifact could not be put.
#[derive(Debug, thiserror::Error)]
pub enum PutError {
    /// The source could not be read.
    #[error("the artifact's source could not be read")]
    Source(#[source] io::Error),
    /// There are more bytes than allowed.
    #[error("the artifact has more than {bytes_max} bytes")]
    TooLarge {
        /// The limit.
        bytes_max: u64,
    },
    /// The folder could not be written.
    #[error("the artifact could not be written to {}", folder.display())]
    Folder {
        /// The store's folder.
        folder: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl ArtifactStore {
    /// Opens the store in a folder, which is made where it is missing.
    pub fn in_folder(root: impl Into<PathBuf>) -> io::Result<Self> {
        Ok(Self { inner: Arc::new(Inner { folder: LocalFolder::open(root.into())?, embedded: BTreeMap::new() }) })
    }

    /// Adds an artifact that lies in the program itself. It is verified when it is opened, like any other.
    #[must_use]
    pub fn with_embedded(mut self, digest: Digest, bytes: &'static [u8]) -> Self {
        Arc::make_mut(&mut self.inner).embedded.insert(digest, bytes);
        self
    }

    /// Stores what `source` gives, at most `bytes_max`. Blocks.
    ///
    /// The bytes are on the disk when this returns. An artifact that was there before is replaced, which heals it
    /// where it was damaged.
    pub fn put(&self, source: impl Read, bytes_max: u64) -> Result<Stored, PutError> {
        self.inner.folder.put(source, bytes_max)
    }

    /// Stores a copy of a file. Blocks.
    pub fn put_file(&self, path: &Path) -> Result<Stored, PutError> {
        let file = File::open(path).map_err(PutError::Source)?;
        let bytes = file.metadata().map_err(PutError::Source)?.len();
        self.put(file, bytes)
    }

    /// Makes an empty file beside the artifacts, for what is made of them. It has no name and is gone once it is closed.
    /// Blocks.
    pub fn scratch(&self) -> io::Result<File> {
        self.inner.folder.unnamed()
    }

    /// Says whether an artifact is here. Its bytes are not looked at.
    pub fn contains(&self, digest: &Digest) -> bool {
        self.inner.embedded.contains_key(digest) || self.inner.folder.path(digest).is_file()
    }

    /// Opens an artifact and verifies all its bytes through the descriptor that is returned. Blocks.
    pub fn open(&self, digest: &Digest) -> Result<VerifiedFile, OpenError> {
        let failed = |source| OpenError::Read { digest: *digest, source };
        if let Some(bytes) = self.inner.embedded.get(digest) {
            let file = embedded::file(bytes, &self.inner.folder).map_err(failed)?;
            return verify(file, digest);
        }
        let file = match self.inner.folder.open_file(digest) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let aside = self.inner.folder.aside(digest);
                return Err(if aside.exists() {
                    OpenError::SetAside { digest: *digest, path: aside }
                } else {
                    OpenError::Missing { digest: *digest, path: self.inner.folder.path(digest) }
                });
            }
            Err(error) => return Err(failed(error)),
        };
        let opened = file.try_clone().map_err(failed)?;
        let verified = verify(file, digest);
        if matches!(verified, Err(OpenError::Mismatch { .. }))
            && let Err(error) = self.inner.folder.quarantine(digest, &opened)
        {
            warn!(%digest, %error, "a damaged artifact could not be moved aside");
        }
        verified
    }
}

/// Hashes an open file from its beginning and returns it, at its beginning again.
fn verify(mut file: File, digest: &Digest) -> Result<VerifiedFile, OpenError> {
    let failed = |source| OpenError::Read { digest: *digest, source };
    file.rewind().map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    let mut hasher = Sha256::new();
    let mut bytes = 0;
    let mut buffer = vec![0; BUFFER_BYTES];
    // One byte more than there should be: a file that grows meanwhile ends the reading and fails.
    let mut reader = (&file).take(length.saturating_add(1));
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => {
                hasher.update(&buffer[..count]);
                bytes += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error)),
        }
    }
    let found = Digest(hasher.finalize().into());
    if found != *digest {
        return Err(OpenError::Mismatch { digest: *digest, found });
    }
    file.rewind().map_err(failed)?;
    Ok(VerifiedFile { file, digest: *digest, bytes })
}

/// Copies a source to a file and hashes it on the way.
pub(crate) fn copy_hashed(mut source: impl Read, mut target: impl io::Write, bytes_max: u64) -> Result<Stored, Copy> {
    let mut hasher = Sha256::new();
    let mut bytes = 0_u64;
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let count = match source.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Copy::Source(error)),
        };
        bytes += count as u64;
        if bytes > bytes_max {
            return Err(Copy::TooLarge);
        }
        hasher.update(&buffer[..count]);
        target.write_all(&buffer[..count]).map_err(Copy::Target)?;
    }
    Ok(Stored { digest: Digest(hasher.finalize().into()), bytes })
}

/// Why a copy failed, by the side that failed.
pub(crate) enum Copy {
    Source(io::Error),
    TooLarge,
    Target(io::Error),
}
