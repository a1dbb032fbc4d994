//! Tiny models of random weights, written on the spot: any architecture's shape, vocabulary and quantization.

use tether_engine::VerifiedArtifact;

use crate::artifact_of;

/// How the matrices of a model are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(non_camel_case_types, reason = "so the formats are called")]
pub(crate) enum Kind {
    F16,
    Q4_0,
    Q4_1,
    Q8_0,
    /// Q4_K, with Q6_K where the file type of that name has it.
    Q4_K_M,
}

/// The shape of a model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct QuantizedModel {
    /// `llama`, `qwen2` or `gemma3`.
    pub(crate) architecture: &'static str,
    pub(crate) kind: Kind,
    pub(crate) vocabulary: usize,
    pub(crate) context_length: u32,
    pub(crate) chat_template: Option<&'static str>,
}

const LAYERS: usize = 2;
/// Q4_K comes in blocks of 256.
const WIDTH: usize = 256;
const FEED_FORWARD: usize = 512;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_WIDTH: usize = WIDTH / HEADS;
const ALIGNMENT: usize = 32;

const U32: u32 = 4;
const I32: u32 = 5;
const F32: u32 = 6;
const BOOL: u32 = 7;
const TEXT: u32 = 8;
const ARRAY: u32 = 9;

struct Tensor {
    name: String,
    dimensions: Vec<usize>,
    kind: u32,
    bytes: Vec<u8>,
}

impl QuantizedModel {
    /// Writes the file.
    pub(crate) fn artifact(self) -> VerifiedArtifact {
        let tensors = self.tensors();
        let metadata = self.metadata();
        let mut file = b"GGUF".to_vec();
        file.extend(3_u32.to_le_bytes());
        file.extend((tensors.len() as u64).to_le_bytes());
        file.extend((metadata.len() as u64).to_le_bytes());
        file.extend(metadata.concat());
        let mut offset = 0_usize;
        for tensor in &tensors {
            file.extend(text(&tensor.name));
            file.extend((tensor.dimensions.len() as u32).to_le_bytes());
            file.extend(tensor.dimensions.iter().flat_map(|length| (*length as u64).to_le_bytes()));
            file.extend(tensor.kind.to_le_bytes());
            file.extend((offset as u64).to_le_bytes());
            offset += tensor.bytes.len().next_multiple_of(ALIGNMENT);
        }
        for tensor in &tensors {
            file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
            file.extend(&tensor.bytes);
        }
        artifact_of(&file)
    }

    fn metadata(self) -> Vec<Vec<u8>> {
        let architecture = self.architecture;
        let number =
            |name: &str, value: usize| key(&format!("{architecture}.{name}"), U32, (value as u32).to_le_bytes());
        let words = |name: &str, words: Vec<String>| key(name, ARRAY, array(TEXT, words.iter().map(|word| text(word))));
        let last = self.vocabulary - 1;
        let tokens = (0..self.vocabulary).map(|token| match u8::try_from(token) {
            Ok(byte) => letter_of(byte).to_string(),
            Err(_) if token == last => "<|end|>".into(),
            Err(_) => format!("tok{token}"),
        });
        let kinds = (0..self.vocabulary).map(|token| if token == last { 3_i32 } else { 1 }.to_le_bytes());
        let mut metadata = vec![
            key("general.architecture", TEXT, text(architecture)),
            number("context_length", self.context_length as usize),
            number("embedding_length", WIDTH),
            number("block_count", LAYERS),
            number("feed_forward_length", FEED_FORWARD),
            number("attention.head_count", HEADS),
            number("attention.head_count_kv", KV_HEADS),
            number("attention.key_length", HEAD_WIDTH),
            number("attention.value_length", HEAD_WIDTH),
            key(&format!("{architecture}.attention.layer_norm_rms_epsilon"), F32, 1e-5_f32.to_le_bytes()),
            key("tokenizer.ggml.model", TEXT, text("gpt2")),
            key("tokenizer.ggml.pre", TEXT, text("gpt-2")),
            words("tokenizer.ggml.tokens", tokens.collect()),
            key("tokenizer.ggml.token_type", ARRAY, array(I32, kinds)),
            words("tokenizer.ggml.merges", vec!["a b".into()]),
            key("tokenizer.ggml.bos_token_id", U32, (last as u32).to_le_bytes()),
            key("tokenizer.ggml.eos_token_id", U32, (last as u32).to_le_bytes()),
            key("tokenizer.ggml.add_bos_token", BOOL, [0]),
        ];
        if architecture == "gemma3" {
            metadata.push(number("attention.sliding_window", 64));
        }
        metadata.extend(self.chat_template.map(|template| key("tokenizer.chat_template", TEXT, text(template))));
        metadata
    }

