//! Runs the commands of the documents, so that what they promise and what the program does stay the same.
//!
//! A block that begins with "```sh run" is run, line by line, in a home of its own for each section. Commands that stay
//! up are started and waited for; a network in one process, and the end of a section, stop what ran before, as Ctrl-C
//! does.

#![cfg(feature = "llama")]

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use rustix::process::Signal;
use tether_cli::tiny_model;

use crate::program::{Home, signal, wait_for};

/// Model files that the documents speak of.
const FILES: [&str; 3] = ["SmolLM2-135M-Instruct.Q4_1.gguf", "model.gguf", "other.gguf"];
/// Commands that stay up, and what each prints once it is there.
const STAYING: [(&str, &str); 4] =
    [("up", "Ctrl-C stops it"), ("registry", "next: tether invite"), ("join", "on UDP"), ("worker", "on UDP")];
/// Where the documents say that the gateway listens.
const USUAL_ADDRESS: &str = "127.0.0.1:7070";

/// The commands of one section, in their order.
struct Section {
    title: String,
    commands: Vec<String>,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Takes the runnable commands out of a document. Lines that end with a backslash go on.
fn sections(text: &str) -> Vec<Section> {
    let mut sections = vec![Section { title: String::new(), commands: vec![] }];
    let (mut runs, mut begun) = (false, String::new());
    for line in text.lines() {
        if let Some(title) = line.strip_prefix("## ") {
            sections.push(Section { title: title.to_owned(), commands: vec![] });
        } else if line.starts_with("```") {
            runs = line == "```sh run";
        } else if runs && !line.trim().is_empty() {
            begun.push_str(line);
            begun.push('\n');
            if !line.ends_with('\\') {
                let command = std::mem::take(&mut begun);
                sections.last_mut().expect("the first").commands.push(command.trim_end().to_owned());
            }
        }
    }
    sections.retain(|section| !section.commands.is_empty());
    sections
}

/// A person who types the commands of a section.
struct Typist {
    home: Home,
    /// The variables that were set so far.
    variables: Vec<String>,
    invites: Vec<String>,
    key_id: String,
    running: Vec<(String, Child)>,
    /// Commands that were started: each has a log of its own.
    started: usize,
}

impl Typist {
    fn new() -> Self {
        let home = Home::new();
        symlink(env!("CARGO_BIN_EXE_tether"), home.path().join("tether")).expect("linked");
        for (number, file) in FILES.iter().enumerate() {
            // Each is a model of its own.
            let bytes = [tiny_model::BYTES, &vec![0; number + 1]].concat();
            fs::write(home.path().join(file), bytes).expect("written");
        }
        Self { home, variables: vec![], invites: vec![], key_id: String::new(), running: vec![], started: 0 }
    }

    /// Types one command, and says what is wrong with what comes of it.
    fn types(&mut self, command: &str) {
        if let Some(recipe) = command.strip_prefix("make ") {
            let recipe = recipe.split_whitespace().next().expect("a recipe");
            let makefile = fs::read_to_string(root().join("Makefile")).expect("a Makefile");
            assert!(makefile.lines().any(|line| line.starts_with(&format!("{recipe}:"))), "no recipe {recipe}");
            if recipe == "up" {
                self.stays("tether up", "up");
            }
            return;
        }
        if command.split_once('=').is_some_and(|(name, _)| name.bytes().all(|byte| byte.is_ascii_uppercase())) {
            self.variables.push(command.to_owned());
            return;
        }
        let role = command.strip_prefix("tether ").and_then(|rest| rest.split_whitespace().next()).unwrap_or_default();
        if role == "join" {
            let invites = std::mem::take(&mut self.invites);
            assert!(!invites.is_empty(), "{command}: nobody was invited");
            for invite in invites {
                self.stays(&command.replace("tth_join_…", &invite), role);
            }
        } else if STAYING.iter().any(|(name, _)| *name == role) {
            self.stays(command, role);
        } else {
            self.ends(command);
        }
    }

