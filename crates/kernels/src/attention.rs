//! Attention of queries to a KV cache whose cells belong to many sequences.
//!
//! The method is online softmax (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018) over blocks
//! of keys, as FlashAttention has it (Dao et al., 2022). For a query `q` of one head, with keys `k` and values `v`:
//!
//! ```text
//! s_i = scale · q·k_i + mask_i           m = max(m, s_i)           p_i = exp(s_i - m)
//! denominator = Σ p_i                    acc = Σ p_i · v_i         output = acc / denominator
//! ```
//!
//! A larger running maximum `m` rescales the denominator and the accumulator of the blocks before.
//!
//! The mask hides most cells from a given query. The cells that some query sees are sorted into blocks of sixteen by
//! their positions: positions 0 to 15, 16 to 31 and so on, position `p` in SIMD lane `p % 16`. The keys of a block are
//! transposed once for all heads that share them (grouped-query attention).
//!
//! So the result of a query depends, to the bit, only on the keys and values that it sees and on their positions. It
//! does not depend on which cells hold them, on other sequences and queries, or on how a prompt was cut into batches
//! (ADR 0029).

use std::arch::x86_64::{
    __m256i, __m512, __m512i, __mmask16, _mm_cvtsi32_si128, _mm256_and_si256, _mm256_cmpneq_epi16_mask,
    _mm256_loadu_si256, _mm256_or_si256, _mm256_set1_epi16, _mm256_setzero_si256, _mm256_sll_epi16, _mm256_srl_epi16,
    _mm256_storeu_si256, _mm256_testz_si256, _mm512_add_epi32, _mm512_add_ps, _mm512_cmpeq_epi32_mask,
    _mm512_cmpneq_epi32_mask, _mm512_cvtph_ps, _mm512_fmadd_ps, _mm512_fnmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512,
    _mm512_mask_loadu_epi32, _mm512_mask_max_epi32, _mm512_mask_min_epi32, _mm512_mask_mov_ps,
    _mm512_mask_storeu_epi32, _mm512_max_ps, _mm512_mul_ps, _mm512_reduce_add_ps, _mm512_reduce_max_epi32,
    _mm512_reduce_max_ps, _mm512_reduce_min_epi32, _mm512_roundscale_ps, _mm512_scalef_ps, _mm512_set1_epi32,
    _mm512_set1_ps, _mm512_setr_epi32, _mm512_setzero_ps, _mm512_shuffle_f32x4, _mm512_shuffle_ps, _mm512_storeu_ps,
    _mm512_storeu_si512, _mm512_unpackhi_ps, _mm512_unpacklo_ps,
};
use std::ops::Range;

use crate::{LANES, is_supported};

/// The most numbers of a head.
const WIDTH_MAX: usize = 256;
/// The most rows (pairs of query and head) of a unit, unless one query alone has more heads.
const ROWS_MAX: usize = 128;
/// The most queries of a unit.
const QUERIES_MAX: usize = 16;
/// Up to so many queries, each is a unit of its own: they belong to many sequences, or there are few of them.
const ALONE_MAX: usize = 16;
/// Minus infinity as a 16-bit float: the mask of a cell that a query does not see.
const HIDDEN: i16 = 0xfc00_u16.cast_signed();
/// The cell of a position that no cell has.
const NOWHERE: u32 = u32::MAX;

