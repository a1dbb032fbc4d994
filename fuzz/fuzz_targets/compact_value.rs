//! Drives [`tether_fuzz::compact_value`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::compact_value(bytes));
