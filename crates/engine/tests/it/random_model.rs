//! Tiny models of random weights, one for each way in which architectures remember a text.

use half::f16;
use tether_engine::VerifiedArtifact;

use crate::artifact_of;
use crate::chance::Chance;

/// The width of a token's vector.
const WIDTH: usize = 64;
const FEED_FORWARD: usize = 128;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_WIDTH: usize = WIDTH / HEADS;
/// Llama 4 has a layer without rotations among them, for which llama.cpp has an input.
const LAYERS: usize = 4;
/// The bytes and the end of a text.
pub(crate) const VOCABULARY: usize = 272;
/// The text of the token that every text begins with.
pub(crate) const BEGIN: &str = "<|begin|>";
/// The tokens before a beginning, before an end and before what is to be filled in between.
pub(crate) const FILL_IN: [u32; 3] = [260, 261, 262];
/// Positions that a sliding window sees.
pub(crate) const WINDOW: usize = 32;
/// Positions of a chunk, which llama.cpp fixes for this architecture.
pub(crate) const CHUNK: usize = 8_192;
/// Numbers that share a scale.
const BLOCK: usize = 32;

/// How a model remembers what it has read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    /// Every layer sees all positions.
    Full,
    /// Every second layer sees the last positions only, as in Gemma 3.
    Sliding,
    /// Every second layer sees the positions of its chunk only, as in Llama 4.
    Chunked,
    /// A state of fixed size, as in Mamba.
    Recurrent,
    /// Every second layer has a state and the others see all positions, as in LFM2.
    Hybrid,
    /// Every layer sees all positions, and a classifier scores pairs of texts.
    Ranking,
}

/// How the matrices are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Weights {
    F16,
    Q4_0,
    Q4_1,
    Q8_0,
}

/// Returns a model of a family, the same for the same seed.
pub(crate) fn random_model(family: Family, weights: Weights, seed: u64) -> VerifiedArtifact {
    let mut writer = Writer { weights, chance: Chance(seed), ..Writer::default() };
    writer.vocabulary();
    match family {
        Family::Full => transformer(&mut writer, "llama"),
        Family::Sliding => sliding(&mut writer),
        Family::Chunked => chunked(&mut writer),
        Family::Recurrent => recurrent(&mut writer),
        Family::Hybrid => hybrid(&mut writer),
        Family::Ranking => ranking(&mut writer),
    }
    artifact_of(&writer.file())
}

fn transformer(writer: &mut Writer, architecture: &str) {
    writer.sizes(architecture, 1_024);
    writer.number(&format!("{architecture}.attention.head_count_kv"), KV_HEADS);
    writer.norm("output_norm.weight", WIDTH);
    for layer in 0..LAYERS {
        writer.attention(layer);
        writer.feed_forward(layer);
    }
}

fn ranking(writer: &mut Writer) {
    writer.number("qwen3.attention.key_length", HEAD_WIDTH);
    writer.number("qwen3.attention.value_length", HEAD_WIDTH);
    writer.number("qwen3.pooling_type", 4);
    writer.texts("qwen3.classifier.output_labels", &["yes".into(), "no".into()]);
    writer.text("tokenizer.chat_template.rerank", "Q: {query}\nD: {document}<|end|>");
    transformer(writer, "qwen3");
    for layer in 0..LAYERS {
        for name in ["attn_q_norm", "attn_k_norm"] {
            writer.norm(&format!("blk.{layer}.{name}.weight"), HEAD_WIDTH);
        }
    }
    writer.matrix("cls.output.weight", WIDTH, 2);
}

fn sliding(writer: &mut Writer) {
    writer.number("gemma3.attention.key_length", HEAD_WIDTH);
    writer.number("gemma3.attention.value_length", HEAD_WIDTH);
    writer.number("gemma3.attention.sliding_window", WINDOW);
    writer.number("gemma3.attention.sliding_window_pattern", 2);
    transformer(writer, "gemma3");
    for layer in 0..LAYERS {
        for name in ["attn_q_norm", "attn_k_norm"] {
            writer.norm(&format!("blk.{layer}.{name}.weight"), HEAD_WIDTH);
        }
        for name in ["post_attention_norm", "post_ffw_norm"] {
            writer.norm(&format!("blk.{layer}.{name}.weight"), WIDTH);
        }
    }
}

