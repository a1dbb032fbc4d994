//! Drives [`tether_fuzz::mux_frames`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::mux_frames(bytes));
