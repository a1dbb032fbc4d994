//! Partially fetched artifacts, in `partial/`. The bytes survive a restart of the process, so a fetch can be resumed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::path::PathBuf;

use protocol::Digest;
use sha2::{Digest as _, Sha256};

use crate::local_folder::{LocalFolder, make_folder, make_private, same_file};

const BUFFER_BYTES: usize = 1 << 20;

/// An artifact that is not complete. Nobody else can write it while this value lives.
#[derive(Debug)]
pub struct Partial {
    folder: LocalFolder,
    digest: Digest,
    file: File,
    hasher: Sha256,
    bytes: u64,
}

/// Why a fetched artifact could not be completed.
#[derive(Debug, thiserror::Error)]
pub enum FinishError {
    /// The bytes do not match the digest and were deleted.
    #[error("the bytes have the digest {found}")]
    Mismatch {
        /// The digest of the actual bytes.
        found: Digest,
    },
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Partial {
    /// Opens the partial file of an artifact, or creates an empty one. Returns `None` while someone else writes
    /// it. Blocks: the bytes fetched earlier are read and hashed.
    pub(crate) fn open(folder: &LocalFolder, digest: &Digest) -> io::Result<Option<Self>> {
        let path = path(folder, digest);
        make_folder(path.parent().unwrap_or(&path))?;
        let mut options = OpenOptions::new();
        options.read(true).append(true).create(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let file = match options.open(&path) {
            // A process ended while it turned the file into an artifact, after it had made it read-only.
            #[cfg(unix)]
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
                options.open(&path)?
            }
            file => file?,
        };
        if file.try_lock().is_err() {
            return Ok(None);
        }
        // The previous holder of the lock may have completed or deleted the file.
        if !same_file(&path, &file).unwrap_or(false) {
            return Ok(None);
        }
        let mut partial = Self { folder: folder.clone(), digest: *digest, file, hasher: Sha256::new(), bytes: 0 };
        partial.hash_what_is_there()?;
        Ok(Some(partial))
    }

    fn hash_what_is_there(&mut self) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            match self.file.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => {
                    self.hasher.update(&buffer[..count]);
                    self.bytes += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Appends bytes. Blocks. After an error the file must be opened again.
    pub fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Deletes the bytes fetched so far.
    pub fn clear(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        (self.hasher, self.bytes) = (Sha256::new(), 0);
        Ok(())
    }

    /// Verifies the digest and turns the bytes into a fetched artifact. Bytes with another digest are deleted.
    /// Blocks.
    pub fn finish(&mut self) -> Result<(), FinishError> {
        let found = Digest(self.hasher.clone().finalize().into());
        if found != self.digest {
            self.clear()?;
            return Err(FinishError::Mismatch { found });
        }
        if self.folder.path(&self.digest).is_file() {
            // The artifact was stored on this machine meanwhile, so it stays this machine's own.
            return Ok(fs::remove_file(path(&self.folder, &self.digest))?);
        }
        make_private(&self.file)?;
        // The marker comes first: a file without a marker would never be evicted.
        self.folder.mark(&self.digest)?;
        Ok(self.folder.install(&path(&self.folder, &self.digest), &self.file, &self.digest)?)
    }

    /// Deletes the partial file. Blocks.
    pub fn discard(self) -> io::Result<()> {
        fs::remove_file(path(&self.folder, &self.digest))
    }
}

fn folder_of(folder: &LocalFolder) -> PathBuf {
    folder.root().join("partial")
}

fn path(folder: &LocalFolder, digest: &Digest) -> PathBuf {
    folder_of(folder).join(digest.to_string())
}

/// Returns how many bytes of an incomplete artifact there are.
pub(crate) fn bytes_of(folder: &LocalFolder, digest: &Digest) -> u64 {
    fs::metadata(path(folder, digest)).map_or(0, |metadata| metadata.len())
}

/// Returns the incomplete artifacts.
pub(crate) fn list(folder: &LocalFolder) -> io::Result<Vec<Digest>> {
    digests_in(&folder_of(folder))
}

/// Returns the digests that are names of files in a folder.
pub(crate) fn digests_in(folder: &std::path::Path) -> io::Result<Vec<Digest>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
        entries => entries?,
    };
    let mut digests = vec![];
    for entry in entries {
        digests.extend(entry?.file_name().to_str().and_then(|name| name.parse::<Digest>().ok()));
    }
    digests.sort();
    Ok(digests)
}
