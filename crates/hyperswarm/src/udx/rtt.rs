//! Round-trip time estimate and retransmission timeout (RFC 6298).

use std::time::Duration;

use tokio::time::Instant;

/// The minimum that a timeout adds to the round-trip time, as in Linux. A queue that fills steadily shows no variation,
/// and an event loop may be busy. A minimum of one second in total, as in libudx, would let one lost packet stall a
/// fast link.
const ALLOWANCE_MIN: Duration = Duration::from_millis(200);
/// The timeout before anything was measured (section 2.1).
const RTO_FIRST: Duration = Duration::from_secs(1);
const RTO_MAX: Duration = Duration::from_secs(30);
/// A sample counts for one part in so many of the smoothed round trip (1 / alpha, section 2.3).
const SRTT_WEIGHT: u32 = 8;
/// A sample counts for one part in so many of the variation (1 / beta, section 2.3).
const RTTVAR_WEIGHT: u32 = 4;
/// How many variations the timeout adds to the smoothed round trip (section 2.3).
const K: u32 = 4;
/// A probe is sent after so many round trips (RFC 8985, section 7.2).
const PTO_ROUND_TRIPS: u32 = 2;
/// How long the event loop of the peer may be busy with other work (TLP.max_ack_delay in RFC 8985).
const MAX_ACK_DELAY: Duration = Duration::from_millis(10);
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
                self.variation = (self.variation * (RTTVAR_WEIGHT - 1) + smoothed.abs_diff(sample)) / RTTVAR_WEIGHT;
                self.smoothed = Some((smoothed * (SRTT_WEIGHT - 1) + sample) / SRTT_WEIGHT);
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
        let rto = |srtt: Duration| (srtt + (self.variation * K).max(ALLOWANCE_MIN)).min(RTO_MAX);
        self.smoothed.map_or(RTO_FIRST, rto)
    }

    /// Returns the probe timeout (PTO): how long to wait before resending the last packet of a flight to elicit an
    /// acknowledgement.
    pub(crate) fn probe_timeout(&self) -> Duration {
        let pto = |srtt: Duration| (srtt * PTO_ROUND_TRIPS).max(srtt + self.variation * K) + MAX_ACK_DELAY;
        self.smoothed.map_or(RTO_FIRST, pto)
    }
}
