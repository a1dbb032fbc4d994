//! Drives [`tether_fuzz::responses_request`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::responses_request(bytes));