    fn ends(&mut self, command: &str) {
        let command = command.replace(USUAL_ADDRESS, &self.address()).replace("KEY_ID", &self.key_id);
        if command.starts_with("tether nodes") || command.starts_with("tether doctor") {
            // Whoever reads the document types slower than a model loads.
            wait_for("the network to be well", || self.bash("tether doctor").status.success());
        }
        let output = self.bash(&command);
        let (said, errors) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{command}\n{said}\n{errors}");
        self.invites.extend(said.split_whitespace().filter(|word| word.starts_with("tth_join_")).map(str::to_owned));
        if let Some(key) = said.trim().strip_prefix("tth_live_") {
            self.key_id = key.chars().take(8).collect();
        }
    }

    fn stays(&mut self, command: &str, role: &str) {
        if role == "up" {
            self.stop();
        }
        let (_, ready) = STAYING.iter().find(|(name, _)| *name == role).expect("it stays");
        self.started += 1;
        let log = self.home.path().join(format!("{}.log", self.started));
        let file = || File::options().create(true).append(true).open(&log).expect("a file");
        let mut bash = self.shell(&format!("exec {command}"));
        let mut child = bash.stdout(Stdio::from(file())).stderr(Stdio::from(file())).spawn().expect("it starts");
        wait_for(command, || {
            let output = fs::read_to_string(&log).unwrap_or_default();
            assert!(child.try_wait().expect("a child").is_none(), "{command} ended by itself:\n{output}");
            output.contains(ready)
        });
        self.running.push((command.to_owned(), child));
    }

    fn bash(&self, command: &str) -> Output {
        self.shell(command).output().expect("bash runs")
    }

    fn shell(&self, command: &str) -> Command {
        let home = self.home.path();
        let mut bash = Command::new("bash");
        bash.arg("-ec").arg([&self.variables[..], &[command.to_owned()]].concat().join("\n"));
        bash.env_clear().env("HOME", home).env("PATH", format!("{}:/usr/local/bin:/usr/bin:/bin", home.display()));
        // Any port: somebody else may have the usual one on the machine of a test.
        bash.env("TETHER_GATEWAY__BIND", "127.0.0.1:0").current_dir(home).stdin(Stdio::null());
        bash
    }

    fn address(&self) -> String {
        let url = fs::read_to_string(self.home.data().join("address")).unwrap_or_default();
        url.trim().trim_start_matches("http://").to_owned()
    }

    /// Presses Ctrl-C in every terminal, those that came last first.
    fn stop(&mut self) {
        while let Some((command, mut child)) = self.running.pop() {
            signal(child.id(), Signal::INT);
            wait_for("a command to end", || child.try_wait().expect("a child").is_some());
            let status = child.wait().expect("ended");
            assert!(status.success(), "{command} ended with {status}");
        }
    }
}

impl Drop for Typist {
    fn drop(&mut self) {
        for (_, child) in &mut self.running {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs what a document holds, and returns how many commands that were.
fn run(document: &str) -> usize {
    let text = fs::read_to_string(root().join(document)).expect("the document");
    let mut count = 0;
    for Section { title, commands } in sections(&text) {
        let mut typist = Typist::new();
        for command in &commands {
            // The note behind a command is for people.
            let command = command.split("  #").next().expect("a command").trim_end();
            typist.types(command);
            count += 1;
        }
        typist.stop();
        assert!(typist.invites.is_empty(), "{title}: an invite is left over");
    }
    count
}

#[test]
fn the_commands_of_the_readme_do_what_it_says() {
    assert!(run("README.md") >= 12);
}

#[test]
fn the_commands_of_the_operators_page_do_what_it_says() {
    assert!(run("docs/operations/README.md") >= 6);
}

#[test]
fn only_tagged_blocks_are_run_and_long_lines_are_joined() {
    let text = "## A\n```sh\nrm -rf x\n```\n```sh run\none \\\n  two\n\nthree\n```\n## B\n```toml\na = 1\n```\n";
    let sections = sections(text);
    assert_eq!(sections.len(), 1);
    assert_eq!(
        (sections[0].title.as_str(), sections[0].commands.as_slice()),
        ("A", &["one \\\n  two".to_owned(), "three".to_owned()][..])
    );
}
