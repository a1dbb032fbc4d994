//! Drives [`tether_fuzz::stream_frame`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::stream_frame(bytes));
