//! Path MTU discovery: probes larger packet sizes by padding packets (RFC 8899).

use super::packet::OVERHEAD_BYTES;

const BASE: usize = 1200;
const MAX: usize = 1500;
/// A probe is a full packet with padding, and the header gives the padding's length in one byte.
const PADDING_MAX: usize = 255;
const STEP_MIN: usize = 32;
/// A size that fails this often is considered too large.
const TRIES: u8 = 2;

/// The search for the largest packet size that arrives.
#[derive(Debug)]
pub(crate) struct MtuSearch {
    mtu: usize,
    step: usize,
    failures: u8,
    outstanding: bool,
    confirmed: bool,
}

impl MtuSearch {
    pub(crate) fn new() -> Self {
        Self { mtu: BASE, step: PADDING_MAX, failures: 0, outstanding: false, confirmed: false }
    }

    /// Returns the current MTU, including the IP and UDP headers.
    pub(crate) fn mtu(&self) -> usize {
        self.mtu
    }

    /// Returns how many payload bytes fit in one packet.
    pub(crate) fn payload_max(&self) -> usize {
        self.mtu - OVERHEAD_BYTES
    }

    /// Returns the padding of the next full packet if it should be a probe.
    pub(crate) fn padding(&self) -> Option<u8> {
        let target = (self.mtu + self.step).min(MAX);
        let wanted = self.confirmed && !self.outstanding && self.step >= STEP_MIN && target > self.mtu;
        wanted.then_some((target - self.mtu) as u8)
    }

    pub(crate) fn on_probe_sent(&mut self) {
        self.outstanding = true;
    }

    pub(crate) fn on_acked(&mut self, padding: u8) {
        self.confirmed = true;
        if padding > 0 {
            self.mtu += usize::from(padding);
            self.outstanding = false;
            self.failures = 0;
        }
    }

    pub(crate) fn on_probe_lost(&mut self) {
        self.outstanding = false;
        self.failures += 1;
        if self.failures >= TRIES {
            self.failures = 0;
            self.step /= 2;
        }
    }
}
