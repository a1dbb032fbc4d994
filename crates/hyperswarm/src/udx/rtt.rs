//! Round-trip time estimate and retransmission timeout (RFC 6298).

use std::time::Duration;

use tokio::time::Instant;

/// The minimum that a timeout adds to the round-trip time, as in Linux. A queue that fills steadily shows no variation,
/// and an event loop may be busy. A minimum of one second in total, as in libudx, would let one lost packet stall a
/// fast link.
const ALLOWANCE_MIN: Duration = Duration::from_millis(200);
const TIMEOUT_FIRST: Duration = Duration::from_secs(1);
const TIMEOUT_MAX: Duration = Duration::from_secs(30);
const MINIMUM_AGE_MAX: Duration = Duration::from_mins(5);
/// Longer samples are attributed to a host that was suspended.
const SAMPLE_MAX: Duration = Duration::from_secs(30);

/// Smoothed round-trip time, its variation, and the minimum, of one stream.
#[derive(Debug, Default)]
pub(crate) struct RoundTrip {
    smoothed: Option<Duration>,
    variation: Duration,
    minimum: Option<(Duration, Instant)>,
}

impl RoundTrip {
    pub(crate) fn sample(&mut self, sample: Duration, now: Instant) {
        let sample = sample.min(SAMPLE_MAX);
        match self.smoothed {
            None => {
                self.smoothed = Some(sample);
                self.variation = sample / 2;
            }
            Some(smoothed) => {
                self.variation = (self.variation * 3 + smoothed.abs_diff(sample)) / 4;
                self.smoothed = Some((smoothed * 7 + sample) / 8);
            }
        }
        match self.minimum {
            Some((minimum, at)) if minimum <= sample && now - at < MINIMUM_AGE_MAX => {}
            _ => self.minimum = Some((sample, now)),
        }
    }

    pub(crate) fn smoothed(&self) -> Option<Duration> {
        self.smoothed
    }

    pub(crate) fn minimum(&self) -> Option<Duration> {
        self.minimum.map(|(minimum, _)| minimum)
    }

    /// Returns the retransmission timeout: how long a packet may stay unacknowledged before the whole flight counts as
    /// lost.
    pub(crate) fn timeout(&self) -> Duration {
        self.smoothed
            .map_or(TIMEOUT_FIRST, |smoothed| (smoothed + (self.variation * 4).max(ALLOWANCE_MIN)).min(TIMEOUT_MAX))
    }

    /// Returns the probe timeout (PTO): how long to wait before resending the last packet of a flight to elicit an
    /// acknowledgement.
    pub(crate) fn probe_timeout(&self) -> Duration {
        self.smoothed.map_or(TIMEOUT_FIRST, |smoothed| (smoothed * 2).max(smoothed + self.variation * 4) + PEER_DELAY)
    }
}

/// How long the event loop of the other side may be busy with other work.
const PEER_DELAY: Duration = Duration::from_millis(10);