fn chunked(writer: &mut Writer) {
    writer.number("llama4.attention.sliding_window_pattern", 2);
    writer.number("llama4.interleave_moe_layer_step", 0);
    writer.number("llama4.expert_count", 2);
    writer.number("llama4.expert_used_count", 1);
    writer.number("llama4.expert_feed_forward_length", FEED_FORWARD);
    writer.number("llama4.attention.head_count_kv", KV_HEADS);
    writer.sizes("llama4", 2 * CHUNK);
    writer.norm("output_norm.weight", WIDTH);
    for layer in 0..LAYERS {
        writer.attention(layer);
        writer.feed_forward(layer);
    }
}

fn recurrent(writer: &mut Writer) {
    const INNER: usize = 2 * WIDTH;
    const STATE: usize = 16;
    const RANK: usize = 4;
    const KERNEL: usize = 4;
    writer.sizes("mamba", 1_024);
    writer.number("mamba.ssm.conv_kernel", KERNEL);
    writer.number("mamba.ssm.inner_size", INNER);
    writer.number("mamba.ssm.state_size", STATE);
    writer.number("mamba.ssm.time_step_rank", RANK);
    writer.norm("output_norm.weight", WIDTH);
    for layer in 0..LAYERS {
        let name = |name: &str| format!("blk.{layer}.{name}");
        writer.norm(&name("attn_norm.weight"), WIDTH);
        writer.matrix(&name("ssm_in.weight"), WIDTH, 2 * INNER);
        writer.plain(&name("ssm_conv1d.weight"), &[KERNEL, INNER], 0.5);
        writer.plain(&name("ssm_conv1d.bias"), &[INNER], 0.1);
        writer.plain(&name("ssm_x.weight"), &[INNER, RANK + 2 * STATE], 0.2);
        writer.plain(&name("ssm_dt.weight"), &[RANK, INNER], 0.5);
        writer.plain(&name("ssm_dt.bias"), &[INNER], 0.5);
        // States fade at different speeds.
        let fading: Vec<f32> = (0..INNER * STATE).map(|index| -((index % STATE + 1) as f32)).collect();
        writer.floats(&name("ssm_a"), &[STATE, INNER], &fading);
        writer.plain(&name("ssm_d"), &[INNER], 1.0);
        writer.matrix(&name("ssm_out.weight"), INNER, WIDTH);
    }
}

fn hybrid(writer: &mut Writer) {
    const KERNEL: usize = 3;
    let kv_heads: Vec<usize> = (0..LAYERS).map(|layer| if layer % 2 == 0 { 0 } else { KV_HEADS }).collect();
    writer.sizes("lfm2", 1_024);
    writer.numbers("lfm2.attention.head_count_kv", &kv_heads);
    writer.number("lfm2.shortconv.l_cache", KERNEL);
    writer.norm("token_embd_norm.weight", WIDTH);
    for (layer, kv_heads) in kv_heads.into_iter().enumerate() {
        let name = |name: &str| format!("blk.{layer}.{name}");
        if kv_heads > 0 {
            writer.attention(layer);
            writer.norm(&name("attn_q_norm.weight"), HEAD_WIDTH);
            writer.norm(&name("attn_k_norm.weight"), HEAD_WIDTH);
        } else {
            writer.norm(&name("attn_norm.weight"), WIDTH);
            writer.plain(&name("shortconv.conv.weight"), &[KERNEL, WIDTH], 0.5);
            writer.matrix(&name("shortconv.in_proj.weight"), WIDTH, 3 * WIDTH);
            writer.matrix(&name("shortconv.out_proj.weight"), WIDTH, WIDTH);
        }
        writer.feed_forward(layer);
    }
}

/// Collects what a GGUF file says and holds.
struct Writer {
    weights: Weights,
    chance: Chance,
    pairs: Vec<Vec<u8>>,
    tensors: Vec<Vec<u8>>,
    data: Vec<u8>,
}

impl Default for Writer {
    fn default() -> Self {
        let (pairs, tensors, data) = Default::default();
        Self { weights: Weights::F16, chance: Chance(0), pairs, tensors, data }
    }
}

