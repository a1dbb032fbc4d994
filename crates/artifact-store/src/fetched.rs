//! Which artifacts were fetched from other nodes, and which of them were used last.
//!
//! Each has a mark in `fetched/`, a file with the number of its last use. Whoever uses the artifact holds a lock on its
//! mark; without a mark, an artifact belongs to this machine and makes room for nobody.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::path::PathBuf;

use protocol::Digest;

use crate::local_folder::{LocalFolder, make_folder, same_file};
use crate::partial::digests_in;

/// An artifact that was fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fetched {
    /// SHA-256 of its bytes.
    pub digest: Digest,
    /// Its length in bytes.
    pub bytes: u64,
    /// The number of its last use; greater is later.
    pub last_use: u64,
}

/// Says that a fetched artifact is in use. While this lives, it makes room for nobody.
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

    /// Notes that an artifact is fetched, and not this machine's own.
    pub(crate) fn mark(&self, digest: &Digest) -> io::Result<()> {
        make_folder(&self.marks_folder())?;
        let mut mark = OpenOptions::new().write(true).create(true).truncate(true).open(self.mark_path(digest))?;
        mark.write_all(self.next_use()?.to_string().as_bytes())
    }

    /// Makes an artifact this machine's own.
    pub(crate) fn unmark(&self, digest: &Digest) -> io::Result<()> {
        match fs::remove_file(self.mark_path(digest)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Returns the artifacts that were fetched and are here, the least recently used first.
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

    /// Notes that an artifact is used; nothing where it is this machine's own.
    pub(crate) fn in_use(&self, digest: &Digest) -> io::Result<Option<InUse>> {
        let path = self.mark_path(digest);
        let mut mark = match OpenOptions::new().read(true).write(true).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            mark => mark?,
        };
        mark.lock_shared()?;
        if !same_file(&path, &mark).unwrap_or(false) {
            // It has just made room.
            return Ok(None);
        }
        let number = self.next_use()?.to_string();
        mark.rewind()?;
        mark.write_all(number.as_bytes())?;
        mark.set_len(number.len() as u64)?;
        Ok(Some(InUse { _mark: mark }))
    }

    /// Returns whether a fetched artifact is in use at this moment.
    pub(crate) fn is_in_use(&self, digest: &Digest) -> bool {
        File::open(self.mark_path(digest)).is_ok_and(|mark| mark.try_lock().is_err())
    }

    /// Deletes a fetched artifact. False where it is in use, or was not fetched.
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
        // The lock is held until the mark is gone.
        fs::remove_file(&path)?;
        Ok(true)
    }

    fn last_use(&self, digest: &Digest) -> u64 {
        let mut text = String::new();
        // A damaged mark counts as the oldest.
        let read = File::open(self.mark_path(digest)).and_then(|file| file.take(32).read_to_string(&mut text));
        read.ok().and_then(|_| text.trim().parse().ok()).unwrap_or_default()
    }

    fn next_use(&self) -> io::Result<u64> {
        let uses = digests_in(&self.marks_folder())?.into_iter().map(|digest| self.last_use(&digest));
        Ok(uses.max().unwrap_or_default().saturating_add(1))
    }
}
