//! Drives [`tether_fuzz::grammar`] with libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: {
        // Panics inside llguidance are caught and become errors. libFuzzer's hook would end the process before that; a
        // panic that leaves the target still does.
        std::panic::set_hook(Box::new(|_| {}));
    },
    |bytes: &[u8]| tether_fuzz::grammar(bytes)
);