impl Writer {
    /// Bytes as a byte-level vocabulary has them, some tokens without use, and an end.
    fn vocabulary(&mut self) {
        self.text("tokenizer.ggml.model", "gpt2");
        self.text("tokenizer.ggml.pre", "gpt-2");
        let printable = |byte: &u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
        let mut spare = 256_u32..;
        let mut tokens: Vec<String> = (0..256)
            .map(|byte| if printable(&byte) { byte } else { spare.next().expect("it has no end") })
            .map(|letter| char::from_u32(letter).expect("it is a letter").to_string())
            .collect();
        tokens.extend((tokens.len()..VOCABULARY - 2).map(|number| format!("token{number}")));
        tokens.extend([BEGIN.into(), "<|end|>".into()]);
        let mut kinds = vec![1_usize; VOCABULARY - 2];
        kinds.extend([3, 3]);
        self.texts("tokenizer.ggml.tokens", &tokens);
        self.numbers("tokenizer.ggml.token_type", &kinds);
        self.texts("tokenizer.ggml.merges", &["a b".into()]);
        for (name, token) in ["fim_pre", "fim_suf", "fim_mid"].into_iter().zip(FILL_IN) {
            self.number(&format!("tokenizer.ggml.{name}_token_id"), token as usize);
        }
        self.number("tokenizer.ggml.bos_token_id", VOCABULARY - 2);
        self.number("tokenizer.ggml.eos_token_id", VOCABULARY - 1);
        self.pair("tokenizer.ggml.add_bos_token", 7, &[1]);
        self.matrix("token_embd.weight", WIDTH, VOCABULARY);
    }

    fn sizes(&mut self, architecture: &str, context_length: usize) {
        self.text("general.architecture", architecture);
        for (name, number) in [
            ("context_length", context_length),
            ("embedding_length", WIDTH),
            ("block_count", LAYERS),
            ("feed_forward_length", FEED_FORWARD),
            ("attention.head_count", HEADS),
            ("rope.dimension_count", HEAD_WIDTH),
            ("vocab_size", VOCABULARY),
        ] {
            self.number(&format!("{architecture}.{name}"), number);
        }
        self.pair(&format!("{architecture}.attention.layer_norm_rms_epsilon"), 6, &1e-5_f32.to_le_bytes());
    }

    fn attention(&mut self, layer: usize) {
        let name = |name: &str| format!("blk.{layer}.{name}.weight");
        self.norm(&name("attn_norm"), WIDTH);
        self.matrix(&name("attn_q"), WIDTH, WIDTH);
        self.matrix(&name("attn_k"), WIDTH, KV_HEADS * HEAD_WIDTH);
        self.matrix(&name("attn_v"), WIDTH, KV_HEADS * HEAD_WIDTH);
        self.matrix(&name("attn_output"), WIDTH, WIDTH);
    }

    fn feed_forward(&mut self, layer: usize) {
        let name = |name: &str| format!("blk.{layer}.{name}.weight");
        self.norm(&name("ffn_norm"), WIDTH);
        self.matrix(&name("ffn_gate"), WIDTH, FEED_FORWARD);
        self.matrix(&name("ffn_up"), WIDTH, FEED_FORWARD);
        self.matrix(&name("ffn_down"), FEED_FORWARD, WIDTH);
    }

    fn norm(&mut self, name: &str, length: usize) {
        self.floats(name, &[length], &vec![1.0; length]);
    }

    /// Numbers that are always 32 bits wide.
    fn plain(&mut self, name: &str, sides: &[usize], scale: f32) {
        let numbers: Vec<f32> = (0..sides.iter().product()).map(|_| scale * self.normal()).collect();
        self.floats(name, sides, &numbers);
    }

    fn floats(&mut self, name: &str, sides: &[usize], numbers: &[f32]) {
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        self.tensor(name, sides, 0, &bytes);
    }

    /// A matrix that keeps the length of the vectors it is multiplied with, more or less.
    fn matrix(&mut self, name: &str, columns: usize, rows: usize) {
        let scale = 1.5 / (columns as f32).sqrt();
        let numbers: Vec<f32> = (0..columns * rows).map(|_| scale * self.normal()).collect();
        let blocks = numbers.chunks_exact(BLOCK);
        let (kind, bytes) = match self.weights {
            Weights::F16 => (1, numbers.iter().flat_map(|number| f16::from_f32(*number).to_le_bytes()).collect()),
            Weights::Q4_0 => (2, blocks.flat_map(four_bits).collect::<Vec<u8>>()),
            Weights::Q4_1 => (3, blocks.flat_map(four_bits_from_least).collect()),
            Weights::Q8_0 => (8, blocks.flat_map(eight_bits).collect()),
        };
        self.tensor(name, &[columns, rows], kind, &bytes);
    }

