//! A dependency is listed once, in the workspace table, without its default features.

use anyhow::{Context as _, Result};
use toml::{Table, Value};

use super::SourceFile;

/// Crates whose default features are empty, only `std`, or exactly those that we need.
const DEFAULTS_ALLOWED: &[&str] = &[
    "anyhow",
    "async-trait",
    "bytes",
    "http",
    "http-body",
    "http-body-util",
    "libc",
    "serde_path_to_error",
    "tempfile",
    "thiserror",
];

/// Checks the workspace's table.
pub(crate) fn check_table(manifest: &SourceFile) -> Result<Vec<String>> {
    let root = parse(manifest)?;
    let table = root.get("workspace").and_then(|workspace| workspace.get("dependencies")).and_then(Value::as_table);
    let table = table.context("Cargo.toml has no [workspace.dependencies]")?;
    let mut findings = vec![];
    for (name, entry) in table {
        let is_ours = entry.get("path").is_some();
        let has_defaults = entry.get("default-features").and_then(Value::as_bool) != Some(false);
        if !is_ours && has_defaults && !DEFAULTS_ALLOWED.contains(&name.as_str()) {
            findings.push(format!("Cargo.toml: {name} needs default-features = false, or a place on the allow list"));
        }
        if entry.get("git").is_some() {
            findings.push(format!("Cargo.toml: {name} comes from a git repository"));
        }
    }
    Ok(findings)
}

/// Checks the manifest of a member.
pub(crate) fn check_member(manifest: &SourceFile) -> Result<Vec<String>> {
    let root = parse(manifest)?;
    let mut findings = vec![];
    let targets = root.get("target").and_then(Value::as_table).into_iter().flat_map(Table::values);
    for holder in targets.filter_map(Value::as_table).chain([&root]) {
        for kind in ["dependencies", "dev-dependencies", "build-dependencies"] {
            for (name, entry) in holder.get(kind).and_then(Value::as_table).into_iter().flatten() {
                if entry.get("workspace").and_then(Value::as_bool) != Some(true) {
                    findings.push(format!("{}: {name} is not taken from the workspace table", manifest.path));
                }
            }
        }
    }
    let lints = root.get("lints").and_then(|lints| lints.get("workspace")).and_then(Value::as_bool);
    if lints != Some(true) {
        findings.push(format!("{}: [lints] workspace = true is missing", manifest.path));
    }
    Ok(findings)
}

fn parse(manifest: &SourceFile) -> Result<Table> {
    manifest.text.parse().with_context(|| format!("{} is malformed", manifest.path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(text: &str) -> SourceFile {
        SourceFile { path: "crates/x/Cargo.toml".into(), text: text.into() }
    }

    #[test]
    fn default_features_are_off_unless_allowed() {
        let table = "[workspace.dependencies]\nanyhow = \"1\"\nrpc = { path = \"crates/rpc\" }\nserde = \"1\"\n\
                     tokio = { version = \"1\", default-features = false }\nhex = { version = \"0.4\" }";
        let findings = check_table(&manifest(table)).expect("well formed").join("\n");
        assert!(findings.contains("serde") && findings.contains("hex"), "{findings}");
        assert_eq!(findings.lines().count(), 2, "{findings}");
    }

    #[test]
    fn members_take_their_dependencies_from_the_table() {
        let member = "[dependencies]\nserde = { workspace = true, features = [\"rc\"] }\nhex = \"0.4\"\n\
                      [target.'cfg(unix)'.dev-dependencies]\nrustix = { path = \"x\" }\n[lints]\nworkspace = true";
        let findings = check_member(&manifest(member)).expect("well formed").join("\n");
        assert!(findings.contains("hex") && findings.contains("rustix"), "{findings}");
        assert_eq!(findings.lines().count(), 2, "{findings}");
    }

    #[test]
    fn members_take_the_lints_of_the_workspace() {
        let findings = check_member(&manifest("[package]\nname = \"x\"")).expect("well formed");
        assert_eq!(findings, ["crates/x/Cargo.toml: [lints] workspace = true is missing"]);
    }
}
