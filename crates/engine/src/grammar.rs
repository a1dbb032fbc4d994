//! Structured output: an answer is constrained to a JSON object, a JSON schema, a regular expression or a grammar.
//!
//! [`Grammars`] holds the bytes of each token of one model and compiles constraints. A [`Constraint`] follows one
//! answer and returns the tokens that may come next. llguidance does the work: it computes a mask in well under a
//! millisecond and counts its steps. Constraints come from clients: [`limits`] rejects those that llguidance would
//! not bound, and a panic inside llguidance becomes an error of the request.

mod limits;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;

use llguidance::api::{GrammarWithLexer, ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use crate::json_form::{is_lenient, make_lenient, with_options};
use crate::model_runtime::{EngineError, OutputFormat, unsupported};
use crate::sampler::TokenMask;

const PARAMETER: &str = "response_format";
/// Stack for schemas with a thousand nested references. Only the part that is used takes memory.
const COMPILER_STACK_BYTES: usize = 64 << 20;
/// The maximum length of an error's reason.
const REASON_BYTES_MAX: usize = 400;

/// The vocabulary of a model, as grammars need it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenTable {
    /// The bytes of each token; empty for a token that must not be generated.
    pub bytes: Vec<Vec<u8>>,
    /// Whether each token is a special token, which text can never produce; as long as `bytes`.
    pub special: Vec<bool>,
    pub eog: Vec<u32>,
}

/// Compiles constraints for one model.
pub struct Grammars {
    factory: ParserFactory,
}

/// Tracks one answer through its constraint. A clone continues independently from the same position.
#[derive(Clone)]
pub struct Constraint {
    matcher: Matcher,
}

impl Grammars {
    /// Builds a search trie of the vocabulary, which takes a few hundred milliseconds and 500 bytes per token.
    pub fn new(table: TokenTable) -> Result<Self, EngineError> {
        // The library asserts what it expects of a vocabulary.
        let built = catch_unwind(AssertUnwindSafe(|| ParserFactory::new_simple(&token_environment(table)?).ok()));
        let Ok(Some(mut factory)) = built else {
            return Err(unsupported(PARAMETER, "the model's vocabulary cannot be constrained"));
        };
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            // About 40 MB per answer.
            max_lexer_states: 20_000,
            max_grammar_size: 100_000,
            // Precomputing takes time that no fuel bounds.
            precompute_large_lexemes: false,
            verbose_errors: false,
            ..ParserLimits::default()
        };
        Ok(Self { factory })
    }

    /// Compiles a constraint. Returns `None` for free text. Blocks for milliseconds.
    pub fn constraint(&self, format: &OutputFormat) -> Result<Option<Constraint>, EngineError> {
        let grammar = match format {
            OutputFormat::Text => return Ok(None),
            OutputFormat::Json => GrammarWithLexer::from_json_schema(with_options(&json!({ "type": "object" }))),
            OutputFormat::JsonSchema(schema) => return self.of_schema(schema).map(Some),
            OutputFormat::Regex(pattern) => {
                limits::check_text(pattern).map_err(refused)?;
                GrammarWithLexer::from_regex(pattern)
            }
            OutputFormat::Lark(grammar) => {
                limits::check_lark(grammar).map_err(refused)?;
                GrammarWithLexer::from_lark(grammar.clone())
            }
        };
        self.compile(grammar).map(Some).map_err(refused)
    }

    fn of_schema(&self, schema: &Value) -> Result<Constraint, EngineError> {
        limits::check_schema(schema).map_err(refused)?;
        let compile = |schema: &Value| self.compile(GrammarWithLexer::from_json_schema(with_options(schema)));
        let lenient = is_lenient(schema);
        compile(schema).map_err(|reason| {
            let fault_of = |part: &Value| {
                let mut part = part.clone();
                if lenient {
                    make_lenient(&mut part);
                }
                compile(&part).err()
            };
            let (path, reason) = limits::locate(schema, reason, fault_of);
            refused(if path.is_empty() { reason } else { format!("at {path}: {reason}") })
        })
    }

    fn compile(&self, grammar: GrammarWithLexer) -> Result<Constraint, String> {
        let work = || {
            let parser = self.factory.create_parser(TopLevelGrammar::from_grammar(grammar));
            let mut matcher = Matcher::new(parser);
            // A constraint that allows nothing fails here, before generation begins.
            matcher.compute_mask().map(|_| Constraint { matcher }).map_err(|error| plain(&format!("{error:#}")))
        };
        thread::scope(|scope| {
            let compiler = thread::Builder::new().stack_size(COMPILER_STACK_BYTES).spawn_scoped(scope, work);
            let compiled = compiler.map_err(|error| error.to_string())?.join();
            compiled.unwrap_or_else(|_| Err("it cannot be compiled".into()))
        })
    }
}

impl std::fmt::Debug for Grammars {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Grammars").finish_non_exhaustive()
    }
}

impl Constraint {
    /// Returns the tokens that may come next, including the end-of-generation tokens if the answer may end here.
    pub fn mask(&mut self) -> Result<TokenMask, EngineError> {
        let mask = self.matcher.compute_mask_or_eos().map_err(|error| refused(plain(&error.to_string())))?;
        Ok(TokenMask::from_words(mask.into()))
    }

    /// Advances by a token that the mask allowed, or that an earlier attempt of the same answer generated.
    pub fn accept(&mut self, token: u32) -> Result<(), EngineError> {
        self.matcher.consume_token(token).map_err(|error| refused(plain(&error.to_string())))
    }

    /// Returns whether the answer must end here.
    pub fn is_complete(&self) -> bool {
        self.matcher.is_stopped()
    }
}

impl std::fmt::Debug for Constraint {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Constraint").field("is_complete", &self.is_complete()).finish_non_exhaustive()
    }
}

fn token_environment(table: TokenTable) -> Option<TokEnv> {
    let mut words = table.bytes;
    for (word, special) in words.iter_mut().zip(table.special) {
        if special && !word.is_empty() {
            word.insert(0, TokTrie::SPECIAL_TOKEN_MARKER);
        } else if word.len() > 1 && word[0] == TokTrie::SPECIAL_TOKEN_MARKER {
            // No UTF-8 text begins with this byte, and the library would take the token for a special one.
            word.clear();
        }
    }
    let info = TokRxInfo::new(words.len() as u32, *table.eog.first()?);
    Some(Arc::new(ApproximateTokEnv::new(TokTrie::from(&info, &words).with_eos_tokens(&table.eog))))
}

fn refused(reason: impl Into<String>) -> EngineError {
    unsupported(PARAMETER, reason)
}

/// Removes details for the library's developers from an error message.
fn plain(message: &str) -> String {
    if message.starts_with("panic") {
        return "it is too complex".into();
    }
    if message.contains("NoExtensionBias") {
        return "it allows no text that the model can write".into();
    }
    let message = message.split("\n<").next().unwrap_or_default();
    let words: Vec<&str> = message.split_whitespace().collect();
    let mut reason = words.join(" ");
    reason.truncate(reason.floor_char_boundary(REASON_BYTES_MAX));
    reason
}

#[cfg(test)]
mod tests;