/// Attention of `queries` queries to `cells` cells of a KV cache. Shapes are `[slow][fast]`; strides are in bytes, and
/// the numbers of one head are adjacent.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Attention {
    /// Numbers of a head (head dimension) of queries, keys and values: a multiple of 16, at most 256.
    pub width: usize,
    /// Heads of a query.
    pub heads: usize,
    /// Heads of a key and of a value; a divisor of `heads`.
    pub kv_heads: usize,
    pub queries: usize,
    pub cells: usize,
    /// The position of each cell in its sequence; null where cells are in the order of their positions.
    pub positions: *const i32,
    /// All positions of visible cells are less than this.
    pub positions_end: usize,
    /// The factor of `q·k`, usually `1/√width`.
    pub scale: f32,
    /// `[queries][heads][width]`, 32-bit floats.
    pub query: *const f32,
    /// From one query to the next.
    pub query_stride: usize,
    /// From one head of a query to the next.
    pub query_head_stride: usize,
    /// `[cells][kv_heads][width]`, 16-bit floats.
    pub key: *const u16,
    /// From one key to the next.
    pub key_stride: usize,
    /// From one head of a key to the next.
    pub key_head_stride: usize,
    /// `[cells][kv_heads][width]`, 16-bit floats.
    pub value: *const u16,
    /// From one value to the next.
    pub value_stride: usize,
    /// From one head of a value to the next.
    pub value_head_stride: usize,
    /// `[queries][cells]`, 16-bit floats: added to the scaled products; minus infinity hides a cell.
    pub mask: *const u16,
    /// From one row to the next.
    pub mask_stride: usize,
    /// `[queries][heads][width]`, 32-bit floats.
    pub output: *mut f32,
    /// From one head to the next.
    pub output_stride: usize,
}

/// How an attention is divided among threads.
#[derive(Debug, Clone, Copy)]
struct Division {
    /// Heads of queries that prob a head of keys.
    group: usize,
    /// Queries of a unit.
    queries: usize,
    /// Parts into which a group is cut, where there are fewer units than threads.
    parts: usize,
}

/// One thread's share of the work, with its scratch memory. A row is a pair of query and head.
#[derive(Clone)]
struct Unit<'a> {
    attention: &'a Attention,
    kv_head: usize,
    queries: Range<usize>,
    heads: Range<usize>,
    /// Scaled queries, `[rows][width]`.
    scaled: *mut f32,
    /// Accumulators of `p·v`, `[rows][width]`.
    acc: *mut f32,
    /// The largest score so far, `[rows]`.
    running_max: *mut f32,
    /// Sum of `p` so far, `[rows]`.
    denominator: *mut f32,
    /// Keys of a block, transposed: `[width][16]`.
    keys: *mut f32,
    /// Values of a block, `[16][width]`.
    values: *mut f32,
    /// `p` of a block, `[heads][16]`.
    probs: *mut f32,
    /// The cell of each position, from the block of the first one that is seen on, or [`NOWHERE`].
    cells_by_position: *mut u32,
    /// Which lanes of a block each query sees, by block and then by query.
    seen: *mut u16,
}

/// Two sequences have different cells for one position.
struct Conflict;

impl Attention {
    /// Returns whether it can be computed here.
    pub fn is_possible(&self) -> bool {
        let width = (LANES..=WIDTH_MAX).contains(&self.width) && self.width.is_multiple_of(LANES);
        let heads = self.kv_heads > 0 && self.heads > 0 && self.heads.is_multiple_of(self.kv_heads);
        width && heads && self.cells.is_multiple_of(LANES) && is_supported()
    }

    fn division(&self, threads: usize) -> Division {
        let group = self.heads / self.kv_heads;
        let most = (ROWS_MAX / group).clamp(1, QUERIES_MAX);
        let queries = if self.queries <= ALONE_MAX { 1 } else { most };
        let units = self.queries.div_ceil(queries) * self.kv_heads;
        Division { group, queries, parts: threads.div_ceil(units.max(1)).min(group) }
    }

    /// Returns how many units of work there are for so many threads.
    pub fn units(&self, threads: usize) -> usize {
        let Division { queries, parts, .. } = self.division(threads);
        self.queries.div_ceil(queries) * self.kv_heads * parts
    }

