//! Closes an engine process off from files, the network and other processes, before it reads a byte of its model.
//!
//! A malicious model file or chat template that takes over the process finds no key in its environment, opens no file,
//! reaches no address, and can neither start, trace nor signal another process. The process needs none of that: its
//! files arrive as open descriptors, and drivers are started before. Landlock refuses paths, and a seccomp filter
//! refuses system calls; both apply for good, and to root as well. Only Linux has them. Whatever the kernel lacks is
//! reported and not hidden: the process tries each way out before it goes on. See
//! `docs/adr/0050-engines-in-a-sandbox.md`.

#[cfg(target_os = "linux")]
mod call_numbers;
#[cfg(target_os = "linux")]
mod files;
#[cfg(target_os = "linux")]
mod system_calls;

use std::fmt;
use std::fs::File;

use serde::{Deserialize, Serialize};

/// The sandbox of an engine process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sandbox {
    /// It is turned off in the settings.
    Off,
    On {
        /// What the process cannot reach.
        closed: Vec<Target>,
        /// What it can reach all the same, and why.
        gaps: Vec<String>,
        /// What enforces it, such as `Landlock ABI 7`.
        means: Vec<String>,
    },
}

/// What a sandbox closes a process off from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    Files,
    Network,
    /// Starting, tracing and signalling processes.
    Processes,
}

impl fmt::Display for Target {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Files => "files",
            Self::Network => "network",
            Self::Processes => "other processes",
        })
    }
}

impl Sandbox {
    /// Returns whether nothing is within the process's reach.
    pub fn is_complete(&self) -> bool {
        matches!(self, Self::On { gaps, .. } if gaps.is_empty())
    }
}

impl fmt::Display for Sandbox {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::On { closed, gaps, means } = self else {
            return formatter.write_str(
                "off: a malicious model file could read files and use the network; see worker.engine_sandbox",
            );
        };
        let mut parts = Vec::new();
        if !closed.is_empty() {
            let closed: Vec<_> = closed.iter().map(|target| format!("no {target}")).collect();
            parts.push(format!("{} ({})", closed.join(", "), means.join(", ")));
        }
        parts.extend(gaps.iter().cloned());
        formatter.write_str(&parts.join("; "))
    }
}

/// What a process still needs after its sandbox is closed.
#[derive(Debug, Default)]
pub(super) struct Needs<'a> {
    /// Files that llama.cpp opens again by path: the parts of a split model.
    pub(super) files: Vec<&'a File>,
    /// Whether it computes on GPUs, whose drivers open devices and libraries when they are first used.
    pub(super) drivers: bool,
}

/// What the kernel did with each means: its name, or why it is missing.
#[cfg(target_os = "linux")]
#[derive(Debug)]
struct Means {
    landlock: Result<String, String>,
    seccomp: Result<String, String>,
    /// Threads that Landlock does not cover.
    threads_outside: usize,
    /// Whether files that may only be read can be emptied.
    may_empty_files: bool,
}

/// Closes the sandbox of this process for good, tries what it closes, and reports.
///
/// Call it before other threads are started: Landlock covers those that exist only since Linux 7.0.
#[cfg(target_os = "linux")]
pub(super) fn close(needs: &Needs<'_>) -> Sandbox {
    let threads = std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    let files = files::close(needs);
    let covers_threads = files.as_ref().is_ok_and(|closed| closed.all_threads);
    let means = Means {
        may_empty_files: needs.drivers && files.as_ref().is_ok_and(|closed| closed.abi < files::GUARDS_LENGTH),
        threads_outside: if covers_threads { 0 } else { threads.saturating_sub(1) },
        landlock: files.map(|closed| format!("Landlock ABI {}", closed.abi)),
        seccomp: system_calls::close(needs).map(|()| "seccomp".to_owned()),
    };
    let within_reach = [
        (Target::Files, File::open("/").is_ok()),
        (Target::Network, can_make_a_socket()),
        (Target::Processes, means.seccomp.is_err() || can_signal_its_parent()),
    ];
    report(&means, &within_reach)
}

