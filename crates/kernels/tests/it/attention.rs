//! Attention beside what the same numbers give in plain arithmetic.

use proptest::prelude::*;
use tether_kernels::{Attention, is_supported};

use crate::Numbers;

const HIDDEN: u16 = 0xfc00;

/// A room of keys and values, queries, and which of them see which cells.
#[derive(Debug)]
struct Cells {
    width: usize,
    heads: usize,
    kv_heads: usize,
    cells: usize,
    queries: Vec<f32>,
    keys: Vec<u16>,
    values: Vec<u16>,
    mask: Vec<u16>,
    /// The position of each cell; none where they are in order.
    positions: Vec<i32>,
}

impl Numbers {
    /// Returns a 16-bit float from a quarter to two, of either sign.
    fn half(&mut self) -> u16 {
        let (sign, exponent, rest) = (self.next() & 1, 13 + self.next() % 3, self.next() & 0x3ff);
        (sign << 15 | exponent << 10 | rest) as u16
    }
}

fn float(half: u16) -> f64 {
    let (exponent, rest) = (i32::from(half >> 10 & 31), f64::from(half & 0x3ff));
    let sign = if half >> 15 == 0 { 1.0 } else { -1.0 };
    match exponent {
        0 => sign * rest * 2_f64.powi(-24),
        _ => sign * (1.0 + rest / 1024.0) * 2_f64.powi(exponent - 15),
    }
}

impl Cells {
    fn new(width: usize, [heads, kv_heads]: [usize; 2], queries: usize, cells: usize, seed: u64) -> Self {
        let mut numbers = Numbers(seed);
        let mut halves = |count: usize| (0..count).map(|_| numbers.half()).collect::<Vec<_>>();
        let (keys, values) = (halves(cells * kv_heads * width), halves(cells * kv_heads * width));
        let queries_halves = halves(queries * heads * width);
        // Rows of cells with gaps: some blocks are seen as a whole, some in part, some not at all.
        let mask = (0..queries * cells).map(|_| match numbers.next() % 40 {
            0 => 0x3800,
            odd if odd % 2 == 1 => HIDDEN,
            _ => 0,
        });
        let mut mask: Vec<u16> = mask.collect();
        for block in mask.chunks_mut(16) {
            match numbers.next() % 4 {
                0 => block.fill(HIDDEN),
                1 => block.fill(0),
                _ => {}
            }
        }
        let queries = queries_halves.into_iter().map(|half| float(half) as f32).collect();
        Self { width, heads, kv_heads, cells, queries, keys, values, mask, positions: Vec::new() }
    }

    fn count(&self) -> usize {
        self.queries.len() / self.heads / self.width
    }

    fn attend(&self, threads: usize) -> Vec<f32> {
        let count = self.count();
        let mut output = vec![f32::NAN; count * self.heads * self.width];
        let row = self.kv_heads * self.width;
        let attention = Attention {
            width: self.width,
            heads: self.heads,
            kv_heads: self.kv_heads,
            queries: count,
            cells: self.cells,
            positions: if self.positions.is_empty() { std::ptr::null() } else { self.positions.as_ptr() },
            positions_end: self.cells,
            scale: 0.25,
            query: self.queries.as_ptr(),
            query_stride: self.heads * self.width * 4,
            query_head_stride: self.width * 4,
            key: self.keys.as_ptr(),
            key_stride: row * 2,
            key_head_stride: self.width * 2,
            value: self.values.as_ptr(),
            value_stride: row * 2,
            value_head_stride: self.width * 2,
            mask: self.mask.as_ptr(),
            mask_stride: self.cells * 2,
            output: output.as_mut_ptr(),
            output_stride: self.width * 4,
        };
        assert!(attention.is_possible());
        let mut scratch = vec![f32::NAN; attention.scratch_floats()];
        for unit in 0..attention.units(threads) {
            // SAFETY: everything is as long as it is said to be.
            unsafe { attention.attend(unit, threads, scratch.as_mut_ptr()) };
        }
        output
    }

