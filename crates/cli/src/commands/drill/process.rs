//! Signals to the processes of a network.

use std::fs;

use anyhow::Context as _;
use rustix::process::{Pid, Signal, kill_process};

/// Refers to a process. On Linux no other process is signalled if it has ended and its id belongs to another one.
pub(super) struct Handle(kernel::Handle);

impl Handle {
    /// Refers to a process whose id cannot pass to another one meanwhile, such as a child that was not waited for.
    pub(super) fn of(pid: u32) -> anyhow::Result<Self> {
        kernel::open(process(pid)?).map(Self).context("no such process runs")
    }

    /// Refers to a process that the given one has started and that still runs.
    pub(super) fn of_child(parent: u32) -> Option<Self> {
        children(parent).into_iter().find_map(|pid| {
            let handle = Self::of(pid).ok()?;
            // Between the list and the handle, the id may have passed to another process.
            children(parent).contains(&pid).then_some(handle)
        })
    }

    pub(super) fn kill(&self) -> anyhow::Result<()> {
        self.send(Signal::KILL).context("could not kill a process")
    }

    fn send(&self, signal: Signal) -> rustix::io::Result<()> {
        kernel::send(&self.0, signal)
    }
}

#[cfg(target_os = "linux")]
mod kernel {
    use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

    pub(super) type Handle = std::os::fd::OwnedFd;

    pub(super) fn open(pid: Pid) -> rustix::io::Result<Handle> {
        pidfd_open(pid, PidfdFlags::empty())
    }

    pub(super) fn send(handle: &Handle, signal: Signal) -> rustix::io::Result<()> {
        pidfd_send_signal(handle, signal)
    }
}

#[cfg(not(target_os = "linux"))]
mod kernel {
    use rustix::process::{Pid, Signal, kill_process};

    pub(super) type Handle = Pid;

    pub(super) fn open(pid: Pid) -> rustix::io::Result<Handle> {
        Ok(pid)
    }

    pub(super) fn send(handle: &Handle, signal: Signal) -> rustix::io::Result<()> {
        kill_process(*handle, signal)
    }
}

/// Processes that stand still until this is dropped.
pub(super) struct Frozen(Vec<Handle>);

impl Frozen {
    /// Stops processes. One that has just ended is left out.
    pub(super) fn new(processes: impl IntoIterator<Item = Handle>) -> Self {
        Self(processes.into_iter().filter(|process| process.send(Signal::STOP).is_ok()).collect())
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        for handle in &self.0 {
            let _ = handle.send(Signal::CONT);
        }
    }
}

pub(super) fn terminate(pid: u32) -> anyhow::Result<()> {
    kill_process(process(pid)?, Signal::TERM).context("could not signal a process")
}

fn process(pid: u32) -> anyhow::Result<Pid> {
    i32::try_from(pid).ok().and_then(Pid::from_raw).context("not the id of a process")
}

/// Returns the processes that a process has started and that still run.
fn children(pid: u32) -> Vec<u32> {
    // Children belong to the thread that started them.
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    let mut pids: Vec<u32> =
        lists.flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect();
    pids.sort_unstable();
    pids
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::Command;

    use super::*;

    #[test]
    fn a_child_is_killed_and_nobody_else_is_found() {
        let mut child = Command::new("sleep").arg("600").spawn().expect("a child");
        assert!(Handle::of_child(child.id()).is_none(), "it has no child itself");
        assert!(children(std::process::id()).contains(&child.id()));
        let handle = Handle::of(child.id()).expect("it runs");
        handle.kill().expect("killed");
        assert_eq!(child.wait().expect("its end").signal(), Some(Signal::KILL.as_raw()));
        assert!(handle.kill().is_err(), "whoever has its id now is not killed");
    }
}
