//! Drives [`tether_fuzz::certificate`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::certificate(bytes));
