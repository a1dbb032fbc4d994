//! Drives [`tether_fuzz::enrolment_file`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::enrolment_file(bytes));
