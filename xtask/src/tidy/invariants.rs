//! Each test that a document names for what it promises exists.

use std::collections::HashSet;

use super::SourceFile;

/// Documents whose promises tests hold.
const DOCUMENTS: [&str; 2] = ["ARCHITECTURE.md", THREATS];
/// The one that names a test for each threat.
const THREATS: &str = "docs/security/README.md";

/// Finds test names in these documents that no test has.
pub(crate) fn check(files: &[SourceFile]) -> Vec<String> {
    let tests: HashSet<&str> =
        files.iter().filter(|file| file.has_extension("rs")).flat_map(|file| tests(&file.text)).collect();
    let mut findings: Vec<_> = DOCUMENTS.iter().flat_map(|path| check_document(files, path, &tests)).collect();
    let threats = files.iter().find(|file| file.path == THREATS);
    findings.extend(threats.iter().flat_map(|file| undefended(&file.path, &file.text)));
    findings
}

fn check_document(files: &[SourceFile], path: &str, tests: &HashSet<&str>) -> Vec<String> {
    let Some(document) = files.iter().find(|file| file.path == path) else {
        return vec![format!("{path} is missing")];
    };
    let named = document.text.lines().enumerate().flat_map(|(index, line)| {
        // Every second part is between backticks.
        line.split('`').skip(1).step_by(2).filter(|name| is_test_name(name)).map(move |name| (index + 1, name))
    });
    named
        .filter(|(_, name)| !tests.contains(name))
        .map(|(line, name)| format!("{path}:{line}: there is no test {name}"))
        .collect()
}

/// Returns the names of functions with a test attribute, such as `#[test]` or `#[tokio::test(…)]`, and of behaviours.
fn tests(text: &str) -> Vec<&str> {
    let mut is_test = false;
    let mut names: Vec<_> = behaviours(text).collect();
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

/// Returns the names in uses of the macro `behaviours`, which makes a test of each.
fn behaviours(text: &str) -> impl Iterator<Item = &str> {
    let lists = text.split("behaviours! {").skip(1).filter_map(|rest| rest.split('}').next());
    lists.flat_map(str::lines).filter_map(|line| behaviour(line.trim()))
}

/// Returns the name in a line such as `jobs: a_settled_job_frees_its_slot,`.
fn behaviour(line: &str) -> Option<&str> {
    let (group, name) = line.strip_suffix(',')?.split_once(": ")?;
    let is_group = group.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
    (is_group && is_test_name(name)).then_some(name)
}

/// Finds threats that no test holds off, in a table of threats and defences.
fn undefended(path: &str, text: &str) -> Vec<String> {
    let rows = text.lines().enumerate().filter(|(_, line)| line.starts_with("| ") && !line.starts_with("| Threat |"));
    let names_none = |line: &str| !line.split('`').skip(1).step_by(2).any(is_test_name);
    rows.filter(|(_, line)| names_none(line))
        .map(|(index, _)| format!("{path}:{}: no test is named for this threat", index + 1))
        .collect()
}

/// Returns whether a name looks like a test's. Test names are sentences; no module name has four words.
fn is_test_name(text: &str) -> bool {
    let is_of_a_name = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    text.matches('_').count() >= 3 && text.bytes().all(is_of_a_name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings_in(map: &str, security: &str, code: &str) -> Vec<String> {
        let [map_path, security_path] = DOCUMENTS;
        let files = [(map_path, map), (security_path, security), ("crates/x/tests/it/main.rs", code)]
            .map(|(path, text)| SourceFile { path: path.into(), text: text.into() });
        check(&files)
    }

    fn findings(map: &str, code: &str) -> Vec<String> {
        findings_in(map, "", code)
    }

    #[test]
    fn a_test_that_the_map_names_exists() {
        let code = "    #[tokio::test(start_paused = true)]\n    async fn a_job_is_settled_once() {}\n";
        assert_eq!(findings("held by `a_job_is_settled_once` in `scheduler`", code), Vec::<String>::new());
        let missing = findings("x\nheld by `a_job_is_never_lost`", code);
        assert_eq!(missing, ["ARCHITECTURE.md:2: there is no test a_job_is_never_lost"]);
    }

    #[test]
    fn a_test_that_defends_against_a_threat_exists() {
        let code = "#[test]\nfn a_stranger_takes_64_mib_at_most() {}\n";
        assert_eq!(findings_in("", "| Strangers | `a_stranger_takes_64_mib_at_most` |", code), Vec::<String>::new());
        let missing = findings_in("", "| Strangers | `a_stranger_takes_65_mib_at_most` |", code);
        assert_eq!(missing, ["docs/security/README.md:1: there is no test a_stranger_takes_65_mib_at_most"]);
        let unproven = findings_in("", "| Threat | Defence |\n|---|---|\n| Strangers | a limit |", code);
        assert_eq!(unproven, ["docs/security/README.md:3: no test is named for this threat"]);
    }

    #[test]
    fn a_behaviour_that_a_macro_makes_a_test_of_counts() {
        let line = "            jobs: of_64_settlements_of_one_job_exactly_one_bills,\n";
        let map = "`of_64_settlements_of_one_job_exactly_one_bills`";
        let list = format!("        $crate::behaviours! {{ $make =>\n{line}        }}\n");
        assert_eq!(findings(map, &list), Vec::<String>::new());
        // A field of that name is no test, and neither is one after the list.
        assert_eq!(findings(map, &format!("struct Jobs {{\n{line}}}\n")).len(), 1);
        assert_eq!(findings(map, &format!("behaviours! {{ $make =>\n}}\nstruct Jobs {{\n{line}}}\n")).len(), 1);
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
