//! Stores artifacts in a folder under their SHA-256 digest, verifies them when they are opened, and evicts fetched
//! ones. Artifacts embedded in the binary can be opened too.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use protocol::Digest;
use tracing::warn;

use crate::copy::hash;
use crate::embedded;
use crate::fetched::{Fetched, InUse};
#[cfg(unix)]
use crate::known_good;
use crate::local_folder::LocalFolder;
use crate::partial::{self, Partial};

/// Keeps artifacts by digest. Clones share the store, and processes may share its folder.
#[derive(Debug, Clone)]
pub struct ArtifactStore {
    inner: Arc<Inner>,
}

#[derive(Debug, Clone)]
struct Inner {
    folder: LocalFolder,
    embedded: BTreeMap<Digest, &'static [u8]>,
}

/// An open file whose bytes matched the digest, either when they were read through this descriptor or when they were
/// stored. In the second case, the file's inode, length, mtime and ctime are unchanged since then.
///
/// An embedded artifact is a sealed memfd if the system allows one, and else an unnamed file. A file in the folder
/// belongs to this user and is never written in place, so only its owner or root could change it behind the descriptor.
#[derive(Debug)]
pub struct VerifiedFile {
    /// The file, positioned at its start.
    pub file: File,
    /// SHA-256 of its bytes.
    pub digest: Digest,
    pub bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// SHA-256 of the bytes, by which they are stored.
    pub digest: Digest,
    pub bytes: u64,
}

/// How a file was brought into the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Import {
    /// The store already had the artifact.
    Known,
    /// The file got a second name in the store and takes no extra space.
    Linked,
    /// The file system shares the blocks with the file until one of the two changes (reflink).
    Cloned,
    Copied,
}

/// Why an artifact could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The artifact is not in the store and must be fetched.
    #[error("artifact {digest} is not in the store: there is no file {}", path.display())]
    Missing {
        digest: Digest,
        /// The path where it would be stored.
        path: PathBuf,
    },
    /// The artifact was found damaged earlier and moved to quarantine.
    #[error("artifact {digest} was damaged and lies in {} now; store it again", path.display())]
    Quarantined {
        digest: Digest,
        /// The path of the damaged file.
        path: PathBuf,
    },
    /// The bytes do not match the digest. The file was moved to quarantine; fetch it again.
    #[error(
        "artifact {digest} has other bytes than its digest says ({found}) and was moved to quarantine; store it again"
    )]
    Mismatch {
        digest: Digest,
        /// The digest of the actual bytes.
        found: Digest,
    },
    #[error("artifact {digest} could not be read")]
    Read { digest: Digest, source: io::Error },
}

/// Why an artifact could not be stored.
#[derive(Debug, thiserror::Error)]
pub enum PutError {
    #[error("the artifact's source could not be read")]
    Source(#[source] io::Error),
    /// The artifact is longer than allowed.
    #[error("the artifact has more than {bytes_max} bytes")]
    TooLarge { bytes_max: u64 },
    /// The disk has no space for a copy.
    #[error("the artifact takes {bytes} bytes, and the disk of {} has {room_bytes} free", folder.display())]
    NoSpace {
        /// Length of the copy in bytes.
        bytes: u64,
        /// Free bytes on the disk for this user.
        room_bytes: u64,
        folder: PathBuf,
    },
    /// Writing to the folder failed.
    #[error("the artifact could not be written to {}", folder.display())]
    Folder { folder: PathBuf, source: io::Error },
}

impl ArtifactStore {
    /// Opens the store in a folder, which is created if it is missing.
    pub fn in_folder(root: impl Into<PathBuf>) -> io::Result<Self> {
        Ok(Self { inner: Arc::new(Inner { folder: LocalFolder::open(root.into())?, embedded: BTreeMap::new() }) })
    }

    /// Adds an artifact that is embedded in the program. It is verified when it is opened, like any other.
    #[must_use]
    pub fn with_embedded(mut self, digest: Digest, bytes: &'static [u8]) -> Self {
        Arc::make_mut(&mut self.inner).embedded.insert(digest, bytes);
        self
    }

    /// Stores the bytes of `source`, at most `bytes_max`. Blocks.
    ///
    /// The bytes are on disk when this returns. An existing artifact is replaced, which repairs it if it was damaged.
    pub fn put(&self, source: impl Read, bytes_max: u64) -> Result<Stored, PutError> {
        self.inner.folder.put(source, bytes_max)
    }

    /// Stores a copy of a file. Blocks.
    pub fn put_file(&self, path: &Path) -> Result<Stored, PutError> {
        let file = File::open(path).map_err(PutError::Source)?;
        let bytes = file.metadata().map_err(PutError::Source)?.len();
        self.put(file, bytes)
    }

