//! Drives [`tether_fuzz::udx_packets`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::udx_packets(bytes));
