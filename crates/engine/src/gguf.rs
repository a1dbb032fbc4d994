//! Parses the header of an untrusted GGUF file.
//!
//! llama.cpp aborts its process on some malformed files, so this parser runs first. It never panics, allocates only
//! for data that the file really contains and at most [`KEPT_BYTES_MAX`] (see
//! `docs/adr/0042-headers-within-a-budget.md`), and reports where a file is malformed. The layout, in little endian,
//! is: magic, version, tensor count, pair count, the key-value pairs, the tensor descriptions, padding to the
//! alignment, the tensors.
//!
//! [`read_model`] reads a model, which may be split into several files. [`check_adapter`] checks whether an adapter
//! fits it.

mod adapter;
mod check;
mod joined;
mod reader;
mod split;

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{BufReader, Read};

use crate::model_runtime::SamplingDefaults;
pub use adapter::check_adapter;
pub(crate) use adapter::{adapter_alpha, adapter_pairs, is_input};
pub use check::check_model;
pub use joined::Joined;
use reader::{Positioned, Reader};
pub use split::{join, read_adapter, read_model};

/// The maximum length of a header; the largest known vocabularies take a tenth of it.
pub const HEADER_BYTES_MAX: u64 = 128 << 20;
/// The maximum number of metadata pairs.
pub const PAIRS_MAX: u64 = 8_192;
/// The maximum number of tensors.
pub const TENSORS_MAX: u64 = 65_536;
/// The maximum length of a key.
pub const KEY_BYTES_MAX: u64 = 1_024;
/// The maximum length of a string value; chat templates are the longest known.
pub const TEXT_BYTES_MAX: u64 = 1 << 20;
/// The maximum length of a string in an array.
pub const ITEM_BYTES_MAX: u64 = 64 << 10;
/// The maximum length of a tensor's name; llama.cpp stores 64 bytes with the terminating zero.
pub const TENSOR_NAME_BYTES_MAX: u64 = 63;
/// Arrays of numbers up to this length are kept. Longer ones are only checked.
pub const KEPT_NUMBERS_MAX: u64 = 4_096;
/// The maximum number of array items that are kept in all: each takes many times its length in the file.
pub const KEPT_IN_ALL_MAX: u64 = 64 << 10;

/// The memory budget for all that is kept of a model's headers, in bytes. The largest known vocabularies take a
/// fifth.
pub const KEPT_BYTES_MAX: u64 = 24 << 20;

const TOKENS_KEY: &str = "tokenizer.ggml.tokens";

/// The header of a GGUF file: metadata and the positions of the tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    /// Format version, 2 or 3.
    pub version: u32,
    pub metadata: BTreeMap<String, Value>,
    /// The tensors in file order.
    pub tensors: Vec<Tensor>,
    /// The offset of the tensor data.
    pub data_offset: u64,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Unsigned(u64),
    /// A signed integer of any width.
    Signed(i64),
    /// A float of either width.
    Float(f64),
    Bool(bool),
    Text(String),
    /// An array of numbers or booleans that is short enough to keep.
    Array(Vec<Value>),
    Texts(TextTable),
    /// An array that was checked and skipped.
    Skipped {
        items: u64,
    },
}

/// Many strings in one allocation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TextTable {
    bytes: Vec<u8>,
    ends: Vec<u32>,
}

/// The position and shape of one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    pub name: String,
    /// Elements by dimension, the fastest-varying first.
    pub dimensions: Vec<u64>,
    /// The number of its ggml type.
    pub kind: u32,
    /// Offset from [`Header::data_offset`].
    pub offset: u64,
    /// Its length in bytes.
    pub bytes: u64,
}

/// Why a file is not a valid GGUF file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufError {
    pub offset: u64,
    /// The key or tensor at that offset, if known.
    pub key: Option<String>,
    pub problem: String,
}

