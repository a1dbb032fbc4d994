//! Drives [`tether_fuzz::model_ref`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::model_ref(bytes));
