//! Drives [`tether_fuzz::health_report`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::health_report(bytes));
