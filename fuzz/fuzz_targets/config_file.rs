//! Drives [`tether_fuzz::config_file`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::config_file(bytes));
