//! Structured output: compiles the constraints on a model's answers.

use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};

use super::native::{Token, Vocabulary};
use crate::grammar::{Constraint, Grammars, TokenTable};
use crate::model_runtime::{EngineError, OutputFormat};

/// The grammars of one model. They are built for the first request that needs one, which takes a few hundred
/// milliseconds.
#[derive(Debug)]
pub(super) struct Constraints {
    spoken: Arc<BTreeSet<Token>>,
    grammars: OnceLock<Result<Grammars, EngineError>>,
}

impl Constraints {
    /// `spoken` are the special tokens whose text is part of answers.
    pub(super) fn new(spoken: BTreeSet<Token>) -> Self {
        Self { spoken: Arc::new(spoken), grammars: OnceLock::new() }
    }

    /// Returns the special tokens whose text is part of answers.
    pub(super) fn spoken(&self) -> Arc<BTreeSet<Token>> {
        Arc::clone(&self.spoken)
    }

    /// Compiles the constraint of one answer. Returns `None` for free text. Blocks for milliseconds.
    pub(super) fn constraint(
        &self,
        vocabulary: Vocabulary<'_>,
        format: &OutputFormat,
    ) -> Result<Option<Constraint>, EngineError> {
        if *format == OutputFormat::Text {
            return Ok(None);
        }
        let grammars = self.grammars.get_or_init(|| Grammars::new(token_table(vocabulary, &self.spoken)));
        grammars.as_ref().map_err(Clone::clone)?.constraint(format)
    }
}

fn token_table(vocabulary: Vocabulary<'_>, spoken: &BTreeSet<Token>) -> TokenTable {
    let is_special =
        |token: Token| !spoken.contains(&token) && (vocabulary.is_control(token) || vocabulary.is_end(token));
    TokenTable {
        bytes: vocabulary.tokens().map(|token| vocabulary.piece(token, true)).collect(),
        special: vocabulary.tokens().map(is_special).collect(),
        eog: vocabulary.tokens().filter(|token| vocabulary.is_end(*token)).map(Token::cast_unsigned).collect(),
    }
}
