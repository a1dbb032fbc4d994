//! Drives [`tether_fuzz::dht_record`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::dht_record(bytes));
