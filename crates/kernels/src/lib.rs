//! Products with quantised matrices, and attention, for processors with AVX-512 and VNNI.
//!
//! A model's answer is made of products `W·x`: a matrix of weights, in blocks of small numbers with a scale each, by one
//! vector for each token. The weights are packed once, at the load, so that one load from memory brings what sixteen
//! outputs need next. The vectors are brought into blocks of bytes before each product. What is then left is
//! `vpdpbusd`, which adds up four products of bytes in each of sixteen lanes, twice a cycle.
//!
//! What one vector gives does not depend on how many others are multiplied beside it: the order of its sums is always
//! the same. What holds for attention stands at [`Attention`]'s module. How fast this is beside ggml's own kernels stands in `docs/benchmarks.md`; why it exists, in ADR 0027.

#![cfg(target_arch = "x86_64")]
#![allow(unsafe_code)]
#![allow(clippy::cast_ptr_alignment, reason = "numbers lie between bytes, and are read and written where they lie")]

mod attention;
mod inputs;
mod packing;
mod product;

use std::ops::Range;

pub use attention::Attention;

/// Numbers that share a scale, as ggml's formats have them.
pub const BLOCK: usize = 32;
/// Outputs that are made side by side, one in each lane.
pub const LANES: usize = 16;
/// Vectors that are multiplied with a part of the weights while that is in registers.
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

/// Returns whether this processor can multiply here.
pub fn is_supported() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("fma")
}

/// The form of a matrix that can be packed, on a processor that can multiply it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Matrix {
    quantization: Quantization,
    columns: usize,
    rows: usize,
}

impl Matrix {
    /// Returns the form of a matrix that turns vectors of `columns` numbers into vectors of `rows`, or `None` where it
    /// cannot be packed.
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

    /// Brings a matrix from ggml's order into ours.
    ///
    /// # Panics
    /// Where either is not as long as [`Matrix::bytes`].
    pub fn pack(self, source: &[u8], packed: &mut [u8]) {
        assert_eq!((source.len(), packed.len()), (self.bytes(), self.bytes()), "a matrix has another length");
        packing::pack(self, source, packed);
    }

    /// Returns the bytes that so many vectors take once they are taken in.
    pub fn inputs_bytes(self, count: usize) -> usize {
        count * self.blocks() * inputs::BLOCK_BYTES
    }

    /// Takes in some blocks of the vector at `index` of `count`.
    ///
    /// # Safety
    /// `inputs` must have room for [`Matrix::inputs_bytes`] of `count` vectors. No other thread may take in the same
    /// blocks meanwhile.
    ///
    /// # Panics
    /// Where the vector is not as long as the matrix has columns, or has no such blocks.
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
    /// `packed` must be a matrix that [`Matrix::pack`] wrote, `inputs` must hold `count` whole vectors, and `outputs` must
    /// have room for `count` vectors of as many numbers as there are rows. No other thread may write to the same groups
    /// meanwhile.
    ///
    /// # Panics
    /// Where there are no such groups.
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
