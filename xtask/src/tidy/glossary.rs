//! Finds what `docs/glossary.md` refuses: phrases in code, comments and documents, and type names.

use super::SourceFile;

const GLOSSARY: &str = "docs/glossary.md";
/// Extensions of files whose text people read.
const READ_BY_PEOPLE: &[&str] = &["rs", "md", "toml", "py", "js", "ts", "sh"];

/// Finds refused phrases and type names, with what to write instead.
pub(crate) fn check(files: &[SourceFile]) -> Vec<String> {
    let Some(glossary) = files.iter().find(|file| file.path == GLOSSARY) else {
        return vec![format!("{GLOSSARY} is missing")];
    };
    let phrases = refused(&glossary.text, "## Refused phrases");
    let names = refused(&glossary.text, "## Refused type names");
    let mut findings = vec![];
    for file in files.iter().filter(|file| file.path != GLOSSARY && is_read(file)) {
        for (index, line) in file.text.lines().enumerate() {
            let at = format!("{}:{}", file.path, index + 1);
            for (phrase, instead) in phrases.iter().filter(|(phrase, _)| has_phrase(line, phrase)) {
                findings.push(format!("{at}: not {phrase:?}, but {instead}"));
            }
            let defined = defined_type(line).filter(|_| file.has_extension("rs"));
            for (name, instead) in names.iter().filter(|(name, _)| defined == Some(*name)) {
                findings.push(format!("{at}: no type is called {name}; use {instead}"));
            }
        }
    }
    findings
}

fn is_read(file: &SourceFile) -> bool {
    READ_BY_PEOPLE.iter().any(|extension| file.has_extension(extension))
}

/// Returns what a section refuses, with the replacement, from lines of the form "- `refused` – instead".
fn refused<'a>(glossary: &'a str, section: &str) -> Vec<(&'a str, &'a str)> {
    let lines = glossary.lines().skip_while(|line| *line != section).skip(1);
    let lines = lines.take_while(|line| !line.starts_with("## "));
    lines.filter_map(|line| line.strip_prefix("- `")?.split_once("` – ")).collect()
}

/// Returns whether a line has a phrase, also capitalised at the beginning of a sentence. Python's `is None` does not
/// match.
fn has_phrase(line: &str, phrase: &str) -> bool {
    let (first, rest) = phrase.split_at(1);
    has_words(line, phrase) || has_words(line, &(first.to_uppercase() + rest))
}

/// Returns whether a text has these words, except as parts of longer words.
fn has_words(text: &str, words: &str) -> bool {
    let goes_on = |letter: Option<char>| letter.is_some_and(|letter| letter.is_alphanumeric() || letter == '_');
    text.match_indices(words).any(|(start, _)| {
        !goes_on(text[..start].chars().next_back()) && !goes_on(text[start + words.len()..].chars().next())
    })
}

/// Returns the name of the type that a line defines.
fn defined_type(line: &str) -> Option<&str> {
    let mut words = line.split_whitespace().skip_while(|word| word.starts_with("pub"));
    let is_definition = matches!(words.next()?, "struct" | "enum" | "trait" | "type" | "union");
    let name = words.next().filter(|_| is_definition)?;
    name.split(|letter: char| !letter.is_alphanumeric()).next()
}

#[cfg(test)]
mod tests {
    use super::*;

    // Concatenated, so that the check does not match this file.
    fn findings(path: &str, text: &str) -> Vec<String> {
        let phrase = ["is no", "ne"].concat();
        let glossary = format!(
            "## Refused phrases\n\n- `{phrase}` – \"is invalid\"\n\n## Refused type names\n\n- `Strand` – `CachedSequence`\n"
        );
        let files = [(GLOSSARY, glossary.as_str()), (path, text)];
        check(&files.map(|(path, text)| SourceFile { path: path.into(), text: text.into() }))
    }

    #[test]
    fn a_refused_phrase_is_found_with_what_to_write_instead() {
        let text = ["// A longer name is no", "ne.\n"].concat();
        assert_eq!(findings("crates/x/src/lib.rs", &text).len(), 1);
        assert!(findings("docs/x.md", &text)[0].ends_with("but \"is invalid\""));
        assert_eq!(findings("x.lock", &text), Vec::<String>::new());
        assert_eq!(findings("x.rs", "if this.is_none() {}\n// The basis nonetheless\n"), Vec::<String>::new());
        assert_eq!(findings("x.py", "if this is None:\n"), Vec::<String>::new());
    }

    #[test]
    fn a_refused_type_name_is_found_where_it_is_defined() {
        assert_eq!(findings("x.rs", "pub(super) struct Strand<'a> {\n").len(), 1);
        assert_eq!(findings("x.rs", "/// A Strand.\nstruct Strands;\nlet strand = 1;\n"), Vec::<String>::new());
        assert_eq!(findings("x.md", "struct Strand\n"), Vec::<String>::new());
    }
}
