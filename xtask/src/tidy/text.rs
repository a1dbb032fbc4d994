//! Finds empty names, marks of unfinished work, and I/O in crates that must have none.

use super::SourceFile;

/// Names that fit everything and therefore say nothing.
const EMPTY_NAMES: &[&str] = &["common", "helper", "helpers", "misc", "mod", "util", "utils"];
/// I/O that the protocol and inference crates must not use: they encode and decode bytes that other crates transport.
const OUTSIDE_WORLD: &[&str] =
    &["tokio::", "async fn", "std::fs", "std::io", "std::net", "std::env", "std::process", "std::thread"];
/// The most characters in a line of comment. rustfmt keeps code to the same width.
const COMMENT_WIDTH_MAX: usize = 120;
/// Files that tools write.
const GENERATED: &[&str] = &["Cargo.lock", "package-lock.json"];

pub(crate) fn check(files: &[SourceFile]) -> Vec<String> {
    let mut findings = vec![];
    for file in files {
        findings.extend(check_path(&file.path));
        let name = file.path.rsplit('/').next().unwrap_or_default();
        if !GENERATED.contains(&name) {
            findings.extend(check_lines(file));
        }
    }
    findings
}

fn check_path(path: &str) -> Option<String> {
    let parts = path.strip_suffix(".rs")?.split('/');
    let empty = parts.into_iter().find(|part| EMPTY_NAMES.contains(part))?;
    Some(if empty == "mod" {
        format!("{path}: name the file after its module, beside its folder")
    } else {
        format!("{path}: {empty} names nothing; name the subject")
    })
}

fn check_lines(file: &SourceFile) -> Vec<String> {
    // Concatenated, so that the check does not match this file.
    let marks = [["TO", "DO"], ["FIX", "ME"], ["XX", "X"]].map(|parts| parts.concat());
    let homes = [["/ho", "me/"], ["/ro", "ot/"], ["/Us", "ers/"]].map(|parts| parts.concat());
    let ignored = ["#[ig", "nore"].concat();
    // Ignored tests of these kinds do run: another test starts them as a child process, `interop/run` or a recipe
    // selects them, or somebody who measures runs them by the command in `docs/benchmarks.md`.
    let excused = [
        "run in a process of its own by ",
        "needs Node: make interop",
        "needs models: make bench-engine",
        "measures memory: docs/benchmarks.md",
        "measures time: docs/benchmarks.md",
        "runs for long: make linearizability",
        "runs for long: make quotas",
        "runs for long: make cuts",
    ]
    .map(|why| format!("{ignored} = \"{why}"));
    let is_language = ["crates/inference/src/", "crates/protocol/src/"].iter().any(|src| file.path.starts_with(src));
    let mut findings = vec![];
    for (index, line) in file.text.lines().enumerate() {
        let at = format!("{}:{}", file.path, index + 1);
        for mark in marks.iter().filter(|mark| has_word(line, mark)) {
            findings.push(format!("{at}: {mark}: do it, or open an issue"));
        }
        for home in homes.iter().filter(|home| has_path(line, home)) {
            findings.push(format!("{at}: a path below {home} is somebody's own"));
        }
        for word in OUTSIDE_WORLD.iter().filter(|word| is_language && line.contains(**word)) {
            findings.push(format!("{at}: inference and protocol do no I/O, so no {word}"));
        }
        let code = line.trim_start();
        if file.has_extension("rs") && code.starts_with("//") && line.chars().count() > COMMENT_WIDTH_MAX {
            findings.push(format!("{at}: a comment wider than {COMMENT_WIDTH_MAX} columns; break the line"));
        }
        if file.has_extension("rs") && code.starts_with(&ignored) && !excused.iter().any(|why| code.starts_with(why)) {
            findings.push(format!("{at}: a test that never runs proves nothing"));
        }
    }
    findings
}

fn has_word(line: &str, word: &str) -> bool {
    let part_of_word = |letter: char| letter.is_alphanumeric() || letter == '_';
    line.match_indices(word).any(|(start, _)| {
        !line[..start].ends_with(part_of_word) && !line[start + word.len()..].starts_with(part_of_word)
    })
}

/// Returns whether the line has a path with this beginning. In `~/x` and `a/x`, `/x` is not the beginning of a path.
fn has_path(line: &str, start_of_path: &str) -> bool {
    let goes_on = |letter: char| letter.is_alphanumeric() || matches!(letter, '.' | '~' | '}' | ')' | '-' | '_');
    let is_name = |letter: char| letter.is_alphanumeric() || matches!(letter, '.' | '_' | '-');
    line.match_indices(start_of_path)
        .any(|(start, _)| !line[..start].ends_with(goes_on) && line[start + start_of_path.len()..].starts_with(is_name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(path: &str, text: &str) -> Vec<String> {
        check(&[SourceFile { path: path.into(), text: text.into() }])
    }

    #[test]
    fn names_that_say_nothing_are_found() {
        for path in ["crates/x/src/utils.rs", "crates/common/src/lib.rs", "crates/x/src/y/mod.rs"] {
            assert_eq!(findings(path, "").len(), 1, "{path}");
        }
        assert!(findings("crates/x/src/module.rs", "").is_empty());
    }

    #[test]
    fn marks_of_undone_work_are_found_as_words() {
        let mark = ["TO", "DO"].concat();
        assert_eq!(findings("a.rs", &format!("x;\n// {mark}: later")).len(), 1);
        assert!(findings("a.rs", &format!("let {mark}S = 1;")).is_empty());
        assert!(findings("Cargo.lock", &mark).is_empty());
    }

    #[test]
    fn somebodys_own_paths_are_found() {
        let home = ["/ho", "me/"].concat();
        assert_eq!(findings("a.md", &format!("see {home}ada/x")).len(), 1);
        for fine in [format!("https://example.com{home}page"), format!("below `{home}`"), "~/.cache/x".to_owned()] {
            assert!(findings("a.md", &fine).is_empty(), "{fine}");
        }
    }

    #[test]
    fn the_language_of_the_nodes_does_no_io() {
        assert_eq!(findings("crates/protocol/src/x.rs", "use std::fs::File;\nasync fn x() {}").len(), 2);
        assert!(findings("crates/rpc/src/x.rs", "use std::fs::File;").is_empty());
    }

    #[test]
    fn comments_wider_than_code_are_found() {
        let comment = |words: usize| format!("// {}\n", "wörd ".repeat(words).trim_end());
        let findings = |text: String| check(&[SourceFile { path: "crates/x/src/lib.rs".into(), text }]);
        assert_eq!(findings(comment(23)), Vec::<String>::new());
        assert_eq!(findings(comment(24)).len(), 1);
        assert_eq!(findings(format!("let text = {:?};\n", "a".repeat(200))), Vec::<String>::new());
    }

    #[test]
    fn tests_that_never_run_are_found() {
        let ignored = ["#[ig", "nore]"].concat();
        assert_eq!(findings("a.rs", &format!("    {ignored}\n")).len(), 1);
        assert!(findings("a.md", &ignored).is_empty());
        let child = ["#[ig", "nore = \"run in a process of its own by its_test\"]"].concat();
        assert!(findings("a.rs", &child).is_empty());
    }
}
