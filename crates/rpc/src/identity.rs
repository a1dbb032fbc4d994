//! A node's key file: created at the first start and readable by its owner alone.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use protocol::signature::NodeKey;
use tempfile::NamedTempFile;

/// Why a node has no key.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file or its folder cannot be read or written.
    #[error("could not use the key file {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file does not hold a key.
    #[error("{} does not hold a key of 32 bytes; move it away to have a new one made", path.display())]
    NotAKey {
        /// The file.
        path: PathBuf,
    },
    /// The system provides no randomness.
    #[error("could not draw random bytes")]
    Random,
}

/// Reads the key in `path`, or creates one there with mode 0600.
pub fn load_or_create(path: &Path) -> Result<NodeKey, IdentityError> {
    let failed = |source| IdentityError::File { path: path.to_owned(), source };
    match fs::read(path) {
        Ok(bytes) => {
            let seed: [u8; 32] = bytes.try_into().map_err(|_| IdentityError::NotAKey { path: path.to_owned() })?;
            Ok(NodeKey::from_seed(&seed))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let mut seed = [0; 32];
            getrandom::fill(&mut seed).map_err(|_| IdentityError::Random)?;
            match write_private(path, &seed) {
                // Another process created the key first, so this node uses it.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => load_or_create(path),
                written => written.map(|()| NodeKey::from_seed(&seed)).map_err(failed),
            }
        }
        Err(error) => Err(failed(error)),
    }
}

/// Replaces a file atomically. Only its owner can read it.
pub fn replace_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    written_beside(path, bytes)?.persist(path)?;
    sync_folder(path)
}

/// Creates a file atomically. Only its owner can read it. Fails if the file exists.
pub fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    written_beside(path, bytes)?.persist_noclobber(path)?;
    sync_folder(path)
}

/// Writes the bytes to a temporary file with a unique name in the same folder, which is created if it is missing. The
/// file has mode 0600, and is deleted unless it is renamed.
fn written_beside(path: &Path, bytes: &[u8]) -> io::Result<NamedTempFile> {
    let folder = folder_of(path);
    fs::create_dir_all(folder)?;
    let mut file = tempfile::Builder::new().prefix(".").suffix(".new").tempfile_in(folder)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    Ok(file)
}

/// Syncs the folder, so that the file's name survives a power failure as its bytes do.
fn sync_folder(path: &Path) -> io::Result<()> {
    #[cfg(unix)]
    fs::File::open(folder_of(path))?.sync_all()?;
    #[cfg(not(unix))]
    let _ = path;
    Ok(())
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_made_once_and_kept_private() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("nodes/gateway.key");
        let first = load_or_create(&path).expect("made").public_key();
        assert_eq!(load_or_create(&path).expect("read").public_key(), first);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt as _;
            assert_eq!(fs::metadata(&path).expect("exists").permissions().mode() & 0o777, 0o600);
        }
    }

    #[test]
    fn many_who_write_one_file_at_once_all_succeed_and_leave_nothing_else() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("core/pool.json");
        let texts: Vec<String> = (0..8).map(|writer| format!("{writer}").repeat(1000)).collect();
        std::thread::scope(|scope| {
            for text in &texts {
                scope.spawn(|| (0..50).for_each(|_| replace_private(&path, text.as_bytes()).expect("written")));
            }
        });
        let last = fs::read_to_string(&path).expect("there");
        assert!(texts.contains(&last), "one of them, whole: {last}");
        assert_eq!(fs::read_dir(folder.path().join("core")).expect("a folder").count(), 1);
    }

    #[test]
    fn many_who_make_one_key_at_once_have_the_same() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("nodes/gateway.key");
        let keys: Vec<_> = std::thread::scope(|scope| {
            let make = || scope.spawn(|| load_or_create(&path).expect("a key").public_key());
            let threads: Vec<_> = (0..8).map(|_| make()).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        assert!(keys.iter().all(|key| *key == keys[0]));
    }

    #[test]
    fn a_file_that_is_no_key_is_left_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("gateway.key");
        fs::write(&path, b"short").expect("written");
        let error = load_or_create(&path).expect_err("not a key");
        assert!(matches!(error, IdentityError::NotAKey { .. }), "{error}");
        assert_eq!(fs::read(&path).expect("still there"), b"short");
    }
}
