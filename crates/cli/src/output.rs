//! Prints to stdout and stderr: text for people and JSON for programs.

use std::fmt::Write as _;
use std::io::{self, Write as _};

use anstyle::{AnsiColor, Style};
use serde::Serialize;
use unicode_width::UnicodeWidthStr as _;

/// Prints a line. It may contain untrusted text. A closed pipe is not an error.
pub fn line(text: impl AsRef<str>) {
    let _ = writeln!(io::stdout().lock(), "{}", harmless(text.as_ref()));
}

/// Prints a line for the user to stderr, apart from what a program reads. It may contain untrusted text.
pub fn note(text: impl AsRef<str>) {
    let _ = writeln!(io::stderr().lock(), "tether: {}", harmless(text.as_ref()));
}

/// Returns the known name that a mistyped one is probably meant to be.
pub fn nearest<'a>(mistyped: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let similarity = |name: &str| strsim::jaro_winkler(mistyped, name);
    let best = known.into_iter().max_by(|one, other| similarity(one).total_cmp(&similarity(other)))?;
    (similarity(best) > 0.9).then_some(best)
}

/// Prints text at once, without waiting for the end of the line. A closed pipe is not an error.
pub fn piece(text: &str) {
    let _ = try_piece(text);
}

/// Prints text at once. For answers: nobody should wait for the rest of one that cannot be written.
pub fn try_piece(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// Prints a value as JSON, with the characters that [`harmless`] escapes as `\uXXXX`.
pub fn json(value: &impl Serialize) -> anyhow::Result<()> {
    line(escaped(&serde_json::to_string_pretty(value)?));
    Ok(())
}

/// Escapes in JSON what is not harmless on a terminal. Such characters occur in strings only.
fn escaped(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for letter in json.chars() {
        if is_harmless(letter) {
            text.push(letter);
        } else {
            let _ = write!(text, "\\u{:04x}", u32::from(letter));
        }
    }
    text
}

/// The style of a word on a terminal with colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    Good,
    Doubtful,
    Bad,
    Head,
    Aside,
}

/// Styles a text. Print it with [`shown`], which removes the style if stdout is not a terminal or NO_COLOR is set.
pub fn looking(look: Look, text: &str) -> String {
    let style = match look {
        Look::Good => AnsiColor::Green.on_default(),
        Look::Doubtful => AnsiColor::Yellow.on_default(),
        Look::Bad => AnsiColor::Red.on_default(),
        Look::Head => Style::new().bold(),
        Look::Aside => Style::new().dimmed(),
    };
    format!("{style}{text}{style:#}")
}

/// Prints a line, with its styles only if stdout is a terminal and NO_COLOR is not set.
pub fn shown(text: impl AsRef<str>) {
    let _ = writeln!(anstream::stdout().lock(), "{}", text.as_ref());
}

/// Makes untrusted text safe for a terminal. Only line ends and tabs keep their effect; other control characters, and
/// those that change the writing direction, are escaped.
pub fn harmless(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for letter in text.chars() {
        if is_harmless(letter) {
            shown.push(letter);
        } else {
            shown.extend(letter.escape_default());
        }
    }
    shown
}

fn is_harmless(letter: char) -> bool {
    let turns = matches!(letter, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    !turns && (!letter.is_control() || matches!(letter, '\n' | '\t'))
}

/// Returns another machine's text on one line, without characters that change the terminal.
pub fn one_line(text: &str) -> String {
    harmless(text).replace(['\n', '\t'], " ")
}

/// Returns a number and its noun, with a plural s unless it is one: `1 worker`, `2 workers`.
pub fn counted(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

/// Prints a table with a header, each column as wide as its widest cell.
pub fn table(head: &[&str], rows: &[Vec<String>]) {
    shown(aligned(head, rows));
}

/// Returns the style of a word in the column STATE.
fn look_of(state: &str) -> Option<Look> {
    match state {
        "ready" | "answers" | "good" | "ok" => Some(Look::Good),
        "loading" | "stopping" | "not reporting" => Some(Look::Doubtful),
        "error" | "does not answer" | "revoked" | "ended" => Some(Look::Bad),
        _ => None,
    }
}

/// Returns styled rows under a header, each column as wide as its widest cell on a terminal. Cells may contain
/// untrusted text.
pub fn aligned(head: &[&str], rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(|cell| one_line(cell)).collect()).collect();
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.width());
        cells.chain([head[column].width()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let row = |cells: &[&str], look: &dyn Fn(usize, &str) -> Option<Look>| {
        // Cells after the last non-empty one are left out, so that no line ends in spaces.
        let end = cells.iter().rposition(|cell| !cell.is_empty()).map_or(0, |last| last + 1);
        let mut text = String::new();
        for (column, cell) in cells[..end].iter().enumerate() {
            text.push_str(&look(column, cell).map_or_else(|| (*cell).to_owned(), |look| looking(look, cell)));
            if column + 1 < end {
                text.push_str(&" ".repeat(widths[column] - cell.width() + 2));
            }
        }
        text
    };
    let mut lines = vec![row(head, &|_, _| Some(Look::Head))];
    lines.extend(rows.iter().map(|cells| {
        let cells: Vec<&str> = cells.iter().map(String::as_str).collect();
        row(&cells, &|column, cell| look_of(cell).filter(|_| head[column] == "STATE"))
    }));
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
    fn what_other_machines_say_cannot_change_the_terminal() {
        let hostile = "a\u{1b}]52;c;x\u{7}\u{9b}2J\u{202e}b\nc";
        let is_plain = |text: &str| text.chars().all(is_harmless);
        assert!(is_plain(&harmless(hostile)) && is_plain(&one_line(hostile)));
        assert!(!one_line(hostile).contains('\n'));
        let table = aligned(&["ONE"], &[vec![hostile.to_owned()]]);
        let unstyled = anstream::adapter::strip_str(&table).to_string();
        assert!(is_plain(&unstyled) && unstyled.contains("]52;c;x"), "{table:?}");
        let json = escaped(&serde_json::to_string(hostile).expect("JSON"));
        assert!(is_plain(&json), "{json}");
        assert_eq!(serde_json::from_str::<String>(&json).expect("still JSON"), hostile);
    }

    #[test]
    fn columns_line_up() {
        let rows = [vec!["a".into(), "long cell".into(), "x".into()], vec!["模型".into(), "b".into(), String::new()]];
        let plain = |text: &str| anstream::adapter::strip_str(text).to_string();
        assert_eq!(
            plain(&aligned(&["ONE", "TWO", "THREE"], &rows)),
            "ONE   TWO        THREE\na     long cell  x\n模型  b"
        );
    }

    #[test]
    fn states_and_titles_have_a_look_and_other_cells_do_not() {
        let rows = [vec!["ready".into(), "ready".into()]];
        let table = aligned(&["NAME", "STATE"], &rows);
        let expected = format!(
            "{}   {}\nready  {}",
            looking(Look::Head, "NAME"),
            looking(Look::Head, "STATE"),
            looking(Look::Good, "ready")
        );
        assert_eq!(table, expected);
    }

    #[test]
    fn one_thing_takes_no_s() {
        assert_eq!(
            [counted(0, "model"), counted(1, "model"), counted(2, "model")],
            ["0 models", "1 model", "2 models"]
        );
    }
}
