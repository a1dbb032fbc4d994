//! Reads the header of a GGUF file without trusting it.
//!
//! llama.cpp aborts its process on some malformed files. This parser comes first: it is bounded, never panics,
//! allocates only what the file really holds, and says where a file is wrong. Layout (little endian): magic, version,
//! tensor count, pair count, the pairs, the tensor descriptions, padding to the alignment, the tensors.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;

/// The most bytes of header that are read; the largest vocabularies known take a tenth.
pub const HEADER_BYTES_MAX: u64 = 128 << 20;
/// The most metadata pairs.
pub const PAIRS_MAX: u64 = 8_192;
/// The most tensors.
pub const TENSORS_MAX: u64 = 65_536;
/// The longest key.
pub const KEY_BYTES_MAX: u64 = 1_024;
/// The longest text value; chat templates are the longest known.
pub const TEXT_BYTES_MAX: u64 = 1 << 20;
/// The longest text within an array.
pub const ITEM_BYTES_MAX: u64 = 64 << 10;
/// The longest name of a tensor; llama.cpp keeps 64 bytes with the final zero.
pub const TENSOR_NAME_BYTES_MAX: u64 = 63;
/// Arrays of numbers up to this length are kept; longer ones are only checked.
pub const KEPT_NUMBERS_MAX: u64 = 4_096;

const MAGIC: [u8; 4] = *b"GGUF";
const TOKENS_KEY: &str = "tokenizer.ggml.tokens";

/// The header of a GGUF file: what the model is and where its tensors lie.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    /// Format version, 2 or 3.
    pub version: u32,
    /// Metadata by key.
    pub metadata: BTreeMap<String, Value>,
    /// The tensors in file order.
    pub tensors: Vec<Tensor>,
    /// Where the tensors' bytes begin.
    pub data_offset: u64,
}

/// One metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// An unsigned integer of any width.
    Unsigned(u64),
    /// A signed integer of any width.
    Signed(i64),
    /// A float of either width.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// Text.
    Text(String),
    /// Numbers or truth values of an array that is short enough to keep.
    Array(Vec<Value>),
    /// The vocabulary.
    Texts(TextTable),
    /// An array that was checked and skipped.
    Skipped {
        /// Its length in items.
        items: u64,
    },
}

/// Many texts in one allocation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TextTable {
    bytes: Vec<u8>,
    ends: Vec<u32>,
}

/// Where one tensor lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Elements by dimension, the fastest first.
    pub dimensions: Vec<u64>,
    /// The number of its ggml type.
    pub kind: u32,
    /// Offset from [`Header::data_offset`].
    pub offset: u64,
    /// Its length in bytes.
    pub bytes: u64,
}

/// Why a file is not a GGUF file that can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufError {
    /// Where reading stopped.
    pub offset: u64,
    /// The key or tensor at that place, where one is known.
    pub key: Option<String>,
    /// What is wrong.
    pub problem: String,
}

