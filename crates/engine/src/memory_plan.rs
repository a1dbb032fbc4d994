//! Estimates the memory a model needs, from its header alone.

use crate::gguf::Header;
use crate::model_runtime::{EngineError, LoadOptions, MemoryPlan};

/// Tokens that one decode step evaluates at most.
pub const BATCH_TOKENS: u32 = 512;
/// Sequences that may generate side by side; llama.cpp knows 256, and some are kept for those who come back.
pub const SLOTS_MAX: u32 = 192;
/// Cells come in blocks of so many.
const CELL_BLOCK: u32 = 256;

/// The options that a model will really be loaded with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Tokens of context per sequence.
    pub context_length: u32,
    /// Sequences that generate side by side.
    pub slots: u32,
    /// Tokens that all of them together can hold.
    pub kv_tokens: u32,
}

/// Returns the shape that fits both the wish and the model.
pub fn shape(header: &Header, options: &LoadOptions) -> Result<Shape, EngineError> {
    let trained = header
        .context_length()
        .filter(|tokens| *tokens > 0)
        .ok_or_else(|| EngineError::InvalidModel { reason: "the file does not say how long its context is".into() })?;
    // Positions beyond those seen in training give noise.
    let context_length = match options.context_length {
        0 => trained,
        wanted => wanted.min(trained),
    };
    let slots = options.slots.clamp(1, SLOTS_MAX);
    if u64::from(context_length) * u64::from(slots) > u64::from(u32::MAX / 2) {
        return Err(EngineError::Unsupported {
            parameter: "context_length".into(),
            reason: format!("{slots} contexts of {context_length} tokens are more than the engine can address"),
        });
    }
    let most = context_length * slots;
    // One sequence of full length must always fit, and cells come in blocks.
    let kv_tokens = match options.kv_tokens {
        0 => most,
        wanted => wanted.clamp(context_length, most),
    };
    Ok(Shape { context_length, slots, kv_tokens: kv_tokens.next_multiple_of(CELL_BLOCK) })
}

/// Returns the memory that a load would take.
pub fn plan(header: &Header, options: &LoadOptions) -> Result<MemoryPlan, EngineError> {
    let Shape { kv_tokens, .. } = shape(header, options)?;
    let number = |name: &str| header.hyperparameter(name).unwrap_or(0);
    let layers = number("block_count").min(4_096);
    let width = number("embedding_length");
    let heads = number("attention.head_count").max(1);
    let key_width = header.hyperparameter("attention.key_length").unwrap_or(width / heads);
    let value_width = header.hyperparameter("attention.value_length").unwrap_or(width / heads);
    let kv_heads = header
        .per_layer("attention.head_count_kv", layers as usize)
        .map_or(layers.saturating_mul(heads), |counts| counts.iter().fold(0, |sum, count| sum.saturating_add(*count)));

    // Each cell holds 16-bit floats.
    let cells = u64::from(kv_tokens);
    let cell_bytes = kv_heads.saturating_mul(key_width.saturating_add(value_width)).saturating_mul(2);

    // The widest tensors of a step: activations, the feed-forward layer, and the logits of every row.
    let feed_forward = header.hyperparameter("feed_forward_length").unwrap_or(width.saturating_mul(4));
    let vocabulary = header.vocabulary_size().unwrap_or(0);
    let row = width.saturating_mul(6).saturating_add(feed_forward.saturating_mul(3)).saturating_add(vocabulary);
    let mask = cells.saturating_mul(u64::from(BATCH_TOKENS)).saturating_mul(4);
    let compute_bytes = row.saturating_mul(u64::from(BATCH_TOKENS)).saturating_mul(4).saturating_add(mask);

    Ok(MemoryPlan { weights_bytes: header.tensor_bytes(), kv_bytes: cells.saturating_mul(cell_bytes), compute_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiny() -> Header {
        let file = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny.gguf"));
        Header::parse(&file.expect("the tiny model is there")).expect("it is valid")
    }

    #[test]
    fn the_plan_of_the_tiny_model_is_the_sum_of_its_parts() {
        let plan = plan(&tiny(), &LoadOptions::default()).expect("it can be planned");
        // 4 slots of 512 tokens, 4 layers of 3 heads, 32 wide, keys and values, 2 bytes.
        assert_eq!(plan.kv_bytes, 4 * 512 * 4 * 3 * 32 * 2 * 2);
        assert!(plan.weights_bytes > 1_600_000 && plan.weights_bytes < 1_656_352, "{plan:?}");
        assert!(plan.compute_bytes > 0 && plan.compute_bytes < 64 << 20, "{plan:?}");
    }

    #[test]
    fn more_slots_need_more_room() {
        let few = plan(&tiny(), &LoadOptions { slots: 2, ..LoadOptions::default() }).expect("it can be planned");
        let many = plan(&tiny(), &LoadOptions { slots: 8, ..LoadOptions::default() }).expect("it can be planned");
        assert_eq!(many.kv_bytes, 4 * few.kv_bytes);
    }

    #[test]
    fn a_context_longer_than_trained_is_cut() {
        let options = LoadOptions { context_length: 100_000, ..LoadOptions::default() };
        assert_eq!(shape(&tiny(), &options), Ok(Shape { context_length: 512, slots: 4, kv_tokens: 2_048 }));
    }

    #[test]
    fn a_header_full_of_huge_numbers_does_not_overflow() {
        let mut header = tiny();
        for name in ["block_count", "embedding_length", "attention.head_count", "feed_forward_length"] {
            header.metadata.insert(format!("llama.{name}"), crate::gguf::Value::Unsigned(u64::MAX));
        }
        header.metadata.remove("llama.attention.head_count_kv");
        assert!(plan(&header, &LoadOptions::default()).expect("it saturates").total_bytes() > 1 << 60);
    }
}
