//! Runs the built program with a home of its own.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// A home folder, where nobody's settings or keys lie.
pub(crate) struct Home {
    folder: tempfile::TempDir,
}

/// A running `tether up`.
pub(crate) struct Up {
    child: Child,
    pub(crate) url: String,
    pub(crate) key: String,
}

impl Home {
    pub(crate) fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("a folder") }
    }

    /// A home whose commands do not ask whatever gateway another test runs at the usual address.
    pub(crate) fn apart() -> Self {
        let home = Self::new();
        let folder = home.path().join(".config/tether");
        std::fs::create_dir_all(&folder).expect("made");
        // Nobody listens there.
        let settings = "version = 1\n[gateway]\nbind = \"127.0.0.1:9\"\n";
        std::fs::write(folder.join("tether.toml"), settings).expect("written");
        home
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.path().join(".local/share/tether")
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tether"));
        command.args(arguments).env_clear().env("HOME", self.path()).current_dir(self.path());
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("the program runs")
    }

    /// Runs a command that must do well, and returns what it prints.
    pub(crate) fn well(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let text = String::from_utf8(output.stdout).expect("text");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}\n{text}\n{errors}");
        text
    }

    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.well(arguments)).expect("JSON")
    }

    /// Starts the network on a free port and waits until a model is ready.
    pub(crate) fn up(&self, settings: &[(&str, &str)]) -> Up {
        self.up_with(&[], settings)
    }

    /// Starts the network with more arguments.
    pub(crate) fn up_with(&self, more: &[&str], settings: &[(&str, &str)]) -> Up {
        let wanted = settings.iter().find(|(name, _)| *name == "TETHER_WORKERS");
        let workers = wanted.map_or(1, |(_, count)| count.parse().expect("a number"));
        let mut command = self.command(&[&["up", "--bind", "127.0.0.1:0"], more].concat());
        command.envs(settings.iter().copied()).stdout(Stdio::null()).stderr(Stdio::null());
        self.until_ready(command, workers)
    }

    /// Starts the network with an output that cannot be written.
    pub(crate) fn up_on_a_full_disk(&self) -> Up {
        let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").expect("a full disk");
        let mut command = self.command(&["up", "--bind", "127.0.0.1:0"]);
        command.env("TETHER_LOG__FILTER", "debug").stdout(full()).stderr(full());
        self.until_ready(command, 1)
    }

    /// Starts the network with its log in a file.
    pub(crate) fn up_logging_to(&self, log: &Path, settings: &[(&str, &str)]) -> Up {
        let mut command = self.command(&["up", "--bind", "127.0.0.1:0"]);
        command.envs(settings.iter().copied()).stdout(Stdio::null());
        command.stderr(std::fs::File::create(log).expect("a log"));
        self.until_ready(command, 1)
    }

    fn until_ready(&self, mut command: Command, workers: usize) -> Up {
        let child = command.spawn().expect("the program starts");
        let mut up = Up { child, url: String::new(), key: String::new() };
        wait_for("the network to be ready", || {
            assert!(up.child.try_wait().expect("a child").is_none(), "the network ended by itself");
            up.url = self.kept("address");
            up.key = self.kept("api-key");
            !up.url.is_empty() && self.run(&["nodes"]).status.success() && self.ready(&up, workers)
        });
        up
    }

    fn kept(&self, file: &str) -> String {
        std::fs::read_to_string(self.data().join(file)).unwrap_or_default().trim().to_owned()
    }

    fn ready(&self, up: &Up, expected: usize) -> bool {
        let fleet = self.json(&["nodes", "--json"]);
        let workers = fleet["workers"].as_array().cloned().unwrap_or_default();
        let ready = |worker: &Value| {
            let models = worker["report"]["modelCache"].as_array();
            models.is_some_and(|models| !models.is_empty() && models.iter().all(|model| model["state"] == "ready"))
        };
        !up.key.is_empty() && workers.len() == expected && workers.iter().all(ready)
    }
}

impl Up {
    /// Asks it to end, and returns its exit code.
    pub(crate) fn end(mut self) -> Option<i32> {
        signal(self.child.id(), Signal::TERM);
        wait_for("the network to end", || self.child.try_wait().expect("a child").is_some());
        self.child.try_wait().expect("a child").and_then(|status| status.code())
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The processes it started.
    pub(crate) fn children(&self) -> Vec<u32> {
        children(self.child.id())
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("ended");
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns the processes that a process has started and that still run.
pub(crate) fn children(id: u32) -> Vec<u32> {
    let mut pids: Vec<u32> = vec![];
    // Children belong to the thread that made them.
    for task in std::fs::read_dir(format!("/proc/{id}/task")).into_iter().flatten().flatten() {
        let text = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
        pids.extend(text.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
    }
    pids.sort_unstable();
    pids.dedup();
    pids
}

pub(crate) fn signal(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a process id");
    let _ = kill_process(pid, signal);
}

pub(crate) fn lives(pid: u32) -> bool {
    // A zombie waits for its parent and runs nothing.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

/// Waits until something is so, at most half a minute.
#[expect(clippy::disallowed_methods, reason = "no runtime here, and another process to wait for")]
pub(crate) fn wait_for(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !so() {
        assert!(Instant::now() < deadline, "waited half a minute for {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}
