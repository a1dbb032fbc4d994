//! Checks whether a model's header is consistent.
//!
//! llama.cpp checks much of the header itself and returns errors. This module checks what llama.cpp takes for
//! granted, where an inconsistent header would make it abort, divide by zero or read out of bounds.

use std::collections::HashSet;

use super::{Header, TOKENS_KEY, Value};

/// The maximum number of layers in llama.cpp.
const LAYERS_MAX: u64 = 512;
/// The maximum number of experts in llama.cpp.
const EXPERTS_MAX: u64 = 512;
/// The maximum embedding length, and the maximum of similar lengths; the widest known models use a sixteenth.
const LENGTH_MAX: u64 = 1 << 20;

/// Lengths and their minimum. A layer may have no heads or no feed-forward matrices.
const LENGTHS: [(&str, u64); 8] = [
    ("embedding_length", 1),
    ("feed_forward_length", 0),
    ("attention.head_count", 0),
    ("attention.key_length", 0),
    ("attention.value_length", 0),
    ("rope.dimension_count", 0),
    ("vocab_size", 0),
    ("expert_feed_forward_length", 0),
];

/// Checks that a model's header is consistent.
pub fn check_model(header: &Header) -> Result<(), String> {
    if header.architecture().is_none() {
        return Err("the file does not say of which architecture the model is".into());
    }
    if let Some(kind) = header.text("general.type").filter(|kind| *kind != "model") {
        return Err(format!("the file is of the type {kind:?} and not a model"));
    }
    check_lengths(header)?;
    check_heads(header)?;
    check_experts(header)?;
    check_epsilons(header)?;
    check_vocabulary(header)
}

fn check_lengths(header: &Header) -> Result<(), String> {
    for (name, least) in LENGTHS {
        for length in all_of(header, name) {
            if !length.is_some_and(|length| (least..=LENGTH_MAX).contains(&length)) {
                return Err(format!("{name} is not a number from {least} to {LENGTH_MAX}"));
            }
        }
    }
    match header.hyperparameter("block_count") {
        Some(layers) if (1..=LAYERS_MAX).contains(&layers) => Ok(()),
        Some(layers) => Err(format!("{layers} layers, from 1 to {LAYERS_MAX} are possible")),
        None => Err("the file does not say how many layers there are (block_count)".into()),
    }
}

/// Several attention heads share one key-value head.
fn check_heads(header: &Header) -> Result<(), String> {
    let heads = all_of(header, "attention.head_count");
    let shared = all_of(header, "attention.head_count_kv");
    // A single number applies to all layers.
    let layers = heads.len().max(shared.len());
    for (heads, shared) in heads.iter().cycle().zip(shared.iter().cycle()).take(layers) {
        match (heads, shared) {
            (Some(heads), Some(shared)) if *shared <= *heads && (*shared == 0 || heads.is_multiple_of(*shared)) => {}
            _ => return Err("attention.head_count is not a multiple of attention.head_count_kv".into()),
        }
    }
    Ok(())
}

fn check_experts(header: &Header) -> Result<(), String> {
    let number = |name: &str| header.hyperparameter(name).unwrap_or(0);
    let (experts, used) = (number("expert_count"), number("expert_used_count"));
    if experts > EXPERTS_MAX || used > experts || (experts > 0 && used == 0) {
        return Err(format!("{used} of {experts} experts cannot be used"));
    }
    let (groups, groups_used) = (number("expert_group_count"), number("expert_group_used_count"));
    let is_grouped = groups > 0;
    let fits = groups < experts && experts.is_multiple_of(groups.max(1)) && groups_used > 0 && groups_used < groups;
    if is_grouped && groups > 1 && !fits {
        return Err(format!("{groups_used} of {groups} groups of {experts} experts cannot be used"));
    }
    Ok(())
}

/// An epsilon is added before a square root, so it must not be negative.
fn check_epsilons(header: &Header) -> Result<(), String> {
    let epsilons = header.metadata.iter().filter(|(key, _)| key.ends_with("_epsilon"));
    for (key, value) in epsilons {
        if !matches!(value, Value::Float(epsilon) if epsilon.is_finite() && *epsilon >= 0.0) {
            return Err(format!("{key} is not a positive number"));
        }
    }
    Ok(())
}

