//! What people and programs read on stdout.

use std::io::{self, Write as _};

use serde::Serialize;

/// Prints a line. A reader that went away is no error.
pub fn line(text: impl AsRef<str>) {
    let _ = writeln!(io::stdout().lock(), "{}", text.as_ref());
}

/// Prints a line for the person at the terminal, beside what a program reads.
pub fn note(text: impl AsRef<str>) {
    let _ = writeln!(io::stderr().lock(), "tether: {}", text.as_ref());
}

/// Returns the known name that a mistyped one is likely meant to be.
pub fn nearest<'a>(mistyped: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let similarity = |name: &str| strsim::jaro_winkler(mistyped, name);
    let best = known.into_iter().max_by(|one, other| similarity(one).total_cmp(&similarity(other)))?;
    (similarity(best) > 0.9).then_some(best)
}

/// Prints text as it comes, without waiting for the end of the line.
pub fn piece(text: &str) {
    let mut stdout = io::stdout().lock();
    let _ = stdout.write_all(text.as_bytes());
    let _ = stdout.flush();
}

/// Prints a value as JSON.
pub fn json(value: &impl Serialize) -> anyhow::Result<()> {
    line(serde_json::to_string_pretty(value)?);
    Ok(())
}

/// Prints rows under a head, each column as wide as its widest cell.
pub fn table(head: &[&str], rows: &[Vec<String>]) {
    line(aligned(head, rows));
}

/// Returns rows under a head, each column as wide as its widest cell.
pub fn aligned(head: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([head[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let row = |cells: &mut dyn Iterator<Item = &str>| {
        let padded: Vec<String> =
            cells.zip(&widths).map(|(cell, width)| format!("{cell:<width$}", width = *width)).collect();
        padded.join("  ").trim_end().to_owned()
    };
    let mut lines = vec![row(&mut head.iter().copied())];
    lines.extend(rows.iter().map(|cells| row(&mut cells.iter().map(String::as_str))));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistyped_name_is_recognised_and_a_foreign_one_is_not() {
        let known = ["smollm2-135m-instruct", "tether-tiny", "gemma-3-270m"];
        assert_eq!(nearest("teter-tiny", known), Some("tether-tiny"));
        assert_eq!(nearest("smollm2-135m", known), Some("smollm2-135m-instruct"));
        assert_eq!(nearest("llama3", known), None);
    }

    #[test]
    fn columns_line_up() {
        let rows = [vec!["a".into(), "long cell".into(), "x".into()], vec!["ü".into(), "b".into(), "y".into()]];
        assert_eq!(
            aligned(&["ONE", "TWO", "THREE"], &rows),
            "ONE  TWO        THREE\na    long cell  x\nü    b          y"
        );
    }
}