impl fmt::Display for GgufError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} at byte {}", self.problem, self.offset)?;
        match &self.key {
            // A key comes from the file, so it is shown escaped.
            Some(key) => write!(formatter, " ({key:?})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for GgufError {}

impl Header {
    /// Reads the header from the bytes of a whole file.
    pub fn parse(bytes: &[u8]) -> Result<Self, GgufError> {
        Self::read_from(bytes, bytes.len() as u64)
    }

    /// Reads the header of an open file, leaving its position alone.
    pub fn read(file: &File) -> Result<Self, GgufError> {
        let length = file.metadata().map_err(|error| GgufError {
            offset: 0,
            key: None,
            problem: format!("the file cannot be read: {error}"),
        })?;
        Self::read_from(BufReader::with_capacity(1 << 16, Positioned { file, offset: 0 }), length.len())
    }

    /// Returns the text under a key.
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

    /// Returns the architecture's name, such as `llama`.
    pub fn architecture(&self) -> Option<&str> {
        self.text("general.architecture")
    }

    /// Returns the non-negative integer under a key of the architecture, such as `block_count`.
    pub fn hyperparameter(&self, name: &str) -> Option<u64> {
        self.unsigned(&format!("{}.{name}", self.architecture()?))
    }

    /// Returns one number per layer under a key of the architecture; a single number stands for all layers.
    pub fn per_layer(&self, name: &str, layers: usize) -> Option<Vec<u64>> {
        match self.metadata.get(&format!("{}.{name}", self.architecture()?))? {
            Value::Array(values) if values.len() >= layers => {
                values.iter().take(layers).map(Value::as_unsigned).collect()
            }
            Value::Array(_) => None,
            value => Some(vec![value.as_unsigned()?; layers]),
        }
    }

    /// Returns the tokens of context that the model was trained with.
    pub fn context_length(&self) -> Option<u32> {
        self.hyperparameter("context_length").and_then(|tokens| u32::try_from(tokens).ok())
    }

    /// Returns the chat template.
    pub fn chat_template(&self) -> Option<&str> {
        self.text("tokenizer.chat_template")
    }

    /// Returns the text of the token that begins a sequence.
    pub fn bos_token(&self) -> Option<String> {
        self.token("tokenizer.ggml.bos_token_id")
    }

    /// Returns the text of the token that ends a sequence.
    pub fn eos_token(&self) -> Option<String> {
        self.token("tokenizer.ggml.eos_token_id")
    }

    /// Returns the number of tokens in the vocabulary.
    pub fn vocabulary_size(&self) -> Option<u64> {
        match self.metadata.get(TOKENS_KEY) {
            Some(Value::Texts(table)) => Some(table.len() as u64),
            _ => None,
        }
    }

    /// Returns the sum of all tensors' bytes.
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

    fn read_from(input: impl Read, file_bytes: u64) -> Result<Self, GgufError> {
        let mut reader = Reader { input, offset: 0, file_bytes, key: None };
        let header = reader.header();
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
    /// Returns how many texts there are.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Returns whether there is none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Returns the bytes of one text.
    pub fn get(&self, index: usize) -> Option<&[u8]> {
        let end = *self.ends.get(index)? as usize;
        let start = match index.checked_sub(1) {
            Some(previous) => *self.ends.get(previous)? as usize,
            None => 0,
        };
        self.bytes.get(start..end)
    }
}

/// Reads a file by position, so that parsers that share its descriptor do not disturb each other.
struct Positioned<'a> {
    file: &'a File,
    offset: u64,
}

impl Read for Positioned<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(buffer, self.offset)?;
        self.offset += count as u64;
        Ok(count)
    }
}

struct Reader<R> {
    input: R,
    offset: u64,
    file_bytes: u64,
    key: Option<String>,
}

