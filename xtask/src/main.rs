//! Maintenance tasks of the repository. `cargo xtask tidy` checks its rules.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a chore talks to whoever typed it")]

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};

mod tidy;

const USAGE: &str = "\
usage: cargo xtask tidy [--tether PATH]

  tidy            checks the rules of ARCHITECTURE.md and STYLE.md that a program can check
  --tether PATH   compares the example configuration by this binary instead of building one";

fn main() -> ExitCode {
    match run(std::env::args().skip(1).collect()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Runs a task. Returns whether it succeeded.
fn run(arguments: Vec<String>) -> Result<bool> {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["tidy"] => tidy::run(None),
        ["tidy", "--tether", path] => tidy::run(Some(PathBuf::from(path))),
        [] | ["help" | "--help" | "-h"] => {
            println!("{USAGE}");
            Ok(true)
        }
        _ => bail!("no such chore\n{USAGE}"),
    }
}
