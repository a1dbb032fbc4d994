//! Predicts the memory that a model needs, from its header alone.
//!
//! The prediction is the peak resident memory of a process that has evaluated a full batch: the mapped weights and
//! everything it allocated. The sums follow what llama.cpp allocates for a dense transformer with flash attention,
//! and are within a tenth of the measured values; see `tests/it/memory.rs`.

mod devices;

use crate::gguf::{Header, Tensor};
use crate::model_runtime::{EngineError, Kernels, LoadOptions, MemoryPlan};
pub use devices::{VRAM_SPARED_BYTES, layers_that_fit};

/// The maximum number of tokens in one step.
pub const BATCH_TOKENS: u32 = 512;
/// The maximum number of sequences that generate at the same time; llama.cpp supports 256, and some are kept for the
/// prefix cache.
pub const SLOTS_MAX: u32 = 192;
/// The maximum number of draft tokens: each takes a row of logits for every slot.
pub const DRAFT_TOKENS_MAX: u32 = 16;
/// The maximum number of prompt tokens whose log-probabilities one step returns: each takes a row of logits.
pub const ECHO_ROWS: u32 = 32;
/// The default context length of a sequence if the model was trained with more. Longer contexts are rare, and the KV
/// cache is most of what a small model takes.
pub const CONTEXT_DEFAULT: u32 = 8_192;
/// The default size of the KV cache in tokens, unless one sequence of full length needs more.
const KV_TOKENS_DEFAULT: u32 = 8_192;
/// The shortest context length that is chosen automatically when memory is short.
const CONTEXT_MIN: u32 = 1_024;
/// KV cache cells are allocated in blocks of this size.
const CELL_BLOCK: u32 = 256;
/// The program, its libraries and its threads, and what llama.cpp allocates for any model.
const PROGRAM_BYTES: u64 = 18 << 20;
/// The maximum memory for the logits of an embedding batch. Logits count twice, because they are computed and copied.
pub(crate) const EMBED_LOGITS_BYTES_MAX: u64 = 128 << 20;
/// Memory that llama.cpp and this program keep for each token of the vocabulary.
const TOKEN_BYTES: u64 = 160;

/// The sizes with which a model is actually loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// The context length of a sequence in tokens.
    pub context_length: u32,
    /// The number of sequences that generate at the same time.
    pub slots: u32,
    /// The size of the KV cache in tokens, shared by all sequences.
    pub kv_tokens: u32,
}

/// Returns the shape that fits both the options and the model.
pub fn shape(header: &Header, options: &LoadOptions) -> Result<Shape, EngineError> {
    let trained = header
        .context_length()
        .filter(|tokens| *tokens > 0)
        .ok_or_else(|| EngineError::InvalidModel { reason: "the file does not say how long its context is".into() })?;
    // The model gives noise for positions beyond those seen in training.
    let context_length = match options.context_length {
        0 => trained.min(CONTEXT_DEFAULT),
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
        0 => KV_TOKENS_DEFAULT.clamp(context_length, most),
        wanted => wanted.clamp(context_length, most),
    };
    Ok(Shape { context_length, slots, kv_tokens: kv_tokens.next_multiple_of(CELL_BLOCK) })
}

/// Returns options that take less memory, the largest first: first a smaller KV cache, then ever shorter contexts.
/// Values that are set explicitly are kept.
pub fn smaller(options: &LoadOptions, context_length: u32) -> Vec<LoadOptions> {
    let room = |context_length| LoadOptions {
        context_length,
        kv_tokens: if options.kv_tokens == 0 { context_length } else { options.kv_tokens },
        ..options.clone()
    };
    let mut contexts = vec![context_length];
    if options.context_length == 0 {
        let halves = std::iter::successors(Some(context_length / 2), |tokens| Some(tokens / 2));
        contexts.extend(halves.take_while(|tokens| *tokens >= CONTEXT_MIN));
    }
    contexts.into_iter().map(room).collect()
}

/// Returns the options that take the least memory. Values that are set explicitly are kept.
pub fn smallest(options: &LoadOptions) -> LoadOptions {
    let context_length = if options.context_length == 0 { CONTEXT_MIN } else { options.context_length };
    let kv_tokens = if options.kv_tokens == 0 { context_length } else { options.kv_tokens };
    LoadOptions { context_length, kv_tokens, ..options.clone() }
}

