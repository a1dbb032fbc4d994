//! Each test that `ARCHITECTURE.md` names for an invariant exists.

use std::collections::HashSet;

use super::SourceFile;

/// Finds test names in the map that no test has.
pub(crate) fn check(files: &[SourceFile]) -> Vec<String> {
    let Some(map) = files.iter().find(|file| file.path == "ARCHITECTURE.md") else {
        return vec!["ARCHITECTURE.md is missing".to_owned()];
    };
    let tests: HashSet<&str> =
        files.iter().filter(|file| file.has_extension("rs")).flat_map(|file| tests(&file.text)).collect();
    let named = map.text.lines().enumerate().flat_map(|(index, line)| {
        // Every second part is between backticks.
        line.split('`').skip(1).step_by(2).filter(|name| is_test_name(name)).map(move |name| (index + 1, name))
    });
    named
        .filter(|(_, name)| !tests.contains(name))
        .map(|(line, name)| format!("ARCHITECTURE.md:{line}: there is no test {name}"))
        .collect()
}

/// Returns the names of functions with a test attribute, such as `#[test]` or `#[tokio::test(…)]`.
fn tests(text: &str) -> Vec<&str> {
    let mut is_test = false;
    let mut names = vec![];
    for line in text.lines().map(str::trim) {
        if let Some(attribute) = line.strip_prefix("#[") {
            let path = attribute.split(['(', ']']).next().unwrap_or_default();
            is_test |= path == "test" || path.ends_with("::test");
        } else if let Some((_, rest)) = line.split_once("fn ") {
            names.extend(rest.split('(').next().filter(|_| is_test));
            is_test = false;
        } else if !line.starts_with("//") && !line.is_empty() {
            // The rest of a multi-line attribute may follow before the function.
            is_test &= !line.ends_with('}') && !line.ends_with(';');
        }
    }
    names
}

/// Returns whether a name looks like a test's. Test names are sentences; no module name has four words.
fn is_test_name(text: &str) -> bool {
    text.matches('_').count() >= 3 && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(map: &str, code: &str) -> Vec<String> {
        let files = [("ARCHITECTURE.md", map), ("crates/x/tests/it/main.rs", code)]
            .map(|(path, text)| SourceFile { path: path.into(), text: text.into() });
        check(&files)
    }

    #[test]
    fn a_test_that_the_map_names_exists() {
        let code = "    #[tokio::test(start_paused = true)]\n    async fn a_job_is_settled_once() {}\n";
        assert_eq!(findings("held by `a_job_is_settled_once` in `scheduler`", code), Vec::<String>::new());
        let missing = findings("x\nheld by `a_job_is_never_lost`", code);
        assert_eq!(missing, ["ARCHITECTURE.md:2: there is no test a_job_is_never_lost"]);
    }

    #[test]
    fn a_function_that_is_no_test_holds_nothing() {
        let map = "held by `a_job_is_settled_once`";
        assert_eq!(findings(map, "#[test]\nfn other() {}\nfn a_job_is_settled_once() {}\n").len(), 1);
        assert_eq!(findings(map, "#[allow(unused)]\nfn a_job_is_settled_once() {}\n").len(), 1);
        let many_lines =
            "#[test]\n#[expect(\n    clippy::x,\n    reason = \"y\"\n)]\n/// Why.\nfn a_job_is_settled_once() {}\n";
        assert_eq!(findings(map, many_lines), Vec::<String>::new());
    }
}
