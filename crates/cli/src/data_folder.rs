//! The folder that holds everything this machine keeps: keys, stores, models. Its owner alone may read it.

use std::fs::{self, File};
use std::net::{SocketAddr, SocketAddrV4};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use gateway::folder_proof::FolderSecret;
use orchestrator::SealingKey;
use protocol::signature::NodeKey;
use protocol::{PublicKey, codec};
use registry::Pepper;
use rpc::identity;

use crate::addresses;
use crate::node::Pool;
use crate::settings::{Env, Settings};

#[derive(Debug, Clone)]
pub struct DataFolder {
    path: PathBuf,
}

/// Locks of the roles whose nodes run on a folder, held while this lives.
#[derive(Debug)]
pub struct FolderLock {
    _files: Vec<File>,
}

impl DataFolder {
    /// Returns the folder that the settings name, or the user's default, without creating it.
    pub fn of(settings: &Settings, env: &Env) -> anyhow::Result<Self> {
        let named = settings.data_dir.clone().or_else(|| env.data_folder());
        let path = named.context("no home folder is known; name a data folder with --data-dir")?;
        Ok(Self { path })
    }

    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Creates the folder if it is missing.
    pub fn create(&self) -> anyhow::Result<()> {
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true);
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.create(&self.path).with_context(|| format!("could not make the data folder {}", self.path.display()))
    }

    /// Locks these roles, so that no other node of them runs on this folder. `tether up` locks all of them.
    pub fn lock(&self, roles: &[&str]) -> anyhow::Result<FolderLock> {
        let files = roles.iter().map(|role| self.lock_role(role)).collect::<Result<_, _>>()?;
        Ok(FolderLock { _files: files })
    }

    fn lock_role(&self, role: &str) -> anyhow::Result<File> {
        let path = self.path.join(format!("{role}.lock"));
        let file = File::create(&path).with_context(|| format!("could not write {}", path.display()))?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(fs::TryLockError::WouldBlock) => {
                bail!("another {role} runs on {}; stop it, or name another folder with --data-dir", self.path.display())
            }
            Err(fs::TryLockError::Error(error)) => {
                Err(error).with_context(|| format!("could not lock {}", path.display()))
            }
        }
    }

    /// Returns a node's key, created at its first start.
    pub fn node_key(&self, node: &str) -> anyhow::Result<NodeKey> {
        Ok(identity::load_or_create(&self.path.join("nodes").join(format!("{node}.key")))?)
    }

    /// Returns the root key of the pool, created at the registry's first start.
    pub fn root_key(&self) -> anyhow::Result<NodeKey> {
        Ok(identity::load_or_create(&self.path.join("root.key"))?)
    }

    /// Returns the key for hashing token secrets, created at the first start.
    pub fn pepper(&self) -> anyhow::Result<Pepper> {
        match self.secret("pepper", "without it no API key can be checked")? {
            Some(pepper) => Ok(Pepper(pepper)),
            None => self.make_secret("pepper")?.map_or_else(|| self.pepper(), |pepper| Ok(Pepper(pepper))),
        }
    }

    /// Returns the key that encrypts kept answers, created at an orchestrator's first start.
    pub fn sealing_key(&self) -> anyhow::Result<SealingKey> {
        match self.secret("sealing.key", "delete it and start again; the answers that are kept are lost then")? {
            Some(key) => Ok(SealingKey(key)),
            None => self.make_secret("sealing.key")?.map_or_else(|| self.sealing_key(), |key| Ok(SealingKey(key))),
        }
    }

    /// Returns the secret with which a gateway proves to commands that it runs on this folder, if there is one.
    pub fn gateway_secret(&self) -> anyhow::Result<Option<FolderSecret>> {
        let secret = self.secret("gateway.secret", "delete it and start the gateway again")?;
        Ok(secret.map(FolderSecret::new))
    }

    /// Returns that secret, created at a gateway's first start.
    pub fn make_gateway_secret(&self) -> anyhow::Result<FolderSecret> {
        match self.gateway_secret()? {
            Some(secret) => Ok(secret),
            None => self
                .make_secret("gateway.secret")?
                .map_or_else(|| self.make_gateway_secret(), |secret| Ok(FolderSecret::new(secret))),
        }
    }

    fn secret(&self, name: &str, advice: &str) -> anyhow::Result<Option<[u8; 32]>> {
        let path = self.path.join(name);
        match fs::read(&path) {
            Ok(bytes) => match bytes.try_into() {
                Ok(secret) => Ok(Some(secret)),
                Err(_) => bail!("{} does not hold 32 bytes; {advice}", path.display()),
            },
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("could not read {}", path.display())),
        }
    }

    /// Draws and writes a secret. Returns `None` if another process was first.
    fn make_secret(&self, name: &str) -> anyhow::Result<Option<[u8; 32]>> {
        let path = self.path.join(name);
        let mut secret = [0; 32];
        getrandom::fill(&mut secret).context("could not draw random bytes")?;
        match identity::write_private(&path, &secret) {
            Ok(()) => Ok(Some(secret)),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(None),
            Err(error) => Err(error).with_context(|| format!("could not write {}", path.display())),
        }
    }

    /// Records which network this folder belongs to.
    pub fn write_pool(&self, pool: &Pool) -> anyhow::Result<()> {
        let path = self.path.join("pool.json");
        identity::replace_private(&path, &codec::encode(pool))
            .with_context(|| format!("could not write {}", path.display()))
    }

    /// Forgets the network that this folder's own registry founded, when it goes on without other machines.
    pub fn forget_pool(&self, registry: PublicKey) -> anyhow::Result<()> {
        if self.pool()?.is_some_and(|pool| pool.registry == registry) {
            let path = self.path.join("pool.json");
            fs::remove_file(&path).with_context(|| format!("could not delete {}", path.display()))?;
        }
        Ok(())
    }

    /// Returns the network that this folder belongs to, if any.
    pub fn pool(&self) -> anyhow::Result<Option<Pool>> {
        let path = self.path.join("pool.json");
        match fs::read(&path) {
            Ok(bytes) => codec::decode(&bytes).map(Some).with_context(|| {
                format!("{} is damaged; move it away and start or join the network again", path.display())
            }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("could not read {}", path.display())),
        }
    }

    /// Returns the number of a node's next start: greater than every one before, whatever happens to the process, and
    /// than `above`.
    pub fn next_epoch(&self, node: &str, above: u64) -> anyhow::Result<u64> {
        let path = self.path.join("nodes").join(format!("{node}.epoch"));
        let last = match fs::read_to_string(&path) {
            Ok(text) => text.trim().parse::<u64>().with_context(|| {
                format!("{} does not hold a number; write one that is greater than every one before", path.display())
            })?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error).with_context(|| format!("could not read {}", path.display())),
        };
        let next = last.max(above) + 1;
        identity::replace_private(&path, format!("{next}\n").as_bytes())
            .with_context(|| format!("could not write {}", path.display()))?;
        Ok(next)
    }

    /// Returns the file of a node's enrolment.
    pub fn enrolment(&self, node: &str) -> PathBuf {
        self.path.join("nodes").join(format!("{node}.enrolment"))
    }

    /// Records why no orchestrator accepts the worker's reports, or that one does.
    pub fn write_unheard(&self, why: Option<&str>) -> std::io::Result<()> {
        let path = self.path.join("nodes").join("worker.unheard");
        match why {
            Some(why) => identity::replace_private(&path, why.as_bytes()),
            None => match fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            },
        }
    }

    /// Returns why no orchestrator accepts the worker's reports, if that is so.
    pub fn unheard(&self) -> Option<String> {
        fs::read_to_string(self.path.join("nodes").join("worker.unheard")).ok()
    }

    /// Returns the file of the flags that a node was started with.
    pub fn kept_flags(&self, node: &str) -> PathBuf {
        self.path.join("nodes").join(format!("{node}.toml"))
    }

    /// Returns the roles of the nodes that were started or enrolled here, in start order.
    pub fn roles(&self) -> Vec<&'static str> {
        let is_here = |role: &&str| self.kept_flags(role).exists() || self.enrolment(role).exists();
        // `tether up` runs all of the other roles.
        let all: &[_] = if is_here(&"up") {
            &["bootstrap", "up"]
        } else {
            &["bootstrap", "registry", "orchestrator", "gateway", "worker"]
        };
        all.iter().copied().filter(is_here).collect()
    }

    /// Returns the file of a node's known peers.
    pub fn known_peers(&self, node: &str) -> PathBuf {
        self.path.join("nodes").join(format!("{node}.peers"))
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

    /// Returns the folder of incomplete downloads.
    pub fn downloads(&self) -> PathBuf {
        self.path.join("downloads")
    }

    /// Returns the file of the first API key.
    pub fn api_key_file(&self) -> PathBuf {
        self.path.join("api-key")
    }

    /// Returns the first API key, if there is one.
    pub fn api_key(&self) -> Option<String> {
        fs::read_to_string(self.api_key_file()).ok().map(|text| text.trim().to_owned())
    }

    /// Records the address of the network that runs here, and its certificate file if it uses TLS.
    pub fn write_address(&self, address: SocketAddr, certificate: Option<&Path>) -> anyhow::Result<()> {
        let write = |name: &str, text: &str| {
            let path = self.path.join(name);
            identity::replace_private(&path, format!("{text}\n").as_bytes())
                .with_context(|| format!("could not write {}", path.display()))
        };
        match certificate {
            // Commands may run in other working folders.
            Some(file) => write("certificate", &std::path::absolute(file)?.display().to_string())?,
            None => drop(fs::remove_file(self.path.join("certificate"))),
        }
        write("gateway.last-port", &address.port().to_string())?;
        write("address", &addresses::urls(address, certificate.is_some()).swap_remove(0))
    }

    /// Returns the port of the gateway that last ran here.
    pub fn last_port(&self) -> Option<u16> {
        fs::read_to_string(self.path.join("gateway.last-port")).ok()?.trim().parse().ok()
    }

    /// Forgets the network's address once it has stopped, since another program may listen there.
    pub fn forget_address(&self) {
        // A stale file does little harm: a client finds out that nothing answers, or that it is another program.
        for name in ["address", "certificate"] {
            let _ = fs::remove_file(self.path.join(name));
        }
    }

    /// Returns the certificate file of the gateway that runs or last ran here, if it uses TLS.
    pub fn certificate(&self) -> Option<PathBuf> {
        Some(PathBuf::from(fs::read_to_string(self.path.join("certificate")).ok()?.trim()))
    }

    /// Records the UDP address on which a node of this folder listens.
    pub fn write_listen_address(&self, node: &str, address: SocketAddrV4) -> anyhow::Result<()> {
        let path = self.path.join(format!("{node}.listen"));
        identity::replace_private(&path, format!("{address}\n").as_bytes())
            .with_context(|| format!("could not write {}", path.display()))
    }

    /// Returns the UDP address on which a node of this folder listens or last listened.
    pub fn listen_address(&self, node: &str) -> Option<SocketAddrV4> {
        fs::read_to_string(self.path.join(format!("{node}.listen"))).ok()?.trim().parse().ok()
    }

    /// Returns the URL of the network that runs or last ran here.
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
        let lock = data.lock(&["worker", "gateway"]).expect("the first");
        let error = data.lock(&["gateway"]).expect_err("the second").to_string();
        assert!(error.contains("--data-dir"), "{error}");
        data.lock(&["registry"]).expect("another role");
        drop(lock);
        data.lock(&["gateway"]).expect("free again");
    }

    #[test]
    fn the_roles_of_a_folder_are_those_that_were_started_or_enrolled_in_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let data = DataFolder::at(folder.path());
        data.node_key("gateway").expect("a key is no role");
        assert!(data.roles().is_empty());
        fs::write(data.kept_flags("worker"), "").expect("written");
        fs::write(data.enrolment("gateway"), "").expect("written");
        fs::write(data.kept_flags("registry"), "").expect("written");
        assert_eq!(data.roles(), ["registry", "gateway", "worker"]);
        fs::write(data.kept_flags("up"), "").expect("written");
        assert_eq!(data.roles(), ["up"]);
    }

    #[test]
    fn each_start_has_a_greater_number() {
        let folder = tempfile::tempdir().expect("a folder");
        let data = DataFolder::at(folder.path());
        data.node_key("worker").expect("makes the folder");
        assert_eq!(data.next_epoch("worker", 0).expect("the first"), 1);
        assert_eq!(data.next_epoch("worker", 0).expect("the second"), 2);
        assert_eq!(data.next_epoch("gateway", 0).expect("another node's first"), 1);
        assert_eq!(data.next_epoch("worker", 7).expect("one above what was believed"), 8);
        assert_eq!(data.next_epoch("worker", 7).expect("the next"), 9);
        fs::write(folder.path().join("nodes/worker.epoch"), "x").expect("written");
        assert!(data.next_epoch("worker", 0).is_err(), "never begins again by itself");
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
