//! Closes an engine process off from files, the network and other processes, before it reads a byte of its model.
//!
//! A malicious model file or chat template that takes over the process finds no key in its environment, opens no file,
//! reaches no address, and can neither start, trace nor signal another process. The process needs none of that: its
//! files arrive as open descriptors, and drivers are started before. Landlock refuses paths, and a seccomp filter
//! refuses system calls; both apply for good, and to root as well. Only Linux has them. Whatever the kernel lacks is
//! reported and not hidden: the process tries each way out before it goes on. See
//! `docs/adr/0050-engines-in-a-sandbox.md`.
//!
//! Programs of others that serve a model are started in a sandbox with more room ([`ServerSandbox`]). See
//! `docs/adr/0065-own-servers-in-a-sandbox.md`.

#[cfg(target_os = "linux")]
mod call_numbers;
#[cfg(target_os = "linux")]
mod files;
#[cfg(target_os = "linux")]
mod own_rules;
#[cfg(target_os = "linux")]
mod system_calls;

use std::fmt;
use std::fs::File;
#[cfg(target_os = "linux")]
use std::io;
#[cfg(target_os = "linux")]
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
#[cfg(target_os = "linux")]
use std::os::fd::{AsFd as _, OwnedFd};
#[cfg(target_os = "linux")]
use std::path::{Path, PathBuf};

#[cfg(target_os = "linux")]
use files::ServerRules;
use serde::{Deserialize, Serialize};
#[cfg(target_os = "linux")]
use system_calls::ServerFilters;

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
    /// The network, except for those that connect to the process at its port.
    Connections,
    /// Ports to listen on, except for the one that it was given. What listens without a port still gets one that the
    /// kernel picks.
    Ports,
    /// Starting, tracing and signalling processes. A server may start processes, which are in its sandbox.
    Processes,
}

impl fmt::Display for Target {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Files => "files",
            Self::Network => "network",
            Self::Connections => "connections to others",
            Self::Ports => "other ports of its choice",
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

/// What a server still needs that a worker starts.
#[cfg(target_os = "linux")]
#[derive(Debug)]
pub(super) struct ServerNeeds<'a> {
    /// The file of its model.
    pub(super) model: &'a File,
    /// The file of its program, if that was found.
    pub(super) program: Option<&'a Path>,
    /// What else it may use.
    pub(super) paths: &'a [PathBuf],
    /// The port that it listens on.
    pub(super) port: u16,
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
    /// Whether signals are left to a Landlock that does not guard them.
    may_signal: bool,
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
        // The filter refuses signals to others.
        may_signal: false,
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

/// A sandbox for a server that is yet to be started.
#[cfg(target_os = "linux")]
#[derive(Debug)]
pub(super) struct ServerSandbox {
    rules: Option<OwnedFd>,
    filters: Option<ServerFilters>,
    /// What it does, as was found out in a thread.
    pub(super) report: Sandbox,
}

#[cfg(target_os = "linux")]
impl ServerSandbox {
    pub(super) fn new(needs: &ServerNeeds<'_>) -> io::Result<Self> {
        let (rules, filters) = (ServerRules::new(needs), ServerFilters::new());
        let (report, means) = std::thread::scope(|scope| {
            let tried = std::thread::Builder::new().spawn_scoped(scope, || tried(rules.as_ref(), filters.as_ref()))?;
            tried.join().map_err(|_| io::Error::other("the thread that tries the sandbox panicked"))
        })?;
        Ok(Self {
            rules: rules.ok().filter(|_| means.landlock.is_ok()).and_then(ServerRules::into_descriptor),
            filters: filters.ok().filter(|_| means.seccomp.is_ok()),
            report,
        })
    }

