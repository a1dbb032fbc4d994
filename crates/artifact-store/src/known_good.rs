//! Files that this process hashed while it copied them in, so that they need not be hashed again when they are
//! opened.
//!
//! A file is identified by its device and inode number, its length, its modification time (mtime) and its change time
//! (ctime). Any later write changes these times, because a file is remembered only after the file system's clock was
//! seen to move past its last write. Setting the modification time changes the change time. Only the owner, who can
//! write through an open descriptor anyway, and root, who can set the clock, can get around this.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::sync::LazyLock;
use std::thread;
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use protocol::Digest;
use quick_cache::unsync::Cache;

/// Shorter files are hashed again, which takes less time than remembering them.
const BYTES_MIN: u64 = 16 << 20;
const FILES_MAX: usize = 256;
/// The interval at which the file system's clock is read, and the number of reads. The clock ticks every 4 to 10 ms.
const CLOCK_EVERY: Duration = Duration::from_millis(1);
const CLOCK_READS: u32 = 50;

/// The files by device and inode number, as the kernel reports them. Stores of one folder share this map.
static KNOWN: LazyLock<Mutex<Files>> = LazyLock::new(|| Mutex::new(Cache::new(FILES_MAX)));

type Files = Cache<(u64, u64), Known>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Known {
    digest: Digest,
    bytes: u64,
    written: (i64, i64),
    changed: (i64, i64),
}

/// A file time in seconds and nanoseconds.
type Time = (i64, i64);

fn known() -> MutexGuard<'static, Files> {
    KNOWN.lock()
}

/// Returns the modification time of a file once any later write would get a later time. `clock` creates a new file.
///
/// Call this before the file is hashed, or before anyone else can open it.
#[expect(clippy::disallowed_methods, reason = "the store blocks, for some milliseconds here")]
pub(crate) fn settled(file: &File, mut clock: impl FnMut() -> io::Result<File>) -> io::Result<Option<Time>> {
    let metadata = file.metadata()?;
    let written = (metadata.mtime(), metadata.mtime_nsec());
    if metadata.len() < BYTES_MIN {
        return Ok(None);
    }
    for _ in 0..CLOCK_READS {
        let now = clock()?.metadata()?;
        if (now.mtime(), now.mtime_nsec()) > written {
            return Ok(Some(written));
        }
        thread::sleep(CLOCK_EVERY);
    }
    Ok(None)
}

/// Remembers a file that has its final name in the store, unless it was written after `settled`.
pub(crate) fn remember(file: &File, digest: Digest, settled: Time) -> io::Result<()> {
    let metadata = file.metadata()?;
    let (written, changed) = times(&metadata);
    if written == settled {
        let file = (metadata.dev(), metadata.ino());
        known().insert(file, Known { digest, bytes: metadata.len(), written, changed });
    }
    Ok(())
}

/// Returns whether this process stored the open file under this digest and the file has not changed since.
pub(crate) fn is_known(file: &File, digest: &Digest) -> io::Result<bool> {
    let metadata = file.metadata()?;
    let (written, changed) = times(&metadata);
    let now = Known { digest: *digest, bytes: metadata.len(), written, changed };
    Ok(known().get(&(metadata.dev(), metadata.ino())) == Some(&now))
}

