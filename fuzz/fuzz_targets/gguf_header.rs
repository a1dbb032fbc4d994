//! Drives [`tether_fuzz::gguf_header`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::gguf_header(bytes));
