//! Bytes that both worlds can make.

/// Bytes that count up, in steps that no power of two divides.
pub(crate) fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index * 7 + (index >> 8)) as u8).collect()
}
