//! Vectors as blocks of bytes.
//!
//! Up to sixteen vectors make a tile. A tile has its blocks one after the other, and each block the numbers of all its
//! vectors, then their scales, then their corrections: what was added to the weights, times the sum of the numbers.

use std::arch::x86_64::{
    _mm_storeu_si128, _mm512_abs_ps, _mm512_add_epi32, _mm512_castps_si512, _mm512_cvtepi32_epi8, _mm512_cvtps_epi32,
    _mm512_loadu_ps, _mm512_max_epu32, _mm512_mul_ps, _mm512_reduce_add_epi32, _mm512_reduce_max_epu32, _mm512_set1_ps,
};
use std::ops::Range;

use crate::{BLOCK, LANES, Matrix, TILE};

/// Bytes of a block of one vector: its numbers, its scale and its correction.
pub(crate) const BLOCK_BYTES: usize = BLOCK + 4 + 4;

/// The vectors of a tile, which may be fewer at the end.
pub(crate) fn tile_of(index: usize, count: usize) -> (usize, usize) {
    let tile = index / TILE;
    (tile, TILE.min(count - tile * TILE))
}

/// Returns where a tile begins.
pub(crate) fn tile_offset(tile: usize, blocks: usize) -> usize {
    tile * TILE * blocks * BLOCK_BYTES
}

/// # Safety
/// As for [`Matrix::take_in`]; its checks have passed.
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) unsafe fn take_in(
    matrix: Matrix,
    vector: &[f32],
    blocks: Range<usize>,
    index: usize,
    count: usize,
    inputs: *mut u8,
) {
    let (tile, width) = tile_of(index, count);
    let offset = index % TILE;
    let begin = tile_offset(tile, matrix.blocks());
    for block in blocks {
        // SAFETY: the vector has the block, and `inputs` the tile.
        unsafe {
            let numbers = vector.as_ptr().add(block * BLOCK);
            let low = _mm512_loadu_ps(numbers);
            let high = _mm512_loadu_ps(numbers.add(LANES));
            // As bits, so that what is not a number is the largest of all, and so is its scale none.
            let bits = |numbers| _mm512_castps_si512(_mm512_abs_ps(numbers));
            let largest = f32::from_bits(_mm512_reduce_max_epu32(_mm512_max_epu32(bits(low), bits(high))));
            let scale = largest / 127.0;
            let inverse = _mm512_set1_ps(if scale > 0.0 { 1.0 / scale } else { 0.0 });
            let low = _mm512_cvtps_epi32(_mm512_mul_ps(low, inverse));
            let high = _mm512_cvtps_epi32(_mm512_mul_ps(high, inverse));
            let sum = _mm512_reduce_add_epi32(_mm512_add_epi32(low, high));
            let to = inputs.add(begin + block * width * BLOCK_BYTES);
            let bytes = to.add(offset * BLOCK);
            _mm_storeu_si128(bytes.cast(), _mm512_cvtepi32_epi8(low));
            _mm_storeu_si128(bytes.add(LANES).cast(), _mm512_cvtepi32_epi8(high));
            to.add(width * BLOCK).cast::<f32>().add(offset).write_unaligned(scale);
            let correction = matrix.quantization.bias().wrapping_mul(sum).wrapping_neg();
            to.add(width * (BLOCK + 4)).cast::<i32>().add(offset).write_unaligned(correction);
        }
    }
}
