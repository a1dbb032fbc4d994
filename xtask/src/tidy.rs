//! Checks those rules of `ARCHITECTURE.md` and `STYLE.md` that a program can check.
//!
//! Each check is a pure function from file contents to findings; this module reads the files and prints the findings.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

mod decisions;
mod dependencies;
mod example_config;
mod floors;
mod glossary;
mod invariants;
mod links;
mod seed_names;
mod sizes;
mod text;
mod type_names;

/// Folders that tools generate.
const SKIPPED_FOLDERS: &[&str] = &[".git", "target", "node_modules", "__pycache__", "artifacts"];
/// Prefix of the names of Python's virtual environments. There can be several, for packages that conflict.
const ENVIRONMENT: &str = ".venv";

/// A text file of the repository.
pub(crate) struct SourceFile {
    /// Path relative to the root, with forward slashes.
    pub(crate) path: String,
    pub(crate) text: String,
}

impl SourceFile {
    /// Returns whether the file has this extension.
    fn has_extension(&self, extension: &str) -> bool {
        Path::new(&self.path).extension().is_some_and(|found| found == extension)
    }
}

/// Runs all checks and prints the findings. Returns whether nothing was found.
pub(crate) fn run(tether: Option<PathBuf>) -> Result<bool> {
    // The program may have been built in another checkout.
    let own = std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    let root = own.parent().context("xtask lies in the repository")?;
    let files = read_files(root)?;
    let metadata = cargo_metadata(root)?;
    let crates = floors::crates_of(&metadata)?;

    let mut findings = vec![];
    findings.extend(floors::check(&crates));
    findings.extend(dependencies::check_table(file(&files, "Cargo.toml")?)?);
    for manifest in files.iter().filter(|file| file.path.ends_with("/Cargo.toml")) {
        findings.extend(dependencies::check_member(manifest)?);
    }
    findings.extend(seed_names::check(&files));
    findings.extend(invariants::check(&files));
    findings.extend(decisions::check(&files));
    findings.extend(glossary::check(&files));
    findings.extend(type_names::check(&files));
    findings.extend(text::check(&files));
    findings.extend(links::check(&files, |path| root.join(path).exists()));
    // A program that does not build is reported as one finding, so that the others are printed too.
    findings.extend(example_config::check(root, &metadata, tether).unwrap_or_else(|error| Some(format!("{error:#}"))));

    for line in sizes::report(&files) {
        println!("note: {line}");
    }
    for line in seed_names::report(&files) {
        println!("note: {line}");
    }
    for finding in &findings {
        println!("finding: {finding}");
    }
    match findings.len() {
        0 => println!("tidy: {} files, {} crates, no findings", files.len(), crates.len()),
        count => println!("tidy: {count} findings"),
    }
    Ok(findings.is_empty())
}

fn file<'a>(files: &'a [SourceFile], path: &str) -> Result<&'a SourceFile> {
    files.iter().find(|file| file.path == path).with_context(|| format!("{path} is missing"))
}

/// Reads every text file below the root, ordered by path. Files that are not UTF-8 are skipped.
fn read_files(root: &Path) -> Result<Vec<SourceFile>> {
    let mut files = vec![];
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("could not list {}", folder.display()))? {
            let entry = entry?;
            let kind = entry.file_type()?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if kind.is_dir() && !SKIPPED_FOLDERS.contains(&name.as_str()) && !name.starts_with(ENVIRONMENT) {
                folders.push(entry.path());
            } else if kind.is_file()
                && let Ok(text) = String::from_utf8(fs::read(entry.path())?)
            {
                let path = entry.path().strip_prefix(root)?.to_string_lossy().replace('\\', "/");
                files.push(SourceFile { path, text });
            }
        }
    }
    files.sort_by(|left, right| left.path.cmp(&right.path));
    Ok(files)
}

fn cargo_metadata(root: &Path) -> Result<serde_json::Value> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .current_dir(root)
        .output()
        .context("could not run cargo metadata")?;
    if !output.status.success() {
        bail!("cargo metadata failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    serde_json::from_slice(&output.stdout).context("cargo metadata wrote something else than JSON")
}
