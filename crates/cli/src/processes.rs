//! Nodes as child processes on this machine: each runs this program on a data folder of its own.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::net::SocketAddrV4;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::data_folder::DataFolder;

/// How long a node may take to end when asked to.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// Nodes as child processes. Those that still run when this is dropped are killed.
#[derive(Debug)]
pub struct Processes {
    program: PathBuf,
    folder: PathBuf,
    running: Vec<Member>,
    /// Settings of all nodes, which then get none from the environment.
    settings: Option<PathBuf>,
    /// Commands that run a node elsewhere, such as in another network namespace.
    wrappers: Vec<(String, Vec<String>)>,
}

#[derive(Debug)]
struct Member {
    name: String,
    child: Child,
}

impl Processes {
    /// Runs this program, with the nodes' folders in `folder`.
    pub fn below(folder: &Path) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("could not find the path of this program")?;
        Ok(Self::of(program, folder))
    }

    /// Runs the given program, with the nodes' folders in `folder`.
    pub fn of(program: impl Into<PathBuf>, folder: &Path) -> Self {
        let program = program.into();
        Self { program, folder: folder.to_owned(), running: vec![], settings: None, wrappers: vec![] }
    }

    /// Gives all nodes the settings of one file and none of the user's.
    #[must_use]
    pub fn with_settings(mut self, file: &Path) -> Self {
        self.settings = Some(file.to_owned());
        self
    }

    /// Runs a node by a command to which its own command line is appended. It must replace itself by the node.
    pub fn wrap(&mut self, name: &str, command: Vec<String>) {
        self.wrappers.push((name.to_owned(), command));
    }

    /// Returns a node's data folder.
    pub fn data(&self, name: &str) -> DataFolder {
        DataFolder::at(self.folder.join(name))
    }

    /// Starts a node. Its log goes to a file in its folder.
    pub fn start(&mut self, name: &str, arguments: &[&str]) -> anyhow::Result<()> {
        let data = self.data(name);
        data.create()?;
        let log = self.log(name);
        let log = File::create(&log).with_context(|| format!("could not write {}", log.display()))?;
        let mut command = self.command(name, arguments);
        let child = command
            .arg("--with-parent")
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("no second handle")?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("could not start {}", self.program.display()))?;
        self.running.push(Member { name: name.to_owned(), child });
        Ok(())
    }

    /// Runs a command on a node's folder to its end, and returns its output.
    pub fn run(&self, name: &str, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self.command(name, arguments).output().context("could not run this program")?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim().trim_start_matches("tether: "));
        }
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    }

    fn command(&self, name: &str, arguments: &[&str]) -> Command {
        let wrapper = self.wrappers.iter().find(|(wrapped, _)| wrapped == name).map(|(_, command)| command.as_slice());
        let mut command = match wrapper {
            Some([tool, rest @ ..]) => {
                let mut command = Command::new(tool);
                command.args(rest).arg(&self.program);
                command
            }
            _ => Command::new(&self.program),
        };
        command.args(arguments).args([OsStr::new("--data-dir"), self.data(name).path().as_os_str()]);
        if let Some(settings) = &self.settings {
            command.arg("--config").arg(settings);
            for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"TETHER_")) {
                command.env_remove(name);
            }
        }
        command
    }

    /// Waits until `look` finds something in a node's folder, and returns it.
    pub async fn wait_for<T>(
        &mut self,
        name: &str,
        within: Duration,
        look: impl Fn(&DataFolder) -> Option<T>,
    ) -> anyhow::Result<T> {
        let data = self.data(name);
        let deadline = Instant::now() + within;
        loop {
            if let Some(found) = look(&data) {
                return Ok(found);
            }
            self.check(name)?;
            if Instant::now() >= deadline {
                bail!("{name} is not ready after {} s\n{}", within.as_secs(), self.last_words(name));
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Returns the UDP address of a node once it listens.
    pub async fn listening(&mut self, name: &str, role: &str) -> anyhow::Result<SocketAddrV4> {
        self.wait_for(name, END_TIMEOUT, |data| data.listen_address(role)).await
    }

    /// Fails if a node has ended by itself.
    pub fn check(&mut self, name: &str) -> anyhow::Result<()> {
        let member = self.running.iter_mut().find(|member| member.name == name).context("no such node")?;
        if let Some(status) = member.child.try_wait().context("no word of a child")? {
            bail!("{name} ended by itself ({status})\n{}", self.last_words(name));
        }
        Ok(())
    }

    /// Returns whether a node has ended by itself.
    pub fn has_ended(&mut self, name: &str) -> bool {
        let member = self.running.iter_mut().find(|member| member.name == name);
        member.is_some_and(|member| matches!(member.child.try_wait(), Ok(Some(_))))
    }

    fn log(&self, name: &str) -> PathBuf {
        self.folder.join(name).join("log")
    }

    fn last_words(&self, name: &str) -> String {
        let log = fs::read_to_string(self.log(name)).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(10)..].join("\n")
    }

    /// Returns a node's process id.
    pub fn pid(&self, name: &str) -> Option<u32> {
        self.running.iter().find(|member| member.name == name).map(|member| member.child.id())
    }

    /// Kills a node at once, as a power cut would.
    pub fn kill(&mut self, name: &str) -> anyhow::Result<()> {
        let at = self.running.iter().position(|member| member.name == name).context("no such node")?;
        let mut member = self.running.swap_remove(at);
        member.child.kill().with_context(|| format!("could not kill {name}"))?;
        member.child.wait().context("no word of a child")?;
        Ok(())
    }

    /// Asks a node to end, and waits for it. Fails if it has to be killed, or exits with an error.
    pub async fn end(&mut self, name: &str) -> anyhow::Result<()> {
        let member = self.running.iter_mut().find(|member| member.name == name).context("no such node")?;
        let ended = member.end().await?;
        self.running.retain(|member| member.name != name);
        match ended {
            Some(status) if status.success() => Ok(()),
            Some(status) => bail!("{name} ended with {status}\n{}", self.last_words(name)),
            None => bail!("{name} did not end within {} s and was killed", END_TIMEOUT.as_secs()),
        }
    }

    /// Asks every node to end, those started last first, and kills those that do not.
    pub async fn stop(&mut self) -> anyhow::Result<()> {
        let mut stubborn = vec![];
        // Each node stays in the list until it has ended, so that dropping this future leaves no process behind.
        while let Some(member) = self.running.last_mut() {
            if member.end().await?.is_none() {
                stubborn.push(member.name.clone());
            }
            self.running.pop();
        }
        if !stubborn.is_empty() {
            bail!("{} did not end within {} s and was killed", stubborn.join(", "), END_TIMEOUT.as_secs());
        }
        Ok(())
    }
}

impl Member {
    /// Asks the process to end, and returns its exit status; `None` if it had to be killed.
    async fn end(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        if let Some(pid) = pid {
            let _ = kill_process(pid, Signal::TERM);
        }
        let deadline = Instant::now() + END_TIMEOUT;
        loop {
            if let Some(status) = self.child.try_wait().context("no word of a child")? {
                return Ok(Some(status));
            }
            if Instant::now() >= deadline {
                self.child.kill().context("could not kill a child")?;
                self.child.wait().context("no word of a child")?;
                return Ok(None);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        for member in &mut self.running {
            let _ = member.child.kill();
            let _ = member.child.wait();
        }
    }
}
