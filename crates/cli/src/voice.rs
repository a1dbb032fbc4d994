//! Prints a model's answer as it arrives. Nothing in it can move the cursor or change the terminal.

use std::io::{self, IsTerminal as _};

use anstream::{AutoStream, ColorChoice};

use crate::client::Piece;
use crate::output::{self, Look, harmless};

/// Where an answer is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Screen {
    /// A file or another program, which gets the answer unchanged and without the reasoning.
    Pipe,
    /// A terminal without colours.
    Plain,
    /// A terminal with colours: reasoning is dimmed.
    Coloured,
}

/// Turns the pieces of one answer into what its screen shows.
#[derive(Debug, Clone)]
pub struct Voice {
    screen: Screen,
    is_thinking: bool,
    has_begun: bool,
    ends_line: bool,
}

impl Screen {
    pub fn of_stdout() -> Self {
        let stdout = io::stdout();
        if !stdout.is_terminal() {
            Self::Pipe
        } else if AutoStream::choice(&stdout) == ColorChoice::Never {
            Self::Plain
        } else {
            Self::Coloured
        }
    }
}

impl Voice {
    pub fn new(screen: Screen) -> Self {
        Self { screen, is_thinking: false, has_begun: false, ends_line: false }
    }

    /// Returns what to print for a piece.
    pub fn says(&mut self, piece: Piece<'_>) -> String {
        let text = match (self.screen, piece) {
            (Screen::Pipe, Piece::Text(text)) => {
                self.ends_line = text.ends_with('\n');
                return text.to_owned();
            }
            (Screen::Pipe, Piece::Thought(_)) => return String::new(),
            (_, Piece::Text(text) | Piece::Thought(text)) => text,
        };
        let thinks = matches!(piece, Piece::Thought(_));
        let mut shown = String::new();
        if thinks != self.is_thinking && self.has_begun {
            shown.push_str(if self.ends_line { "\n" } else { "\n\n" });
        }
        if thinks && !self.is_thinking && self.screen == Screen::Plain {
            shown.push_str("Thinking: ");
        }
        (self.is_thinking, self.has_begun, self.ends_line) = (thinks, true, text.ends_with('\n'));
        let text = harmless(text);
        if thinks && self.screen == Screen::Coloured {
            // Each piece is styled by itself, so that the answer may stop anywhere.
            shown.push_str(&output::looking(Look::Aside, &text));
        } else {
            shown.push_str(&text);
        }
        shown
    }

    /// Returns what ends the answer: a line end on a terminal, and elsewhere only if the answer has none.
    pub fn ends(&self) -> &'static str {
        if self.ends_line && self.screen == Screen::Pipe { "" } else { "\n" }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(screen: Screen, pieces: &[Piece<'_>]) -> String {
        let mut voice = Voice::new(screen);
        let text: String = pieces.iter().map(|piece| voice.says(*piece)).collect();
        text + voice.ends()
    }

    #[test]
    fn nothing_that_a_model_says_reaches_the_terminal_raw() {
        let said = "a\u{1b}]0;title\u{7}b\r\u{9b}2J\u{202e}c\td\n";
        assert_eq!(
            shown(Screen::Coloured, &[Piece::Text(said)]),
            "a\\u{1b}]0;title\\u{7}b\\r\\u{9b}2J\\u{202e}c\td\n\n"
        );
        assert_eq!(shown(Screen::Pipe, &[Piece::Text(said)]), said, "programs get the answer as it is");
        assert_eq!(harmless("naïve 模型 👩‍💻"), "naïve 模型 👩‍💻");
    }

    #[test]
    fn thoughts_are_dimmed_or_named_and_kept_from_programs() {
        let pieces = [Piece::Thought("so\u{1b}[31m"), Piece::Thought("…"), Piece::Text("yes")];
        let coloured = shown(Screen::Coloured, &pieces);
        assert!(coloured.starts_with("\u{1b}[2mso\\u{1b}[31m\u{1b}[0m"), "{coloured:?}");
        assert_eq!(anstream::adapter::strip_str(&coloured).to_string(), "so\\u{1b}[31m…\n\nyes\n");
        assert_eq!(shown(Screen::Plain, &pieces), "Thinking: so\\u{1b}[31m…\n\nyes\n");
        assert_eq!(shown(Screen::Pipe, &pieces), "yes\n");
    }
}
