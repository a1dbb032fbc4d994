//! A node's key file: made at first start, readable by its owner alone.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use protocol::signature::NodeKey;

/// Why a node has no key.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file or its folder can't be used.
    #[error("could not use the key file {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file does not hold a key.
    #[error("{} does not hold a key of 32 bytes; move it away to have a new one made", path.display())]
    NotAKey {
        /// The file.
        path: PathBuf,
    },
    /// The machine has no randomness to give.
    #[error("could not draw random bytes")]
    Random,
}

/// Reads the key in `path`, or makes one there with mode 0600.
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
            if let Some(folder) = path.parent() {
                fs::create_dir_all(folder).map_err(failed)?;
            }
            write_private(path, &seed).map_err(failed)?;
            Ok(NodeKey::from_seed(&seed))
        }
        Err(error) => Err(failed(error)),
    }
}

/// Writes a file that only its owner can read, in whole or not at all, over the one that is there.
pub fn replace_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    // Left by a process that was killed while it wrote.
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    write_private(&beside, bytes)?;
    fs::rename(&beside, path)
}

/// Writes a new file that only its owner can read. Fails where the file exists.
pub fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
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
    fn a_file_that_is_no_key_is_left_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("gateway.key");
        fs::write(&path, b"short").expect("written");
        let error = load_or_create(&path).expect_err("not a key");
        assert!(matches!(error, IdentityError::NotAKey { .. }), "{error}");
        assert_eq!(fs::read(&path).expect("still there"), b"short");
    }
}