/// Returns the maximum number of logit rows in one step.
pub(crate) fn outputs(slots: u32, draft_tokens: u32) -> u32 {
    slots * (1 + draft_tokens.min(DRAFT_TOKENS_MAX)) + ECHO_ROWS
}

/// Returns the memory that a load would take. If the options leave the number of GPU layers open, all layers are
/// planned in host memory, which is then certain to suffice.
pub fn plan(header: &Header, options: &LoadOptions) -> Result<MemoryPlan, EngineError> {
    let shape = shape(header, options)?;
    let model = Dimensions::of(header);
    let on_gpu = options.gpu_layers.unwrap_or(0);
    let (host, device) = devices::split(header, &model, on_gpu, options.kernels);
    let outputs = u64::from(outputs(shape.slots, options.draft_tokens));
    let compute_bytes = model.compute_bytes(u64::from(BATCH_TOKENS), u64::from(shape.kv_tokens), outputs);
    let logits_bytes = outputs.saturating_mul(model.vocabulary).saturating_mul(4);
    let kv_bytes = |cell_bytes: u64| u64::from(shape.kv_tokens).saturating_mul(cell_bytes);
    let device_compute = if on_gpu > 0 { compute_bytes } else { 0 };
    Ok(MemoryPlan {
        weights_bytes: host.weights_bytes,
        repacked_bytes: host.repacked_bytes,
        kv_bytes: kv_bytes(host.cell_bytes),
        compute_bytes: compute_bytes.saturating_add(logits_bytes),
        cache_bytes: options.prompt_cache_bytes,
        process_bytes: PROGRAM_BYTES
            .saturating_add(model.vocabulary.saturating_mul(TOKEN_BYTES))
            .saturating_add(model.work_bytes()),
        later_bytes: model.later_bytes(u64::from(shape.context_length), header.is_causal()),
        vram_bytes: device.weights_bytes.saturating_add(kv_bytes(device.cell_bytes)).saturating_add(device_compute),
    })
}

/// Returns the number of layers that can be offloaded to GPUs, counting the output as one.
pub fn layers(header: &Header) -> u32 {
    u32::try_from(Dimensions::of(header).cell_bytes.len()).unwrap_or(u32::MAX).saturating_add(1)
}

/// The dimensions that determine a model's buffers.
#[derive(Debug)]
struct Dimensions {
    /// Bytes of the keys and values of one token, by layer.
    cell_bytes: Vec<u64>,
    width: u64,
    feed_forward: u64,
    vocabulary: u64,
}

impl Dimensions {
    fn of(header: &Header) -> Self {
        let number = |name: &str| header.hyperparameter(name).unwrap_or(0);
        let layers = number("block_count").min(4_096) as usize;
        let width = number("embedding_length");
        let heads = number("attention.head_count").max(1);
        let key_width = header.hyperparameter("attention.key_length").unwrap_or(width / heads);
        let value_width = header.hyperparameter("attention.value_length").unwrap_or(width / heads);
        let kv_heads = header.per_layer("attention.head_count_kv", layers).unwrap_or_else(|| vec![heads; layers]);
        // Keys and values are 16-bit floats.
        let row_bytes = key_width.saturating_add(value_width).saturating_mul(2);
        // Only some of the experts are active at a time.
        let experts = number("expert_used_count").max(1);
        let feed_forward = header
            .hyperparameter("expert_feed_forward_length")
            .map(|length| length.saturating_mul(experts))
            .or_else(|| header.hyperparameter("feed_forward_length"))
            .unwrap_or(width.saturating_mul(4));
        Self {
            cell_bytes: kv_heads.into_iter().map(|heads| heads.saturating_mul(row_bytes)).collect(),
            width,
            feed_forward,
            vocabulary: header.vocabulary_size().unwrap_or(0),
        }
    }

