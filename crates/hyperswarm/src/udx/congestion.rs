//! Congestion control: how many packets may be in flight at once.

use std::time::Duration;

use tokio::time::Instant;

/// How fast the window grows, in packets per cubic second (C, RFC 9438, section 5).
const CUBIC_C: f64 = 0.4;
/// What is left of the window after a loss (beta_cubic, section 4.6).
pub(crate) const CUBIC_BETA: f64 = 0.7;
/// How many packets the window of a Reno flow grows by in a round trip, so that it is as large on average as one that
/// grows by a packet and is halved at a loss (alpha_cubic, section 4.3).
const CUBIC_ALPHA: f64 = 3.0 * (1.0 - CUBIC_BETA) / (1.0 + CUBIC_BETA);
/// The window grows to this many times its size in a round trip at most (section 4.2).
const CUBIC_TARGET_MAX: f64 = 1.5;
/// The slow start threshold after an idle time, as a share of the window before it (RFC 7661, section 4.4.3).
const IDLE_SSTHRESH: f64 = 0.75;
/// The minimum window, in full packets.
const WINDOW_MIN: u64 = 2;
/// The initial window, in full packets (RFC 6928).
const WINDOW_FIRST: u64 = 10;
/// A larger window has no use, because the other side's window is smaller.
const WINDOW_MAX_BYTES: u64 = 16 * 1024 * 1024;

/// CUBIC (RFC 9438). The window grows with the time since the last loss, so that long paths fill as well as short ones.
pub(crate) struct Cubic {
    packet_bytes: f64,
    window: f64,
    slow_start_threshold: f64,
    /// The window at the last loss. Growth approaches it, then goes beyond it.
    window_before_loss: f64,
    /// The window that Reno would have, for paths too short for the cubic curve.
    reno_window: f64,
    epoch: Option<Instant>,
    /// Seconds from the start of the epoch until the window is back at its size before the loss.
    seconds_to_plateau: f64,
    before: Option<Before>,
    rounds: Rounds,
}

/// The state to restore after a spurious loss.
#[derive(Clone, Copy)]
struct Before {
    window: f64,
    slow_start_threshold: f64,
    window_before_loss: f64,
}

impl Cubic {
    pub(crate) fn new(packet_bytes: u64) -> Self {
        let packet_bytes = packet_bytes as f64;
        Self {
            packet_bytes,
            window: packet_bytes * WINDOW_FIRST as f64,
            slow_start_threshold: f64::INFINITY,
            window_before_loss: 0.0,
            reno_window: 0.0,
            epoch: None,
            seconds_to_plateau: 0.0,
            before: None,
            rounds: Rounds::default(),
        }
    }

    fn decrease(&mut self) {
        self.before = Some(Before {
            window: self.window,
            slow_start_threshold: self.slow_start_threshold,
            window_before_loss: self.window_before_loss,
        });
        // Fast convergence: a flow whose window shrank leaves capacity to newer flows.
        self.window_before_loss =
            if self.window < self.window_before_loss { self.window * (1.0 + CUBIC_BETA) / 2.0 } else { self.window };
        self.slow_start_threshold = (self.window * CUBIC_BETA).max(self.packet_bytes * WINDOW_MIN as f64);
        self.epoch = None;
    }

    fn begin_epoch(&mut self, now: Instant) -> Instant {
        self.epoch = Some(now);
        self.reno_window = self.window;
        self.window_before_loss = self.window_before_loss.max(self.window);
        self.seconds_to_plateau = ((self.window_before_loss - self.window) / self.packet_bytes / CUBIC_C).cbrt();
        now
    }

    /// Returns the congestion window in bytes.
    pub(crate) fn window_bytes(&self) -> u64 {
        self.window as u64
    }

    /// Sets the size of a full packet.
    pub(crate) fn on_packet_bytes(&mut self, packet_bytes: u64) {
        self.packet_bytes = packet_bytes as f64;
    }

