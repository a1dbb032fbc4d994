//! Drives [`tether_fuzz::chat_template`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::chat_template(bytes));
