//! One store over all the places where artifacts lie.

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

/// An open file whose bytes had the digest when they were read through this very descriptor, or when they were taken
/// in: the kernel says of the file behind the descriptor that it was not written since.
///
/// What comes from the program itself cannot change any more. A file of the folder belongs to this user alone and is
/// never written in place, so only its owner or root could change it behind the descriptor.
#[derive(Debug)]
pub struct VerifiedFile {
    /// The file, at its beginning.
    pub file: File,
    /// SHA-256 of its bytes.
    pub digest: Digest,
    pub bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// SHA-256 of the bytes: their name from here on.
    pub digest: Digest,
    /// How many there are.
    pub bytes: u64,
}

/// How the bytes of a file came into the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// They were there before.
    Known,
    /// The file has another name in the store, and takes no further room.
    Linked,
    /// The file system shares them with the file until one of the two is changed.
    Cloned,
    Copied,
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
    TooLarge { bytes_max: u64 },
    /// The disk has no room for a copy.
    #[error("the artifact takes {bytes} bytes, and the disk of {} has {room_bytes} free", folder.display())]
    NoRoom {
        /// The length of the copy.
        bytes: u64,
        /// What this user may still write there.
        room_bytes: u64,
        folder: PathBuf,
    },
    /// The folder could not be written.
    #[error("the artifact could not be written to {}", folder.display())]
    Folder { folder: PathBuf, source: io::Error },
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

    /// Stores the bytes of an open file: shared with it where the file system can, else copied. `progress` gets the
    /// number of bytes at each step, and ends it with an error. Blocks.
    pub fn put_open(
        &self,
        file: &File,
        bytes_max: u64,
        progress: impl FnMut(u64) -> io::Result<()>,
    ) -> Result<(Stored, Way), PutError> {
        self.inner.folder.put_open(file, bytes_max, progress)
    }

    /// Stores a file without a copy of it, by a second name; where the file system allows no such name, as
    /// [`Self::put_open`] does. The file must not be written in place later: what is stored is found damaged then.
    /// Blocks.
    pub fn put_link(
        &self,
        path: &Path,
        bytes_max: u64,
        progress: impl FnMut(u64) -> io::Result<()>,
    ) -> Result<(Stored, Way), PutError> {
        self.inner.folder.put_link(path, bytes_max, progress)
    }

    /// Removes an artifact from the folder; false where it is not there. Whoever has it open keeps it.
    pub fn remove(&self, digest: &Digest) -> io::Result<bool> {
        self.inner.folder.remove(digest)
    }

    /// Returns how many bytes this user may still write beside the artifacts, as far as the system tells.
    #[cfg(unix)]
    pub fn room_bytes(&self) -> io::Result<u64> {
        self.inner.folder.room_bytes()
    }

    /// Opens what there is of an artifact that is being fetched; nothing while somebody else writes it. Blocks.
    pub fn partial(&self, digest: &Digest) -> io::Result<Option<Partial>> {
        Partial::open(&self.inner.folder, digest)
    }

    /// Returns how many bytes there are of an artifact that is being fetched.
    pub fn partial_bytes(&self, digest: &Digest) -> u64 {
        partial::bytes_of(&self.inner.folder, digest)
    }

    /// Returns the artifacts that are being fetched, or were and are not complete.
    pub fn partials(&self) -> io::Result<Vec<Digest>> {
        partial::list(&self.inner.folder)
    }

    /// Returns the artifacts that were fetched and are here, the least recently used first.
    pub fn fetched(&self) -> io::Result<Vec<Fetched>> {
        self.inner.folder.fetched()
    }

    /// Notes that a fetched artifact is used, and keeps it here meanwhile; nothing where it is this machine's own.
    pub fn in_use(&self, digest: &Digest) -> io::Result<Option<InUse>> {
        self.inner.folder.in_use(digest)
    }

    /// Returns whether a fetched artifact is in use at this moment.
    pub fn is_in_use(&self, digest: &Digest) -> bool {
        self.inner.folder.is_in_use(digest)
    }

    /// Deletes a fetched artifact. False where it is in use, or where this machine did not fetch it.
    pub fn evict(&self, digest: &Digest) -> io::Result<bool> {
        self.inner.folder.evict(digest)
    }

    /// Makes an artifact that may have been fetched this machine's own: it makes room for no other.
    pub fn keep(&self, digest: &Digest) -> io::Result<()> {
        self.inner.folder.unmark(digest)
    }

    /// Makes an empty file beside the artifacts, for what is made of them. It has no name and is gone once it is
    /// closed. Blocks.
    pub fn scratch(&self) -> io::Result<File> {
        self.inner.folder.unnamed()
    }

    /// Returns whether an artifact is here. Its bytes are not looked at.
    pub fn contains(&self, digest: &Digest) -> bool {
        self.inner.embedded.contains_key(digest) || self.inner.folder.path(digest).is_file()
    }

    /// Opens an artifact of the folder to look at, without verifying it: what is read may be anything.
    pub fn peek(&self, digest: &Digest) -> io::Result<File> {
        self.inner.folder.open_file(digest)
    }

    /// Opens an artifact and verifies all its bytes through the descriptor that is returned, unless this process hashed
    /// them when it took the file in and nobody has written the file since. Blocks.
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

/// Hashes an open file from its beginning and returns it, at its beginning again.
fn verify(file: File, digest: &Digest) -> Result<VerifiedFile, OpenError> {
    let failed = |source| OpenError::Read { digest: *digest, source };
    let Stored { digest: found, bytes } = hash(&file, |_| Ok(())).map_err(failed)?;
    if found != *digest {
        return Err(OpenError::Mismatch { digest: *digest, found });
    }
    Ok(VerifiedFile { file, digest: *digest, bytes })
}
