//! Drives [`tether_fuzz::answer_parser`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::answer_parser(bytes));
