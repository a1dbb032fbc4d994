//! Drives [`tether_fuzz::infer_body`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::infer_body(bytes));