    /// Stores the bytes of an open file. They are shared with that file if the file system supports it (reflink), else
    /// copied. `progress` receives the number of bytes stored or hashed so far. Its error aborts the operation and is
    /// returned as [`PutError::Source`]. Blocks.
    pub fn put_open(
        &self,
        file: &File,
        bytes_max: u64,
        progress: impl FnMut(u64) -> io::Result<()>,
    ) -> Result<(Stored, Import), PutError> {
        self.inner.folder.put_open(file, bytes_max, progress)
    }

    /// Stores a file without copying it, as a hard link. If the file system does not allow the link, falls back to
    /// [`Self::put_open`]. The file must not be written in place later: the artifact would then be found damaged.
    /// Blocks.
    pub fn put_link(
        &self,
        path: &Path,
        bytes_max: u64,
        progress: impl FnMut(u64) -> io::Result<()>,
    ) -> Result<(Stored, Import), PutError> {
        self.inner.folder.put_link(path, bytes_max, progress)
    }

    /// Removes an artifact from the folder. Returns false if it is not there. Readers that have it open keep it.
    pub fn remove(&self, digest: &Digest) -> io::Result<bool> {
        self.inner.folder.remove(digest)
    }

    /// Returns how many bytes this user may still write to the store's disk, as far as the system reports it.
    #[cfg(unix)]
    pub fn room_bytes(&self) -> io::Result<u64> {
        self.inner.folder.room_bytes()
    }

    /// Opens the partial file of an artifact that is being fetched. Returns `None` while someone else writes it.
    /// Blocks.
    pub fn partial(&self, digest: &Digest) -> io::Result<Option<Partial>> {
        Partial::open(&self.inner.folder, digest)
    }

    /// Returns how many bytes of an artifact have been fetched so far.
    pub fn partial_bytes(&self, digest: &Digest) -> u64 {
        partial::bytes_of(&self.inner.folder, digest)
    }

    /// Returns the artifacts whose fetch is running or was interrupted.
    pub fn partials(&self) -> io::Result<Vec<Digest>> {
        partial::list(&self.inner.folder)
    }

    /// Returns the fetched artifacts in the store, the least recently used first.
    pub fn fetched(&self) -> io::Result<Vec<Fetched>> {
        self.inner.folder.fetched()
    }

    /// Records a use of a fetched artifact and protects it from eviction while the result lives. Returns `None` if
    /// the artifact is not marked as fetched, or was evicted meanwhile.
    pub fn in_use(&self, digest: &Digest) -> io::Result<Option<InUse>> {
        self.inner.folder.in_use(digest)
    }

    /// Returns whether a fetched artifact is in use.
    pub fn is_in_use(&self, digest: &Digest) -> bool {
        self.inner.folder.is_in_use(digest)
    }

    /// Deletes a fetched artifact. Returns false if it is in use or not marked as fetched.
    pub fn evict(&self, digest: &Digest) -> io::Result<bool> {
        self.inner.folder.evict(digest)
    }

    /// Removes an artifact's mark as fetched, so that it is never evicted. Does nothing if it has no mark.
    pub fn unmark(&self, digest: &Digest) -> io::Result<()> {
        self.inner.folder.unmark(digest)
    }

    /// Creates an empty, unnamed file in the store's folder, for derived data. It is deleted when it is closed.
    /// Blocks.
    pub fn scratch(&self) -> io::Result<File> {
        self.inner.folder.unnamed()
    }

    /// Returns whether the store has an artifact. Its bytes are not verified.
    pub fn contains(&self, digest: &Digest) -> bool {
        self.inner.embedded.contains_key(digest) || self.inner.folder.path(digest).is_file()
    }

    /// Opens an artifact of the folder without verifying it: its bytes are untrusted.
    pub fn peek(&self, digest: &Digest) -> io::Result<File> {
        self.inner.folder.open_file(digest)
    }

    /// Opens an artifact and verifies all its bytes through the returned descriptor. Verification is skipped if this
    /// process hashed the bytes when it stored the file and the file has not been written since. Blocks.
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
                    OpenError::Quarantined { digest: *digest, path: aside }
                } else {
                    OpenError::Missing { digest: *digest, path: self.inner.folder.path(digest) }
                });
            }
            Err(error) => return Err(failed(error)),
        };
        #[cfg(unix)]
        if known_good::is_known(&file, digest).map_err(failed)? {
            let bytes = file.metadata().map_err(failed)?.len();
            return Ok(VerifiedFile { file, digest: *digest, bytes });
        }
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

/// Hashes an open file from its start and rewinds it.
fn verify(file: File, digest: &Digest) -> Result<VerifiedFile, OpenError> {
    let failed = |source| OpenError::Read { digest: *digest, source };
    let Stored { digest: found, bytes } = hash(&file, |_| Ok(())).map_err(failed)?;
    if found != *digest {
        return Err(OpenError::Mismatch { digest: *digest, found });
    }
    Ok(VerifiedFile { file, digest: *digest, bytes })
}