    /// Bytes were acknowledged, after this round trip, while the congestion window was what limited the sender.
    pub(crate) fn on_acked(&mut self, now: Instant, bytes: u64, round_trip: Duration) {
        let bytes = bytes as f64;
        if self.window < self.slow_start_threshold {
            match self.rounds.sample(now, round_trip) {
                Pace::Double => self.window += bytes,
                Pace::Cautious => self.window += bytes / CSS_GROWTH_DIVISOR,
                Pace::Leave => self.slow_start_threshold = self.window,
            }
        } else {
            let epoch = self.epoch.unwrap_or_else(|| self.begin_epoch(now));
            let seconds = (now - epoch + round_trip).as_secs_f64() - self.seconds_to_plateau;
            let target = self.window_before_loss + CUBIC_C * seconds.powi(3) * self.packet_bytes;
            let target = target.clamp(self.window, self.window * CUBIC_TARGET_MAX);
            self.reno_window += CUBIC_ALPHA * self.packet_bytes * bytes / self.window;
            self.window = (self.window + (target - self.window) * bytes / self.window).max(self.reno_window);
        }
        self.window = self.window.min(WINDOW_MAX_BYTES as f64);
    }

    /// Packets were lost, for the first time in this flight.
    pub(crate) fn on_loss(&mut self) {
        self.decrease();
        self.window = self.slow_start_threshold;
    }

    /// Nothing was acknowledged for a whole retransmission timeout.
    pub(crate) fn on_timeout(&mut self) {
        self.decrease();
        self.window = self.packet_bytes * WINDOW_MIN as f64;
    }

    /// The last reported loss or timeout was spurious: the packets arrived late.
    pub(crate) fn on_spurious_loss(&mut self) {
        if let Some(before) = self.before.take() {
            self.window = self.window.max(before.window);
            self.slow_start_threshold = before.slow_start_threshold;
            self.window_before_loss = before.window_before_loss;
            self.epoch = None;
        }
    }

    /// Nothing was sent for this many timeouts.
    pub(crate) fn on_idle(&mut self, timeouts: u32) {
        let first = self.packet_bytes * WINDOW_FIRST as f64;
        if self.window > first {
            self.slow_start_threshold = self.slow_start_threshold.max(self.window * IDLE_SSTHRESH);
            self.window = (self.window / 2f64.powi(timeouts.min(16) as i32)).max(first);
        }
        self.epoch = None;
    }
}

/// Detects, round by round, the delay that a filling queue adds, and ends slow start before the queue overflows
/// (HyStart++, RFC 9406).
#[derive(Default)]
struct Rounds {
    started: Option<Instant>,
    least: Option<Duration>,
    least_before: Option<Duration>,
    samples: u32,
    /// The baseline delay of conservative slow start, and the rounds since it began.
    cautious: Option<(Duration, u32)>,
}

/// How slow start goes on.
enum Pace {
    Double,
    Cautious,
    Leave,
}

// The constants of RFC 9406, section 4.3.
const N_RTT_SAMPLE: u32 = 8;
const MIN_RTT_THRESH: Duration = Duration::from_millis(4);
const MAX_RTT_THRESH: Duration = Duration::from_millis(16);
const MIN_RTT_DIVISOR: u32 = 8;
const CSS_GROWTH_DIVISOR: f64 = 4.0;
const CSS_ROUNDS: u32 = 5;

impl Rounds {
    fn sample(&mut self, now: Instant, round_trip: Duration) -> Pace {
        let started = *self.started.get_or_insert(now);
        if self.least.is_some_and(|least| now - started >= least) {
            self.started = Some(now);
            self.least_before = self.least.take();
            self.samples = 0;
            if let Some((_, rounds)) = &mut self.cautious {
                *rounds += 1;
            }
        }
        self.samples += 1;
        let least = self.least.map_or(round_trip, |least| least.min(round_trip));
        self.least = Some(least);
        if self.samples >= N_RTT_SAMPLE
            && let Some(before) = self.least_before
        {
            match self.cautious {
                None if least >= before + (before / MIN_RTT_DIVISOR).clamp(MIN_RTT_THRESH, MAX_RTT_THRESH) => {
                    self.cautious = Some((before, 0));
                }
                Some((baseline, _)) if least < baseline => self.cautious = None,
                _ => {}
            }
        }
        match self.cautious {
            None => Pace::Double,
            Some((_, rounds)) if rounds < CSS_ROUNDS => Pace::Cautious,
            Some(_) => {
                self.cautious = None;
                Pace::Leave
            }
        }
    }
}
