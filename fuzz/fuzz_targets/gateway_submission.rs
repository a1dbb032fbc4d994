//! Drives [`tether_fuzz::gateway_submission`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::gateway_submission(bytes));
