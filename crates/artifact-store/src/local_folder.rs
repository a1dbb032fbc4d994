//! Artifacts in a folder: `sha256/<first two digits>/<digest>`.
//!
//! A file gets its final name only once it is complete and synced to disk, and is never written again. Next to
//! `sha256/`, `incoming/` holds files that are being written, `partial/` artifacts that are being fetched,
//! `quarantine/` one damaged file for each digest, and `fetched/` the markers of fetched artifacts.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use protocol::Digest;
use tracing::debug;

use crate::artifact_store::{Import, PutError, Stored};
use crate::copy::{Copy, copy_file_hashed, copy_hashed, hash};
#[cfg(unix)]
use crate::known_good;

/// Makes the names of incoming files unique within the process.
static NEXT_PART: AtomicU64 = AtomicU64::new(0);

#[derive(Debug, Clone)]
pub(crate) struct LocalFolder {
    root: PathBuf,
}

impl LocalFolder {
    /// Creates missing folders and removes files that a crash left incomplete.
    pub(crate) fn open(root: PathBuf) -> io::Result<Self> {
        let folder = Self { root };
        make_folder(&folder.root.join("sha256"))?;
        make_folder(&folder.incoming())?;
        folder.clear_incoming()?;
        Ok(folder)
    }

    /// Returns the path of an artifact.
    pub(crate) fn path(&self, digest: &Digest) -> PathBuf {
        let name = digest.to_string();
        self.root.join("sha256").join(&name[..2]).join(name)
    }

