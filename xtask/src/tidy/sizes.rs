//! Lists long files and functions. They are not errors, but may hold two ideas.

use super::SourceFile;

const FILE_LINES: usize = 400;
const FUNCTION_LINES: usize = 60;

pub(crate) fn report(files: &[SourceFile]) -> Vec<String> {
    let mut lines = vec![];
    for file in files.iter().filter(|file| file.has_extension("rs")) {
        let count = file.text.lines().count();
        if count > FILE_LINES {
            lines.push(format!("{} has {count} lines", file.path));
        }
        for (line, name, count) in functions(&file.text).into_iter().filter(|(_, _, count)| *count > FUNCTION_LINES) {
            lines.push(format!("{}:{line}: fn {name} has {count} lines", file.path));
        }
    }
    lines
}

/// Returns each function's line, name and length. Relies on rustfmt's layout.
fn functions(text: &str) -> Vec<(usize, &str, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = vec![];
    for (index, line) in lines.iter().enumerate() {
        let code = line.trim_start();
        let Some(name) = function_name(code) else { continue };
        let indent = line.len() - code.len();
        let end = lines[index..].iter().position(|line| {
            let code = line.trim_start();
            // A body closes at the indentation where it began; a declaration without a body ends with its semicolon.
            line.len() - code.len() == indent && (code == "}" || code.ends_with(';'))
        });
        found.push((index + 1, name, end.unwrap_or(0) + 1));
    }
    found
}

fn function_name(code: &str) -> Option<&str> {
    let mut words = code.split(' ');
    let before_fn = words
        .find(|word| !(matches!(*word, "const" | "async" | "unsafe" | "extern" | "\"C\"") || word.starts_with("pub")));
    let name = (before_fn == Some("fn")).then(|| words.next()).flatten()?;
    name.split(['(', '<']).next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_are_measured_from_their_name_to_their_brace() {
        let text = "pub async fn long(\n    a: u8,\n) {\n    if a {\n    }\n}\n\nimpl X {\n    fn short(&self) {\n        \
                    x;\n    }\n    fn declared(&self);\n}\nfn one() {}\n";
        let found = functions(text);
        assert_eq!(found[0], (1, "long", 6));
        assert_eq!(found[1], (9, "short", 3));
        assert_eq!(found[2], (12, "declared", 1));
    }

    #[test]
    fn only_what_is_long_is_reported() {
        let long = format!("fn long() {{\n{}}}\n", "    x;\n".repeat(FUNCTION_LINES));
        let file = SourceFile { path: "a.rs".into(), text: format!("{long}fn short() {{\n}}\n") };
        assert_eq!(report(&[file]), ["a.rs:1: fn long has 62 lines"]);
    }
}
