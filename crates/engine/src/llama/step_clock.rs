//! Learns how long steps take, so that their size can be chosen.

use std::time::Duration;

/// The maximum number of rows for which durations are kept.
const ROWS_MAX: usize = 32;
/// A step with fewer prompt tokens says little about the speed of prefill.
const PROMPT_MIN: usize = 32;
/// The weight of one step in the moving average.
const WEIGHT: f32 = 0.2;
/// Prompt tokens in a mixed step are a multiple of this, which suits the CPU kernels.
const GRAIN: usize = 32;

/// Smoothed durations of steps.
#[derive(Debug)]
pub(super) struct StepClock {
    /// Seconds of a decode-only step, by its rows; 0 if none was measured.
    by_rows: [f32; ROWS_MAX + 1],
    /// Seconds per token of a step with prompt tokens.
    per_prompt_token: f32,
}

impl Default for StepClock {
    fn default() -> Self {
        Self { by_rows: [0.0; ROWS_MAX + 1], per_prompt_token: 0.0 }
    }
}

impl StepClock {
    /// Records a step of `rows` rows, of which `prompt_rows` belong to prompts.
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

    /// Returns the duration of a step with `rows` rows. If that number was never measured, it returns the duration of
    /// the next smaller step, so that the number is tried.
    pub(super) fn seconds(&self, rows: usize) -> f32 {
        let known = self.by_rows[..=rows.min(ROWS_MAX)].iter().rev().find(|seconds| **seconds > 0.0);
        known.copied().unwrap_or(1.0)
    }

    /// Returns how many prompt tokens a step can evaluate within `gap`, between `least` and `most`.
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
