//! Drives [`tether_fuzz::dht_connection`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::dht_connection(bytes));
