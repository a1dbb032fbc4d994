//! Drives [`tether_fuzz::ollama_request`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::ollama_request(bytes));
