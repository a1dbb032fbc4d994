//! Drives [`tether_fuzz::traceparent`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::traceparent(bytes));
