//! Arithmetic over a whole vocabulary, written so that the compiler can vectorise it.
//!
//! Results do not depend on the machine: this module approximates the exponential by a polynomial and adds in a fixed
//! order.

/// The number of logits per block; a multiple of [`LANES`].
const BLOCK: usize = 1_024;
/// The number of SIMD lanes.
const LANES: usize = 16;

/// Returns the most likely token and its logit. If several tokens tie, returns the one with the lowest id. Returns
/// `None` if a logit is NaN or plus infinity, or if there are no logits.
pub(super) fn likeliest(logits: &[f32]) -> Option<(u32, f32)> {
    let mut best = 0;
    let mut highest = f32::NEG_INFINITY;
    let mut unordered = logits.is_empty();
    for (number, block) in logits.chunks(BLOCK).enumerate() {
        let (of_block, is_unordered) = maximum(block);
        unordered |= is_unordered;
        if of_block > highest {
            highest = of_block;
            best = number;
        }
    }
    if unordered || highest == f32::INFINITY {
        return None;
    }
    let start = best * BLOCK;
    let within = logits[start..].iter().position(|logit| *logit >= highest)?;
    Some(((start + within) as u32, highest))
}

/// Returns the greatest value, and whether any value is NaN.
pub(super) fn maximum(values: &[f32]) -> (f32, bool) {
    let mut highest = [f32::NEG_INFINITY; LANES];
    let mut unordered = [false; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            highest[lane] = if chunk[lane] > highest[lane] { chunk[lane] } else { highest[lane] };
            unordered[lane] |= chunk[lane].is_nan();
        }
    }
    let all = highest.iter().chain(rest);
    let highest = all.fold(f32::NEG_INFINITY, |highest, value| if *value > highest { *value } else { highest });
    (highest, unordered.contains(&true) || rest.iter().any(|value| value.is_nan()))
}

/// Returns the token's softmax weight relative to the most likely token; 0 if its logit is below `floor`.
pub(super) fn weight(logit: f32, highest: f32, floor: f32, temperature: f32) -> f32 {
    if logit < floor { 0.0 } else { exp((logit - highest) / temperature) }
}

/// Writes the weight of each logit to `weights`.
pub(super) fn weigh(logits: &[f32], highest: f32, floor: f32, temperature: f32, weights: &mut Vec<f32>) {
    weights.resize(logits.len(), 0.0);
    let (chunks, rest) = logits.as_chunks::<LANES>();
    let (of_chunks, of_rest) = weights.as_chunks_mut::<LANES>();
    for (weights, chunk) in of_chunks.iter_mut().zip(chunks) {
        for lane in 0..LANES {
            weights[lane] = weight(chunk[lane], highest, floor, temperature);
        }
    }
    for (weight_of, logit) in of_rest.iter_mut().zip(rest) {
        *weight_of = weight(*logit, highest, floor, temperature);
    }
}

/// Returns the total weight of all tokens at temperature 1.
pub(super) fn total(logits: &[f32], highest: f32) -> f64 {
    logits.chunks(BLOCK).map(|block| sum(block, |logit| exp(logit - highest))).sum()
}

/// Samples an index in proportion to the weights. `point` is uniform in 0..1. Returns `None` if all weights are 0.
pub(super) fn pick(weights: &[f32], point: f64) -> Option<usize> {
    let goal = point * weights.chunks(BLOCK).map(|block| sum(block, |weight| weight)).sum::<f64>();
    let mut reached = 0.0;
    for (number, block) in weights.chunks(BLOCK).enumerate() {
        let of_block = sum(block, |weight| weight);
        if reached + of_block <= goal {
            reached += of_block;
            continue;
        }
        for (index, weight) in block.iter().enumerate() {
            reached += f64::from(*weight);
            if reached > goal {
                return Some(number * BLOCK + index);
            }
        }
    }
    weights.iter().rposition(|weight| *weight > 0.0)
}

/// Sums a block in single precision, lane by lane. A lane is too short to lose much precision.
fn sum(block: &[f32], of: impl Fn(f32) -> f32) -> f64 {
    let mut sums = [0.0_f32; LANES];
    let (chunks, rest) = block.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            sums[lane] += of(chunk[lane]);
        }
    }
    sums.into_iter().chain(rest.iter().map(|value| of(*value))).map(f64::from).sum()
}

/// Returns e to the power of `x`, for `x` of at most 0. The error is at most three units in the last place; below -87
/// the result is 0.
fn exp(x: f32) -> f32 {
    // Adding this constant rounds to an integer, which the low bits then hold.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts. The first has few significant bits, so that subtracting integer multiples of it is exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let bounded = x.max(-87.0);
    let shifted = bounded * std::f32::consts::LOG2_E + ROUND;
    let power = shifted - ROUND;
    let rest = bounded - power * LN_2_HIGH - power * LN_2_LOW;
    // The Taylor series, with enough terms for |rest| up to ln 2 / 2.
    let mut series = 1.0 / 5_040.0;
    for factor in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        series = series * rest + factor;
    }
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127);
    if x < -87.0 { 0.0 } else { series * f32::from_bits(exponent << 23) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_that_of_the_textbooks() {
        for step in 0..=870_000 {
            let x = -step as f32 / 10_000.0;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 3.0 * f64::from(f32::EPSILON), "{x}: {error}");
        }
        assert_eq!(
            [exp(0.0), exp(-87.1), exp(f32::NEG_INFINITY)].map(f32::to_bits),
            [1.0_f32, 0.0, 0.0].map(f32::to_bits)
        );
    }

    #[test]
    fn the_likeliest_is_found_wherever_it_lies() {
        for length in [1, 15, 16, 17, 1_023, 1_024, 1_025, 5_000] {
            for index in [0, length / 2, length - 1] {
                let mut logits = vec![-3.0; length];
                logits[index] = 2.0;
                assert_eq!(likeliest(&logits), Some((index as u32, 2.0)));
                logits[length - 1] = 2.0;
                assert_eq!(likeliest(&logits), Some((index as u32, 2.0)), "of equals the lowest");
                logits[index] = f32::NAN;
                assert_eq!(likeliest(&logits), None);
            }
        }
    }
}
