//! Joins the files of a split model into one.
//!
//! The key-value pairs of the first part are kept byte for byte, except those that describe the split. The tensors
//! keep their order, and the data of each part follows that of the part before.

use std::fs::File;
use std::io::{self, BufReader, Cursor, Read};
use std::ops::Range;

use super::reader::{Positioned, Reader};
use super::{Header, KEPT_BYTES_MAX, check_model, join};

/// The maximum length of a joined file's header, which is held in memory; the largest known vocabularies take two
/// thirds.
const HEAD_BYTES_MAX: u64 = 24 << 20;
/// The prefix of all keys that describe the split.
const SPLIT: &str = "split.";

/// The layout of one file that is joined from the parts of a model.
#[derive(Debug)]
pub struct Joined {
    /// The header of the joined file.
    pub header: Header,
    /// All bytes before the tensor data.
    head: Vec<u8>,
    /// The range of the tensor data in each part, and the number of padding zeros after it.
    data: Vec<(Range<u64>, u64)>,
}

impl Joined {
    /// Reads the parts of a model, given in order. Returns an error if they do not form a whole model.
    pub fn of(parts: &[File]) -> Result<Self, String> {
        let first = parts.first().ok_or("there is no file")?;
        let pairs = pairs(first)?;
        let headers = Header::read_all(parts).map_err(|error| error.to_string())?;
        let shares: Vec<_> = headers.iter().map(|part| (part.data_offset, part.tensors.len())).collect();
        let mut header = join(headers)?;
        check_model(&header)?;
        header.metadata.retain(|key, _| !key.starts_with(SPLIT));
        let alignment = header.unsigned("general.alignment").unwrap_or(32);
        let mut data = vec![];
        let mut rest = &mut header.tensors[..];
        let mut base = 0_u64;
        for (data_offset, count) in shares {
            let (tensors, others) = rest.split_at_mut(count);
            rest = others;
            let length = tensors.iter().map(|tensor| tensor.offset.saturating_add(tensor.bytes)).max().unwrap_or(0);
            let padded = length.checked_next_multiple_of(alignment).ok_or("a part is too long")?;
            data.push((data_offset..data_offset.saturating_add(length), padded - length));
            for tensor in tensors {
                // Each part may have its own alignment, but the joined file has only one.
                if !tensor.offset.is_multiple_of(alignment) {
                    return Err(format!(
                        "the tensor {:?} is aligned otherwise than those of the first file",
                        tensor.name
                    ));
                }
                tensor.offset = base.checked_add(tensor.offset).ok_or("the parts are too long")?;
            }
            base = base.checked_add(padded).ok_or("the parts are too long")?;
        }
        let mut joined = Self { header, head: vec![], data };
        joined.head = joined.write_head(first, &pairs, alignment)?;
        joined.header.data_offset = joined.head.len() as u64;
        Ok(joined)
    }

    /// Returns the length of the joined file.
    pub fn bytes(&self) -> u64 {
        self.data.iter().fold(self.head.len() as u64, |sum, (data, zeros)| sum + (data.end - data.start) + zeros)
    }

    /// Returns a reader over the joined file.
    pub fn reader<'a>(&'a self, parts: &'a [File]) -> impl Read + 'a {
        let tensors = parts.iter().zip(&self.data).map(|(file, (data, zeros))| {
            let positioned = Positioned { file, offset: data.start };
            positioned.take(data.end - data.start).chain(io::repeat(0).take(*zeros))
        });
        let tensors: Box<dyn Read + 'a> =
            tensors.fold(Box::new(io::empty()), |before, part| Box::new(before.chain(part)) as Box<dyn Read + 'a>);
        Cursor::new(&self.head).chain(tensors)
    }

    fn write_head(&self, first: &File, pairs: &[(String, Range<u64>)], alignment: u64) -> Result<Vec<u8>, String> {
        let kept: Vec<&Range<u64>> =
            pairs.iter().filter(|(key, _)| !key.starts_with(SPLIT)).map(|(_, range)| range).collect();
        let bytes = kept.iter().fold(0, |sum, range| sum + (range.end - range.start));
        let mut head = Vec::with_capacity(usize::try_from(bytes.min(HEAD_BYTES_MAX)).unwrap_or_default());
        head.extend(b"GGUF");
        head.extend(self.header.version.to_le_bytes());
        head.extend((self.header.tensors.len() as u64).to_le_bytes());
        head.extend((kept.len() as u64).to_le_bytes());
        for range in kept {
            let mut pair = Positioned { file: first, offset: range.start }.take(range.end - range.start);
            if head.len() as u64 + (range.end - range.start) > HEAD_BYTES_MAX {
                return Err(format!("the header would be longer than {} MiB", HEAD_BYTES_MAX >> 20));
            }
            pair.read_to_end(&mut head).map_err(|error| format!("the file cannot be read: {error}"))?;
        }
        for tensor in &self.header.tensors {
            head.extend((tensor.name.len() as u64).to_le_bytes());
            head.extend(tensor.name.as_bytes());
            head.extend((tensor.dimensions.len() as u32).to_le_bytes());
            tensor.dimensions.iter().for_each(|side| head.extend(side.to_le_bytes()));
            head.extend(tensor.kind.to_le_bytes());
            head.extend(tensor.offset.to_le_bytes());
        }
        let padded = (head.len() as u64).next_multiple_of(alignment);
        head.resize(padded as usize, 0);
        Ok(head)
    }
}

/// Returns the byte range of each key-value pair of a file, by key.
fn pairs(file: &File) -> Result<Vec<(String, Range<u64>)>, String> {
    let file_bytes = file.metadata().map_err(|error| format!("the file cannot be read: {error}"))?.len();
    let input = BufReader::with_capacity(1 << 16, Positioned { file, offset: 0 });
    let mut reader = Reader::new(input, file_bytes, KEPT_BYTES_MAX);
    reader.header()?;
    Ok(reader.pairs)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::fs::FileExt as _;

    use proptest::prelude::*;

    use super::*;
    use crate::gguf::tests::tiny;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(bytes).expect("written");
        file
    }