    /// Returns the scratch space of a full batch. The feed-forward layer keeps five rows of activations alive in
    /// addition to three of its own; in the last step the logits take their place. The mask consists of 16-bit
    /// floats.
    fn compute_bytes(&self, batch: u64, cells: u64, outputs: u64) -> u64 {
        let feed_forward = self.feed_forward.saturating_mul(3).saturating_mul(batch);
        let logits = self.vocabulary.saturating_mul(outputs.min(batch));
        let activations = self.width.saturating_mul(5).saturating_add(10).saturating_mul(batch);
        let floats = activations.saturating_add(feed_forward.max(logits));
        floats.saturating_mul(4).saturating_add(cells.saturating_mul(batch).saturating_mul(2))
    }

    /// Returns the memory of the contexts that are created on first use: one for deterministic generations, and one
    /// for embeddings.
    fn later_bytes(&self, context_length: u64, is_causal: bool) -> u64 {
        let batch = u64::from(BATCH_TOKENS);
        let cell_bytes = self.cell_bytes.iter().copied().fold(0, u64::saturating_add);
        let cells_bytes = context_length.saturating_mul(cell_bytes);
        let alone = cells_bytes.saturating_add(self.compute_bytes(batch, context_length, 1));
        let vectors = if is_causal {
            // Every token of a batch is an output, so its logits are computed as well.
            cells_bytes
                .saturating_add(self.compute_bytes(batch, context_length, 1))
                .saturating_add(EMBED_LOGITS_BYTES_MAX)
        } else {
            // A text is one batch. Memory for its logits is reserved, but never touched.
            let logits_bytes = self.vocabulary.saturating_mul(4).saturating_mul(context_length);
            self.compute_bytes(context_length, context_length, 1).saturating_add(logits_bytes)
        };
        alone.saturating_add(vectors)
    }

    /// Returns the temporary memory of a matrix product: its rows, converted to the format that the weights need.
    fn work_bytes(&self) -> u64 {
        self.feed_forward.max(self.width).saturating_mul(u64::from(BATCH_TOKENS)).saturating_mul(2)
    }
}

/// Returns whether every matrix product of a model is computed row by row, so that a row's bits do not depend on the
/// other rows. For most types, ggml multiplies several rows with other kernels than a single one.
pub fn is_row_by_row(header: &Header, kernels: Kernels) -> bool {
    const Q4_1: u32 = 3;
    const Q5_1: u32 = 7;
    let is_exact = |tensor: &Tensor| {
        let [_, rows, ..] = tensor.dimensions[..] else { return true };
        rows <= 1 || matches!(tensor.kind, Q4_1 | Q5_1) || is_packed(tensor, kernels)
    };
    header.tensors.iter().all(is_exact)
}

/// Returns whether ggml's CPU backend repacks a matrix at load, which takes a second copy.
fn is_repacked(tensor: &Tensor) -> bool {
    const Q4_0: u32 = 2;
    const Q8_0: u32 = 8;
    const Q4_K: u32 = 12;
    const Q5_K: u32 = 13;
    const Q6_K: u32 = 14;
    const IQ4_NL: u32 = 20;
    const MXFP4: u32 = 39;
    let [_, rows, ..] = tensor.dimensions[..] else { return false };
    let kinds: &[u32] = match std::env::consts::ARCH {
        "x86_64" => &[Q4_0, Q4_K, IQ4_NL, MXFP4],
        "aarch64" => &[Q4_0, Q8_0, Q4_K, Q5_K, Q6_K, IQ4_NL, MXFP4],
        _ => &[],
    };
    kinds.contains(&tensor.kind) && rows.is_multiple_of(8)
}

/// Returns whether our kernels pack a matrix at load, which replaces ggml's copy.
#[cfg(matrices)]
fn is_packed(tensor: &Tensor, kernels: Kernels) -> bool {
    if kernels == Kernels::Off {
        return false;
    }
    let [columns, rows] = tensor.dimensions[..] else { return false };
    let quantization = ::kernels::Quantization::of_ggml(tensor.kind);
    let sides = (usize::try_from(columns).ok()).zip(usize::try_from(rows).ok());
    quantization.zip(sides).is_some_and(|(it, (columns, rows))| ::kernels::Matrix::new(it, columns, rows).is_some())
}

#[cfg(not(matrices))]
fn is_packed(_: &Tensor, _: Kernels) -> bool {
    false
}

#[cfg(test)]
pub(crate) mod tests;
