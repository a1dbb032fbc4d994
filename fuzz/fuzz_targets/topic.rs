//! Drives [`tether_fuzz::topic`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::topic(bytes));
