//! Starts engine processes.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::process::Stdio;

use tokio::net::UnixStream;
use tokio::process::{Child, Command};

use super::frame::ToParent;
use super::pipe::FrameReader;
use super::{ChildCommand, close_in_children, environment};
use crate::hardware::Hardware;

/// How often an engine thread polls for the others before it sleeps, about 10 to 25 µs. GNU's OpenMP polls 300,000
/// times by default. If other programs need the cores, a spinning thread keeps the core from the very thread that it
/// waits for. See `docs/adr/0031-engine-threads-sleep-early.md`.
const SPIN_COUNT: &str = "500";

/// A started process and the worker's ends of its sockets. It is killed on drop.
pub(super) struct Spawned {
    pub(super) child: Child,
    pub(super) frames: UnixStream,
    pub(super) files: StdUnixStream,
}

pub(super) fn spawn(command: &ChildCommand) -> io::Result<Spawned> {
    spawn_in(command, std::env::vars_os())
}

/// Starts a process from a worker with this environment.
fn spawn_in(
    command: &ChildCommand,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> io::Result<Spawned> {
    let (frames, their_frames) = StdUnixStream::pair()?;
    let (files, their_files) = StdUnixStream::pair()?;
    frames.set_nonblocking(true)?;
    files.set_nonblocking(true)?;
    close_in_children();
    let child = Command::new(&command.program)
        .args(&command.args)
        .env_clear()
        .envs(environment::inherited(environment))
        .env("GOMP_SPINCOUNT", SPIN_COUNT)
        .envs(command.envs.iter().map(|(name, value)| (name, value)))
        // A failed assertion would start a debugger to print a backtrace.
        .env("GGML_NO_BACKTRACE", "1")
        .stdin(Stdio::from(OwnedFd::from(their_files)))
        .stdout(Stdio::from(OwnedFd::from(their_frames)))
        .stderr(Stdio::piped())
        // Ctrl-C on a terminal is meant for the program, which lets its jobs finish, and not for the engines that
        // they need.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()?;
    Ok(Spawned { child, frames: UnixStream::from_std(frames)?, files })
}

/// Starts a process that only reports its devices, so that no driver is started in the worker's own process.
pub(super) async fn ask_hardware(command: &ChildCommand) -> io::Result<Hardware> {
    let Spawned { child: _child, frames, files: _files } = spawn(command)?;
    let (reading, _writing) = frames.into_split();
    match FrameReader::new(reading).next().await.map_err(io::Error::other)? {
        Some(ToParent::Hello { hardware, .. }) => Ok(hardware),
        _ => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the process did not say hello")),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt as _;

    use super::*;

    #[tokio::test]
    async fn a_process_gets_what_drivers_need_and_no_secret_of_its_worker() {
        let environment = [
            ("PATH", "/bin"),
            ("LD_LIBRARY_PATH", "/opt/driver"),
            ("TETHER_API_KEY", "tth_secret"),
            ("AWS_SECRET_ACCESS_KEY", "secret"),
        ];
        let environment = environment.map(|(name, value)| (name.into(), value.into()));
        let command = ChildCommand {
            program: "/usr/bin/env".into(),
            args: vec![],
            envs: vec![("ADDED".into(), "by the caller".into())],
        };
        let Spawned { mut child, mut frames, files: _files } = spawn_in(&command, environment).expect("it starts");
        let mut printed = String::new();
        frames.read_to_string(&mut printed).await.expect("it prints");
        child.wait().await.expect("it ends");
        let mut lines: Vec<&str> = printed.lines().collect();
        lines.sort_unstable();
        let expected =
            ["ADDED=by the caller", "GGML_NO_BACKTRACE=1", "GOMP_SPINCOUNT=500", "LD_LIBRARY_PATH=/opt/driver"];
        assert_eq!(lines, expected);
    }
}
