//! The order of packed weights.
//!
//! Sixteen rows make a group. A group has its blocks in pairs: the scales of both blocks, sixteen each, then the
//! numbers of both. A number's offset is `[word][row][byte of the word]`, where a word is four numbers that are
//! multiplied at once; of four-bit numbers, the low halves of the words are the block's first half and the high halves
//! its second, as ggml has them. Bytes are made unsigned.

use crate::{LANES, Matrix, Quantization};

/// Bytes of a scale.
const SCALE: usize = 2;
/// Bytes of a word.
const WORD: usize = 4;

pub(crate) fn pack(matrix: Matrix, source: &[u8], packed: &mut [u8]) {
    let block_bytes = matrix.quantization.block_bytes();
    let numbers_bytes = LANES * (block_bytes - SCALE);
    let flip = match matrix.quantization {
        Quantization::Q4_0 => 0,
        Quantization::Q8_0 => 0x80,
    };
    let groups = packed.chunks_exact_mut(matrix.group_bytes()).zip(source.chunks_exact(matrix.group_bytes()));
    for (group, rows) in groups {
        for (row, blocks) in rows.chunks_exact(matrix.row_bytes()).enumerate() {
            let pairs = group.chunks_exact_mut(2 * LANES * block_bytes).zip(blocks.chunks_exact(2 * block_bytes));
            for (pair, source) in pairs {
                let (scales, numbers) = pair.split_at_mut(2 * LANES * SCALE);
                for (half, block) in source.chunks_exact(block_bytes).enumerate() {
                    let (scale, words) = block.split_at(SCALE);
                    scales[(half * LANES + row) * SCALE..][..SCALE].copy_from_slice(scale);
                    for (word, bytes) in words.chunks_exact(WORD).enumerate() {
                        let offset = half * numbers_bytes + (word * LANES + row) * WORD;
                        for (to, from) in numbers[offset..][..WORD].iter_mut().zip(bytes) {
                            *to = from ^ flip;
                        }
                    }
                }
            }
        }
    }
}