impl<R: Read> Reader<R> {
    fn header(&mut self) -> Result<Header, String> {
        if self.array::<4>()? != MAGIC {
            return Err("the file does not begin with GGUF".into());
        }
        let version = self.u32()?;
        if version.swap_bytes() == 2 || version.swap_bytes() == 3 {
            return Err("big-endian files are not supported".into());
        }
        if !(2..=3).contains(&version) {
            return Err(format!("version {version} is not supported, only 2 and 3"));
        }
        let tensor_count = self.bounded("tensors", TENSORS_MAX)?;
        let pair_count = self.bounded("metadata pairs", PAIRS_MAX)?;
        let metadata = self.pairs(pair_count)?;
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(Value::Unsigned(bytes)) if bytes.is_power_of_two() && *bytes <= 1 << 20 => *bytes,
            Some(_) => return Err("general.alignment is not a power of two up to 1 MiB".into()),
        };
        let mut tensors = self.tensors(tensor_count)?;
        let data_offset = self.offset.next_multiple_of(alignment);
        self.place(&mut tensors, data_offset, alignment)?;
        let header = Header { version, metadata, tensors, data_offset };
        check_split(&header)?;
        Ok(header)
    }

    fn pairs(&mut self, count: u64) -> Result<BTreeMap<String, Value>, String> {
        let mut metadata = BTreeMap::new();
        for _ in 0..count {
            let key = self.text(KEY_BYTES_MAX)?;
            self.key = Some(key.clone());
            let kind = self.u32()?;
            let value = self.value(&key, kind)?;
            if metadata.insert(key, value).is_some() {
                return Err("the key occurs twice".into());
            }
            self.key = None;
        }
        Ok(metadata)
    }

    fn value(&mut self, key: &str, kind: u32) -> Result<Value, String> {
        match kind {
            8 => Ok(Value::Text(self.text(TEXT_BYTES_MAX)?)),
            9 => self.array_value(key),
            _ => self.number(kind),
        }
    }

    fn number(&mut self, kind: u32) -> Result<Value, String> {
        Ok(match kind {
            0 => Value::Unsigned(u64::from(u8::from_le_bytes(self.array()?))),
            1 => Value::Signed(i64::from(i8::from_le_bytes(self.array()?))),
            2 => Value::Unsigned(u64::from(u16::from_le_bytes(self.array()?))),
            3 => Value::Signed(i64::from(i16::from_le_bytes(self.array()?))),
            4 => Value::Unsigned(u64::from(self.u32()?)),
            5 => Value::Signed(i64::from(i32::from_le_bytes(self.array()?))),
            6 => Value::Float(f64::from(f32::from_le_bytes(self.array()?))),
            7 => match self.array::<1>()? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return Err(format!("{other} is not a truth value")),
            },
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(format!("{other} is not a type of value")),
        })
    }

    fn array_value(&mut self, key: &str) -> Result<Value, String> {
        let kind = self.u32()?;
        let items = self.u64()?;
        if kind == 8 {
            // A text takes at least the eight bytes of its length.
            self.expect_room(items, 8)?;
            return self.texts(items, key == TOKENS_KEY);
        }
        let item_bytes = number_bytes(kind).ok_or_else(|| format!("{kind} is not a type of array item"))?;
        let total = self.expect_room(items, item_bytes)?;
        if items > KEPT_NUMBERS_MAX {
            self.skip(total)?;
            return Ok(Value::Skipped { items });
        }
        (0..items).map(|_| self.number(kind)).collect::<Result<_, _>>().map(Value::Array)
    }

    fn texts(&mut self, items: u64, keep: bool) -> Result<Value, String> {
        let mut table = TextTable::default();
        for _ in 0..items {
            let length = self.bounded("bytes in an item", ITEM_BYTES_MAX)?;
            if !keep {
                self.skip(length)?;
                continue;
            }
            let text = self.bytes(length)?;
            table.bytes.extend_from_slice(&text);
            table.ends.push(u32::try_from(table.bytes.len()).map_err(|_| "the vocabulary is too long".to_owned())?);
        }
        Ok(if keep { Value::Texts(table) } else { Value::Skipped { items } })
    }

    fn tensors(&mut self, count: u64) -> Result<Vec<Tensor>, String> {
        // A description takes at least 24 bytes: name length, dimension count, type and offset.
        self.expect_room(count, 24)?;
        let mut tensors = Vec::new();
        let mut names = HashSet::new();
        for _ in 0..count {
            let tensor = self.tensor()?;
            if !names.insert(tensor.name.clone()) {
                return Err("the tensor occurs twice".into());
            }
            tensors.push(tensor);
        }
        Ok(tensors)
    }

    fn tensor(&mut self) -> Result<Tensor, String> {
        let name = self.text(TENSOR_NAME_BYTES_MAX)?;
        self.key = Some(name.clone());
        let count = self.u32()?;
        if count > 4 {
            return Err(format!("a tensor of {count} dimensions, 4 are the most"));
        }
        let mut dimensions = Vec::new();
        let mut elements = 1_u64;
        for _ in 0..count {
            let length = self.u64()?;
            if length == 0 {
                return Err("a tensor without elements".into());
            }
            elements = elements
                .checked_mul(length)
                .filter(|elements| *elements < 1 << 62)
                .ok_or_else(|| "a tensor of too many elements".to_owned())?;
            dimensions.push(length);
        }
        let kind = self.u32()?;
        let (block_elements, block_bytes) =
            tensor_block(kind).ok_or_else(|| format!("{kind} is not a known type of tensor"))?;
        if !dimensions.first().copied().unwrap_or(1).is_multiple_of(block_elements) {
            return Err(format!("the first dimension is not a multiple of {block_elements}"));
        }
        let bytes = (elements / block_elements)
            .checked_mul(block_bytes)
            .ok_or_else(|| "a tensor of too many bytes".to_owned())?;
        let offset = self.u64()?;
        Ok(Tensor { name, dimensions, kind, offset, bytes })
    }

    fn place(&mut self, tensors: &mut [Tensor], data_offset: u64, alignment: u64) -> Result<(), String> {
        for tensor in tensors.iter() {
            self.key = Some(tensor.name.clone());
            if !tensor.offset.is_multiple_of(alignment) {
                return Err(format!("the tensor's offset is not a multiple of {alignment}"));
            }
            let end = data_offset.checked_add(tensor.offset).and_then(|start| start.checked_add(tensor.bytes));
            if end.is_none_or(|end| end > self.file_bytes) {
                return Err("the tensor lies beyond the end of the file".into());
            }
        }
        self.key = None;
        Ok(())
    }

    /// Reads a count and refuses one above `most`.
    fn bounded(&mut self, what: &str, most: u64) -> Result<u64, String> {
        let count = self.u64()?;
        if count > most { Err(format!("{count} {what}, {most} are the most")) } else { Ok(count) }
    }

    fn expect_room(&self, items: u64, item_bytes: u64) -> Result<u64, String> {
        let room = self.file_bytes.min(HEADER_BYTES_MAX).saturating_sub(self.offset);
        items
            .checked_mul(item_bytes)
            .filter(|total| *total <= room)
            .ok_or_else(|| format!("{items} items do not fit the rest of the file"))
    }

    fn text(&mut self, most: u64) -> Result<String, String> {
        let length = self.bounded("bytes in a text", most)?;
        String::from_utf8(self.bytes(length)?).map_err(|_| "a text is not UTF-8".into())
    }

    fn bytes(&mut self, length: u64) -> Result<Vec<u8>, String> {
        self.expect_room(length, 1)?;
        let mut bytes = vec![0; length as usize];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn skip(&mut self, mut length: u64) -> Result<(), String> {
        self.expect_room(length, 1)?;
        let mut scratch = [0; 4_096];
        while length > 0 {
            let step = length.min(scratch.len() as u64);
            self.fill(&mut scratch[..step as usize])?;
            length -= step;
        }
        Ok(())
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, String> {
        self.array().map(u64::from_le_bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), String> {
        if self.offset.saturating_add(bytes.len() as u64) > HEADER_BYTES_MAX {
            return Err(format!("the header is longer than {HEADER_BYTES_MAX} bytes"));
        }
        self.input.read_exact(bytes).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => "the file ends within its header".to_owned(),
            _ => format!("the file cannot be read: {error}"),
        })?;
        self.offset += bytes.len() as u64;
        Ok(())
    }
}

