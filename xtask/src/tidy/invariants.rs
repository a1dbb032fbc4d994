//! Each invariant of `ARCHITECTURE.md` names the tests that hold it, and those tests exist.

use std::collections::HashSet;

use super::SourceFile;

/// Finds names of tests in the map that no test bears.
pub(crate) fn check(files: &[SourceFile]) -> Vec<String> {
    let Some(map) = files.iter().find(|file| file.path == "ARCHITECTURE.md") else {
        return vec!["ARCHITECTURE.md is missing".to_owned()];
    };
    let functions: HashSet<&str> =
        files.iter().filter(|file| file.has_extension("rs")).flat_map(|file| functions(&file.text)).collect();
    let named = map.text.lines().enumerate().flat_map(|(index, line)| {
        // Every second part lies between backticks.
        line.split('`').skip(1).step_by(2).filter(|name| is_test_name(name)).map(move |name| (index + 1, name))
    });
    named
        .filter(|(_, name)| !functions.contains(name))
        .map(|(line, name)| format!("ARCHITECTURE.md:{line}: there is no test {name}"))
        .collect()
}

fn functions(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| {
        let (_, rest) = line.split_once("fn ")?;
        rest.split('(').next()
    })
}

/// Says whether this reads like a test's name, which is a sentence: no module has four words.
fn is_test_name(text: &str) -> bool {
    text.matches('_').count() >= 3 && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(map: &str) -> Vec<SourceFile> {
        let test = "    async fn a_job_is_settled_once() {}\n";
        [("ARCHITECTURE.md", map), ("crates/x/tests/it/main.rs", test)]
            .map(|(path, text)| SourceFile { path: path.into(), text: text.into() })
            .into()
    }

    #[test]
    fn a_test_that_the_map_names_exists() {
        assert_eq!(check(&files("held by `a_job_is_settled_once` in `scheduler`")), Vec::<String>::new());
        let findings = check(&files("x\nheld by `a_job_is_never_lost`"));
        assert_eq!(findings, ["ARCHITECTURE.md:2: there is no test a_job_is_never_lost"]);
    }
}
