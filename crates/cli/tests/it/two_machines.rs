//! Two machines, each a network namespace of its own with a cable between them: how a network begins with `tether up
//! --listen` and one `tether join`, and how `tether start` brings it back.

#![cfg(feature = "llama")]

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};

use rustix::process::{Signal, geteuid};
use serde_json::Value;

use crate::program::{Home, signal, wait_for};

/// Where the tools lie that make and enter namespaces.
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";
const HERE: &str = "10.99.0.1";
const THERE: &str = "10.99.0.2";

/// A machine: a network namespace, and a home. Nothing of it is left when it is dropped.
struct Machine {
    home: Home,
    /// Holds the namespace.
    holder: Child,
    running: Option<Child>,
}

impl Machine {
    /// Makes a machine beside another one, or the reason why this system lets nobody make one.
    fn new(beside: Option<&Machine>) -> Result<Self, String> {
        let hold = ["sh", "-c", "echo ready; exec sleep 600"];
        let mut command = Command::new("unshare");
        if let (Some(other), false) = (beside, geteuid().is_root()) {
            // Only within one user namespace may a cable lead from one to the other.
            command = Command::new("nsenter");
            command.args(other.entry()).args(["unshare", "--net"]);
        } else if geteuid().is_root() {
            command.arg("--net");
        } else {
            command.args(["--user", "--map-root-user", "--net"]);
        }
        command.args(hold).env("PATH", PATH).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut holder = command.spawn().map_err(|error| format!("unshare: {error}"))?;
        // Before it says so it may still be in our own namespace.
        let mut line = String::new();
        let _ = BufReader::new(holder.stdout.take().expect("piped")).read_line(&mut line);
        if line.trim() != "ready" {
            let output = holder.wait_with_output().map_err(|error| error.to_string())?;
            return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
        }
        Ok(Self { home: Home::new(), holder, running: None })
    }

