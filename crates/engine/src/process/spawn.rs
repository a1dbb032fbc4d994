//! Starts engine processes.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::process::Stdio;

use tokio::net::UnixStream;
use tokio::process::{Child, Command};

use super::ChildCommand;
use super::frame::ToParent;
use super::pipe::FrameReader;
use crate::hardware::Hardware;

/// How often a thread of an engine looks whether the others are done before it sleeps, some 10 to 25 µs; GNU's OpenMP
/// looks 300,000 times unless told. Where other programs want the cores, a thread that spins keeps the core from the
/// very thread that it waits for. See `docs/adr/0031-engine-threads-sleep-early.md`.
const SPIN_COUNT: &str = "500";

/// A process that was started, and the worker's ends of its sockets. It is killed when it is dropped.
pub(super) struct Spawned {
    pub(super) child: Child,
    pub(super) frames: UnixStream,
    pub(super) files: StdUnixStream,
}

pub(super) fn spawn(command: &ChildCommand) -> io::Result<Spawned> {
    let (frames, their_frames) = StdUnixStream::pair()?;
    let (files, their_files) = StdUnixStream::pair()?;
    frames.set_nonblocking(true)?;
    files.set_nonblocking(true)?;
    let child = Command::new(&command.program)
        .args(&command.args)
        .env("GOMP_SPINCOUNT", SPIN_COUNT)
        .envs(command.envs.iter().map(|(name, value)| (name, value)))
        // An assertion that fails would start a debugger to print a trace.
        .env("GGML_NO_BACKTRACE", "1")
        .stdin(Stdio::from(OwnedFd::from(their_files)))
        .stdout(Stdio::from(OwnedFd::from(their_frames)))
        .stderr(Stdio::piped())
        // Ctrl-C on a terminal is for the program, which lets its jobs end, and not for the engines they need.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()?;
    Ok(Spawned { child, frames: UnixStream::from_std(frames)?, files })
}

/// Starts a process that only says what it computes with, so that no driver starts in the worker's own.
pub(super) async fn ask_hardware(command: &ChildCommand) -> io::Result<Hardware> {
    let Spawned { child: _child, frames, files: _files } = spawn(command)?;
    let (reading, _writing) = frames.into_split();
    match FrameReader::new(reading).next().await.map_err(io::Error::other)? {
        Some(ToParent::Hello { hardware, .. }) => Ok(hardware),
        _ => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the process did not say hello")),
    }
}
