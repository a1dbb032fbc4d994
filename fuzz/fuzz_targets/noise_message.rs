//! Drives [`tether_fuzz::noise_message`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::noise_message(bytes));
