//! Drives [`tether_fuzz::remote_server`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::remote_server(bytes));
