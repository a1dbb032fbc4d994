//! Signals to the processes of a network.

use std::fs;
use std::os::fd::OwnedFd;

use anyhow::Context as _;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};

/// Processes that stand still until this is dropped. It refers to them by handles, so that no other process is
/// signalled if one of them has ended.
pub(super) struct Frozen(Vec<OwnedFd>);

impl Frozen {
    pub(super) fn new(pids: &[u32]) -> anyhow::Result<Self> {
        let mut frozen = Self(vec![]);
        for pid in pids {
            let Ok(handle) = pidfd_open(process(*pid)?, PidfdFlags::empty()) else { continue };
            pidfd_send_signal(&handle, Signal::STOP).context("could not stop a process")?;
            frozen.0.push(handle);
        }
        Ok(frozen)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        for handle in &self.0 {
            let _ = pidfd_send_signal(handle, Signal::CONT);
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