    /// About normally distributed, with a variance of 1.
    fn normal(&mut self) -> f32 {
        let sum: u64 = (0..12).map(|_| self.chance.below(1 << 20)).sum();
        sum as f32 / (1 << 20) as f32 - 6.0
    }

    fn tensor(&mut self, name: &str, sides: &[usize], kind: u32, bytes: &[u8]) {
        let mut it = text(name);
        it.extend((sides.len() as u32).to_le_bytes());
        it.extend(sides.iter().flat_map(|side| (*side as u64).to_le_bytes()));
        it.extend(kind.to_le_bytes());
        it.extend((self.data.len() as u64).to_le_bytes());
        self.tensors.push(it);
        self.data.extend(bytes);
        self.data.resize(self.data.len().next_multiple_of(32), 0);
    }

    fn number(&mut self, key: &str, number: usize) {
        self.pair(key, 4, &(number as u32).to_le_bytes());
    }

    fn numbers(&mut self, key: &str, numbers: &[usize]) {
        let items: Vec<u8> = numbers.iter().flat_map(|number| (*number as u32).to_le_bytes()).collect();
        self.array(key, 5, numbers.len(), &items);
    }

    fn text(&mut self, key: &str, value: &str) {
        self.pair(key, 8, &text(value));
    }

    fn texts(&mut self, key: &str, values: &[String]) {
        let items: Vec<u8> = values.iter().flat_map(|value| text(value)).collect();
        self.array(key, 8, values.len(), &items);
    }

    fn array(&mut self, key: &str, kind: u32, count: usize, items: &[u8]) {
        self.pair(key, 9, &[&kind.to_le_bytes()[..], &(count as u64).to_le_bytes(), items].concat());
    }

    fn pair(&mut self, key: &str, kind: u32, value: &[u8]) {
        self.pairs.push([&text(key)[..], &kind.to_le_bytes(), value].concat());
    }

    fn file(self) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(3_u32.to_le_bytes());
        file.extend((self.tensors.len() as u64).to_le_bytes());
        file.extend((self.pairs.len() as u64).to_le_bytes());
        file.extend(self.pairs.concat());
        file.extend(self.tensors.concat());
        file.resize(file.len().next_multiple_of(32), 0);
        file.extend(self.data);
        file
    }
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

/// A scale and 32 numbers of four bits, the first half of them in the lower bits.
fn four_bits(numbers: &[f32]) -> Vec<u8> {
    let most =
        numbers.iter().copied().fold(0.0, |most: f32, number| if number.abs() > most.abs() { number } else { most });
    let scale = most / -8.0;
    let small = |number: f32| if scale == 0.0 { 8 } else { (number / scale + 8.5).clamp(0.0, 15.0) as u8 };
    let (low, high) = numbers.split_at(BLOCK / 2);
    let pairs = low.iter().zip(high).map(|(low, high)| small(*low) | small(*high) << 4);
    f16::from_f32(scale).to_le_bytes().into_iter().chain(pairs).collect()
}

/// A scale, the least number, and 32 numbers of four bits, as above.
fn four_bits_from_least(numbers: &[f32]) -> Vec<u8> {
    let least = numbers.iter().copied().fold(f32::INFINITY, f32::min);
    let scale = (numbers.iter().copied().fold(f32::NEG_INFINITY, f32::max) - least) / 15.0;
    let small = |number: f32| ((number - least) / scale + 0.5).clamp(0.0, 15.0) as u8;
    let (low, high) = numbers.split_at(BLOCK / 2);
    let pairs = low.iter().zip(high).map(|(low, high)| small(*low) | small(*high) << 4);
    let head = [scale, least].into_iter().flat_map(|number| f16::from_f32(number).to_le_bytes());
    head.chain(pairs).collect()
}

/// A scale and 32 signed bytes.
fn eight_bits(numbers: &[f32]) -> Vec<u8> {
    let scale = numbers.iter().fold(0.0_f32, |most, number| most.max(number.abs())) / 127.0;
    let small = |number: &f32| if scale == 0.0 { 0 } else { (number / scale).round() as i8 };
    f16::from_f32(scale)
        .to_le_bytes()
        .into_iter()
        .chain(numbers.iter().map(|number| small(number).cast_unsigned()))
        .collect()
}