    /// Returns how many 32-bit numbers of scratch memory a thread needs.
    pub fn scratch_floats(&self) -> usize {
        let Division { group, queries, .. } = self.division(1);
        let rows = group * queries;
        2 * rows * (self.width + 1) + 2 * LANES * self.width + group * LANES + self.blocks_max() * (LANES + LANES / 2)
    }

    /// Returns how many blocks of positions there may be. One more before and one after are written to where sixteen
    /// cells reach over the border of a block.
    fn blocks_max(&self) -> usize {
        let end = if self.positions.is_null() { self.cells } else { self.positions_end };
        end.div_ceil(LANES) + 3
    }

    /// Computes one unit.
    ///
    /// # Safety
    /// All pointers must lead to as many numbers as their shapes say, `scratch` to
    /// [`Attention::scratch_floats`]. No other thread may compute the same unit at the same time.
    ///
    /// # Panics
    /// If [`Attention::is_possible`] returns false, or `unit` is not less than [`Attention::units`].
    pub unsafe fn attend(&self, unit: usize, threads: usize, scratch: *mut f32) {
        assert!(self.is_possible() && unit < self.units(threads), "there is no such unit");
        let Division { group, queries, parts } = self.division(threads);
        let (part, unit) = (unit % parts, unit / parts);
        let (kv_head, first) = (unit % self.kv_heads, unit / self.kv_heads * queries);
        let rows = group * queries;
        // SAFETY: the caller vouches for the memory, its parts do not overlap, and the processor was checked.
        unsafe {
            let acc = scratch.add(rows * self.width);
            let running_max = acc.add(rows * self.width);
            let keys = running_max.add(2 * rows);
            let values = keys.add(LANES * self.width);
            let probs = values.add(LANES * self.width);
            let cells_by_position = probs.add(group * LANES).cast::<u32>();
            let unit = Unit {
                attention: self,
                kv_head,
                queries: first..self.queries.min(first + queries),
                heads: group * part / parts..group * (part + 1) / parts,
                scaled: scratch,
                acc,
                running_max,
                denominator: running_max.add(rows),
                keys,
                values,
                probs,
                cells_by_position,
                seen: cells_by_position.add(self.blocks_max() * LANES).cast(),
            };
            unit.compute();
        }
    }

    /// Returns which of sixteen cells a query sees, and for which of them the mask adds something.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn seen(&self, query: usize, cell: usize) -> (__mmask16, __mmask16) {
        // SAFETY: the caller vouches for the row.
        let row = unsafe { _mm256_loadu_si256(self.mask.byte_add(query * self.mask_stride).add(cell).cast()) };
        let seen = _mm256_cmpneq_epi16_mask(row, _mm256_set1_epi16(HIDDEN));
        (seen, seen & _mm256_cmpneq_epi16_mask(row, _mm256_setzero_si256()))
    }
}

/// Sixteen positions, and which of them each query of a unit sees.
struct Block {
    cells: [u32; LANES],
    seen: [__mmask16; QUERIES_MAX],
    /// The mask adds something to some scores.
    is_biased: bool,
}

