//! Shows that an engine thread is alive, and reports prefill progress to readers.
//!
//! It beats in the engine's loop and between the operations of a batch, so that a batch that takes minutes can be
//! distinguished from an engine that hangs.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use tokio::sync::mpsc::Sender;

use crate::model_runtime::{EngineError, Event, Progress};

/// How often readers receive progress. This is half the interval that [`Event::Progress`] promises, because a reader
/// that received another event in the meantime is skipped once.
pub(super) const TELL_EVERY: Duration = Duration::from_secs(1);

/// The engine thread's side of the pulse.
#[derive(Debug)]
pub(super) struct Pulse {
    beats: Arc<Beats>,
    next: Instant,
    readings: Vec<Weak<Reading>>,
}

/// The side of the pulse that other threads see.
#[derive(Debug, Default)]
pub(super) struct Beats {
    count: AtomicU64,
    is_held: AtomicBool,
}

/// The prefill progress of one prompt, and its reader.
#[derive(Debug)]
pub(super) struct Reading {
    events: Sender<Result<Event, EngineError>>,
    tokens_read: AtomicU32,
    tokens_total: u32,
    /// Whether the reader received an event since the last round.
    had_event: AtomicBool,
}

impl Pulse {
    pub(super) fn new(beats: Arc<Beats>) -> Self {
        Self { beats, next: Instant::now() + TELL_EVERY, readings: Vec::new() }
    }

    /// Reports the progress of a prompt to its reader from now on.
    pub(super) fn follow(&mut self, reading: &Arc<Reading>) {
        self.readings.push(Arc::downgrade(reading));
    }

    /// Shows that the engine is alive, and sends progress to readers when it is due.
    pub(super) fn beat(&mut self, now: Instant) {
        self.beats.count.fetch_add(1, Ordering::Relaxed);
        if now < self.next {
            return;
        }
        self.next = now + TELL_EVERY;
        self.readings.retain(|reading| reading.upgrade().inspect(|reading| reading.tell()).is_some());
    }

    /// Runs work that cannot beat and has a time limit of its own, such as reading a file.
    pub(super) fn hold<T>(&mut self, work: impl FnOnce() -> T) -> T {
        self.beats.is_held.store(true, Ordering::Relaxed);
        let done = work();
        self.beats.is_held.store(false, Ordering::Relaxed);
        done
    }
}

impl Beats {
    /// Returns a number that has grown since the last call if the engine is alive.
    pub(super) fn count(&self) -> u64 {
        if self.is_held.load(Ordering::Relaxed) {
            self.count.fetch_add(1, Ordering::Relaxed);
        }
        self.count.load(Ordering::Relaxed)
    }
}

impl Reading {
    pub(super) fn new(events: Sender<Result<Event, EngineError>>, tokens_total: u32) -> Self {
        Self { events, tokens_read: AtomicU32::new(0), tokens_total, had_event: AtomicBool::new(false) }
    }

    /// Records the number of evaluated tokens. Tokens that are evaluated again count once.
    pub(super) fn reach(&self, tokens: usize) {
        let tokens = u32::try_from(tokens).unwrap_or(u32::MAX).min(self.tokens_total);
        self.tokens_read.fetch_max(tokens, Ordering::Relaxed);
    }

    /// Records that the reader received an event.
    pub(super) fn record_event(&self) {
        self.had_event.store(true, Ordering::Relaxed);
    }

    fn tell(&self) {
        if !self.had_event.swap(false, Ordering::Relaxed) {
            let tokens_read = self.tokens_read.load(Ordering::Relaxed);
            // If the stream is full, the reader has other events to read.
            let _ =
                self.events.try_send(Ok(Event::Progress(Progress { tokens_read, tokens_total: self.tokens_total })));
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;

    fn progress(reader: &mut mpsc::Receiver<Result<Event, EngineError>>) -> Vec<(u32, u32)> {
        let mut progress = vec![];
        while let Ok(Ok(Event::Progress(Progress { tokens_read, tokens_total }))) = reader.try_recv() {
            progress.push((tokens_read, tokens_total));
        }
        progress
    }

    #[test]
    fn a_reader_who_is_told_nothing_else_is_told_how_far_the_prompt_is() {
        let (events, mut reader) = mpsc::channel(8);
        let reading = Arc::new(Reading::new(events, 100));
        let mut pulse = Pulse::new(Arc::default());
        let begin = Instant::now();
        pulse.follow(&reading);
        let mut beat = |tenths: u32| pulse.beat(begin + TELL_EVERY * tenths / 10);
        beat(5);
        assert_eq!(progress(&mut reader), []);
        beat(15);
        beat(16);
        reading.reach(60);
        beat(30);
        assert_eq!(progress(&mut reader), [(0, 100), (60, 100)]);
        // The prompt lost its cells and starts again.
        reading.reach(10);
        reading.record_event();
        beat(45);
        assert_eq!(progress(&mut reader), []);
        reading.reach(500);
        beat(60);
        assert_eq!(progress(&mut reader), [(100, 100)]);
    }

    #[test]
    fn readers_who_left_and_those_without_room_hold_nobody_up() {
        let (events, mut reader) = mpsc::channel(1);
        let (full, gone) = (Arc::new(Reading::new(events.clone(), 1)), Arc::new(Reading::new(events, 2)));
        let mut pulse = Pulse::new(Arc::default());
        pulse.follow(&full);
        pulse.follow(&gone);
        drop(gone);
        for seconds in 2..9 {
            pulse.beat(Instant::now() + TELL_EVERY * seconds);
        }
        assert_eq!(progress(&mut reader), [(0, 1)]);
        assert_eq!(pulse.readings.len(), 1);
    }

    #[test]
    fn an_engine_that_waits_for_a_file_counts_as_alive() {
        let beats = Arc::new(Beats::default());
        let mut pulse = Pulse::new(Arc::clone(&beats));
        let before = beats.count();
        assert_eq!(beats.count(), before);
        pulse.hold(|| assert!(beats.count() > before));
        let after = beats.count();
        assert_eq!(beats.count(), after);
        pulse.beat(Instant::now());
        assert!(beats.count() > after);
    }
}
