//! Machines, cables and disks within this machine, by namespaces of Linux. The drill runs itself again in namespaces of
//! its own, where it may make them even if it is not root.

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, bail};
use rustix::process::geteuid;

/// The address of the machine on which everything runs that has no machine of its own.
pub(super) const HERE: &str = "10.99.0.1";
/// Where the tools lie.
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// Returns the command that runs another one in new namespaces for the network and mounts.
pub(super) fn enter() -> Vec<&'static str> {
    let mut command = vec!["unshare", "--net", "--mount"];
    if !geteuid().is_root() {
        command.extend(["--user", "--map-root-user"]);
    }
    command.extend(["sh", "-c", "ip link set lo up && exec \"$0\" \"$@\""]);
    command
}

/// Returns why this machine allows no such namespaces, if it does not.
pub(super) fn refusal() -> Option<String> {
    let test = "mount -t tmpfs -o size=1m tmpfs /mnt && ip link add switch type bridge && \
                ip link add one type veth peer name other";
    let command = [&enter()[..], &["sh", "-c", test]].concat();
    run(&command).err().map(|error| format!("{error:#}"))
}

/// Another machine: a network namespace with a cable to this one.
pub(super) struct Namespace {
    /// The node that runs there.
    pub(super) node: &'static str,
    /// Its address for other nodes.
    pub(super) address: &'static str,
    /// Its address for clients, on a cable that is never cut.
    pub(super) front: &'static str,
    cable: &'static str,
    /// Holds the namespace, and ends with this process.
    holder: Child,
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// Makes a machine for the gateway and one for each worker. All are connected by a switch.
pub(super) fn lay_cables() -> anyhow::Result<Vec<Namespace>> {
    // A drill that runs several such networks uses one switch for each, one after the other.
    let _ = run(&["ip", "link", "delete", "switch"]);
    run(&["ip", "link", "add", "switch", "type", "bridge"])?;
    run(&["ip", "address", "add", &format!("{HERE}/24"), "dev", "switch"])?;
    run(&["ip", "link", "set", "switch", "up"])?;
    let gateway = Namespace::new("gateway", "10.99.0.2", "10.98.0.2", "to-gateway")?;
    let holder = gateway.holder.id().to_string();
    let _ = run(&["ip", "link", "delete", "to-front"]);
    run(&["ip", "link", "add", "to-front", "type", "veth", "peer", "name", "front", "netns", &holder])?;
    run(&["ip", "address", "add", "10.98.0.1/24", "dev", "to-front"])?;
    run(&["ip", "link", "set", "to-front", "up"])?;
    gateway.inside(&["ip", "address", "add", "10.98.0.2/24", "dev", "front"])?;
    gateway.inside(&["ip", "link", "set", "front", "up"])?;
    let workers = [("worker-1", "10.99.0.3", "to-worker-1"), ("worker-2", "10.99.0.4", "to-worker-2")];
    let workers = workers.map(|(node, address, cable)| Namespace::new(node, address, address, cable));
    [Ok(gateway)].into_iter().chain(workers).collect()
}

impl Namespace {
    fn new(
        node: &'static str,
        address: &'static str,
        front: &'static str,
        cable: &'static str,
    ) -> anyhow::Result<Self> {
        let mut holder = Command::new("unshare")
            .args(["--net", "sh", "-c", "echo ready; exec cat"])
            .env("PATH", PATH)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("could not run unshare")?;
        // Before it says so, it may be in our own namespace.
        let mut line = String::new();
        if let Some(output) = holder.stdout.take() {
            BufReader::new(output).read_line(&mut line).context("a namespace says nothing")?;
        }
        let machine = Self { node, address, front, cable, holder };
        if line.trim() != "ready" {
            bail!("this machine allows no further network namespace");
        }
        let other = machine.holder.id().to_string();
        let _ = run(&["ip", "link", "delete", cable]);
        run(&["ip", "link", "add", cable, "type", "veth", "peer", "name", "cable", "netns", &other])?;
        run(&["ip", "link", "set", cable, "master", "switch", "up"])?;
        machine.inside(&["ip", "address", "add", &format!("{address}/24"), "dev", "cable"])?;
        machine.inside(&["ip", "link", "set", "cable", "up"])?;
        machine.inside(&["ip", "link", "set", "lo", "up"])?;
        Ok(machine)
    }

    /// Returns the command that runs another one on this machine.
    pub(super) fn entry(&self) -> Vec<String> {
        ["nsenter", "--net", "--target", &self.holder.id().to_string()].map(str::to_owned).to_vec()
    }

    fn inside(&self, command: &[&str]) -> anyhow::Result<()> {
        let entry = self.entry();
        let entry: Vec<&str> = entry.iter().map(String::as_str).collect();
        run(&[&entry[..], command].concat())
    }

    pub(super) fn set_cable(&self, is_whole: bool) -> anyhow::Result<()> {
        run(&["ip", "link", "set", self.cable, if is_whole { "up" } else { "down" }])
    }
}

/// Mounts an empty disk of a size.
pub(super) fn mount_disk(folder: &Path, mib: u32) -> anyhow::Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("could not make {}", folder.display()))?;
    let folder = folder.display().to_string();
    run(&["mount", "-t", "tmpfs", "-o", &format!("size={mib}m,mode=0700"), "tmpfs", &folder])
}

/// Unmounts a disk, even if a process that is about to end still uses it.
pub(super) fn unmount(folder: &Path) {
    let _ = run(&["umount", "-l", &folder.display().to_string()]);
}

/// Writes a file until the disk is full.
pub(super) fn fill(file: &Path) -> anyhow::Result<()> {
    let mut file = File::create(file).context("could not make a file")?;
    // The last bytes are filled as well.
    for block in [1 << 16, 1 << 9, 1] {
        loop {
            match file.write(&vec![0; block]) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::StorageFull => break,
                Err(error) => return Err(error).context("could not fill a disk"),
            }
        }
    }
    Ok(())
}

fn run(command: &[&str]) -> anyhow::Result<()> {
    let Some((tool, arguments)) = command.split_first() else { bail!("an empty command") };
    let output = Command::new(tool).args(arguments).env("PATH", PATH).output();
    let output = output.with_context(|| format!("could not run {tool}"))?;
    if output.status.success() {
        return Ok(());
    }
    bail!("{tool}: {}", String::from_utf8_lossy(&output.stderr).trim())
}