    /// Returns the same, in plain arithmetic.
    fn exactly(&self, query: usize, head: usize) -> Vec<f64> {
        let kv_head = head / (self.heads / self.kv_heads);
        let from = &self.queries[(query * self.heads + head) * self.width..][..self.width];
        let at =
            |all: &[u16], cell: usize, place: usize| float(all[(cell * self.kv_heads + kv_head) * self.width + place]);
        let mask = &self.mask[query * self.cells..][..self.cells];
        let seen: Vec<usize> = (0..self.cells).filter(|cell| mask[*cell] != HIDDEN).collect();
        let products: Vec<f64> = seen
            .iter()
            .map(|cell| {
                let product: f64 =
                    (0..self.width).map(|place| f64::from(from[place]) * at(&self.keys, *cell, place)).sum();
                product * 0.25 + float(mask[*cell])
            })
            .collect();
        let largest = products.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = products.iter().map(|product| (product - largest).exp()).collect();
        let all: f64 = weights.iter().sum();
        let sum = |place| -> f64 {
            seen.iter().zip(&weights).map(|(cell, weight)| weight / all * at(&self.values, *cell, place)).sum()
        };
        (0..self.width).map(|place| if seen.is_empty() { 0.0 } else { sum(place) }).collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn attention_is_that_of_plain_arithmetic_however_many_threads_share_it(
        registers in 1_usize..9,
        group in 1_usize..8,
        kv_heads in 1_usize..4,
        queries in 1_usize..36,
        blocks in 1_usize..12,
        seed: u64,
    ) {
        if !is_supported() {
            return Ok(());
        }
        let room = Cells::new(registers * 16, [group * kv_heads, kv_heads], queries, blocks * 16, seed);
        let output = room.attend(2);
        for query in 0..queries {
            for head in 0..room.heads {
                let ours = &output[(query * room.heads + head) * room.width..][..room.width];
                for (ours, exact) in ours.iter().zip(room.exactly(query, head)) {
                    prop_assert!((f64::from(*ours) - exact).abs() < 2e-5, "{ours}, exactly {exact}: {query}, {head}");
                }
            }
        }
        for threads in [1, 3, 64] {
            prop_assert_eq!(&room.attend(threads), &output, "{} threads", threads);
        }
    }
}

#[test]
fn cells_that_a_query_does_not_see_may_hold_anything() {
    if !is_supported() {
        return;
    }
    let mut room = Cells::new(64, [4, 2], 3, 64, 7);
    let output = room.attend(1);
    let hidden: Vec<usize> =
        (0..room.cells).filter(|cell| (0..3).all(|query| room.mask[query * room.cells + cell] == HIDDEN)).collect();
    assert!(!hidden.is_empty(), "the seed hides some");
    for cell in hidden {
        let row = cell * 2 * 64..(cell + 1) * 2 * 64;
        room.keys[row.clone()].fill(0x7e00);
        room.values[row].fill(0x7e00);
    }
    assert_eq!(room.attend(1), output);
}

/// Moves every cell to a place by chance among others that nobody sees.
fn scattered(room: &Cells, seed: u64) -> Cells {
    let mut numbers = Numbers(seed);
    let (count, row) = (room.count(), room.kv_heads * room.width);
    let cells = room.cells * 3;
    let mut places: Vec<usize> = (0..cells).collect();
    for last in (1..cells).rev() {
        places.swap(last, (numbers.next() % (last as u64 + 1)) as usize);
    }
    let mut keys = vec![0x7e00; cells * row];
    let (mut values, mut mask) = (keys.clone(), vec![HIDDEN; count * cells]);
    let mut positions: Vec<i32> = (0..cells).map(|_| (numbers.next() % 64) as i32 - 1).collect();
    for (cell, place) in (0..room.cells).zip(places) {
        keys[place * row..][..row].copy_from_slice(&room.keys[cell * row..][..row]);
        values[place * row..][..row].copy_from_slice(&room.values[cell * row..][..row]);
        positions[place] = room.positions.get(cell).copied().unwrap_or(cell as i32);
        for query in 0..count {
            mask[query * cells + place] = room.mask[query * room.cells + cell];
        }
    }
    Cells { cells, keys, values, mask, positions, queries: room.queries.clone(), ..*room }
}

/// Moves all cells on by some places, with unseen ones before them.
fn moved(room: &Cells, by: usize) -> Cells {
    let (count, row) = (room.count(), room.kv_heads * room.width);
    let cells = (room.cells + by).next_multiple_of(16);
    let mut keys = vec![0x7e00; cells * row];
    let (mut values, mut mask) = (keys.clone(), vec![HIDDEN; count * cells]);
    let mut positions = vec![-1; cells];
    for cell in 0..room.cells {
        let place = cell + by;
        keys[place * row..][..row].copy_from_slice(&room.keys[cell * row..][..row]);
        values[place * row..][..row].copy_from_slice(&room.values[cell * row..][..row]);
        positions[place] = room.positions.get(cell).copied().unwrap_or(cell as i32);
        for query in 0..count {
            mask[query * cells + place] = room.mask[query * room.cells + cell];
        }
    }
    Cells { cells, keys, values, mask, positions, queries: room.queries.clone(), ..*room }
}

/// A prompt of one sequence: each query sees the cells up to its own, and no more than a window of them.
fn prompt(queries: usize, window: usize, seed: u64) -> Cells {
    let cells = queries.next_multiple_of(16);
    let mut room = Cells::new(64, [14, 2], queries, cells, seed);
    for (query, row) in room.mask.chunks_mut(cells).enumerate() {
        row.fill(HIDDEN);
        row[(query + 1).saturating_sub(window)..=query].fill(0);
    }
    room
}

/// Puts two rooms of the same form side by side, and asks the queries of both.
fn side_by_side(one: &Cells, other: &Cells) -> Cells {
    let cells = one.cells + other.cells;
    let mut mask = Vec::new();
    for row in one.mask.chunks(one.cells) {
        mask.extend_from_slice(row);
        mask.resize(mask.len() + other.cells, HIDDEN);
    }
    for row in other.mask.chunks(other.cells) {
        mask.resize(mask.len() + one.cells, HIDDEN);
        mask.extend_from_slice(row);
    }
    let both = |one: &[u16], other: &[u16]| [one, other].concat();
    Cells {
        cells,
        queries: [&one.queries[..], &other.queries].concat(),
        keys: both(&one.keys, &other.keys),
        values: both(&one.values, &other.values),
        mask,
        positions: (0..one.cells as i32).chain(0..other.cells as i32).collect(),
        ..*one
    }
}

/// Asks one query by itself.
fn alone(room: &Cells, query: usize) -> Vec<f32> {
    let row = room.heads * room.width;
    let queries = room.queries[query * row..][..row].to_vec();
    let mask = room.mask[query * room.cells..][..room.cells].to_vec();
    let (keys, values, positions) = (room.keys.clone(), room.values.clone(), room.positions.clone());
    Cells { queries, keys, values, mask, positions, ..*room }.attend(1)
}

#[test]
fn where_cells_lie_and_who_else_is_asked_changes_no_bit() {
    if !is_supported() {
        return;
    }
    for (window, seed) in [(1_000, 3), (20, 4), (16, 5)] {
        let room = prompt(50, window, seed);
        let together = room.attend(1);
        let row = room.heads * room.width;
        for by in [1, 16, 37] {
            assert_eq!(moved(&room, by).attend(1), together, "moved on by {by} cells, window {window}");
        }
        assert_eq!(scattered(&room, seed).attend(1), together, "in any order, window {window}");
        for query in 0..room.count() {
            assert_eq!(alone(&room, query), together[query * row..][..row], "query {query} alone, window {window}");
        }
    }
}

#[test]
fn prompts_that_meet_in_a_batch_change_no_bit_of_each_other() {
    if !is_supported() {
        return;
    }
    let (one, other) = (prompt(21, 1_000, 8), prompt(35, 1_000, 9));
    let apart = [one.attend(1), other.attend(1)].concat();
    let both = side_by_side(&one, &other);
    assert_eq!(both.attend(1), apart);
    assert_eq!(scattered(&both, 10).attend(2), apart, "in any order");
}

#[test]
fn a_sequence_that_has_a_position_twice_is_still_attended_to_as_a_whole() {
    if !is_supported() {
        return;
    }
    let mut room = prompt(20, 1_000, 11);
    room.positions = (0..room.cells as i32).map(|cell| cell / 2).collect();
    let output = room.attend(1);
    for (place, exact) in room.exactly(19, 0).into_iter().enumerate() {
        let ours = output[19 * room.heads * room.width + place];
        assert!((f64::from(ours) - exact).abs() < 2e-5, "{ours}, exactly {exact}");
    }
}

#[test]
fn what_is_not_finite_reaches_those_who_see_it_and_no_others() {
    if !is_supported() {
        return;
    }
    let mut room = Cells::new(32, [2, 1], 2, 16, 1);
    room.mask.fill(0);
    room.mask[..8].fill(HIDDEN);
    room.values[..32].fill(0x7e00);
    let finite: Vec<bool> = room.attend(1).iter().map(|number| number.is_finite()).collect();
    assert_eq!(finite, [[true; 64], [false; 64]].concat());
    room.values[..32].fill(0);
    room.keys[..32].fill(0x7e00);
    let finite: Vec<bool> = room.attend(1).iter().map(|number| number.is_finite()).collect();
    assert_eq!(finite, [[true; 64], [false; 64]].concat());
}

#[test]
fn heads_that_do_not_fill_the_lanes_are_left_to_others() {
    let room = Cells::new(16, [2, 2], 1, 16, 1);
    let attention = Attention {
        width: 16,
        heads: 2,
        kv_heads: 2,
        queries: 1,
        cells: 16,
        positions: std::ptr::null(),
        positions_end: 0,
        scale: 1.0,
        query: room.queries.as_ptr(),
        query_stride: 0,
        query_head_stride: 0,
        key: room.keys.as_ptr(),
        key_stride: 0,
        key_head_stride: 0,
        value: room.values.as_ptr(),
        value_stride: 0,
        value_head_stride: 0,
        mask: room.mask.as_ptr(),
        mask_stride: 0,
        output: std::ptr::null_mut(),
        output_stride: 0,
    };
    for not in [
        Attention { width: 24, ..attention },
        Attention { width: 512, ..attention },
        Attention { heads: 3, ..attention },
        Attention { cells: 20, ..attention },
        Attention { kv_heads: 0, ..attention },
    ] {
        assert!(!not.is_possible(), "{not:?}");
    }
}
