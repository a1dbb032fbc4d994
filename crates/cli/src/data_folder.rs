//! The folder that holds everything this machine keeps: keys, stores, models. Its owner alone may read it.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use protocol::signature::NodeKey;
use registry::Pepper;
use rpc::identity;

use crate::settings::{Env, Settings};

/// The folder that holds everything this machine keeps.
#[derive(Debug, Clone)]
pub struct DataFolder {
    path: PathBuf,
}

/// Held while a network runs on a folder, so that no other does.
#[derive(Debug)]
pub struct FolderLock {
    _file: File,
}

impl DataFolder {
    /// Returns the folder that the settings name, or the user's, without making it.
    pub fn of(settings: &Settings, env: &Env) -> anyhow::Result<Self> {
        let named = settings.data_dir.clone().or_else(|| env.data_folder());
        let path = named.context("no home folder is known; name a data folder with --data-dir")?;
        Ok(Self { path })
    }

    /// Takes any folder.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Returns its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the folder where it is missing.
    pub fn create(&self) -> anyhow::Result<()> {
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true);
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.create(&self.path).with_context(|| format!("could not make the data folder {}", self.path.display()))
    }

    /// Keeps other networks off this folder.
    pub fn lock(&self) -> anyhow::Result<FolderLock> {
        let path = self.path.join("lock");
        let file = File::create(&path).with_context(|| format!("could not write {}", path.display()))?;
        match file.try_lock() {
            Ok(()) => Ok(FolderLock { _file: file }),
            Err(fs::TryLockError::WouldBlock) => {
                bail!("another tether runs on {}; stop it, or name another folder with --data-dir", self.path.display())
            }
            Err(fs::TryLockError::Error(error)) => {
                Err(error).with_context(|| format!("could not lock {}", path.display()))
            }
        }
    }

    /// Returns a node's key, made at its first start.
    pub fn node_key(&self, node: &str) -> anyhow::Result<NodeKey> {
        Ok(identity::load_or_create(&self.path.join("nodes").join(format!("{node}.key")))?)
    }

    /// Returns the root key of the pool, made at the registry's first start.
    pub fn root_key(&self) -> anyhow::Result<NodeKey> {
        Ok(identity::load_or_create(&self.path.join("root.key"))?)
    }

    /// Returns the key under which token secrets are hashed, made at the first start.
    pub fn pepper(&self) -> anyhow::Result<Pepper> {
        let path = self.path.join("pepper");
        match fs::read(&path) {
            Ok(bytes) => match bytes.try_into() {
                Ok(pepper) => Ok(Pepper(pepper)),
                Err(_) => bail!("{} does not hold 32 bytes; without it no API key can be checked", path.display()),
            },
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let mut pepper = [0; 32];
                getrandom::fill(&mut pepper).context("could not draw random bytes")?;
                identity::write_private(&path, &pepper)
                    .with_context(|| format!("could not write {}", path.display()))?;
                Ok(Pepper(pepper))
            }
            Err(error) => Err(error).with_context(|| format!("could not read {}", path.display())),
        }
    }

    /// Returns the file of the registry's store.
    pub fn registry_store(&self) -> PathBuf {
        self.path.join("registry.db")
    }

    /// Returns the file of the orchestrator's store.
    pub fn orchestrator_store(&self) -> PathBuf {
        self.path.join("orchestrator.db")
    }

    /// Returns the folder of artifacts.
    pub fn artifacts(&self) -> PathBuf {
        self.path.join("artifacts")
    }

    /// Returns the file of the first API key.
    pub fn api_key_file(&self) -> PathBuf {
        self.path.join("api-key")
    }

    /// Returns the first API key, where there is one.
    pub fn api_key(&self) -> Option<String> {
        fs::read_to_string(self.api_key_file()).ok().map(|text| text.trim().to_owned())
    }

    /// Writes down where the network that runs here listens.
    pub fn write_address(&self, address: SocketAddr, tls: bool) -> anyhow::Result<()> {
        let scheme = if tls { "https" } else { "http" };
        let path = self.path.join("address");
        fs::write(&path, format!("{scheme}://{address}\n"))
            .with_context(|| format!("could not write {}", path.display()))
    }

    /// Returns where the network that runs here listens, or did last.
    pub fn address(&self) -> Option<String> {
        fs::read_to_string(self.path.join("address")).ok().map(|text| text.trim().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_networks_do_not_share_a_folder() {
        let folder = tempfile::tempdir().expect("a folder");
        let data = DataFolder::at(folder.path());
        let lock = data.lock().expect("the first");
        let error = data.lock().expect_err("the second").to_string();
        assert!(error.contains("--data-dir"), "{error}");
        drop(lock);
        data.lock().expect("free again");
    }

    #[test]
    fn the_pepper_is_made_once_and_a_damaged_one_is_not_replaced() {
        let folder = tempfile::tempdir().expect("a folder");
        let data = DataFolder::at(folder.path());
        let first = data.pepper().expect("made").0;
        assert_eq!(data.pepper().expect("read").0, first);
        fs::write(folder.path().join("pepper"), b"x").expect("written");
        assert!(data.pepper().is_err());
    }
}
