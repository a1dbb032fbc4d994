//! Products beside what the same numbers give in plain arithmetic.

use proptest::prelude::*;
use tether_kernels::{BLOCK, LANES, Matrix, Quantization, is_supported};

use crate::Numbers;

impl Numbers {
    fn float(&mut self) -> f32 {
        (self.next() % 2_001) as f32 / 1_000.0 - 1.0
    }
}

/// Writes random blocks in ggml's format; returns them with the weights that they stand for.
fn weights(quantization: Quantization, count: usize, numbers: &mut Numbers) -> (Vec<u8>, Vec<f32>) {
    // Powers of two, so that half floats are written by their exponent alone: 2^-5 to 2^-2.
    let exponents = [10_u16, 11, 12, 13];
    let (mut bytes, mut floats) = (vec![], vec![]);
    for _ in 0..count / BLOCK {
        let exponent = exponents[numbers.next() as usize % exponents.len()];
        let scale = 2_f32.powi(i32::from(exponent) - 15);
        bytes.extend((exponent << 10).to_le_bytes());
        let block: Vec<u8> = (0..BLOCK).map(|_| numbers.next() as u8).collect();
        match quantization {
            Quantization::Q4_0 => {
                let (low, high) = block.split_at(BLOCK / 2);
                bytes.extend(low.iter().zip(high).map(|(low, high)| (low & 15) | (high & 15) << 4));
                floats.extend(block.iter().map(|number| scale * (f32::from(number & 15) - 8.0)));
            }
            Quantization::Q8_0 => {
                bytes.extend(&block);
                floats.extend(block.iter().map(|number| scale * f32::from(number.cast_signed())));
            }
        }
    }
    (bytes, floats)
}

/// Multiplies with the kernels, in two parts as two threads would.
fn multiply(matrix: Matrix, packed: &[u8], vectors: &[Vec<f32>], rows: usize) -> Vec<f32> {
    let count = vectors.len();
    let mut inputs = vec![0; matrix.inputs_bytes(count)];
    let mut outputs = vec![f32::NAN; count * rows];
    let half = matrix.blocks() / 2;
    for (index, vector) in vectors.iter().enumerate() {
        for blocks in [0..half, half..matrix.blocks()] {
            // SAFETY: the vectors have the room that was asked for.
            unsafe { matrix.take_in(vector, blocks, index, count, inputs.as_mut_ptr()) };
        }
    }
    let middle = matrix.groups() / 2;
    for groups in [0..middle, middle..matrix.groups()] {
        // SAFETY: the matrix was packed, and its outputs have their room.
        unsafe { matrix.multiply(packed.as_ptr(), inputs.as_ptr(), count, groups, outputs.as_mut_ptr()) };
    }
    outputs
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn products_are_those_of_plain_arithmetic_and_the_same_alone_and_beside_others(
        is_four_bits: bool,
        pairs in 1_usize..8,
        groups in 1_usize..5,
        count in 1_usize..40,
        seed: u64,
    ) {
        if !is_supported() {
            return Ok(());
        }
        let quantization = if is_four_bits { Quantization::Q4_0 } else { Quantization::Q8_0 };
        let (columns, rows) = (pairs * 2 * BLOCK, groups * LANES);
        let matrix = Matrix::new(quantization, columns, rows).expect("it can be packed");
        let mut numbers = Numbers(seed);
        let (bytes, floats) = weights(quantization, columns * rows, &mut numbers);
        prop_assert_eq!(bytes.len(), matrix.bytes());
        let mut packed = vec![0; matrix.bytes()];
        matrix.pack(&bytes, &mut packed);
        let vectors: Vec<Vec<f32>> = (0..count).map(|_| (0..columns).map(|_| numbers.float()).collect()).collect();

        let outputs = multiply(matrix, &packed, &vectors, rows);
        for (index, vector) in vectors.iter().enumerate() {
            let ours = &outputs[index * rows..][..rows];
            for (row, ours) in ours.iter().enumerate() {
                let weights = &floats[row * columns..][..columns];
                let exact: f32 = weights.iter().zip(vector).map(|(weight, number)| weight * number).sum();
                // A number is off by half a step of 127 at most.
                let most: f32 = weights.iter().map(|weight| weight.abs() / 254.0).sum::<f32>() + 1e-3;
                prop_assert!((exact - ours).abs() <= most, "vector {index}, row {row}: {ours}, exactly {exact}");
            }
            let alone = multiply(matrix, &packed, std::slice::from_ref(vector), rows);
            prop_assert_eq!(ours, &alone[..], "vector {} of {}", index, count);
        }
    }
}

#[test]
fn zeros_give_zeros() {
    let Some(matrix) = Matrix::new(Quantization::Q8_0, 64, 16) else { return };
    let mut packed = vec![0; matrix.bytes()];
    matrix.pack(&vec![0x11; matrix.bytes()], &mut packed);
    assert_eq!(multiply(matrix, &packed, &[vec![0.0; 64]], 16), [0.0; 16]);
}

#[test]
fn what_is_not_finite_stays_so_and_harms_no_other_vector() {
    for quantization in [Quantization::Q4_0, Quantization::Q8_0] {
        let Some(matrix) = Matrix::new(quantization, 64, 16) else { return };
        let (bytes, _) = weights(quantization, 64 * 16, &mut Numbers(1));
        let mut packed = vec![0; matrix.bytes()];
        matrix.pack(&bytes, &mut packed);
        for strange in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for place in [0, 20, 63] {
                let mut vectors = vec![vec![0.5; 64]; 2];
                vectors[0][place] = strange;
                let outputs = multiply(matrix, &packed, &vectors, 16);
                let finite = outputs.iter().map(|output| output.is_finite()).collect::<Vec<_>>();
                assert_eq!(finite, [[false; 16], [true; 16]].concat(), "{quantization:?}, {strange} at {place}");
            }
        }
    }
}

#[test]
fn what_does_not_fill_the_lanes_is_not_packed() {
    for (columns, rows) in [(0, 16), (64, 0), (32, 16), (96, 16), (64, 8), (64, 24)] {
        assert_eq!(Matrix::new(Quantization::Q4_0, columns, rows), None, "{columns} columns, {rows} rows");
    }
    assert_eq!(Quantization::of_ggml(12), None);
}
