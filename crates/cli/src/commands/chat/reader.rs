//! Reads chat input from a terminal or a pipe.

use std::io::{self, BufRead as _, Read as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::FileHistory;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{
    Cmd, ConditionalEventHandler, Config, Editor, Event, EventContext, EventHandler, Helper, KeyCode, KeyEvent,
    Modifiers, Movement, RepeatCount,
};

use super::input;
use crate::output;

/// The most inputs in the history.
const HISTORY_MAX: usize = 1_000;
/// The longest input that enters the history, in bytes.
const REMEMBERED_MAX: usize = 8 << 10;
/// The longest input that is accepted, in bytes.
const TEXT_MAX: usize = 16 << 20;

/// The source of inputs.
pub(super) enum Reader {
    /// A person at a terminal.
    Person(Box<Person>),
    /// A pipe or a file; each line is an input.
    Lines,
}

/// A person at a terminal, with the input history.
pub(super) struct Person {
    editor: Editor<Typing, FileHistory>,
    /// `None` if the history is not saved.
    history: Option<PathBuf>,
}

impl Reader {
    /// Creates a line editor whose history is saved in a file.
    pub(super) fn of_person(history: &Path) -> anyhow::Result<Self> {
        let config = Config::builder().max_history_size(HISTORY_MAX)?.auto_add_history(false).build();
        let mut editor = Editor::with_config(config).context("the terminal cannot be used")?;
        editor.set_helper(Some(Typing));
        editor.bind_sequence(KeyEvent(KeyCode::Enter, Modifiers::ALT), Cmd::Newline);
        editor.bind_sequence(KeyEvent::ctrl('C'), EventHandler::Conditional(Box::new(Abandon)));
        let history = match editor.load_history(history) {
            Err(ReadlineError::Io(error)) if error.kind() == io::ErrorKind::NotFound => Some(history.to_owned()),
            Err(error) => {
                output::note(format!("{} cannot be read ({error}): nothing is remembered", history.display()));
                None
            }
            Ok(()) => Some(history.to_owned()),
        };
        Ok(Self::Person(Box::new(Person { editor, history })))
    }

    /// Reads the next input; `None` at the end. Blocks.
    pub(super) fn read(&mut self, prompt: &str) -> anyhow::Result<Option<String>> {
        match self {
            Self::Person(person) => person.read(prompt),
            Self::Lines => lines(),
        }
    }
}

impl Person {
    fn read(&mut self, prompt: &str) -> anyhow::Result<Option<String>> {
        let text = loop {
            match self.editor.readline(prompt) {
                Ok(text) => break text,
                Err(ReadlineError::Interrupted | ReadlineError::Eof) => return Ok(None),
                Err(ReadlineError::Signal(_)) => {}
                Err(error) => return Err(error).context("the terminal cannot be read"),
            }
        };
        if !text.trim().is_empty() && text.len() <= REMEMBERED_MAX {
            self.remember(&text);
        }
        Ok(Some(text))
    }

    fn remember(&mut self, text: &str) {
        let is_new = self.editor.add_history_entry(text).unwrap_or(false);
        if let Some(history) = self.history.as_ref().filter(|_| is_new)
            && let Err(error) = self.editor.append_history(history)
        {
            output::note(format!("{} cannot be written ({error}): nothing more is remembered", history.display()));
            self.history = None;
        }
    }
}

/// Reads lines until the input is complete.
fn lines() -> anyhow::Result<Option<String>> {
    let mut text = String::new();
    loop {
        // One byte more than the limit is enough to detect an input that is too long.
        let room = (TEXT_MAX + 1).saturating_sub(text.len());
        let count = io::stdin().lock().take(room as u64).read_line(&mut text);
        let count = count.context("stdin cannot be read as text")?;
        if text.len() > TEXT_MAX {
            bail!("a line of stdin has more than {} MiB, which no model takes", TEXT_MAX >> 20);
        }
        let line = text.strip_suffix('\n').map_or(text.as_str(), |line| line.strip_suffix('\r').unwrap_or(line));
        if count == 0 {
            return Ok(Some(line.to_owned()).filter(|line| !line.is_empty()));
        }
        if input::is_whole(line) {
            return Ok(Some(line.to_owned()));
        }
    }
}

/// Detects incomplete input, and completes commands.
struct Typing;

impl Validator for Typing {
    fn validate(&self, typed: &mut ValidationContext<'_>) -> rustyline::Result<ValidationResult> {
        Ok(if input::is_whole(typed.input()) { ValidationResult::Valid(None) } else { ValidationResult::Incomplete })
    }
}

impl Completer for Typing {
    type Candidate = String;

    fn complete(
        &self,
        line: &str,
        position: usize,
        _: &rustyline::Context<'_>,
    ) -> rustyline::Result<(usize, Vec<String>)> {
        let typed = &line[..position];
        let begun = |command: &&str| typed.starts_with('/') && command.starts_with(typed);
        let commands = input::COMMANDS.iter().map(|(command, ..)| *command).filter(begun);
        Ok((0, commands.map(|command| format!("{command} ")).collect()))
    }
}

impl Highlighter for Typing {}

impl Hinter for Typing {
    type Hint = String;
}

impl Helper for Typing {}

/// Ctrl-C discards the typed text, or ends the chat if nothing was typed.
struct Abandon;

impl ConditionalEventHandler for Abandon {
    fn handle(&self, _: &Event, _: RepeatCount, _: bool, typed: &EventContext<'_>) -> Option<Cmd> {
        Some(if typed.line().is_empty() { Cmd::Interrupt } else { Cmd::Kill(Movement::WholeBuffer) })
    }
}
