//! Drives [`tether_fuzz::revocations`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::revocations(bytes));