    /// Returns how `nsenter` gets in.
    fn entry(&self) -> Vec<String> {
        let mut entry = vec!["--target".to_owned(), self.holder.id().to_string(), "--net".to_owned()];
        if !geteuid().is_root() {
            entry.extend(["--user", "--preserve-credentials"].map(str::to_owned));
        }
        entry
    }

    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.args(self.entry()).arg(program).args(arguments);
        command.env_clear().env("PATH", PATH).env("HOME", self.home.path()).current_dir(self.home.path());
        command
    }

    fn ip(&self, arguments: &[&str]) -> Result<(), String> {
        let output = self.command("ip", arguments).output().map_err(|error| format!("nsenter: {error}"))?;
        if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()) }
    }

    /// Gives its end of the cable an address.
    fn plug(&self, cable: &str, address: &str) -> Result<(), String> {
        self.ip(&["address", "add", &format!("{address}/24"), "dev", cable])?;
        self.ip(&["link", "set", cable, "up"])?;
        self.ip(&["link", "set", "lo", "up"])
    }

    fn tether(&self, arguments: &[&str]) -> Command {
        self.command(env!("CARGO_BIN_EXE_tether"), arguments)
    }

    /// Starts the program. What it prints goes to a file.
    fn start(&mut self, arguments: &[&str]) {
        let log = File::create(self.home.path().join("log")).expect("a file");
        let mut command = self.tether(arguments);
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a handle")).stderr(log);
        self.running = Some(command.spawn().expect("it starts"));
    }

    fn log(&self) -> String {
        fs::read_to_string(self.home.path().join("log")).unwrap_or_default()
    }

    /// Pulls its plug.
    fn kill(&mut self) {
        let mut running = self.running.take().expect("it runs");
        running.kill().expect("killed");
        running.wait().expect("ended");
    }

    /// Asks what runs to end.
    fn end(&mut self) {
        let mut running = self.running.take().expect("it runs");
        signal(running.id(), Signal::TERM);
        wait_for("a machine to end", || running.try_wait().expect("a child").is_some());
        assert!(running.wait().expect("ended").success(), "{}", self.log());
    }

    fn workers_ready(&self) -> usize {
        let output = self.tether(&["nodes", "--json"]).output().expect("it runs");
        let fleet: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let is_ready = |worker: &&Value| worker["report"]["modelCache"][0]["state"] == "ready";
        fleet["workers"].as_array().map_or(0, |workers| workers.iter().filter(is_ready).count())
    }

    fn ask(&self) -> String {
        let question = ["run", "tether-tiny", "What is 3 + 4?", "--temperature", "0"];
        let output = self.tether(&question).output().expect("it runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for child in self.running.iter_mut().chain([&mut self.holder]) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Makes two machines and a cable, or says why that cannot be done here.
fn machines() -> Result<[Machine; 2], String> {
    let here = Machine::new(None)?;
    let there = Machine::new(Some(&here))?;
    let other = there.holder.id().to_string();
    here.ip(&["link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", &other])?;
    here.plug("cable", HERE)?;
    there.plug("cable", THERE)?;
    Ok([here, there])
}

#[test]
fn two_machines_make_a_network_with_two_commands_and_are_back_with_one_each() {
    let [mut here, mut there] = match machines() {
        Ok(machines) => machines,
        Err(reason) => {
            println!("skipped: this system lets nobody make network namespaces: {reason}");
            return;
        }
    };
    // Without workers of its own: whatever answers is on the other machine.
    here.start(&["up", "--workers", "0", "--listen", &format!("{HERE}:49737")]);
    let invite = |log: &str| log.lines().find_map(|line| line.trim().strip_prefix("tether join ").map(str::to_owned));
    wait_for("the line for the other machine", || invite(&here.log()).is_some());
    there.start(&["join", &invite(&here.log()).expect("printed")]);
    wait_for("the other machine to be ready", || here.workers_ready() == 1);
    assert!(here.ask().contains("3 + 4 = 7"));

    here.kill();
    there.kill();
    here.start(&["start"]);
    there.start(&["start"]);
    wait_for("the network to be back", || here.workers_ready() == 1);
    assert!(here.ask().contains("3 + 4 = 7"));
    there.end();
    here.end();
}

/// Returns a model's row of the list that a machine shows.
fn row(machine: &Machine, id: &str) -> Value {
    let output = machine.tether(&["model", "list", "--json"]).output().expect("it runs");
    let nodes: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let rows = nodes["data"].as_array().cloned().unwrap_or_default();
    rows.into_iter().find(|row| row["id"] == id).unwrap_or_default()
}

#[test]
fn a_model_that_is_added_on_one_machine_is_answered_by_the_other() {
    let [mut here, mut there] = match machines() {
        Ok(machines) => machines,
        Err(reason) => {
            println!("skipped: this system lets nobody make network namespaces: {reason}");
            return;
        }
    };
    here.start(&["up", "--workers", "0", "--listen", &format!("{HERE}:49737")]);
    let invite = |log: &str| log.lines().find_map(|line| line.trim().strip_prefix("tether join ").map(str::to_owned));
    wait_for("the line for the other machine", || invite(&here.log()).is_some());
    there.start(&["join", &invite(&here.log()).expect("printed")]);
    wait_for("the other machine to be ready", || here.workers_ready() == 1);

    let bytes = [tether_cli::tiny_model::BYTES, b"of the one machine"].concat();
    fs::write(here.home.path().join("mine.gguf"), &bytes).expect("written");
    let added = here.tether(&["model", "add", "mine.gguf"]).output().expect("it runs");
    assert!(added.status.success(), "{}", String::from_utf8_lossy(&added.stderr));
    let state = |machine: &Machine| row(machine, "mine")["where"][0]["state"].clone();
    wait_for("the worker to offer it", || state(&here) == "not fetched");
    let digest = protocol::Digest::of(&bytes).to_string();
    let fetched = there.home.data().join("artifacts/sha256").join(&digest[..2]).join(&digest);
    assert!(!fetched.exists(), "nobody has asked for it");
    let question = ["run", "mine", "What is 3 + 4?", "--temperature", "0"];
    let output = here.tether(&question).output().expect("it runs");
    assert!(
        String::from_utf8_lossy(&output.stdout).contains("3 + 4 = 7"),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(fetched.exists() && !there.home.data().join("artifacts/partial").join(&digest).exists());
    wait_for("the list to show where it is", || state(&here) == "ready");
    // Only what was fetched goes when the model is removed.
    let removed = here.tether(&["model", "rm", "mine", "--force"]).output().expect("it runs");
    assert!(removed.status.success(), "{}", String::from_utf8_lossy(&removed.stderr));
    wait_for("the worker to let go of it", || row(&here, "mine").is_null());
    there.end();
    here.end();
}
