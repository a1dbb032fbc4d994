//! Signals to the processes of a network.

use std::fs;

use anyhow::Context as _;
use rustix::process::{Pid, Signal, kill_process};

/// Refers to a process. On Linux no other process is signalled if it has ended and its id belongs to another one.
#[cfg(target_os = "linux")]
mod handle {
    use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

    pub(super) struct Handle(std::os::fd::OwnedFd);

    impl Handle {
        pub(super) fn of(pid: Pid) -> rustix::io::Result<Self> {
            pidfd_open(pid, PidfdFlags::empty()).map(Self)
        }

        pub(super) fn send(&self, signal: Signal) -> rustix::io::Result<()> {
            pidfd_send_signal(&self.0, signal)
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod handle {
    use rustix::process::{Pid, Signal, kill_process};

    pub(super) struct Handle(Pid);

    impl Handle {
        pub(super) fn of(pid: Pid) -> rustix::io::Result<Self> {
            Ok(Self(pid))
        }

        pub(super) fn send(&self, signal: Signal) -> rustix::io::Result<()> {
            kill_process(self.0, signal)
        }
    }
}

/// Processes that stand still until this is dropped.
pub(super) struct Frozen(Vec<handle::Handle>);

impl Frozen {
    /// Stops processes. One that has just ended is left out.
    pub(super) fn new(pids: &[u32]) -> anyhow::Result<Self> {
        let mut frozen = Self(vec![]);
        for pid in pids {
            let Ok(handle) = handle::Handle::of(process(*pid)?) else { continue };
            if handle.send(Signal::STOP).is_ok() {
                frozen.0.push(handle);
            }
        }
        Ok(frozen)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        for handle in &self.0 {
            let _ = handle.send(Signal::CONT);
        }
    }
}

pub(super) fn kill(pid: u32) -> anyhow::Result<()> {
    kill_process(process(pid)?, Signal::KILL).context("could not kill a process")
}

pub(super) fn terminate(pid: u32) -> anyhow::Result<()> {
    kill_process(process(pid)?, Signal::TERM).context("could not signal a process")
}

fn process(pid: u32) -> anyhow::Result<Pid> {
    i32::try_from(pid).ok().and_then(Pid::from_raw).context("not the id of a process")
}

/// Returns the processes that a process has started and that still run.
pub(super) fn children(pid: u32) -> Vec<u32> {
    // Children belong to the thread that started them.
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    let mut pids: Vec<u32> =
        lists.flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect();
    pids.sort_unstable();
    pids
}
