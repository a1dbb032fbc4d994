//! Drives [`tether_fuzz::engine_frame`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::engine_frame(bytes));
