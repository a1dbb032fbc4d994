//! Decides when reports that a peer's port is closed end a stream. Pure.
//!
//! One report may be forged, or late: the peer may have been starting. So several must arrive over a while in which
//! probes are sent and nothing is received.

use std::time::Duration;

use tokio::time::Instant;

/// How often the peer is probed after a report.
const PROBE_EVERY: Duration = Duration::from_millis(125);
/// The shortest time between the first report and the one that ends the stream.
const SPAN_MIN: Duration = Duration::from_millis(500);
/// A peer has this many round trips to respond to a probe.
const SPAN_ROUND_TRIPS: u32 = 2;
/// The round trip of a peer for which none was measured.
const ROUND_TRIP_FIRST: Duration = Duration::from_secs(1);
/// Reports are forgotten after this many spans.
const SPANS_MAX: u32 = 4;

/// The reports since the peer was last heard.
#[derive(Debug, Default)]
pub(crate) struct ClosedPort(Option<Reports>);

#[derive(Debug)]
struct Reports {
    first_at: Instant,
    span: Duration,
    probe_at: Instant,
}

impl ClosedPort {
    /// Records a report. Returns whether the peer is gone.
    pub(crate) fn report(&mut self, now: Instant, round_trip: Option<Duration>) -> bool {
        if let Some(reports) = self.0.as_ref().filter(|reports| now < reports.until()) {
            return now >= reports.first_at + reports.span;
        }
        let span = SPAN_MIN.max(round_trip.unwrap_or(ROUND_TRIP_FIRST) * SPAN_ROUND_TRIPS);
        self.0 = Some(Reports { first_at: now, span, probe_at: now + PROBE_EVERY });
        false
    }

    /// Returns when the peer is to be probed.
    pub(crate) fn probe_at(&self) -> Option<Instant> {
        self.0.as_ref().map(|reports| reports.probe_at)
    }

    /// Returns whether a probe is due now. The next one is due later.
    pub(crate) fn probe(&mut self, now: Instant) -> bool {
        let Some(reports) = self.0.as_mut().filter(|reports| reports.probe_at <= now) else { return false };
        reports.probe_at = now + PROBE_EVERY;
        if now >= reports.until() {
            self.0 = None;
        }
        true
    }
}

impl Reports {
    fn until(&self) -> Instant {
        self.first_at + self.span * SPANS_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLISECOND: Duration = Duration::from_millis(1);
    const NEAR: Option<Duration> = Some(MILLISECOND);

    #[test]
    fn reports_over_half_a_second_end_a_stream_and_a_burst_does_not() {
        let (mut port, start) = (ClosedPort::default(), Instant::now());
        for late in [0, 0, 1, 250, 499] {
            assert!(!port.report(start + late * MILLISECOND, NEAR), "after {late} ms");
        }
        assert!(port.report(start + 500 * MILLISECOND, NEAR));
    }

    #[test]
    fn a_distant_peer_has_the_time_to_respond() {
        let (mut port, start) = (ClosedPort::default(), Instant::now());
        let round_trip = Some(700 * MILLISECOND);
        assert!(!port.report(start, round_trip));
        assert!(!port.report(start + 1399 * MILLISECOND, round_trip));
        assert!(port.report(start + 1400 * MILLISECOND, round_trip));
        let mut port = ClosedPort::default();
        assert!(!port.report(start, None) && !port.report(start + 1999 * MILLISECOND, None));
        assert!(port.report(start + 2000 * MILLISECOND, None));
    }

    #[test]
    fn a_report_is_followed_by_some_probes_and_then_forgotten() {
        let (mut port, start) = (ClosedPort::default(), Instant::now());
        assert!(!port.probe(start));
        port.report(start, NEAR);
        let mut probes = vec![];
        while let Some(at) = port.probe_at() {
            assert!(!port.probe(at - MILLISECOND) && port.probe(at) && probes.len() < 100);
            probes.push((at - start).as_millis());
        }
        assert_eq!((probes.first(), probes.last(), probes.len()), (Some(&125), Some(&2000), 16));
        assert!(!port.report(start + 2100 * MILLISECOND, NEAR), "the earlier report no longer counts");
    }
}
