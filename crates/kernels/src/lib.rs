//! Quantised matrix products and attention for processors with AVX-512 and VNNI.
//!
//! A layer computes `y = W·x` for each token: `W` is `[rows][columns]` in blocks of 32 small numbers with one scale
//! each, `x` has `columns` 32-bit floats. The weights are packed once, at the load, so that one load from memory brings
//! what sixteen rows need next. Each `x` is quantised to blocks of signed bytes before the product. The inner loop is
//! `vpdpbusd`, which adds four products of bytes in each of sixteen SIMD lanes, twice a cycle.
//!
//! The result for one `x` does not depend on how many others are multiplied with it: sums always have the same order.
//! For attention see [`Attention`]'s module. `docs/benchmarks.md` compares the speed with ggml's own kernels; ADR 0027
//! gives the reasons for this crate.

#![cfg(target_arch = "x86_64")]
#![allow(unsafe_code)]
#![allow(clippy::cast_ptr_alignment, reason = "numbers lie between bytes, and are read and written where they lie")]

mod attention;
mod inputs;
mod packing;
mod product;

use std::ops::Range;

pub use attention::Attention;

/// Numbers that share a scale in ggml's formats.
pub const BLOCK: usize = 32;
/// 32-bit numbers in a SIMD register: rows that are computed at once.
pub const LANES: usize = 16;
/// The most vectors that are multiplied with weights while these are in registers.
const TILE: usize = 16;

/// How weights are written, in ggml's terms and with ggml's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantization {
    /// Blocks of a 16-bit scale and 32 numbers of four bits, from -8.
    Q4_0,
    /// Blocks of a 16-bit scale and 32 signed bytes.
    Q8_0,
}

impl Quantization {
    /// Returns the format with ggml's number for it.
    pub fn of_ggml(kind: u32) -> Option<Self> {
        match kind {
            2 => Some(Self::Q4_0),
            8 => Some(Self::Q8_0),
            _ => None,
        }
    }

    /// Returns the bytes of a block, in ggml's order and in ours.
    const fn block_bytes(self) -> usize {
        match self {
            Self::Q4_0 => 18,
            Self::Q8_0 => 34,
        }
    }

    /// Returns what is added to a weight to make it unsigned.
    const fn bias(self) -> i32 {
        match self {
            Self::Q4_0 => 8,
            Self::Q8_0 => 128,
        }
    }
}

/// Returns whether this processor has the instructions.
pub fn is_supported() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("fma")
}

/// The shape and format of a matrix that can be packed, on a processor that can multiply it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Matrix {
    quantization: Quantization,
    columns: usize,
    rows: usize,
}

impl Matrix {
    /// Returns the shape `[rows][columns]`, or `None` if it cannot be packed or the processor lacks the instructions.
    pub fn new(quantization: Quantization, columns: usize, rows: usize) -> Option<Self> {
        // Two blocks, with their scales, fill whole cache lines.
        let fits = columns > 0 && columns.is_multiple_of(2 * BLOCK) && rows > 0 && rows.is_multiple_of(LANES);
        (fits && is_supported()).then_some(Self { quantization, columns, rows })
    }

    /// Returns the bytes of the matrix, packed or not.
    pub fn bytes(self) -> usize {
        self.rows * self.row_bytes()
    }

    /// Returns how many groups of [`LANES`] outputs there are.
    pub fn groups(self) -> usize {
        self.rows / LANES
    }

    /// Returns the bytes of a packed group.
    pub fn group_bytes(self) -> usize {
        LANES * self.row_bytes()
    }

    fn row_bytes(self) -> usize {
        self.blocks() * self.quantization.block_bytes()
    }

    /// Returns how many blocks a vector has.
    pub fn blocks(self) -> usize {
        self.columns / BLOCK
    }

    /// Packs a matrix: ggml's order in, ours out (see `packing.rs`).
    ///
    /// # Panics
    /// If either is not as long as [`Matrix::bytes`].
    pub fn pack(self, source: &[u8], packed: &mut [u8]) {
        assert_eq!((source.len(), packed.len()), (self.bytes(), self.bytes()), "a matrix has another length");
        packing::pack(self, source, packed);
    }

    /// Returns the bytes of `count` quantised vectors.
    pub fn inputs_bytes(self, count: usize) -> usize {
        count * self.blocks() * inputs::BLOCK_BYTES
    }

    /// Quantises some blocks of vector `index` of `count` into `inputs`.
    ///
    /// # Safety
    /// `inputs` must have [`Matrix::inputs_bytes`] of `count` vectors. No other thread may quantise the same
    /// blocks at the same time.
    ///
    /// # Panics
    /// If the vector does not have `columns` numbers, or `blocks` or `index` are out of range.
    pub unsafe fn take_in(self, vector: &[f32], blocks: Range<usize>, index: usize, count: usize, inputs: *mut u8) {
        assert_eq!(vector.len(), self.columns, "a vector has another length than the matrix has columns");
        assert!(index < count && blocks.end <= self.blocks(), "there is no such vector or block");
        // SAFETY: that the processor can do it was checked when the matrix was made; the caller vouches for the room.
        unsafe { inputs::take_in(self, vector, blocks, index, count, inputs) };
    }

    /// Multiplies some groups of the matrix with all vectors, and writes the result of vector `i` from
    /// `outputs + i * rows` on.
    ///
    /// # Safety
    /// `packed` must be a matrix that [`Matrix::pack`] wrote, `inputs` must hold `count` whole vectors, and
    /// `outputs` must have space for `[count][rows]` numbers. No other thread may write to the same groups at the same
    /// time.
    ///
    /// # Panics
    /// If `groups` is out of range.
    pub unsafe fn multiply(
        self,
        packed: *const u8,
        inputs: *const u8,
        count: usize,
        groups: Range<usize>,
        outputs: *mut f32,
    ) {
        assert!(groups.end <= self.groups(), "there are no such groups");
        // SAFETY: as above.
        unsafe { product::multiply(self, packed, inputs, count, groups, outputs) };
    }
}
