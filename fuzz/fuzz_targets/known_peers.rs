//! Drives [`tether_fuzz::known_peers`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::known_peers(bytes));
