//! Starts a server of others for a model, closed off from what it does not need.
//!
//! The server reads a file of strangers as an engine does, but it is no program of ours: it opens its libraries, makes
//! threads and processes, and listens. So it gets a sandbox of its own kind, before its first instruction. See
//! `docs/adr/0065-own-servers-in-a-sandbox.md`.

#![allow(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::process::{Child, Command};

use super::sandbox::Sandbox;
#[cfg(target_os = "linux")]
use super::sandbox::{ServerNeeds, ServerSandbox};
use super::{close_in_children, environment};

/// A server that is yet to be started.
#[derive(Debug)]
pub struct ServerCommand {
    pub program: OsString,
    pub args: Vec<OsString>,
    /// The file that is its standard input.
    pub model: File,
    /// The port that it listens on.
    pub port: u16,
    /// What it may use besides its program, its libraries and the devices of GPUs. `None` closes it off from nothing.
    pub paths: Option<Vec<PathBuf>>,
}

/// Starts a server with the variables of this process that it may have. It is killed on drop.
pub fn start_server(server: ServerCommand) -> io::Result<(Child, Sandbox)> {
    let ServerCommand { program, args, model, port, paths } = server;
    close_in_children();
    let program = found(&program).unwrap_or(program.into());
    let mut command = Command::new(&program);
    command
        .args(args)
        .env_clear()
        .envs(environment::inherited_by_server(std::env::vars_os()))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    let sandbox = match paths {
        Some(paths) => enclose(&mut command, &model, &program, &paths, port)?,
        None => Sandbox::Off,
    };
    Ok((command.stdin(Stdio::from(model)).spawn()?, sandbox))
}

#[cfg(target_os = "linux")]
fn enclose(command: &mut Command, model: &File, program: &Path, paths: &[PathBuf], port: u16) -> io::Result<Sandbox> {
    if let Some(missing) = paths.iter().find(|path| !path.exists()) {
        let reason = format!("{} in server_paths does not exist", missing.display());
        return Err(io::Error::new(io::ErrorKind::NotFound, reason));
    }
    // The libraries lie beside the program itself, not beside a link to it.
    let program = program.canonicalize().ok();
    let sandbox = ServerSandbox::new(&ServerNeeds { model, program: program.as_deref(), paths, port })?;
    let report = sandbox.report.clone();
    // SAFETY: both only make system calls, and allocate nothing.
    unsafe {
        command.pre_exec(move || {
            super::resource_limits::try_lower().map_err(|(_, error)| io::Error::from(error))?;
            sandbox.enter()
        });
    }
    Ok(report)
}

#[cfg(not(target_os = "linux"))]
fn enclose(_: &mut Command, _: &File, _: &Path, _: &[PathBuf], _: u16) -> io::Result<Sandbox> {
    let gaps = vec!["files, network and other processes are within reach: only Linux has this sandbox".to_owned()];
    Ok(Sandbox::On { closed: Vec::new(), gaps, means: Vec::new() })
}

/// Returns the file that a shell would run for a program's name.
fn found(program: &OsStr) -> Option<PathBuf> {
    let folders = std::env::var_os("PATH").filter(|_| Path::new(program).components().count() == 1)?;
    std::env::split_paths(&folders).map(|folder| folder.join(program)).find(|file| file.is_file())
}
