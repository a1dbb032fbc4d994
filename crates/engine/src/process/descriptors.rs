//! Keeps the descriptors that the worker inherited from the processes that it starts.
//!
//! What Rust opens is closed in a started process. What the worker itself was started with is not: a shell's
//! redirections, files of a supervisor, sockets of a container's runtime.

#![allow(unsafe_code)]

use std::fs;
use std::io;
use std::os::fd::RawFd;

/// Where the system lists the open descriptors of the process that asks.
const OPEN: &str = if cfg!(target_os = "linux") { "/proc/self/fd" } else { "/dev/fd" };

/// Has every descriptor of this process, except for the standard streams, closed in processes that it starts from now
/// on.
pub fn close_in_children() {
    if let Err(error) = set_close_on_exec() {
        tracing::warn!(%error, "a started process inherits open files of this one, because {OPEN} cannot be listed");
    }
}

fn set_close_on_exec() -> io::Result<()> {
    let names = fs::read_dir(OPEN)?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    // The list is complete before anything is changed. It contains its own descriptor, which is closed by then.
    let descriptors: Vec<RawFd> = names.filter(|descriptor| *descriptor > libc::STDERR_FILENO).collect();
    descriptors.into_iter().for_each(close_on_exec);
    Ok(())
}

fn close_on_exec(descriptor: RawFd) {
    // SAFETY: the call reads no memory and closes nothing. For a number that is no longer open, it fails.
    unsafe { libc::fcntl(descriptor, libc::F_SETFD, libc::FD_CLOEXEC) };
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use rustix::io::{FdFlags, dup, fcntl_getfd};

    use super::*;

    #[test]
    fn what_was_inherited_is_closed_in_children_and_stays_open_here() {
        let file = File::open("/dev/null").expect("it is there");
        let inherited = dup(&file).expect("it is copied");
        assert!(!fcntl_getfd(&inherited).expect("it is open").contains(FdFlags::CLOEXEC));
        close_in_children();
        assert!(fcntl_getfd(&inherited).expect("it is open").contains(FdFlags::CLOEXEC));
        let standard = fcntl_getfd(io::stderr()).expect("it is open");
        assert!(!standard.contains(FdFlags::CLOEXEC));
    }
}
