//! The form that a client asks its answer to have, up to the tokens that it allows.

use std::sync::LazyLock;

use engine::OutputFormat;
use engine::grammar::{Constraint, Grammars, TokenTable};

const END: u32 = 256;
/// How many tokens of an answer are followed.
const TOKENS_MAX: usize = 64;

/// A JSON schema, a regular expression or a Lark grammar, which the first byte chooses; the second byte chooses among
/// the tokens that are allowed. An allowed token is accepted.
pub fn grammar(bytes: &[u8]) {
    static GRAMMARS: LazyLock<Grammars> = LazyLock::new(vocabulary);
    let [kind, choice, source @ ..] = bytes else { return };
    let Ok(source) = std::str::from_utf8(source) else { return };
    let format = match kind % 3 {
        0 => match serde_json::from_str(source) {
            Ok(schema) => OutputFormat::JsonSchema(schema),
            Err(_) => return,
        },
        1 => OutputFormat::Regex(source.to_owned()),
        _ => OutputFormat::Lark(source.to_owned()),
    };
    match GRAMMARS.constraint(&format) {
        Ok(Some(constraint)) => follow(constraint, *choice),
        Ok(None) => unreachable!("it is a form"),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// Writes an answer of allowed tokens.
fn follow(mut constraint: Constraint, choice: u8) {
    for _ in 0..TOKENS_MAX {
        let Ok(mask) = constraint.mask() else { return };
        let allowed: Vec<u32> = (0..=END).filter(|token| mask.allows(*token)).collect();
        let Some(&token) = allowed.get(usize::from(choice) % allowed.len().max(1)) else { return };
        if token == END {
            return;
        }
        constraint.accept(token).expect("it was allowed");
    }
}

/// A vocabulary of all bytes and an end.
fn vocabulary() -> Grammars {
    let mut bytes: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
    bytes.push(b"<|end|>".to_vec());
    let special = (0..=END).map(|token| token == END).collect();
    Grammars::new(TokenTable { bytes, special, eog: vec![END] }).expect("it is a vocabulary")
}
