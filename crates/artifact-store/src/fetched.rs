//! Artifacts that were fetched from other nodes, in the order of their last use.
//!
//! Each fetched artifact has a marker file in `fetched/` that holds the number of its last use. A user of the
//! artifact locks its marker. An artifact without a marker belongs to this machine and is never evicted.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::path::PathBuf;

use protocol::Digest;

use crate::local_folder::{LocalFolder, make_folder, same_file};
use crate::partial::digests_in;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fetched {
    /// SHA-256 of its bytes.
    pub digest: Digest,
    pub bytes: u64,
    /// The number of its last use; higher is more recent.
    pub last_use: u64,
}

/// Marks a fetched artifact as in use. It is not evicted while this value lives.
#[derive(Debug)]
pub struct InUse {
    _mark: File,
}

impl LocalFolder {
    fn marks_folder(&self) -> PathBuf {
        self.root().join("fetched")
    }

    fn mark_path(&self, digest: &Digest) -> PathBuf {
        self.marks_folder().join(digest.to_string())
    }

    /// Marks an artifact as fetched.
    pub(crate) fn mark(&self, digest: &Digest) -> io::Result<()> {
        make_folder(&self.marks_folder())?;
        let mut mark = OpenOptions::new().write(true).create(true).truncate(true).open(self.mark_path(digest))?;
        mark.write_all(self.next_use()?.to_string().as_bytes())
    }

    /// Removes an artifact's mark as fetched. Does nothing if it has no mark.
    pub(crate) fn unmark(&self, digest: &Digest) -> io::Result<()> {
        match fs::remove_file(self.mark_path(digest)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Returns the fetched artifacts in the store, the least recently used first.
    pub(crate) fn fetched(&self) -> io::Result<Vec<Fetched>> {
        let mut all = vec![];
        for digest in digests_in(&self.marks_folder())? {
            if let Ok(metadata) = fs::metadata(self.path(&digest)) {
                all.push(Fetched { digest, bytes: metadata.len(), last_use: self.last_use(&digest) });
            }
        }
        all.sort_by_key(|fetched| (fetched.last_use, fetched.digest));
        Ok(all)
    }

    /// Records a use of an artifact. Returns `None` if it is not marked as fetched, or was evicted meanwhile.
    pub(crate) fn in_use(&self, digest: &Digest) -> io::Result<Option<InUse>> {
        let path = self.mark_path(digest);
        let mut mark = match OpenOptions::new().read(true).write(true).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            mark => mark?,
        };
        mark.lock_shared()?;
        if !same_file(&path, &mark).unwrap_or(false) {
            // The artifact was evicted meanwhile.
            return Ok(None);
        }
        let number = self.next_use()?.to_string();
        mark.rewind()?;
        mark.write_all(number.as_bytes())?;
        mark.set_len(number.len() as u64)?;
        Ok(Some(InUse { _mark: mark }))
    }

    /// Returns whether a fetched artifact is in use.
    pub(crate) fn is_in_use(&self, digest: &Digest) -> bool {
        File::open(self.mark_path(digest)).is_ok_and(|mark| mark.try_lock().is_err())
    }

    /// Deletes a fetched artifact. Returns false if it is in use or not marked as fetched.
    pub(crate) fn evict(&self, digest: &Digest) -> io::Result<bool> {
        let path = self.mark_path(digest);
        let mark = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            mark => mark?,
        };
        if mark.try_lock().is_err() || !same_file(&path, &mark).unwrap_or(false) {
            return Ok(false);
        }
        match fs::remove_file(self.path(digest)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // The lock is held until the marker is deleted.
        fs::remove_file(&path)?;
        Ok(true)
    }

    fn last_use(&self, digest: &Digest) -> u64 {
        let mut text = String::new();
        // A damaged marker counts as the oldest.
        let read = File::open(self.mark_path(digest)).and_then(|file| file.take(32).read_to_string(&mut text));
        read.ok().and_then(|_| text.trim().parse().ok()).unwrap_or_default()
    }

    fn next_use(&self) -> io::Result<u64> {
        let uses = digests_in(&self.marks_folder())?.into_iter().map(|digest| self.last_use(&digest));
        Ok(uses.max().unwrap_or_default().saturating_add(1))
    }
}