    fn tensors(self) -> Vec<Tensor> {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let mut tensors = vec![self.matrix("token_embd.weight".into(), WIDTH, self.vocabulary, &mut random)];
        let row = |name: String, length: usize, value: f32| Tensor {
            name,
            dimensions: vec![length],
            kind: 0,
            bytes: value.to_le_bytes().repeat(length),
        };
        tensors.push(row("output_norm.weight".into(), WIDTH, 1.0));
        for layer in 0..LAYERS {
            let name = |part: &str| format!("blk.{layer}.{part}");
            let (queries, keys) = (HEADS * HEAD_WIDTH, KV_HEADS * HEAD_WIDTH);
            for (part, columns, rows) in [
                ("attn_q.weight", WIDTH, queries),
                ("attn_k.weight", WIDTH, keys),
                ("attn_v.weight", WIDTH, keys),
                ("attn_output.weight", queries, WIDTH),
                ("ffn_gate.weight", WIDTH, FEED_FORWARD),
                ("ffn_up.weight", WIDTH, FEED_FORWARD),
                ("ffn_down.weight", FEED_FORWARD, WIDTH),
            ] {
                tensors.push(self.matrix(name(part), columns, rows, &mut random));
            }
            tensors.push(row(name("attn_norm.weight"), WIDTH, 1.0));
            tensors.push(row(name("ffn_norm.weight"), WIDTH, 1.0));
            if self.architecture == "qwen2" {
                for (part, length) in [("attn_q.bias", queries), ("attn_k.bias", keys), ("attn_v.bias", keys)] {
                    tensors.push(row(name(part), length, 0.01));
                }
            }
            if self.architecture == "gemma3" {
                for (part, length) in [
                    ("attn_q_norm.weight", HEAD_WIDTH),
                    ("attn_k_norm.weight", HEAD_WIDTH),
                    ("post_attention_norm.weight", WIDTH),
                    ("post_ffw_norm.weight", WIDTH),
                ] {
                    tensors.push(row(name(part), length, 1.0));
                }
            }
        }
        tensors
    }

    fn matrix(self, name: String, columns: usize, rows: usize, random: &mut Random) -> Tensor {
        // The file type of this name stores some matrices with more bits.
        let more_bits = name.contains("attn_v") || name.contains("ffn_down") || name.starts_with("token_embd");
        let half = |number: f32| half_bits(number).to_le_bytes();
        // The number of the type, the weights of a block, and its bytes: scales around random codes.
        let (kind, block, before, codes, after) = match self.kind {
            Kind::F16 => {
                let bytes = (0..columns * rows).flat_map(|_| half(random.weight())).collect();
                return Tensor { name, dimensions: vec![columns, rows], kind: 1, bytes };
            }
            Kind::Q4_0 => (2, 32, half(0.004).to_vec(), 16, vec![]),
            Kind::Q4_1 => (3, 32, [half(0.004), half(-0.03)].concat(), 16, vec![]),
            Kind::Q8_0 => (8, 32, half(0.000_25).to_vec(), 32, vec![]),
            Kind::Q4_K_M if more_bits => (14, 256, vec![], 208, half(0.000_02).to_vec()),
            Kind::Q4_K_M => (12, 256, [half(0.000_2), half(0.001_5)].concat(), 140, vec![]),
        };
        let blocks = columns * rows / block;
        let bytes = (0..blocks).flat_map(|_| [&before[..], &random.bytes(codes), &after].concat()).collect();
        Tensor { name, dimensions: vec![columns, rows], kind, bytes }
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        std::iter::repeat_with(|| self.next().to_le_bytes()).flatten().take(count).collect()
    }

    /// Returns a number of about the size that weights have.
    fn weight(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 24) as f32 * 0.06 - 0.03
    }
}

/// Returns the bits of a 16-bit float near a small number.
fn half_bits(number: f32) -> u16 {
    half::f16::from_f32(number).to_bits()
}

/// Returns the letter that stands for a byte in byte-level vocabularies.
fn letter_of(byte: u8) -> char {
    let is_shown = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let hidden_before = (0..byte).filter(|earlier| !is_shown(earlier)).count() as u32;
    if is_shown(&byte) { byte.into() } else { char::from_u32(256 + hidden_before).expect("there are few") }
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

fn key(name: &str, kind: u32, value: impl AsRef<[u8]>) -> Vec<u8> {
    [&text(name)[..], &kind.to_le_bytes(), value.as_ref()].concat()
}

fn array<T: AsRef<[u8]>>(kind: u32, items: impl IntoIterator<Item = T>) -> Vec<u8> {
    let items: Vec<_> = items.into_iter().collect();
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend((items.len() as u64).to_le_bytes());
    bytes.extend(items.iter().flat_map(AsRef::as_ref));
    bytes
}
