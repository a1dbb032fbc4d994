//! The kernels beside what the same numbers give in plain arithmetic.

#![cfg(target_arch = "x86_64")]
#![allow(unsafe_code)]

mod attention;
mod products;

/// Numbers that look random and are the same every time.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }
}
