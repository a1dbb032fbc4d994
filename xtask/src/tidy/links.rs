//! Each relative link in a document leads to a file that exists.

use super::SourceFile;

/// Finds broken links. `exists` returns whether a path relative to the root exists.
pub(crate) fn check(files: &[SourceFile], exists: impl Fn(&str) -> bool) -> Vec<String> {
    let mut findings = vec![];
    for file in files.iter().filter(|file| file.has_extension("md")) {
        for (line, target) in links(&file.text) {
            let resolved = resolve(&file.path, target);
            if !resolved.as_deref().is_some_and(&exists) {
                findings.push(format!("{}:{line}: the link to {target} leads nowhere", file.path));
            }
        }
    }
    findings
}

/// Returns a document's relative link targets, each with its line. Links in code are ignored.
fn links(text: &str) -> Vec<(usize, &str)> {
    let mut found = vec![];
    let mut in_code = false;
    for (index, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        }
        if in_code {
            continue;
        }
        // Every second part is between backticks.
        for part in line.split('`').step_by(2) {
            for rest in part.split("](").skip(1) {
                let Some((target, _)) = rest.split_once(')') else { continue };
                let target = target.split([' ', '#']).next().unwrap_or_default();
                if !target.is_empty() && !target.contains(':') {
                    found.push((index + 1, target));
                }
            }
        }
    }
    found
}

/// Returns the target's path relative to the root, or `None` if it leads out of the repository.
fn resolve(document: &str, target: &str) -> Option<String> {
    if target.starts_with('/') {
        return None;
    }
    let mut parts: Vec<&str> = document.split('/').collect();
    parts.pop();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            name => parts.push(name),
        }
    }
    Some(parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(text: &str) -> Vec<String> {
        let file = SourceFile { path: "docs/adr/README.md".into(), text: text.into() };
        check(&[file], |path| matches!(path, "docs/adr/0001.md" | "README.md" | "docs/adr"))
    }

    #[test]
    fn links_that_lead_somewhere_are_in_order() {
        let text = "[a](0001.md) and [b](../../README.md#top), [c](.) [d](#here) [e](https://example.com/x)";
        assert_eq!(findings(text), Vec::<String>::new());
    }

    #[test]
    fn links_that_lead_nowhere_or_out_are_found_with_their_line() {
        let text = "fine\n[a](0002.md)\n[b](../../../README.md)\n[c](/README.md)";
        let found = findings(text);
        assert_eq!(found.len(), 3, "{found:?}");
        assert_eq!(found[0], "docs/adr/README.md:2: the link to 0002.md leads nowhere");
    }

    #[test]
    fn code_has_no_links() {
        assert_eq!(findings("`[a](gone.md)`\n```\n[b](gone.md)\n```\n"), Vec::<String>::new());
    }
}
