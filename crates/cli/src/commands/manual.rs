//! `tether completions` and `tether man`: shell completions and man pages, generated from the commands.

use std::fs;
use std::path::Path;

use anyhow::Context as _;
use clap::CommandFactory as _;
use clap_complete::Shell;

use super::Outcome;
use crate::args::Cli;
use crate::output;

/// Prints a shell's completion script.
pub(super) fn completions(shell: Shell) -> anyhow::Result<Outcome> {
    let mut script = vec![];
    clap_complete::generate(shell, &mut Cli::command(), "tether", &mut script);
    output::piece(&String::from_utf8(script).context("the script is not text")?);
    Ok(Outcome::Well)
}

/// Writes a man page for the program and one for each command.
pub(super) fn pages(folder: &Path) -> anyhow::Result<Outcome> {
    let failed = || format!("could not write to {}", folder.display());
    fs::create_dir_all(folder).with_context(failed)?;
    clap_mangen::generate_to(Cli::command(), folder).with_context(failed)?;
    output::line(format!("read them with: man -M {0} or man {0}/tether.1", folder.display()));
    Ok(Outcome::Well)
}
