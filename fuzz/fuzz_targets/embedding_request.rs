//! Drives [`tether_fuzz::embedding_request`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::embedding_request(bytes));