impl fmt::Display for GgufError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} at byte {}", self.problem, self.offset)?;
        match &self.key {
            // A key comes from an untrusted file, so it is shown escaped.
            Some(key) => write!(formatter, " ({key:?})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for GgufError {}

impl Header {
    /// Parses the header from the bytes of a whole file.
    pub fn parse(bytes: &[u8]) -> Result<Self, GgufError> {
        Self::read_from(bytes, bytes.len() as u64, &mut KEPT_BYTES_MAX.clone())
    }

    /// Reads the header of an open file without moving its position.
    pub fn read(file: &File) -> Result<Self, GgufError> {
        Self::read_within(file, &mut KEPT_BYTES_MAX.clone())
    }

    /// Reads the headers of all files of a model. Together they may take no more memory than a single header.
    pub fn read_all<'a>(files: impl IntoIterator<Item = &'a File>) -> Result<Vec<Self>, GgufError> {
        let mut budget = KEPT_BYTES_MAX;
        files.into_iter().map(|file| Self::read_within(file, &mut budget)).collect()
    }

    fn read_within(file: &File, budget: &mut u64) -> Result<Self, GgufError> {
        let length = file.metadata().map_err(|error| GgufError {
            offset: 0,
            key: None,
            problem: format!("the file cannot be read: {error}"),
        })?;
        Self::read_from(BufReader::with_capacity(1 << 16, Positioned { file, offset: 0 }), length.len(), budget)
    }

    /// Returns the string under a key.
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.metadata.get(key) {
            Some(Value::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// Returns the non-negative integer under a key.
    pub fn unsigned(&self, key: &str) -> Option<u64> {
        self.metadata.get(key)?.as_unsigned()
    }

    /// Returns the number under a key, whatever its numeric type.
    pub fn number(&self, key: &str) -> Option<f64> {
        match self.metadata.get(key)? {
            Value::Unsigned(number) => Some(*number as f64),
            Value::Signed(number) => Some(*number as f64),
            Value::Float(number) => Some(*number),
            _ => None,
        }
    }

    /// Returns the model's recommended sampling parameters, from the keys `general.sampling.…`. A missing key, or a
    /// value that no request may have, yields llama.cpp's default.
    pub fn sampling_defaults(&self) -> SamplingDefaults {
        let of_llama_cpp = SamplingDefaults::default();
        let number = |name: &str, default: f32, low: f32, high: f32| {
            let value = self.number(&format!("general.sampling.{name}")).map(|number| number as f32);
            value.filter(|number| (low..=high).contains(number)).unwrap_or(default)
        };
        let top_k = self.number("general.sampling.top_k").map(|count| count.max(0.0) as u32);
        SamplingDefaults {
            temperature: number("temp", of_llama_cpp.temperature, 0.0, 2.0),
            top_p: number("top_p", of_llama_cpp.top_p, f32::MIN_POSITIVE, 1.0),
            top_k: top_k.unwrap_or(of_llama_cpp.top_k),
            min_p: number("min_p", of_llama_cpp.min_p, 0.0, 1.0),
            repetition_penalty: number("penalty_repeat", of_llama_cpp.repetition_penalty, f32::MIN_POSITIVE, 2.0),
        }
    }

    /// Returns the architecture's name, such as `llama`.
    pub fn architecture(&self) -> Option<&str> {
        self.text("general.architecture")
    }

    /// Returns the non-negative integer under a key of the architecture, such as `block_count`.
    pub fn hyperparameter(&self, name: &str) -> Option<u64> {
        self.unsigned(&format!("{}.{name}", self.architecture()?))
    }

    /// Returns whether attention is causal, as the file says or by default for the architecture.
    pub fn is_causal(&self) -> bool {
        let Some(architecture) = self.architecture() else { return true };
        match self.metadata.get(&format!("{architecture}.attention.causal")) {
            Some(Value::Bool(causal)) => *causal,
            _ => !architecture.contains("bert"),
        }
    }

    /// Returns one number per layer for a key of the architecture. A single number applies to all layers.
    pub fn per_layer(&self, name: &str, layers: usize) -> Option<Vec<u64>> {
        match self.metadata.get(&format!("{}.{name}", self.architecture()?))? {
            Value::Array(values) if values.len() >= layers => {
                values.iter().take(layers).map(Value::as_unsigned).collect()
            }
            Value::Array(_) => None,
            value => Some(vec![value.as_unsigned()?; layers]),
        }
    }

    /// Returns the context length that the model was trained with, in tokens.
    pub fn context_length(&self) -> Option<u32> {
        self.hyperparameter("context_length").and_then(|tokens| u32::try_from(tokens).ok())
    }

    pub fn chat_template(&self) -> Option<&str> {
        self.text("tokenizer.chat_template")
    }

    /// Returns the text of the BOS token.
    pub fn bos_token(&self) -> Option<String> {
        self.token("tokenizer.ggml.bos_token_id")
    }

    /// Returns the text of the EOS token.
    pub fn eos_token(&self) -> Option<String> {
        self.token("tokenizer.ggml.eos_token_id")
    }

    /// Returns whether a text is one of the model's tokens.
    pub fn has_token(&self, text: &str) -> bool {
        match self.metadata.get(TOKENS_KEY) {
            Some(Value::Texts(table)) => (0..table.len()).any(|index| table.get(index) == Some(text.as_bytes())),
            _ => false,
        }
    }

    /// Returns the size of the vocabulary in tokens.
    pub fn vocabulary_size(&self) -> Option<u64> {
        match self.metadata.get(TOKENS_KEY) {
            Some(Value::Texts(table)) => Some(table.len() as u64),
            _ => None,
        }
    }

    /// Returns the total size of all tensors in bytes.
    pub fn tensor_bytes(&self) -> u64 {
        self.tensors.iter().fold(0, |sum, tensor| sum.saturating_add(tensor.bytes))
    }

    fn token(&self, key: &str) -> Option<String> {
        let index = usize::try_from(self.unsigned(key)?).ok()?;
        match self.metadata.get(TOKENS_KEY) {
            Some(Value::Texts(table)) => Some(String::from_utf8_lossy(table.get(index)?).into_owned()),
            _ => None,
        }
    }

    fn read_from(input: impl Read, file_bytes: u64, budget: &mut u64) -> Result<Self, GgufError> {
        let mut reader = Reader::new(input, file_bytes, *budget);
        let header = reader.header();
        *budget = reader.budget;
        header.map_err(|problem| GgufError { offset: reader.offset, key: reader.key, problem })
    }
}

impl Value {
    fn as_unsigned(&self) -> Option<u64> {
        match self {
            Value::Unsigned(number) => Some(*number),
            Value::Signed(number) => u64::try_from(*number).ok(),
            _ => None,
        }
    }
}

impl TextTable {
    /// Returns the number of strings.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Returns whether the table is empty.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Returns the bytes of one string.
    pub fn get(&self, index: usize) -> Option<&[u8]> {
        let end = *self.ends.get(index)? as usize;
        let start = match index.checked_sub(1) {
            Some(previous) => *self.ends.get(previous)? as usize,
            None => 0,
        };
        self.bytes.get(start..end)
    }
}

#[cfg(test)]
pub(crate) mod tests;