#[cfg(not(target_os = "linux"))]
pub(super) fn close(_: &Needs<'_>) -> Sandbox {
    let gaps = vec!["files, network and other processes are within reach: only Linux has this sandbox".to_owned()];
    Sandbox::On { closed: Vec::new(), gaps, means: Vec::new() }
}

#[cfg(target_os = "linux")]
fn can_make_a_socket() -> bool {
    use rustix::net::{AddressFamily, SocketType, socket};

    [AddressFamily::INET, AddressFamily::UNIX].iter().any(|family| socket(*family, SocketType::STREAM, None).is_ok())
}

#[cfg(target_os = "linux")]
fn can_signal_its_parent() -> bool {
    rustix::process::getppid().is_some_and(|parent| rustix::process::test_kill_process(parent).is_ok())
}

#[cfg(target_os = "linux")]
fn report(means: &Means, within_reach: &[(Target, bool)]) -> Sandbox {
    let all = [&means.landlock, &means.seccomp];
    let missing: Vec<&str> = all.iter().filter_map(|one| one.as_ref().err().map(String::as_str)).collect();
    let why = if missing.is_empty() { "the kernel does not say why".to_owned() } else { missing.join(", and ") };
    let is_open =
        |is_open: bool| within_reach.iter().filter(move |(_, open)| *open == is_open).map(|(target, _)| *target);
    let mut gaps: Vec<_> = is_open(true).map(|target| format!("{target} within reach: {why}")).collect();
    if means.landlock.is_ok() && means.threads_outside > 0 {
        gaps.push(format!(
            "{} threads of drivers can reach files, because Landlock covers running threads only since Linux 7.0",
            means.threads_outside
        ));
    }
    if means.may_empty_files {
        gaps.push(
            "libraries and devices that drivers may read can be emptied by whoever may write to them, because \
             Landlock guards the length of files only since Linux 6.2"
                .to_owned(),
        );
    }
    let means = all.into_iter().filter_map(|one| one.clone().ok()).collect();
    Sandbox::On { closed: is_open(false).collect(), gaps, means }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    const ALL: [Target; 3] = [Target::Files, Target::Network, Target::Processes];

    fn reported(landlock: Result<&str, &str>, seccomp: Result<&str, &str>, open: &[Target]) -> Sandbox {
        let owned = |one: Result<&str, &str>| one.map(str::to_owned).map_err(str::to_owned);
        let (landlock, seccomp) = (owned(landlock), owned(seccomp));
        let means = Means { landlock, seccomp, threads_outside: 0, may_empty_files: false };
        report(&means, &ALL.map(|target| (target, open.contains(&target))))
    }

    #[test]
    fn what_is_closed_is_told_with_its_means_and_what_is_not_with_the_reason() {
        let whole = reported(Ok("Landlock ABI 7"), Ok("seccomp"), &[]);
        assert_eq!(whole.to_string(), "no files, no network, no other processes (Landlock ABI 7, seccomp)");
        assert!(whole.is_complete());
        // Without Landlock, the filter refuses to open files all the same, unless the model is split.
        let filter = reported(Err("this kernel has no Landlock"), Ok("seccomp"), &[]);
        assert!(filter.is_complete() && filter.to_string().ends_with("(seccomp)"), "{filter}");
        let split = reported(Err("this kernel has no Landlock"), Ok("seccomp"), &[Target::Files]);
        assert_eq!(
            split.to_string(),
            "no network, no other processes (seccomp); files within reach: this kernel has no Landlock"
        );
        let none = reported(Err("no Landlock"), Err("no seccomp"), &ALL);
        assert!(!none.is_complete() && !Sandbox::Off.is_complete());
        assert!(none.to_string().starts_with("files within reach: no Landlock, and no seccomp; network"), "{none}");
    }

    #[test]
    fn a_landlock_that_does_not_guard_the_length_of_files_is_told_as_a_gap() {
        let (landlock, seccomp) = (Ok("Landlock ABI 2".to_owned()), Ok("seccomp".to_owned()));
        let means = Means { landlock, seccomp, threads_outside: 0, may_empty_files: true };
        let sandbox = report(&means, &ALL.map(|target| (target, false)));
        assert!(!sandbox.is_complete() && sandbox.to_string().contains("can be emptied"), "{sandbox}");
    }
}