impl Unit<'_> {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,fma")]
    unsafe fn compute(&self) {
        // SAFETY: the caller of `attend` vouches for every pointer.
        unsafe {
            if self.compute_together().is_ok() {
                return;
            }
            for query in self.queries.clone() {
                let alone = Unit { queries: query..query + 1, ..self.clone() };
                if alone.compute_together().is_err() {
                    // One sequence has a position twice, so the cells stand for their own positions.
                    let attention = Attention { positions: std::ptr::null(), ..*self.attention };
                    let fits = attention.blocks_max() <= self.attention.blocks_max();
                    assert!(fits, "a sequence has no more positions than there are cells");
                    let _ = Unit { attention: &attention, ..alone }.compute_together();
                }
            }
        }
    }

    /// Computes all queries, unless they are of several sequences.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,fma")]
    unsafe fn compute_together(&self) -> Result<(), Conflict> {
        // SAFETY: as in `compute`.
        unsafe {
            self.start();
            let (blocks, is_biased) = self.sort()?;
            for number in 1..=blocks {
                let seen = _mm256_loadu_si256(self.seen.add(number * LANES).cast());
                if _mm256_testz_si256(seen, seen) == 1 {
                    continue;
                }
                let mut block = Block { cells: [0; LANES], seen: [0; QUERIES_MAX], is_biased };
                _mm256_storeu_si256(block.seen.as_mut_ptr().cast(), seen);
                block
                    .cells
                    .copy_from_slice(std::slice::from_raw_parts(self.cells_by_position.add(number * LANES), LANES));
                // Lanes without a cell load another one, which no query sees there.
                let other = block.cells.into_iter().find(|cell| *cell != NOWHERE).unwrap_or(0);
                block.cells.iter_mut().filter(|cell| **cell == NOWHERE).for_each(|cell| *cell = other);
                self.attend_to(&block);
            }
            self.finish();
        }
        Ok(())
    }

    /// Returns the positions of sixteen cells.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn positions(&self, first: usize) -> __m512i {
        if self.attention.positions.is_null() {
            return _mm512_add_epi32(_mm512_set1_epi32(first as i32), iota());
        }
        // SAFETY: as in `compute`.
        unsafe { _mm512_loadu_si512(self.attention.positions.add(first).cast()) }
    }

    /// Returns which of sixteen cells each query sees, which of them any query sees, and whether the mask adds
    /// something.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn visible(&self, first: usize) -> ([__mmask16; QUERIES_MAX], __mmask16, bool) {
        let (mut all, mut any, mut biased) = ([0; QUERIES_MAX], 0, 0);
        for (seen, query) in all.iter_mut().zip(self.queries.clone()) {
            // SAFETY: as in `compute`.
            let (sees, biases) = unsafe { self.attention.seen(query, first) };
            *seen = sees;
            any |= sees;
            biased |= biases;
        }
        (all, any, biased != 0)
    }

    /// Sorts the cells that any query sees by their positions; returns how many blocks they fill, the first of which is
    /// number 1, and whether the mask adds something.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn sort(&self) -> Result<(usize, bool), Conflict> {
        let it = self.attention;
        let (mut lowest, mut highest) = (_mm512_set1_epi32(i32::MAX), _mm512_set1_epi32(-1));
        let mut is_biased = false;
        for first in (0..it.cells).step_by(LANES) {
            // SAFETY: as in `compute`, here and below.
            unsafe {
                let (_, any, biased) = self.visible(first);
                is_biased |= biased;
                if any != 0 {
                    let positions = self.positions(first);
                    lowest = _mm512_mask_min_epi32(lowest, any, lowest, positions);
                    highest = _mm512_mask_max_epi32(highest, any, highest, positions);
                }
            }
        }
        let (lowest, highest) = (_mm512_reduce_min_epi32(lowest), _mm512_reduce_max_epi32(highest));
        if highest < 0 {
            return Ok((0, false));
        }
        let origin = lowest / LANES as i32 * LANES as i32;
        let blocks = (highest - origin) as usize / LANES + 1;
        assert!(lowest >= 0 && blocks + 2 <= self.attention.blocks_max(), "no position is beyond the last");
        // SAFETY: the scratch memory holds so many blocks.
        unsafe {
            std::slice::from_raw_parts_mut(self.cells_by_position, (blocks + 2) * LANES).fill(NOWHERE);
            std::slice::from_raw_parts_mut(self.seen, (blocks + 2) * LANES).fill(0);
        }
        for first in (0..it.cells).step_by(LANES) {
            // SAFETY: every cell that is seen has a position from the lowest to the highest.
            unsafe {
                let (seen, any, _) = self.visible(first);
                if any != 0 {
                    self.record_cells(first, &seen, any, origin)?;
                }
            }
        }
        Ok((blocks, is_biased))
    }

    /// Records sixteen cells by their positions.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn record_cells(
        &self,
        first: usize,
        seen: &[__mmask16; QUERIES_MAX],
        any: __mmask16,
        origin: i32,
    ) -> Result<(), Conflict> {
        // SAFETY: as in `sort`.
        unsafe {
            let positions = self.positions(first);
            let cells = _mm512_add_epi32(_mm512_set1_epi32(first as i32), iota());
            let seen = _mm256_loadu_si256(seen.as_ptr().cast());
            let mut numbers = [0_i32; LANES];
            _mm512_storeu_si512(numbers.as_mut_ptr().cast(), positions);
            // Cells of one sequence mostly lie in the order of their positions.
            let lane = any.trailing_zeros() as usize;
            let start = numbers[lane] - lane as i32;
            let in_order = _mm512_cmpeq_epi32_mask(positions, _mm512_add_epi32(_mm512_set1_epi32(start), iota()));
            if in_order & any == any {
                // From the block before the first on.
                let index = (start - origin + LANES as i32) as usize;
                let to = self.cells_by_position.add(index).cast::<i32>();
                let nowhere = _mm512_set1_epi32(NOWHERE.cast_signed());
                let before = _mm512_mask_loadu_epi32(nowhere, any, to);
                if _mm512_cmpneq_epi32_mask(before, nowhere) != 0 {
                    return Err(Conflict);
                }
                _mm512_mask_storeu_epi32(to, any, cells);
                let (block, shift) = (index / LANES, (index % LANES) as i32);
                self.add_seen(block, _mm256_sll_epi16(seen, _mm_cvtsi32_si128(shift)));
                if shift > 0 {
                    self.add_seen(block + 1, _mm256_srl_epi16(seen, _mm_cvtsi32_si128(LANES as i32 - shift)));
                }
                return Ok(());
            }
            let mut left = any;
            while left != 0 {
                let lane = left.trailing_zeros() as usize;
                let index = (numbers[lane] - origin + LANES as i32) as usize;
                if std::mem::replace(&mut *self.cells_by_position.add(index), (first + lane) as u32) != NOWHERE {
                    return Err(Conflict);
                }
                let one =
                    _mm256_and_si256(_mm256_srl_epi16(seen, _mm_cvtsi32_si128(lane as i32)), _mm256_set1_epi16(1));
                self.add_seen(index / LANES, _mm256_sll_epi16(one, _mm_cvtsi32_si128((index % LANES) as i32)));
                left &= left - 1;
            }
        }
        Ok(())
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512vl")]
    unsafe fn add_seen(&self, block: usize, more: __m256i) {
        // SAFETY: as in `sort`.
        unsafe {
            let seen = self.seen.add(block * LANES).cast::<__m256i>();
            _mm256_storeu_si256(seen, _mm256_or_si256(_mm256_loadu_si256(seen), more));
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,fma")]
    unsafe fn attend_to(&self, block: &Block) {
        // SAFETY: as in `compute`.
        unsafe {
            self.load_block(&block.cells);
            for (query, seen) in self.queries.clone().zip(block.seen) {
                if seen != 0 {
                    self.softmax_block(query, block, seen);
                    self.accumulate_values(query, seen);
                }
            }
        }
    }

    fn row(&self, query: usize, head: usize) -> usize {
        (query - self.queries.start) * self.heads.len() + head - self.heads.start
    }

    /// Scales the queries and clears the accumulators.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,fma")]
    unsafe fn start(&self) {
        let it = self.attention;
        let scale = _mm512_set1_ps(it.scale);
        for query in self.queries.clone() {
            for head in self.heads.clone() {
                let row = self.row(query, head);
                let whole = self.kv_head * (it.heads / it.kv_heads) + head;
                // SAFETY: as in `compute`.
                unsafe {
                    *self.running_max.add(row) = f32::NEG_INFINITY;
                    *self.denominator.add(row) = 0.0;
                    let from = it.query.byte_add(query * it.query_stride + whole * it.query_head_stride);
                    for column in (0..it.width).step_by(LANES) {
                        let numbers = _mm512_mul_ps(_mm512_loadu_ps(from.add(column)), scale);
                        _mm512_storeu_ps(self.scaled.add(row * it.width + column), numbers);
                        _mm512_storeu_ps(self.acc.add(row * it.width + column), _mm512_setzero_ps());
                    }
                }
            }
        }
    }

    /// Loads the keys, transposed, and the values of a block as 32-bit floats.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,fma")]
    unsafe fn load_block(&self, cells: &[u32; LANES]) {
        let it = self.attention;
        // SAFETY: as in `compute`.
        unsafe {
            let key = it.key.byte_add(self.kv_head * it.key_head_stride);
            let value = it.value.byte_add(self.kv_head * it.value_head_stride);
            for column in (0..it.width).step_by(LANES) {
                let mut rows = [_mm512_setzero_ps(); LANES];
                for (index, (row, cell)) in rows.iter_mut().zip(cells).enumerate() {
                    let cell = *cell as usize;
                    let halves = key.byte_add(cell * it.key_stride).add(column);
                    *row = _mm512_cvtph_ps(_mm256_loadu_si256(halves.cast()));
                    let halves = value.byte_add(cell * it.value_stride).add(column);
                    let numbers = _mm512_cvtph_ps(_mm256_loadu_si256(halves.cast()));
                    _mm512_storeu_ps(self.values.add(index * it.width + column), numbers);
                }
                for (index, row) in transposed(&rows).into_iter().enumerate() {
                    _mm512_storeu_ps(self.keys.add((column + index) * LANES), row);
                }
            }
        }
    }

    /// One step of the online softmax: scores of a query's heads against a block, then `p`, the running maximum and the
    /// denominator.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,fma")]
    unsafe fn softmax_block(&self, query: usize, block: &Block, seen: __mmask16) {
        const ROWS: usize = 4;
        let it = self.attention;
        // SAFETY: as in `compute`.
        unsafe {
            let mut bias = _mm512_setzero_ps();
            if block.is_biased {
                let row = it.mask.byte_add(query * it.mask_stride);
                let mut halves = [0_u16; LANES];
                halves.iter_mut().zip(block.cells).for_each(|(half, cell)| *half = *row.add(cell as usize));
                bias = _mm512_cvtph_ps(_mm256_loadu_si256(halves.as_ptr().cast()));
            }
            let (first, count) = (self.row(query, self.heads.start), self.heads.len());
            let mut done = 0;
            while done < count {
                let rows = ROWS.min(count - done);
                let from = self.scaled.add((first + done) * it.width);
                let products = match rows {
                    4 => products::<4>(from, self.keys, it.width),
                    3 => pad(products::<3>(from, self.keys, it.width)),
                    2 => pad(products::<2>(from, self.keys, it.width)),
                    _ => pad(products::<1>(from, self.keys, it.width)),
                };
                for (index, product) in products.into_iter().take(rows).enumerate() {
                    let row = first + done + index;
                    let product = _mm512_add_ps(product, bias);
                    let product = _mm512_mask_mov_ps(_mm512_set1_ps(f32::NEG_INFINITY), seen, product);
                    let before = *self.running_max.add(row);
                    let running_max = before.max(_mm512_reduce_max_ps(product));
                    let prob = exp(_mm512_add_ps(product, _mm512_set1_ps(-running_max)));
                    _mm512_storeu_ps(self.probs.add((done + index) * LANES), prob);
                    let denominator = self.denominator.add(row);
                    if running_max > before {
                        let rescale = (before - running_max).exp();
                        *self.running_max.add(row) = running_max;
                        *denominator *= rescale;
                        for column in (0..it.width).step_by(LANES) {
                            let acc = self.acc.add(row * it.width + column);
                            _mm512_storeu_ps(acc, _mm512_mul_ps(_mm512_loadu_ps(acc), _mm512_set1_ps(rescale)));
                        }
                    }
                    *denominator += _mm512_reduce_add_ps(prob);
                }
                done += rows;
            }
        }
    }

    /// Adds `p·v` of a block to the accumulators of a query's heads. Values that the query does not see are skipped:
    /// they may be NaN, if another sequence went wrong.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,fma")]
    unsafe fn accumulate_values(&self, query: usize, seen: __mmask16) {
        let width = self.attention.width;
        let (first, count) = (self.row(query, self.heads.start), self.heads.len());
        for head in 0..count {
            // SAFETY: as in `compute`.
            unsafe {
                let (probs, acc) = (self.probs.add(head * LANES), self.acc.add((first + head) * width));
                let mut column = 0;
                while column < width {
                    let values = self.values.add(column);
                    let step = match width - column {
                        64.. => add_strip::<4>(probs, values, width, acc.add(column), seen),
                        32.. => add_strip::<2>(probs, values, width, acc.add(column), seen),
                        _ => add_strip::<1>(probs, values, width, acc.add(column), seen),
                    };
                    column += step;
                }
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,fma")]
    unsafe fn finish(&self) {
        let it = self.attention;
        for query in self.queries.clone() {
            for head in self.heads.clone() {
                let row = self.row(query, head);
                let whole = self.kv_head * (it.heads / it.kv_heads) + head;
                // SAFETY: as in `compute`.
                unsafe {
                    let denominator = *self.denominator.add(row);
                    // The output of a query that sees no cell is zero.
                    let part = _mm512_set1_ps(if denominator == 0.0 { 0.0 } else { 1.0 / denominator });
                    let to = it.output.byte_add((query * it.heads + whole) * it.output_stride);
                    for column in (0..it.width).step_by(LANES) {
                        let acc = _mm512_loadu_ps(self.acc.add(row * it.width + column));
                        _mm512_storeu_ps(to.add(column), _mm512_mul_ps(acc, part));
                    }
                }
            }
        }
    }
}

/// Returns the numbers of the lanes.
#[inline]
#[target_feature(enable = "avx512f")]
fn iota() -> __m512i {
    _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
}

/// Returns the dot products of `ROWS` rows with the sixteen transposed keys.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,fma")]
unsafe fn products<const ROWS: usize>(rows: *const f32, keys: *const f32, width: usize) -> [__m512; ROWS] {
    let mut products = [_mm512_setzero_ps(); ROWS];
    for column in 0..width {
        // SAFETY: the caller vouches for rows and keys.
        unsafe {
            let key = _mm512_loadu_ps(keys.add(column * LANES));
            for (row, product) in products.iter_mut().enumerate() {
                *product = _mm512_fmadd_ps(_mm512_set1_ps(*rows.add(row * width + column)), key, *product);
            }
        }
    }
    products
}

#[inline]
#[target_feature(enable = "avx512f")]
fn pad<const ROWS: usize>(products: [__m512; ROWS]) -> [__m512; 4] {
    let mut padded = [_mm512_setzero_ps(); 4];
    padded[..ROWS].copy_from_slice(&products);
    padded
}

/// Adds `p·v` of a strip of numbers to the accumulator of a row; returns the width of the strip.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,fma")]
unsafe fn add_strip<const REGISTERS: usize>(
    probs: *const f32,
    values: *const f32,
    width: usize,
    acc: *mut f32,
    seen: __mmask16,
) -> usize {
    let mut strip = [_mm512_setzero_ps(); REGISTERS];
    // SAFETY: the caller vouches for accumulator, probabilities and values.
    unsafe {
        for (index, register) in strip.iter_mut().enumerate() {
            *register = _mm512_loadu_ps(acc.add(index * LANES));
        }
        let mut add = |cell: usize| {
            let prob = _mm512_set1_ps(*probs.add(cell));
            for (index, register) in strip.iter_mut().enumerate() {
                let values = _mm512_loadu_ps(values.add(cell * width + index * LANES));
                *register = _mm512_fmadd_ps(prob, values, *register);
            }
        };
        if seen == __mmask16::MAX {
            (0..LANES).for_each(&mut add);
        } else {
            let mut left = seen;
            while left != 0 {
                add(left.trailing_zeros() as usize);
                left &= left - 1;
            }
        }
        for (index, register) in strip.into_iter().enumerate() {
            _mm512_storeu_ps(acc.add(index * LANES), register);
        }
    }
    REGISTERS * LANES
}

/// Returns `exp(x)` for `x ≤ 0` to seven digits: Cody–Waite range reduction, then a polynomial. Results below
/// `exp(-87)` are rounded up to it.
#[inline]
#[target_feature(enable = "avx512f,fma")]
fn exp(exponents: __m512) -> __m512 {
    // NaN stays NaN as the second operand.
    let exponents = _mm512_max_ps(_mm512_set1_ps(-87.0), exponents);
    let powers = _mm512_roundscale_ps::<0>(_mm512_mul_ps(exponents, _mm512_set1_ps(std::f32::consts::LOG2_E)));
    // ln 2 in two parts (Cody and Waite): the first has few digits, so that products with it are exact.
    let rest = _mm512_fnmadd_ps(powers, _mm512_set1_ps(0.693_359_4), exponents);
    let rest = _mm512_fnmadd_ps(powers, _mm512_set1_ps(-2.121_944_4e-4), rest);
    // Taylor's series, to the seventh power of at most 0.35.
    let mut sum = _mm512_set1_ps(1.0 / 5_040.0);
    for factor in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(factor));
    }
    _mm512_scalef_ps(sum, powers)
}

/// Turns sixteen rows into sixteen columns.
#[inline]
#[target_feature(enable = "avx512f")]
fn transposed(rows: &[__m512; LANES]) -> [__m512; LANES] {
    let zero = _mm512_setzero_ps();
    let (mut pairs, mut fours, mut columns) = ([zero; LANES], [zero; LANES], [zero; LANES]);
    for at in (0..LANES).step_by(2) {
        pairs[at] = _mm512_unpacklo_ps(rows[at], rows[at + 1]);
        pairs[at + 1] = _mm512_unpackhi_ps(rows[at], rows[at + 1]);
    }
    for at in (0..LANES).step_by(4) {
        fours[at] = _mm512_shuffle_ps::<0x44>(pairs[at], pairs[at + 2]);
        fours[at + 1] = _mm512_shuffle_ps::<0xee>(pairs[at], pairs[at + 2]);
        fours[at + 2] = _mm512_shuffle_ps::<0x44>(pairs[at + 1], pairs[at + 3]);
        fours[at + 3] = _mm512_shuffle_ps::<0xee>(pairs[at + 1], pairs[at + 3]);
    }
    for at in 0..4 {
        let low = _mm512_shuffle_f32x4::<0x44>(fours[at], fours[4 + at]);
        let high = _mm512_shuffle_f32x4::<0xee>(fours[at], fours[4 + at]);
        let more_low = _mm512_shuffle_f32x4::<0x44>(fours[8 + at], fours[12 + at]);
        let more_high = _mm512_shuffle_f32x4::<0xee>(fours[8 + at], fours[12 + at]);
        columns[at] = _mm512_shuffle_f32x4::<0x88>(low, more_low);
        columns[4 + at] = _mm512_shuffle_f32x4::<0xdd>(low, more_low);
        columns[8 + at] = _mm512_shuffle_f32x4::<0x88>(high, more_high);
        columns[12 + at] = _mm512_shuffle_f32x4::<0xdd>(high, more_high);
    }
    columns
}
