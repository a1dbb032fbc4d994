//! Multiplies packed quantised weights with quantised vectors, with AVX-512 VNNI instructions.

use std::arch::x86_64::{
    __m512i, _MM_HINT_T0, _mm_prefetch, _mm256_loadu_si256, _mm512_and_si512, _mm512_cvtepi32_ps, _mm512_cvtph_ps,
    _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_loadu_si512, _mm512_mul_ps, _mm512_set1_epi8, _mm512_set1_epi32,
    _mm512_set1_ps, _mm512_setzero_ps, _mm512_srli_epi16, _mm512_storeu_ps,
};
use std::ops::Range;

use crate::inputs::{BLOCK_BYTES, tile_of, tile_offset};
use crate::{BLOCK, LANES, Matrix, Quantization, TILE};

/// Words of four numbers in a block.
const WORDS: usize = BLOCK / 4;
/// Bytes of a register.
const REGISTER: usize = 64;

/// How far ahead weights are fetched. A few rows are multiplied faster than the processor looks ahead by itself.
const AHEAD_BYTES: usize = 8 << 10;

/// # Safety
/// As for [`Matrix::multiply`]; its checks have passed.
pub(crate) unsafe fn multiply(
    matrix: Matrix,
    packed: *const u8,
    inputs: *const u8,
    count: usize,
    groups: Range<usize>,
    outputs: *mut f32,
) {
    for first in (0..count).step_by(TILE) {
        let (tile, width) = tile_of(first, count);
        for group in groups.clone() {
            // SAFETY: group and tile lie within what the caller vouches for.
            unsafe {
                let weights = packed.add(group * matrix.group_bytes());
                let inputs = inputs.add(tile_offset(tile, matrix.blocks()));
                let to = outputs.add(first * matrix.rows + group * LANES);
                let pairs = matrix.blocks() / 2;
                match matrix.quantization {
                    Quantization::Q4_0 => by_width::<FourBits>(width, weights, inputs, pairs, to, matrix.rows),
                    Quantization::Q8_0 => by_width::<EightBits>(width, weights, inputs, pairs, to, matrix.rows),
                }
            }
        }
    }
}

/// How a block's numbers become unsigned bytes.
trait Numbers {
    /// Bytes of the numbers of a packed block.
    const BYTES: usize;

    /// # Safety
    /// The block must be there, and the processor able.
    unsafe fn unpack(block: *const u8) -> [__m512i; WORDS];
}

struct FourBits;

impl Numbers for FourBits {
    const BYTES: usize = WORDS / 2 * REGISTER;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn unpack(block: *const u8) -> [__m512i; WORDS] {
        let mask = _mm512_set1_epi8(0x0f);
        let mut words = [mask; WORDS];
        for word in 0..WORDS / 2 {
            // SAFETY: the caller vouches for the block.
            let both = unsafe { _mm512_loadu_si512(block.add(word * REGISTER).cast()) };
            words[word] = _mm512_and_si512(both, mask);
            words[WORDS / 2 + word] = _mm512_and_si512(_mm512_srli_epi16::<4>(both), mask);
        }
        words
    }
}

struct EightBits;

impl Numbers for EightBits {
    const BYTES: usize = WORDS * REGISTER;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn unpack(block: *const u8) -> [__m512i; WORDS] {
        let mut words = [_mm512_set1_epi8(0); WORDS];
        for (index, word) in words.iter_mut().enumerate() {
            // SAFETY: as above.
            *word = unsafe { _mm512_loadu_si512(block.add(index * REGISTER).cast()) };
        }
        words
    }
}

/// Multiplies a group with a tile of so many vectors.
///
/// # Safety
/// As for [`tile`].
unsafe fn by_width<N: Numbers>(
    width: usize,
    weights: *const u8,
    inputs: *const u8,
    pairs: usize,
    outputs: *mut f32,
    stride: usize,
) {
    macro_rules! of_width {
        ($($known:literal)*) => {
            match width {
                // SAFETY: the caller vouches for it.
                $($known => unsafe { tile::<N, $known>(weights, inputs, pairs, outputs, stride) },)*
                _ => unreachable!("a tile has at most sixteen vectors"),
            }
        };
    }
    of_width!(1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16);
}

/// Does the same for each number below a width, one after the other in the program's text. As a loop it would keep the
/// sums in memory, because an array that is indexed by a variable has no registers.
macro_rules! unrolled {
    ($name:ident below $width:ident $body:block) => {
        unrolled!($name below $width $body 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    ($name:ident below $width:ident $body:block $($number:literal)*) => {
        $(if $number < $width {
            let $name: usize = $number;
            $body
        })*
    };
}

/// Multiplies a group with a tile.
///
/// # Safety
/// The processor must be able; the group must have so many pairs of blocks, the tile as many for each of its `WIDTH`
/// vectors, and `outputs` memory for a register every `stride` numbers.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,fma")]
unsafe fn tile<N: Numbers, const WIDTH: usize>(
    mut weights: *const u8,
    mut inputs: *const u8,
    pairs: usize,
    outputs: *mut f32,
    stride: usize,
) {
    let mut sums = [_mm512_setzero_ps(); WIDTH];
    for _ in 0..pairs {
        let ahead = weights.wrapping_add(AHEAD_BYTES);
        for line in 0..=2 * N::BYTES / REGISTER {
            _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(line * REGISTER).cast());
        }
        for half in 0..2 {
            // SAFETY: the caller vouches for every address that is read.
            let (scale, words) = unsafe {
                let scale = _mm512_cvtph_ps(_mm256_loadu_si256(weights.add(half * LANES * 2).cast()));
                (scale, N::unpack(weights.add(REGISTER + half * N::BYTES)))
            };
            unrolled!(vector below WIDTH {
                // SAFETY: as above.
                unsafe {
                    let numbers = inputs.add(vector * BLOCK).cast::<i32>();
                    let scales = inputs.add(WIDTH * BLOCK).cast::<f32>();
                    let corrections = inputs.add(WIDTH * (BLOCK + 4)).cast::<i32>();
                    let mut product = _mm512_set1_epi32(corrections.add(vector).read_unaligned());
                    for (index, word) in words.into_iter().enumerate() {
                        let four = _mm512_set1_epi32(numbers.add(index).read_unaligned());
                        product = _mm512_dpbusd_epi32(product, word, four);
                    }
                    let scale = _mm512_mul_ps(scale, _mm512_set1_ps(scales.add(vector).read_unaligned()));
                    sums[vector] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(product), scale, sums[vector]);
                }
            });
            // SAFETY: as above.
            inputs = unsafe { inputs.add(WIDTH * BLOCK_BYTES) };
        }
        // SAFETY: as above.
        weights = unsafe { weights.add(REGISTER + 2 * N::BYTES) };
    }
    unrolled!(vector below WIDTH {
        // SAFETY: as above.
        unsafe { _mm512_storeu_ps(outputs.add(vector * stride), sums[vector]) };
    });
}