/// Refuses one part of a model that was cut in several files: llama.cpp would look for the others by path.
fn check_split(header: &Header) -> Result<(), String> {
    match header.unsigned("split.count") {
        Some(parts) if parts > 1 => Err(format!("the model is split into {parts} files")),
        _ => Ok(()),
    }
}

fn number_bytes(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

/// Returns the elements and the bytes of one block of a ggml type.
fn tensor_block(kind: u32) -> Option<(u64, u64)> {
    Some(match kind {
        0 | 26 => (1, 4),
        1 | 25 | 30 => (1, 2),
        2 | 20 => (32, 18),
        3 => (32, 20),
        6 => (32, 22),
        7 => (32, 24),
        8 => (32, 34),
        9 => (32, 36),
        10 => (256, 84),
        11 | 21 => (256, 110),
        12 => (256, 144),
        13 => (256, 176),
        14 => (256, 210),
        15 => (256, 292),
        16 | 35 => (256, 66),
        17 => (256, 74),
        18 => (256, 98),
        19 => (256, 50),
        22 => (256, 82),
        23 => (256, 136),
        24 => (1, 1),
        27 | 28 => (1, 8),
        29 => (256, 56),
        34 => (256, 54),
        39 => (32, 17),
        40 => (64, 36),
        41 => (128, 18),
        42 => (64, 18),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tiny() -> Vec<u8> {
        std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny.gguf")).expect("the tiny model is there")
    }

    /// Builds files field by field.
    #[derive(Default)]
    struct Builder(Vec<u8>);

    impl Builder {
        fn new(tensors: u64, pairs: u64) -> Self {
            let mut builder = Self(b"GGUF".to_vec());
            builder.0.extend(3_u32.to_le_bytes());
            builder.u64(tensors).u64(pairs);
            builder
        }

        fn u32(&mut self, number: u32) -> &mut Self {
            self.0.extend(number.to_le_bytes());
            self
        }

        fn u64(&mut self, number: u64) -> &mut Self {
            self.0.extend(number.to_le_bytes());
            self
        }

        fn text(&mut self, text: &str) -> &mut Self {
            self.u64(text.len() as u64);
            self.0.extend(text.as_bytes());
            self
        }
    }

    #[test]
    fn the_tiny_model_tells_what_it_is() {
        let header = Header::parse(&tiny()).expect("it is valid");
        assert_eq!(header.architecture(), Some("llama"));
        assert_eq!(header.context_length(), Some(512));
        assert_eq!(header.vocabulary_size(), Some(1_024));
        assert_eq!(header.hyperparameter("block_count"), Some(4));
        assert_eq!(header.per_layer("attention.head_count_kv", 4), Some(vec![3; 4]));
        assert!(header.chat_template().is_some_and(|template| template.contains("<|im_start|>")));
        assert_eq!(header.eos_token().as_deref(), Some("<|im_end|>"));
    }

    #[test]
    fn the_tensors_of_the_tiny_model_end_where_the_file_ends() {
        let file = tiny();
        let header = Header::parse(&file).expect("it is valid");
        let end = header.tensors.iter().map(|tensor| header.data_offset + tensor.offset + tensor.bytes).max();
        let end = end.expect("it has tensors").next_multiple_of(32);
        assert_eq!(end, (file.len() as u64).next_multiple_of(32));
    }

    #[test]
    fn a_file_cut_anywhere_is_refused() {
        let file = tiny();
        for length in (0..file.len()).step_by(997).chain(file.len() - 40..file.len() - 32) {
            assert!(Header::parse(&file[..length]).is_err(), "cut to {length} bytes");
        }
    }

    #[test]
    fn a_length_beyond_the_file_is_refused_before_it_is_allocated() {
        let mut builder = Builder::new(0, 1);
        builder.text("k").u32(9).u32(10).u64(u64::MAX / 8);
        let error = Header::parse(&builder.0).expect_err("the array cannot be there");
        assert_eq!(error.key.as_deref(), Some("k"));
        assert!(error.problem.contains("do not fit"), "{error}");
    }

    #[test]
    fn counts_above_the_limits_are_refused() {
        for builder in [Builder::new(u64::MAX, 0), Builder::new(0, u64::MAX), Builder::new(TENSORS_MAX + 1, 0)] {
            let error = Header::parse(&builder.0).expect_err("the count is too large");
            assert!(error.problem.contains("are the most"), "{error}");
        }
    }

    #[test]
    fn an_error_names_the_offset_and_the_key() {
        let mut builder = Builder::new(0, 1);
        builder.text("general.name").u32(77);
        let error = Header::parse(&builder.0).expect_err("77 is no type");
        assert_eq!(error.to_string(), "77 is not a type of value at byte 48 (\"general.name\")");
    }

    #[test]
    fn a_tensor_beyond_the_end_of_the_file_is_refused() {
        let mut builder = Builder::new(1, 0);
        builder.text("w").u32(1).u64(1 << 40).u32(0).u64(0);
        let error = Header::parse(&builder.0).expect_err("there are no such bytes");
        assert!(error.problem.contains("beyond the end"), "{error}");
    }

    #[test]
    fn a_tensor_whose_size_overflows_is_refused() {
        let mut builder = Builder::new(1, 0);
        builder.text("w").u32(4).u64(1 << 20).u64(1 << 20).u64(1 << 20).u64(1 << 20).u32(0).u64(0);
        assert!(Header::parse(&builder.0).expect_err("it overflows").problem.contains("too many elements"));
    }

    #[test]
    fn one_part_of_a_split_model_is_refused() {
        let mut builder = Builder::new(0, 1);
        builder.text("split.count").u32(4).u32(3);
        assert!(Header::parse(&builder.0).expect_err("it is split").problem.contains("3 files"));
    }

    #[test]
    fn an_open_file_keeps_its_position() {
        use std::io::{Seek, SeekFrom};
        let mut file = tempfile::tempfile().expect("temporary files work");
        std::io::Write::write_all(&mut file, &tiny()).expect("it is written");
        file.seek(SeekFrom::Start(7)).expect("it seeks");
        assert_eq!(Header::read(&file).expect("it is valid"), Header::parse(&tiny()).expect("it is valid"));
        assert_eq!(file.stream_position().expect("it tells"), 7);
    }

    proptest! {
        #[test]
        fn noise_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = Header::parse(&bytes);
            let mut file = Builder::new(1, 1).0;
            file.extend(bytes);
            let _ = Header::parse(&file);
        }

        #[test]
        fn a_flipped_header_never_panics(place in 0_usize..40_000, bit in 0_u32..8) {
            let mut file = tiny();
            file[place] ^= 1 << bit;
            let _ = Header::parse(&file);
        }
    }
}
