use super::*;
use crate::gguf::Value;

const MIB: u64 = 1 << 20;

pub(super) fn tiny() -> Header {
    let file = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny.gguf"));
    Header::parse(&file.expect("the tiny model is there")).expect("it is valid")
}

/// The tiny model with weights of a type that no kernel repacks.
pub(crate) fn plain() -> Header {
    const F16: u32 = 1;
    let mut header = tiny();
    header.tensors.iter_mut().for_each(|tensor| tensor.kind = F16);
    header
}

#[test]
fn the_plan_of_the_tiny_model_is_the_sum_of_its_parts() {
    let plan = plan(&plain(), &LoadOptions::default()).expect("it can be planned");
    // 4 slots of 512 tokens, 4 layers of 3 heads, 32 wide, keys and values, 2 bytes.
    assert_eq!(plan.kv_bytes, 4 * 512 * 4 * 3 * 32 * 2 * 2);
    assert!(plan.weights_bytes > 1_600_000 && plan.weights_bytes < 1_656_352, "{plan:?}");
    assert_eq!((plan.vram_bytes, plan.cache_bytes), (0, 256 * MIB));
}

/// Buffers that llama.cpp reported: width, feed-forward, vocabulary, cells, outputs, and MiB of scratch space.
#[test]
fn the_scratch_space_is_what_llama_cpp_allocates() {
    let measured = [
        (192, 384, 1_024, 2_048, 1, 6.14),
        (192, 384, 1_024, 32_768, 8, 36.14),
        (768, 3_072, 32_000, 2_048, 1, 27.52),
        (768, 3_072, 32_000, 32_768, 8, 57.52),
        (768, 3_072, 32_000, 2_048, 512, 72.02),
        (896, 4_864, 151_936, 2_048, 1, 39.27),
        (896, 4_864, 151_936, 16_384, 8, 53.27),
        (896, 4_864, 151_936, 2_048, 64, 47.86),
        (896, 4_864, 151_936, 8_192, 256, 165.14),
        (2_048, 5_632, 32_000, 8_192, 4, 61.02),
    ];
    for (width, feed_forward, vocabulary, cells, outputs, mib) in measured {
        let model = Dimensions { cell_bytes: Vec::new(), width, feed_forward, vocabulary };
        let planned = model.compute_bytes(u64::from(BATCH_TOKENS), cells, outputs) as f64 / MIB as f64;
        assert!((planned / mib - 1.0).abs() < 0.005, "{width}, {cells} cells, {outputs} outputs: {planned} for {mib}");
    }
}

#[test]
fn what_ggml_brings_into_another_order_is_kept_twice_and_the_embeddings_of_tokens_are_not() {
    // A type that our kernels do not support.
    const IQ4_NL: u32 = 20;
    let tensor =
        |name: &str, kind| Tensor { name: name.into(), dimensions: vec![64, 64], kind, offset: 0, bytes: 1_000 };
    let mut header = tiny();
    let names = ["token_embd.weight", "output.weight", "blk.0.ffn_up.weight"];
    header.tensors = names.map(|name| tensor(name, IQ4_NL)).into();
    let repacked = |header: &Header| plan(header, &LoadOptions::default()).expect("it can be planned").repacked_bytes;
    assert_eq!(repacked(&header), 2_000);
    // A model without an output matrix computes its logits with the token embeddings.
    header.tensors.remove(1);
    assert_eq!(repacked(&header), 2_000);
    header.tensors[1].kind = 1;
    assert_eq!(repacked(&header), 1_000);
    header.tensors[0].dimensions = vec![64, 63];
    assert_eq!(repacked(&header), 0);
}

#[cfg(matrices)]
#[test]
fn what_our_kernels_take_is_kept_once() {
    if !kernels::is_supported() {
        return;
    }
    let mut header = tiny();
    let tensor = Tensor { name: "output.weight".into(), dimensions: vec![64, 64], kind: 2, offset: 0, bytes: 1_000 };
    header.tensors = vec![tensor];
    let kept = |header: &Header| {
        let plan = plan(header, &LoadOptions::default()).expect("it can be planned");
        (plan.weights_bytes, plan.repacked_bytes)
    };
    assert_eq!(kept(&header), (0, 1_000));
    let without = LoadOptions { kernels: Kernels::Off, ..LoadOptions::default() };
    let plan_without = plan(&header, &without).expect("it can be planned");
    assert_eq!((plan_without.weights_bytes, plan_without.repacked_bytes), (1_000, 1_000));
    // Matrices whose rows do not fill the SIMD lanes are left to ggml.
    header.tensors[0].dimensions = vec![64, 56];
    assert_eq!(kept(&header), (1_000, 1_000));
    // Token embeddings that also compute the logits are looked up as well, and are paged in again in part.
    header.tensors[0] =
        Tensor { name: "token_embd.weight".into(), dimensions: vec![64, 64], ..header.tensors[0].clone() };
    assert_eq!(kept(&header), (1_000, 1_000));
    header.tensors[0].bytes = 1 << 30;
    assert_eq!(kept(&header), (32 << 20, 1 << 30));
}

