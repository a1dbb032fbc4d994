//! Learns how long steps take, so that their size can be chosen.

use std::time::Duration;

/// Rows up to which a step's time is kept by their number.
const ROWS_MAX: usize = 32;
/// Prompt tokens below which a step says little about the speed of prompts.
const PROMPT_MIN: usize = 32;
/// What one step weighs.
const WEIGHT: f32 = 0.2;
/// Prompt tokens beside others are a multiple of this, as the processor's kernels like them.
const GRAIN: usize = 32;

/// Smoothed times of steps.
#[derive(Debug)]
pub(super) struct StepClock {
    /// Seconds of a step that only generates, by its rows; 0 where none was seen.
    by_rows: [f32; ROWS_MAX + 1],
    /// Seconds for each token of a step with prompts.
    per_prompt_token: f32,
}

impl Default for StepClock {
    fn default() -> Self {
        Self { by_rows: [0.0; ROWS_MAX + 1], per_prompt_token: 0.0 }
    }
}

impl StepClock {
    /// Takes note of a step of so many rows, of which so many are of prompts.
    pub(super) fn note(&mut self, rows: usize, prompt_rows: usize, took: Duration) {
        let smooth = |mean: &mut f32, seconds: f32| {
            if *mean == 0.0 { *mean = seconds } else { *mean += WEIGHT * (seconds - *mean) }
        };
        if prompt_rows >= PROMPT_MIN {
            smooth(&mut self.per_prompt_token, took.as_secs_f32() / rows as f32);
        } else if prompt_rows == 0 && rows <= ROWS_MAX {
            smooth(&mut self.by_rows[rows], took.as_secs_f32());
        }
    }

    /// Returns what a step of so many rows takes; of rows never seen, what the next smaller step takes, so that they
    /// are tried.
    pub(super) fn seconds(&self, rows: usize) -> f32 {
        let known = self.by_rows[..=rows.min(ROWS_MAX)].iter().rev().find(|seconds| **seconds > 0.0);
        known.copied().unwrap_or(1.0)
    }

    /// Returns how many prompt tokens a step takes within so long, at least and at most as told.
    pub(super) fn prompt_tokens_within(&self, gap: Duration, least: usize, most: usize) -> usize {
        if self.per_prompt_token == 0.0 {
            return least;
        }
        let tokens = (gap.as_secs_f32() / self.per_prompt_token) as usize;
        (tokens / GRAIN * GRAIN).clamp(least, most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLI: Duration = Duration::from_millis(1);

    #[test]
    fn prompts_beside_others_fit_the_gap_once_their_speed_is_known() {
        let mut clock = StepClock::default();
        assert_eq!(clock.prompt_tokens_within(200 * MILLI, 64, 512), 64);
        clock.note(512, 512, 512 * MILLI);
        assert_eq!(clock.prompt_tokens_within(200 * MILLI, 64, 512), 192);
        assert_eq!(clock.prompt_tokens_within(10 * MILLI, 64, 512), 64);
        assert_eq!(clock.prompt_tokens_within(5_000 * MILLI, 64, 512), 512);
    }

    #[test]
    fn rows_never_seen_take_what_fewer_rows_take() {
        let mut clock = StepClock::default();
        clock.note(1, 0, 10 * MILLI);
        assert!((clock.seconds(4) - 0.01).abs() < 1e-6);
        clock.note(4, 0, 30 * MILLI);
        assert!((clock.seconds(4) - 0.03).abs() < 1e-6);
        assert!((clock.seconds(1) - 0.01).abs() < 1e-6);
        assert!((clock.seconds(100) - 0.03).abs() < 1e-6);
    }
}
