//! Drives [`tether_fuzz::hello`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::hello(bytes));
