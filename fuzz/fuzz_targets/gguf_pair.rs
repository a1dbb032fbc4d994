//! Drives [`tether_fuzz::gguf_pair`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::gguf_pair(bytes));