    /// Closes it around this process, or fails. It allocates no memory, so it may run between `fork` and `exec`.
    pub(super) fn enter(&self) -> io::Result<()> {
        own_rules::drop_capabilities();
        if let Some(rules) = &self.rules {
            own_rules::enter(rules.as_fd())?;
        }
        match self.filters.as_ref().map(ServerFilters::apply) {
            Some(Err(_)) => Err(io::ErrorKind::PermissionDenied.into()),
            _ => Ok(()),
        }
    }
}

/// Closes this thread off for good, and says what it can reach all the same.
#[cfg(target_os = "linux")]
fn tried(rules: Result<&ServerRules, &String>, filters: Result<&ServerFilters, &String>) -> (Sandbox, Means) {
    let unused = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr());
    let files = rules.map_err(Clone::clone).and_then(ServerRules::close);
    let means = Means {
        may_empty_files: files.as_ref().is_ok_and(|closed| closed.abi < files::GUARDS_LENGTH),
        may_signal: !files.as_ref().is_ok_and(|closed| closed.abi >= files::GUARDS_SIGNALS),
        threads_outside: 0,
        landlock: files.map(|closed| format!("Landlock ABI {}", closed.abi)),
        seccomp: filters.map_err(Clone::clone).and_then(ServerFilters::close).map(|()| "seccomp".to_owned()),
    };
    let within_reach = [
        (Target::Files, File::open("/").is_ok()),
        (Target::Connections, unused.is_ok_and(can_connect)),
        (Target::Ports, TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).is_ok()),
        // Not tried: whom this thread may signal says nothing of a process of its own.
        (Target::Processes, means.seccomp.is_err() || means.may_signal),
    ];
    (report(&means, &within_reach), means)
}

/// Returns whether a connection is refused by its address and not by the sandbox.
#[cfg(target_os = "linux")]
fn can_connect(address: SocketAddr) -> bool {
    !TcpStream::connect(address).is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
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
    let is_open =
        |is_open: bool| within_reach.iter().filter(move |(_, open)| *open == is_open).map(|(target, _)| *target);
    let mut gaps: Vec<_> =
        is_open(true).map(|target| format!("{target} within reach: {}", why(means, target))).collect();
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
    let means = [&means.landlock, &means.seccomp].into_iter().filter_map(|one| one.clone().ok()).collect();
    Sandbox::On { closed: is_open(false).collect(), gaps, means }
}

/// Says why a target is within reach.
#[cfg(target_os = "linux")]
fn why(means: &Means, target: Target) -> String {
    let all = [&means.landlock, &means.seccomp];
    let missing: Vec<&str> = all.into_iter().filter_map(|one| one.as_ref().err().map(String::as_str)).collect();
    if missing.is_empty() && target == Target::Processes && means.may_signal {
        "Landlock guards signals only since Linux 6.12".to_owned()
    } else if missing.is_empty() {
        "the kernel does not say why".to_owned()
    } else {
        missing.join(", and ")
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    const ALL: [Target; 3] = [Target::Files, Target::Network, Target::Processes];

    fn reported(landlock: Result<&str, &str>, seccomp: Result<&str, &str>, open: &[Target]) -> Sandbox {
        let owned = |one: Result<&str, &str>| one.map(str::to_owned).map_err(str::to_owned);
        let (landlock, seccomp) = (owned(landlock), owned(seccomp));
        let means = Means { landlock, seccomp, threads_outside: 0, may_empty_files: false, may_signal: false };
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
        let means = Means { landlock, seccomp, threads_outside: 0, may_empty_files: true, may_signal: false };
        let sandbox = report(&means, &ALL.map(|target| (target, false)));
        assert!(!sandbox.is_complete() && sandbox.to_string().contains("can be emptied"), "{sandbox}");
    }

    #[test]
    fn a_landlock_that_does_not_guard_signals_is_told_as_the_reason_why_processes_are_within_reach() {
        let (landlock, seccomp) = (Ok("Landlock ABI 5".to_owned()), Ok("seccomp".to_owned()));
        let means = Means { landlock, seccomp, threads_outside: 0, may_empty_files: false, may_signal: true };
        let sandbox = report(&means, &[(Target::Files, false), (Target::Processes, means.may_signal)]);
        let expected = "no files (Landlock ABI 5, seccomp); \
                        other processes within reach: Landlock guards signals only since Linux 6.12";
        assert_eq!(sandbox.to_string(), expected);
    }
}
