//! Drives [`tether_fuzz::api_token`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::api_token(bytes));
