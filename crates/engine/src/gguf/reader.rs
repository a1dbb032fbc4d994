//! Reads primitive values from the bytes of a header.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::{
    HEADER_BYTES_MAX, Header, ITEM_BYTES_MAX, KEPT_BYTES_MAX, KEPT_IN_ALL_MAX, KEPT_NUMBERS_MAX, KEY_BYTES_MAX,
    PAIRS_MAX, TENSOR_NAME_BYTES_MAX, TENSORS_MAX, TEXT_BYTES_MAX, TOKENS_KEY, Tensor, TextTable, Value,
};

const MAGIC: [u8; 4] = *b"GGUF";

/// Memory for a pair in addition to its strings: its entries in a tree and in a list, each of which may have twice
/// the capacity that it needs.
const PAIR_BYTES: u64 = 384;
/// Memory for a tensor in addition to its name: its list entry, its dimensions, and its entry in the set of names.
const TENSOR_BYTES: u64 = 384;
/// The number of items by which the vocabulary's lists grow.
const GROWTH_ITEMS: usize = 256 << 10;

/// Keys whose type llama.cpp takes for granted, with the number of that type.
const TYPED_KEYS: [(&str, u32); 8] = [
    ("general.alignment", 4),
    ("general.architecture", 8),
    ("general.type", 8),
    ("adapter.type", 8),
    ("adapter.lora.alpha", 6),
    ("split.no", 2),
    ("split.count", 2),
    ("split.tensors.count", 5),
];

/// Reads a file by position, so that parsers that share a descriptor do not disturb each other.
pub(super) struct Positioned<'a> {
    pub(super) file: &'a File,
    pub(super) offset: u64,
}

impl Read for Positioned<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(buffer, self.offset)?;
        self.offset += count as u64;
        Ok(count)
    }
}

/// Reads the fields of a header in order and tracks the offset.
pub(super) struct Reader<R> {
    pub(super) input: R,
    pub(super) offset: u64,
    pub(super) file_bytes: u64,
    pub(super) key: Option<String>,
    /// The byte range of each pair read so far, by key.
    pub(super) pairs: Vec<(String, Range<u64>)>,
    /// The number of array items that were kept.
    kept_numbers: u64,
    /// The remaining memory budget for data that is kept, in bytes.
    pub(super) budget: u64,
}

impl<R: Read> Reader<R> {
    pub(super) fn new(input: R, file_bytes: u64, budget: u64) -> Self {
        Self { input, offset: 0, file_bytes, key: None, pairs: vec![], kept_numbers: 0, budget }
    }

    pub(super) fn header(&mut self) -> Result<Header, String> {
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
        self.check_offsets(&mut tensors, data_offset, alignment)?;
        Ok(Header { version, metadata, tensors, data_offset })
    }

    fn pairs(&mut self, count: u64) -> Result<BTreeMap<String, Value>, String> {
        let mut metadata = BTreeMap::new();
        for _ in 0..count {
            let start = self.offset;
            self.keep(PAIR_BYTES)?;
            let key = self.text(KEY_BYTES_MAX)?;
            // The key is stored in the list of pairs as well.
            self.keep(key.len() as u64)?;
            self.key = Some(key.clone());
            let kind = self.u32()?;
            // llama.cpp asserts the types of these keys, while it checks those of others.
            if TYPED_KEYS.iter().any(|(typed, right)| *typed == key && *right != kind) {
                return Err(format!("{kind} is not the type that this key has"));
            }
            let value = self.value(&key, kind)?;
            self.pairs.push((key.clone(), start..self.offset));
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
            // A string takes at least the eight bytes of its length.
            self.expect_room(items, 8)?;
            return self.texts(items, key == TOKENS_KEY);
        }
        let item_bytes = number_bytes(kind).ok_or_else(|| format!("{kind} is not a type of array item"))?;
        let total = self.expect_room(items, item_bytes)?;
        if items > KEPT_NUMBERS_MAX || self.kept_numbers + items > KEPT_IN_ALL_MAX {
            self.skip(total)?;
            return Ok(Value::Skipped { items });
        }
        self.kept_numbers += items;
        // A growing vector may allocate twice the capacity that it needs.
        self.keep(items * 2 * size_of::<Value>() as u64)?;
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
            self.keep(length + size_of::<u32>() as u64)?;
            let text = self.bytes(length)?;
            // Doubling the capacity would take more memory than was budgeted.
            reserve(&mut table.bytes, text.len());
            reserve(&mut table.ends, 1);
            table.bytes.extend_from_slice(&text);
            table.ends.push(u32::try_from(table.bytes.len()).map_err(|_| "the vocabulary is too long".to_owned())?);
        }
        Ok(if keep { Value::Texts(table) } else { Value::Skipped { items } })
    }

    fn tensors(&mut self, count: u64) -> Result<Vec<Tensor>, String> {
        // A tensor description takes at least 24 bytes: name length, dimension count, type and offset.
        self.expect_room(count, 24)?;
        let mut tensors = Vec::new();
        let mut names = HashSet::new();
        for _ in 0..count {
            self.keep(TENSOR_BYTES)?;
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

    fn check_offsets(&mut self, tensors: &mut [Tensor], data_offset: u64, alignment: u64) -> Result<(), String> {
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

    /// Reads a count and rejects values above `most`.
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

    /// Charges the memory of a value to the budget before the value is read.
    fn keep(&mut self, bytes: u64) -> Result<(), String> {
        self.budget = self.budget.checked_sub(bytes).ok_or_else(|| {
            format!("the header takes more than {} MiB of memory, which no model needs", KEPT_BYTES_MAX >> 20)
        })?;
        Ok(())
    }

    fn text(&mut self, most: u64) -> Result<String, String> {
        let length = self.bounded("bytes in a text", most)?;
        self.keep(length)?;
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

/// Reserves capacity for more items, in fixed steps.
fn reserve<T>(items: &mut Vec<T>, more: usize) {
    if items.capacity() - items.len() < more {
        items.reserve_exact(more.max(GROWTH_ITEMS));
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

/// Returns the number of elements and bytes in one block of a ggml type.
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
