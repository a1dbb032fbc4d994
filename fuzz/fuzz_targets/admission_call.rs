//! Drives [`tether_fuzz::admission_call`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::admission_call(bytes));
