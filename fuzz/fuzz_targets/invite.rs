//! Drives [`tether_fuzz::invite`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::invite(bytes));
