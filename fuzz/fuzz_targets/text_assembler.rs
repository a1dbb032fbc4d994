//! Drives [`tether_fuzz::text_assembler`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::text_assembler(bytes));