fn check_vocabulary(header: &Header) -> Result<(), String> {
    let Some(Value::Texts(tokens)) = header.metadata.get(TOKENS_KEY) else { return Ok(()) };
    let mut known = HashSet::new();
    // llama.cpp reads a token's text up to its first zero byte, and gives an empty one a generated name.
    let texts = (0..tokens.len()).filter_map(|token| tokens.get(token)?.split(|byte| *byte == 0).next());
    match texts.filter(|text| !text.is_empty()).find(|text| !known.insert(*text)) {
        Some(text) => Err(format!("the token {:?} is there twice", String::from_utf8_lossy(text))),
        None => Ok(()),
    }
}

/// Returns the numbers under a key of the architecture: one for all layers, or one for each. Values that are not
/// numbers are `None`.
fn all_of(header: &Header, name: &str) -> Vec<Option<u64>> {
    let Some(architecture) = header.architecture() else { return Vec::new() };
    match header.metadata.get(&format!("{architecture}.{name}")) {
        None => Vec::new(),
        Some(Value::Array(values)) => values.iter().map(Value::as_unsigned).collect(),
        Some(value) => vec![value.as_unsigned()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::tests::{tiny, tiny_header};

    /// Returns the result of checking the tiny model with one number changed.
    fn with(name: &str, number: u64) -> Result<(), String> {
        let mut header = tiny_header();
        header.metadata.insert(format!("llama.{name}"), Value::Unsigned(number));
        check_model(&header)
    }

    #[test]
    fn the_tiny_models_agree_with_themselves() {
        assert_eq!(check_model(&tiny_header()), Ok(()));
        let four_bits = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny-q4_0.gguf"));
        let header = Header::parse(&four_bits.expect("the model is there")).expect("it is valid");
        assert_eq!(check_model(&header), Ok(()));
    }

    #[test]
    fn an_adapter_is_no_model() {
        let file = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny-lora-pirate.gguf"));
        let header = Header::parse(&file.expect("the adapter is there")).expect("it is valid");
        assert!(check_model(&header).expect_err("it is an adapter").contains("\"adapter\""));
    }

    #[test]
    fn numbers_that_llama_cpp_asserts_are_checked_first() {
        for (name, number) in [
            ("block_count", 0),
            ("block_count", 513),
            ("embedding_length", 0),
            ("embedding_length", u64::from(u32::MAX)),
            ("attention.head_count_kv", 4),
            ("attention.head_count_kv", 12),
            ("expert_count", 4_096),
            ("expert_used_count", 2),
        ] {
            assert!(with(name, number).is_err(), "{name} = {number}");
        }
        assert_eq!(with("attention.head_count_kv", 6), Ok(()));
    }

    /// Found by random corruption: ggml asserts this when the first token is evaluated.
    #[test]
    fn an_epsilon_below_zero_is_refused() {
        for epsilon in [-1e-5, f64::NAN, f64::INFINITY] {
            let mut header = tiny_header();
            header.metadata.insert("llama.attention.layer_norm_rms_epsilon".into(), Value::Float(epsilon));
            assert!(check_model(&header).expect_err("it has no root").contains("epsilon"), "{epsilon}");
        }
    }

    #[test]
    fn a_vocabulary_with_a_token_twice_is_refused() {
        let bytes = tiny();
        let at = |text: &[u8]| bytes.windows(text.len()).position(|window| window == text).expect("it is there");
        // Turns the end-of-turn token into the start-of-turn token.
        let end = at(b"<|im_end|>");
        let mut twice = bytes.clone();
        twice[end..end + 10].copy_from_slice(b"<|im_start");
        let start = at(b"<|im_start|>");
        twice[start..start + 12].copy_from_slice(b"<|im_start\0>");
        let header = Header::parse(&twice).expect("it is a header");
        assert!(check_model(&header).expect_err("it is there twice").contains("there twice"));
    }
}