    fn number(head: &mut Vec<u8>, key: &str, kind: u32, bytes: &[u8]) {
        head.extend((key.len() as u64).to_le_bytes());
        head.extend(key.as_bytes());
        head.extend(kind.to_le_bytes());
        head.extend(bytes);
    }

    /// Splits the tiny model as `llama-gguf-split` does: the first part has all pairs, the others only the pairs that
    /// describe the split.
    fn parts(count: usize) -> Vec<File> {
        let tensors = Header::parse(&tiny()).expect("it is valid").tensors.len();
        let share = tensors.div_ceil(count);
        let shares: Vec<usize> = (0..count).map(|part| share.min(tensors - (share * part).min(tensors))).collect();
        split(&shares, None)
    }

    /// Splits the tensors into parts with the given numbers of tensors. If `alignment` is given, the first part
    /// declares it.
    fn split(shares: &[usize], alignment: Option<u32>) -> Vec<File> {
        let whole = tiny();
        let count = shares.len();
        let whole_file = file(&whole);
        let header = Header::read(&whole_file).expect("it is valid");
        let all_pairs = pairs(&whole_file).expect("read");
        let mut rest = &header.tensors[..];
        let part = |(no, share): (usize, &usize)| {
            let (tensors, behind) = rest.split_at(*share);
            rest = behind;
            let alignment = alignment.filter(|_| no == 0);
            let pairs: &[_] = if no == 0 { &all_pairs } else { &[] };
            let mut bytes = b"GGUF".to_vec();
            bytes.extend(3_u32.to_le_bytes());
            bytes.extend((tensors.len() as u64).to_le_bytes());
            bytes.extend((pairs.len() as u64 + 3 + u64::from(alignment.is_some())).to_le_bytes());
            for (_, range) in pairs {
                bytes.extend(&whole[range.start as usize..range.end as usize]);
            }
            number(&mut bytes, "split.no", 2, &(no as u16).to_le_bytes());
            number(&mut bytes, "split.count", 2, &(count as u16).to_le_bytes());
            number(&mut bytes, "split.tensors.count", 5, &(header.tensors.len() as i32).to_le_bytes());
            if let Some(alignment) = alignment {
                number(&mut bytes, "general.alignment", 4, &alignment.to_le_bytes());
            }
            let mut data = vec![];
            for tensor in tensors {
                bytes.extend((tensor.name.len() as u64).to_le_bytes());
                bytes.extend(tensor.name.as_bytes());
                bytes.extend((tensor.dimensions.len() as u32).to_le_bytes());
                tensor.dimensions.iter().for_each(|side| bytes.extend(side.to_le_bytes()));
                bytes.extend(tensor.kind.to_le_bytes());
                bytes.extend((data.len() as u64).to_le_bytes());
                let from = (header.data_offset + tensor.offset) as usize;
                data.extend(&whole[from..from + tensor.bytes as usize]);
                data.resize(data.len().next_multiple_of(32), 0);
            }
            bytes.resize(bytes.len().next_multiple_of(32), 0);
            bytes.extend(data);
            file(&bytes)
        };
        shares.iter().enumerate().map(part).collect()
    }

    fn written(joined: &Joined, parts: &[File]) -> Vec<u8> {
        let mut bytes = vec![];
        joined.reader(parts).read_to_end(&mut bytes).expect("read");
        bytes
    }

    #[test]
    fn the_parts_of_a_model_become_the_very_file_they_were_split_from() {
        for count in [2, 3, 7] {
            let parts = parts(count);
            let joined = Joined::of(&parts).expect("they belong together");
            let bytes = written(&joined, &parts);
            assert_eq!(bytes.len() as u64, joined.bytes());
            assert!(bytes == tiny(), "{count} parts");
            assert_eq!(Header::parse(&bytes).as_ref(), Ok(&joined.header));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        #[test]
        fn parts_of_strangers_are_refused_or_joined_whole(part in 0..2_usize, at in 0..60_000_u64, byte: u8) {
            let parts = parts(2);
            parts[part].write_all_at(&[byte], at).expect("written");
            if let Ok(joined) = Joined::of(&parts) {
                let bytes = written(&joined, &parts);
                prop_assert_eq!(bytes.len() as u64, joined.bytes());
                prop_assert!(Header::parse(&bytes).is_ok());
            }
        }
    }

    #[test]
    fn parts_that_are_aligned_otherwise_than_the_first_are_refused() {
        let tensors = Header::parse(&tiny()).expect("it is valid").tensors.len();
        assert!(Joined::of(&split(&[0, tensors], Some(32))).is_ok(), "a first part may have no tensors");
        let error = Joined::of(&split(&[0, tensors], Some(1 << 20))).expect_err("aligned to 32 bytes only");
        assert!(error.contains("aligned otherwise"), "{error}");
    }

    #[test]
    fn parts_that_are_missing_or_in_another_order_are_refused() {
        let mut swapped = parts(3);
        swapped.swap(1, 2);
        assert!(Joined::of(&swapped).expect_err("swapped").contains("says that it is 3 of 3"));
        assert!(Joined::of(&swapped[..2]).expect_err("missing").contains("3 files, not 2"));
        assert!(Joined::of(&[]).is_err());
        assert!(Joined::of(&[file(b"GGU")]).is_err());
    }
}
