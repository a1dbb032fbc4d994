//! Drives [`tether_fuzz::signed_report`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::signed_report(bytes));