fn times(metadata: &std::fs::Metadata) -> (Time, Time) {
    ((metadata.mtime(), metadata.mtime_nsec()), (metadata.ctime(), metadata.ctime_nsec()))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, FileTimes, OpenOptions};
    use std::io::Write as _;
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::{ArtifactStore, Import, OpenError};

    const BYTES: usize = BYTES_MIN as usize;

    fn store(folder: &Path) -> ArtifactStore {
        ArtifactStore::in_folder(folder.join("store")).expect("a store")
    }

    fn source(folder: &Path, length: usize) -> PathBuf {
        let path = folder.join("model.gguf");
        fs::write(&path, vec![7; length]).expect("written");
        path
    }

    fn path(folder: &Path, digest: &Digest) -> PathBuf {
        let name = digest.to_string();
        folder.join("store/sha256").join(&name[..2]).join(name)
    }

    fn stored(folder: &Path, import: Import, length: usize) -> (ArtifactStore, Digest) {
        let (store, source) = (store(folder), source(folder, length));
        let (stored, went) = match import {
            Import::Linked => store.put_link(&source, u64::MAX, |_| Ok(())).expect("put"),
            _ => store.put_open(&File::open(&source).expect("opened"), u64::MAX, |_| Ok(())).expect("put"),
        };
        assert_eq!(went == Import::Linked, import == Import::Linked);
        (store, stored.digest)
    }

    fn is_known_in(folder: &Path, digest: &Digest) -> bool {
        is_known(&File::open(path(folder, digest)).expect("it is there"), digest).expect("it can be looked at")
    }

    #[test]
    fn a_file_that_was_copied_in_is_hashed_once() {
        let folder = tempfile::tempdir().expect("a folder");
        let (taking, digest) = stored(folder.path(), Import::Copied, BYTES);
        assert!(is_known_in(folder.path(), &digest));
        assert_eq!(taking.open(&digest).expect("it opens").bytes, BYTES_MIN);
        // Another store of the same folder knows the file as well, but only under its own digest.
        assert!(store(folder.path()).open(&digest).is_ok());
        assert!(!is_known(&File::open(path(folder.path(), &digest)).expect("there"), &Digest::of(b"x")).expect("told"));
    }

    #[test]
    fn a_file_that_has_another_name_elsewhere_is_hashed_at_each_opening() {
        let folder = tempfile::tempdir().expect("a folder");
        let (_, digest) = stored(folder.path(), Import::Linked, BYTES);
        assert!(!is_known_in(folder.path(), &digest));
    }

    #[test]
    fn a_file_that_was_written_replaced_or_only_touched_since_is_hashed_again() {
        type Change = fn(&Path);
        let overwrite: Change = |path| {
            let file = OpenOptions::new().write(true).open(path).and_then(|mut file| file.write_all(b"evil"));
            file.expect("written");
        };
        let overwrite_with_its_time: Change = |path| {
            let times = fs::metadata(path).and_then(|it| Ok(FileTimes::new().set_modified(it.modified()?)));
            let mut file = OpenOptions::new().write(true).open(path).expect("opened");
            file.write_all(b"evil").expect("written");
            file.set_times(times.expect("told")).expect("set");
        };
        let replace: Change = |path| {
            let times = fs::metadata(path).and_then(|it| Ok(FileTimes::new().set_modified(it.modified()?)));
            fs::remove_file(path).expect("removed");
            fs::write(path, vec![8; BYTES]).expect("written");
            let file = OpenOptions::new().write(true).open(path).expect("opened");
            file.set_times(times.expect("told")).expect("set");
        };
        for (import, change) in [
            (Import::Copied, overwrite),
            (Import::Copied, overwrite_with_its_time),
            (Import::Copied, replace),
            (Import::Linked, overwrite),
            (Import::Linked, overwrite_with_its_time),
        ] {
            let folder = tempfile::tempdir().expect("a folder");
            let (store, digest) = stored(folder.path(), import, BYTES);
            let path = path(folder.path(), &digest);
            fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("set");
            change(&path);
            assert!(matches!(store.open(&digest), Err(OpenError::Mismatch { .. })), "{import:?}");
        }
        let folder = tempfile::tempdir().expect("a folder");
        let (store, digest) = stored(folder.path(), Import::Copied, BYTES);
        fs::set_permissions(path(folder.path(), &digest), std::os::unix::fs::PermissionsExt::from_mode(0o600))
            .expect("set");
        assert!(!is_known_in(folder.path(), &digest) && store.open(&digest).is_ok());
    }

    #[test]
    fn a_short_file_is_always_hashed() {
        let folder = tempfile::tempdir().expect("a folder");
        let (_, digest) = stored(folder.path(), Import::Copied, BYTES - 1);
        assert!(!is_known_in(folder.path(), &digest));
    }
}