#[test]
fn products_are_made_row_by_row_where_every_matrix_is_of_such_a_type() {
    let mut header = tiny();
    let tensor = |kind| Tensor { name: "a.weight".into(), dimensions: vec![64, 64], kind, offset: 0, bytes: 1_000 };
    let norm = Tensor { dimensions: vec![64], ..tensor(0) };
    let (q4_0, q4_1, q4_k, f16) = (2, 3, 12, 1);
    let mut is_row_by_row = |kinds: &[u32], kernels| {
        header.tensors = kinds.iter().map(|kind| tensor(*kind)).chain([norm.clone()]).collect();
        super::is_row_by_row(&header, kernels)
    };
    assert!(is_row_by_row(&[q4_1], Kernels::Off));
    assert!(!is_row_by_row(&[q4_1, q4_k], Kernels::Auto) && !is_row_by_row(&[f16], Kernels::Auto));
    assert!(!is_row_by_row(&[q4_0], Kernels::Off));
    #[cfg(matrices)]
    assert_eq!(is_row_by_row(&[q4_0, q4_1], Kernels::Auto), kernels::is_supported());
}

#[test]
fn more_slots_need_more_room_unless_they_share_it() {
    let kv = |slots, kv_tokens| {
        let options = LoadOptions { slots, kv_tokens, ..LoadOptions::default() };
        plan(&tiny(), &options).expect("it can be planned").kv_bytes
    };
    assert_eq!(kv(8, 0), 4 * kv(2, 0));
    assert_eq!(kv(8, 1_024), kv(2, 0));
}

#[test]
fn what_nobody_set_is_enough_for_most_and_no_more() {
    let mut header = tiny();
    let mut shape_of = |trained: u64, options: LoadOptions| {
        header.metadata.insert("llama.context_length".into(), Value::Unsigned(trained));
        let Shape { context_length, kv_tokens, .. } = shape(&header, &options).expect("it has a shape");
        (context_length, kv_tokens)
    };
    let set = |context_length, kv_tokens| LoadOptions { context_length, kv_tokens, ..LoadOptions::default() };
    assert_eq!(shape_of(131_072, set(0, 0)), (8_192, 8_192));
    assert_eq!(shape_of(512, set(0, 0)), (512, 2_048));
    assert_eq!(shape_of(4_096, set(0, 0)), (4_096, 8_192));
    // Explicit sizes are granted.
    assert_eq!(shape_of(131_072, set(32_768, 0)), (32_768, 32_768));
    assert_eq!(shape_of(131_072, set(32_768, 100_000)), (32_768, 100_096));
}

#[test]
fn only_what_nobody_set_is_made_smaller_where_memory_is_short() {
    let sizes = |options: &LoadOptions, context_length| {
        let smaller = smaller(options, context_length).into_iter();
        smaller.map(|options| (options.context_length, options.kv_tokens)).collect::<Vec<_>>()
    };
    let set = |context_length, kv_tokens| LoadOptions { context_length, kv_tokens, ..LoadOptions::default() };
    let halves = [(8_192, 8_192), (4_096, 4_096), (2_048, 2_048), (1_024, 1_024)];
    assert_eq!(sizes(&set(0, 0), 8_192), halves);
    assert_eq!(sizes(&set(0, 20_000), 2_048), [(2_048, 20_000), (1_024, 20_000)]);
    assert_eq!(sizes(&set(4_096, 0), 4_096), [(4_096, 4_096)]);
    assert_eq!(sizes(&set(4_096, 9_000), 4_096), [(4_096, 9_000)]);
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
        header.metadata.insert(format!("llama.{name}"), Value::Unsigned(u64::MAX));
    }
    header.metadata.remove("llama.attention.head_count_kv");
    let plan = plan(&header, &LoadOptions::default()).expect("it saturates");
    assert!(plan.total_bytes() > 1 << 60 && plan.later_bytes > 1 << 60, "{plan:?}");
}
