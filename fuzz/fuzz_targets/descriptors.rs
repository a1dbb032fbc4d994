//! Drives [`tether_fuzz::descriptors`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::descriptors(bytes));