    /// Opens an artifact for reading. Symbolic links, pipes and devices are refused.
    pub(crate) fn open_file(&self, digest: &Digest) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.read(true);
        #[cfg(unix)]
        {
            use rustix::fs::OFlags;
            // Without NONBLOCK, opening a pipe under this name would hang.
            let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
            std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, flags.bits() as i32);
        }
        plain(options.open(self.path(digest))?)
    }

    pub(crate) fn put(&self, source: impl Read, bytes_max: u64) -> Result<Stored, PutError> {
        let mut part = self.part().map_err(|error| self.failed(error))?;
        let stored = copy_hashed(source, &mut part.file, bytes_max, &mut |_| Ok(()));
        let stored = stored.map_err(|error| self.copy_failed(error, bytes_max))?;
        self.keep(part, &stored.digest).map_err(|error| self.failed(error))?;
        Ok(stored)
    }

    pub(crate) fn put_open(
        &self,
        file: &File,
        bytes_max: u64,
        mut progress: impl FnMut(u64) -> io::Result<()>,
    ) -> Result<(Stored, Import), PutError> {
        let mut part = self.part().map_err(|error| self.failed(error))?;
        let (stored, import) = if clone_of(file, &part.file) {
            (hash(&part.file, progress).map_err(Copy::Source), Import::Cloned)
        } else {
            self.check_room(file)?;
            (copy_file_hashed(file, &mut part.file, bytes_max, &mut progress), Import::Copied)
        };
        let stored = stored.map_err(|error| self.copy_failed(error, bytes_max))?;
        if stored.bytes > bytes_max {
            return Err(PutError::TooLarge { bytes_max });
        }
        let kept = self.settled(&part.file).and_then(|settled| {
            let file = part.file.try_clone()?;
            self.keep(part, &stored.digest)?;
            remember(&file, &stored.digest, settled)
        });
        kept.map_err(|error| self.failed(error))?;
        Ok((stored, import))
    }

    pub(crate) fn put_link(
        &self,
        path: &Path,
        bytes_max: u64,
        progress: impl FnMut(u64) -> io::Result<()>,
    ) -> Result<(Stored, Import), PutError> {
        // A hard link to a symbolic link would not be a plain file.
        let path = &fs::canonicalize(path).map_err(PutError::Source)?;
        let part = self.part().map_err(|error| self.failed(error))?;
        // Only this process uses the name of a part.
        let linked = fs::remove_file(&part.path).and_then(|()| fs::hard_link(path, &part.path));
        let opened = linked.and_then(|()| plain(File::open(&part.path)?)).and_then(|file| {
            // Every part is locked. The lock is shared, since other readers of the file may lock it too.
            file.try_lock_shared().map(|()| file).map_err(io::Error::from)
        });
        let Ok(file) = opened else {
            drop(part);
            return self.put_open(&File::open(path).map_err(PutError::Source)?, bytes_max, progress);
        };
        let stored = hash(&file, progress).map_err(PutError::Source)?;
        if stored.bytes > bytes_max {
            return Err(PutError::TooLarge { bytes_max });
        }
        // The mode is left unchanged, since the other name shares it.
        let placed = self.install(&part.path, &file, &stored.digest).and_then(|()| self.unmark(&stored.digest));
        // The file is not remembered as hashed, since it may be written through its other name.
        placed.map_err(|error| self.failed(error))?;
        Ok((stored, Import::Linked))
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Returns the modification time of a file once any later write would get a later time.
    #[cfg(unix)]
    fn settled(&self, file: &File) -> io::Result<Option<(i64, i64)>> {
        known_good::settled(file, || self.unnamed())
    }

    #[cfg(not(unix))]
    fn settled(&self, _: &File) -> io::Result<Option<(i64, i64)>> {
        Ok(None)
    }

    pub(crate) fn remove(&self, digest: &Digest) -> io::Result<bool> {
        self.unmark(digest)?;
        match fs::remove_file(self.path(digest)) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    #[cfg(unix)]
    pub(crate) fn room_bytes(&self) -> io::Result<u64> {
        let stats = rustix::fs::statvfs(&self.root)?;
        Ok(stats.f_bavail.saturating_mul(stats.f_frsize))
    }

    /// Fails early if the disk has no space for a copy: a partial copy would use up space that others need.
    fn check_room(&self, file: &File) -> Result<(), PutError> {
        let bytes = file.metadata().map_err(PutError::Source)?.len();
        // If the system does not report its free space, the copy itself finds out.
        match self.room_bytes() {
            Ok(room_bytes) if room_bytes < bytes => {
                Err(PutError::NoSpace { bytes, room_bytes, folder: self.root.clone() })
            }
            _ => Ok(()),
        }
    }

    fn failed(&self, source: io::Error) -> PutError {
        PutError::Folder { folder: self.root.clone(), source }
    }

    fn copy_failed(&self, error: Copy, bytes_max: u64) -> PutError {
        match error {
            Copy::Source(error) => PutError::Source(error),
            Copy::TooLarge => PutError::TooLarge { bytes_max },
            Copy::Target(error) => self.failed(error),
        }
    }

    /// Creates an empty file that nobody else can open and that is deleted when it is closed.
    pub(crate) fn unnamed(&self) -> io::Result<File> {
        // Dropping the part removes its name; the descriptor stays open.
        self.part()?.file.try_clone()
    }

    /// Creates a new file that nobody else writes. It is removed on drop.
    pub(crate) fn part(&self) -> io::Result<Part> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        loop {
            let number = NEXT_PART.fetch_add(1, Ordering::Relaxed);
            let path = self.incoming().join(format!("{}-{number}", std::process::id()));
            match options.open(&path) {
                Ok(file) => {
                    // Shows other processes that the file is in use; see `clear_incoming`.
                    file.lock()?;
                    return Ok(Part { file, path });
                }
                // Left over from a crashed process with the same process id.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn keep(&self, part: Part, digest: &Digest) -> io::Result<()> {
        make_private(&part.file)?;
        self.install(&part.path, &part.file, digest)?;
        // A file that is stored explicitly should stay on this machine, even if it was fetched before.
        self.unmark(digest)
    }

    /// Syncs a file to disk and renames it to its digest.
    pub(crate) fn install(&self, from: &Path, file: &File, digest: &Digest) -> io::Result<()> {
        let path = self.path(digest);
        let folder = path.parent().unwrap_or(&self.root);
        make_folder(folder)?;
        file.sync_all()?;
        fs::rename(from, &path)?;
        sync_folder(folder)
    }

    /// Moves a damaged artifact to quarantine, unless it has been replaced since it was opened.
    pub(crate) fn quarantine(&self, digest: &Digest, opened: &File) -> io::Result<()> {
        let path = self.path(digest);
        if !same_file(&path, opened)? {
            return Ok(());
        }
        let aside = self.aside(digest);
        make_folder(aside.parent().unwrap_or(&self.root))?;
        // One file per digest, so the folder cannot grow without bound.
        fs::rename(&path, aside)
    }

    /// Returns the quarantine path of an artifact.
    pub(crate) fn aside(&self, digest: &Digest) -> PathBuf {
        self.root.join("quarantine").join(digest.to_string())
    }

    fn incoming(&self) -> PathBuf {
        self.root.join("incoming")
    }

    fn clear_incoming(&self) -> io::Result<()> {
        for entry in fs::read_dir(self.incoming())? {
            let path = entry?.path();
            // A file that another process is writing is locked.
            if let Ok(file) = File::open(&path)
                && file.try_lock().is_ok()
            {
                debug!(path = %path.display(), "removing an artifact that was never finished");
                fs::remove_file(&path)?;
            }
        }
        Ok(())
    }
}

/// Remembers that a file was hashed, if its modification time has settled.
fn remember(file: &File, digest: &Digest, settled: Option<(i64, i64)>) -> io::Result<()> {
    #[cfg(unix)]
    if let Some(settled) = settled {
        known_good::remember(file, *digest, settled)?;
    }
    #[cfg(not(unix))]
    let _ = (file, digest, settled);
    Ok(())
}

/// A file that is being written into the store.
pub(crate) struct Part {
    pub(crate) file: File,
    path: PathBuf,
}

impl Drop for Part {
    fn drop(&mut self) {
        // Already renamed if it was kept.
        let _ = fs::remove_file(&self.path);
    }
}

pub(crate) fn make_folder(path: &Path) -> io::Result<()> {
    let mut builder = DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(path)
}

/// Returns an error unless the file is a regular file.
fn plain(file: File) -> io::Result<File> {
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("it is not a plain file")) }
}

/// Makes a file readable by its owner only, and writable by nobody.
pub(crate) fn make_private(file: &File) -> io::Result<()> {
    let mut permissions = file.metadata()?.permissions();
    #[cfg(unix)]
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o400);
    #[cfg(not(unix))]
    permissions.set_readonly(true);
    file.set_permissions(permissions)
}

/// Makes an empty file share the blocks of another one (reflink). Returns false if the file system cannot.
#[cfg(target_os = "linux")]
fn clone_of(source: &File, target: &File) -> bool {
    rustix::fs::ioctl_ficlone(target, source).is_ok()
}

#[cfg(not(target_os = "linux"))]
fn clone_of(_source: &File, _target: &File) -> bool {
    false
}

/// Makes a rename survive a power failure.
fn sync_folder(path: &Path) -> io::Result<()> {
    // Windows cannot open folders.
    if cfg!(unix) { File::open(path)?.sync_all() } else { Ok(()) }
}

#[cfg(unix)]
pub(crate) fn same_file(path: &Path, opened: &File) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt as _;
    let (there, here) = (fs::symlink_metadata(path)?, opened.metadata()?);
    Ok((there.dev(), there.ino()) == (here.dev(), here.ino()))
}

#[cfg(not(unix))]
pub(crate) fn same_file(path: &Path, _opened: &File) -> io::Result<bool> {
    fs::exists(path)
}
