//! Drives [`tether_fuzz::rpc_message`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tether_fuzz::rpc_message(bytes));
