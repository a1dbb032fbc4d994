//! Each public type's name is unique in its crate, so that a reader knows which type it means.

use std::collections::BTreeMap;

use super::SourceFile;

/// Names that every module may define, as in axum and tokio, because they are read together with the module's name.
const OF_A_MODULE: &[&str] = &["Config", "Error", "Options"];

/// Finds `pub` types that share their name with another `pub` type of the crate.
pub(crate) fn check(files: &[SourceFile]) -> Vec<String> {
    let mut found: BTreeMap<(&str, &str), Vec<String>> = BTreeMap::new();
    for file in files {
        let Some(name) = crate_of(&file.path).filter(|_| file.has_extension("rs")) else { continue };
        for (index, line) in file.text.lines().enumerate() {
            if let Some(defined) = public_type(line) {
                found.entry((name, defined)).or_default().push(format!("{}:{}", file.path, index + 1));
            }
        }
    }
    let several = found.into_iter().filter(|((_, name), locations)| locations.len() > 1 && !OF_A_MODULE.contains(name));
    several
        .map(|((of, name), locations)| {
            let (last, others) = locations.split_last().expect("there are several");
            format!("{last}: {of} has another public type {name}, at {}; give one a longer name", others.join(", "))
        })
        .collect()
}

/// Returns the crate whose sources contain a file.
fn crate_of(path: &str) -> Option<&str> {
    let (name, rest) = path.strip_prefix("crates/")?.split_once('/')?;
    rest.starts_with("src/").then_some(name)
}

/// Returns the name of the public type that a line defines. Types of a test module or a function are indented.
fn public_type(line: &str) -> Option<&str> {
    let rest = line.strip_prefix("pub ")?;
    let rest = ["struct ", "enum ", "trait ", "type "].iter().find_map(|kind| rest.strip_prefix(kind))?;
    rest.split(|letter: char| !letter.is_alphanumeric()).next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_public_types_of_one_name_are_found_in_a_crate_alone() {
        let file = |path: &str, text: &str| SourceFile { path: path.into(), text: text.into() };
        let one = file("crates/a/src/x.rs", "pub struct Answer {\n}\npub struct Options;\n");
        let other = file("crates/a/src/y.rs", "//\npub enum Answer {}\npub struct Options;\npub(crate) struct Own;\n");
        let elsewhere = file("crates/b/src/y.rs", "pub struct Answer;\npub(crate) struct Own;\n");
        let findings = check(&[one, other, elsewhere]);
        assert_eq!(findings.len(), 1);
        assert!(findings[0].starts_with("crates/a/src/y.rs:2: a has another public type Answer"), "{findings:?}");
    }
}
