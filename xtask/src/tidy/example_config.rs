//! `config/tether.example.toml` matches the program's defaults.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

const EXAMPLE: &str = "config/tether.example.toml";

/// Compares the example with the output of `tether config example`, from the given binary or one that is built for it.
pub(crate) fn check(root: &Path, metadata: &Value, tether: Option<PathBuf>) -> Result<Option<String>> {
    let tether = match tether {
        Some(path) => path,
        None => build(root, metadata)?,
    };
    let output = Command::new(&tether)
        .args(["config", "example"])
        .output()
        .with_context(|| format!("could not run {}", tether.display()))?;
    if !output.status.success() {
        bail!("tether config example failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let defaults = String::from_utf8(output.stdout).context("tether config example wrote something else than text")?;
    let example = fs::read_to_string(root.join(EXAMPLE)).ok();
    Ok(compare(example.as_deref(), &defaults))
}

/// Builds the program with the workspace's features, so that tests and tasks share the build.
fn build(root: &Path, metadata: &Value) -> Result<PathBuf> {
    let status = Command::new(env!("CARGO"))
        .args(["build", "--workspace", "--bin", "tether"])
        .current_dir(root)
        .status()
        .context("could not run cargo build")?;
    if !status.success() {
        bail!("tether does not build");
    }
    let target = metadata["target_directory"].as_str().context("cargo metadata names no target directory")?;
    Ok(Path::new(target).join("debug").join("tether"))
}

fn compare(example: Option<&str>, defaults: &str) -> Option<String> {
    let remedy = "write it anew with `tether config example`";
    let Some(example) = example else {
        return Some(format!("{EXAMPLE} is missing; {remedy}"));
    };
    let (found, expected) = (example.trim_end(), defaults.trim_end());
    if found == expected {
        return None;
    }
    let mut lines = found.lines();
    let same = expected.lines().take_while(|&line| lines.next() == Some(line)).count();
    Some(format!("{EXAMPLE} differs from the defaults at line {}; {remedy}", same + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_example_that_equals_the_defaults_is_in_order() {
        assert_eq!(compare(Some("version = 1\n"), "version = 1\n\n"), None);
    }

    #[test]
    fn an_example_that_differs_is_found_with_its_line() {
        let finding = compare(Some("version = 1\nport = 1\n"), "version = 1\nport = 2\n").expect("they differ");
        assert!(finding.contains("line 2"), "{finding}");
        let finding = compare(Some("version = 1\nport = 1\n"), "version = 1\n").expect("they differ");
        assert!(finding.contains("line 2"), "{finding}");
    }

    #[test]
    fn a_missing_example_is_found() {
        assert!(compare(None, "version = 1\n").is_some_and(|finding| finding.contains("missing")));
    }
}
