//! Drafts the next tokens of an answer, so that one step can evaluate several (speculative decoding).
//!
//! A draft comes from the answer that the caller predicts, or from an earlier passage that ended as the text does now
//! (prompt lookup). Draft tokens are evaluated together with the last token and accepted only as far as the sampler
//! draws the same ones, so they change the speed of an answer and never its text.

use super::native::Token;

/// The number of tokens that must match before a passage counts as repeated.
const NGRAM: usize = 3;
/// How far back repeated passages are searched for, in tokens.
const LOOK_BACK: usize = 8_192;
/// The weight of one token's outcome in the moving average of the acceptance rate.
const WEIGHT: f32 = 0.1;
/// The number of consecutive steps without an accepted token after which drafting pauses, if drafts are rarely right.
/// If drafts are right half of the time, three wrong steps in a row happen often enough by chance.
const MISSES_MAX: u32 = 3;
/// Up to this estimated acceptance rate, drafts count as rarely right.
const RARELY: f32 = 0.3;
/// The length of the first pause in steps. Each further miss doubles it.
const PAUSE_FIRST: u32 = 16;
/// The length of the longest pause in steps.
const PAUSE_MAX: u32 = 128;

/// Drafts tokens for one answer.
#[derive(Debug)]
pub(super) struct Drafter {
    prediction: Vec<Token>,
    /// The position of the next token in the prediction.
    cursor: usize,
    /// Estimated share of draft tokens that are accepted.
    hit_rate: f32,
    /// Consecutive steps without an accepted token.
    misses: u32,
    /// Remaining steps without a draft.
    pause: u32,
}

impl Drafter {
    /// Creates a drafter from the caller's prediction of the answer, which may be empty.
    pub(super) fn new(prediction: Vec<Token>) -> Self {
        Self { prediction, cursor: 0, hit_rate: 0.5, misses: 0, pause: 0 }
    }

    /// Returns the estimated share of draft tokens that are accepted.
    pub(super) fn hit_rate(&self) -> f32 {
        self.hit_rate
    }

    /// Returns up to `most` draft tokens.
    pub(super) fn suggest(&self, text: &[Token], most: usize) -> Vec<Token> {
        if most == 0 || self.pause > 0 {
            return Vec::new();
        }
        let from = |source: &[Token], position: usize| source[position..source.len().min(position + most)].to_vec();
        if self.cursor < self.prediction.len() {
            return from(&self.prediction, self.cursor);
        }
        match repeated(text, text) {
            Some(position) => from(text, position),
            None => Vec::new(),
        }
    }

    /// Updates the estimates after a step that drafted `suggested` tokens and produced the tokens `came`.
    pub(super) fn learn(&mut self, text: &[Token], came: &[Token], suggested: usize) {
        self.pause = self.pause.saturating_sub(1);
        if suggested > 0 {
            // Tokens after the first rejected one were not tried.
            let right = came.len().saturating_sub(1);
            for index in 0..suggested.min(right + 1) {
                let hit = if index < right { 1.0 } else { 0.0 };
                self.hit_rate += WEIGHT * (hit - self.hit_rate);
            }
            self.misses = if right > 0 { 0 } else { self.misses + 1 };
            if self.hit_rate <= RARELY
                && let Some(more) = self.misses.checked_sub(MISSES_MAX)
            {
                self.pause = PAUSE_FIRST.saturating_mul(1 << more.min(8)).min(PAUSE_MAX);
            }
        }
        // A rejected token most likely replaces one token of the prediction.
        self.cursor = (self.cursor + came.len()).min(self.prediction.len());
        // If the text has left the prediction, continues where the prediction has the text's last tokens.
        if self.prediction.get(self.cursor.wrapping_sub(1)) != text.last()
            && let Some(position) = repeated(&self.prediction, text)
        {
            self.cursor = position;
        }
    }
}

/// Returns the position after the latest passage in `source` that equals the end of `text`.
fn repeated(source: &[Token], text: &[Token]) -> Option<usize> {
    let end = text.len().checked_sub(NGRAM)?;
    let wanted = &text[end..];
    let earliest = source.len().saturating_sub(LOOK_BACK);
    // The end of the text itself does not count as a repetition.
    let positions = (earliest..source.len().saturating_sub(NGRAM)).rev();
    positions
        .map(|position| (position, position + NGRAM))
        .find(|(position, behind)| source[*position..*behind] == *wanted)
        .map(|(_, behind)| behind)
}

/// Returns the typical cost of a step with `rows` rows, relative to a single row. On CPUs, four rows cost 1.8 times
/// one.
pub(super) fn usual_cost(rows: usize) -> f32 {
    const EACH_FURTHER_ROW: f32 = 0.27;
    1.0 + EACH_FURTHER_ROW * rows.saturating_sub(1) as f32
}

/// Returns the number of draft tokens that gives the highest expected number of tokens per second.
///
/// `hit_rate` is the chance of each draft token to be accepted, `rows` the number of rows without draft tokens, and
/// `seconds` the duration of a step by its number of rows.
pub(super) fn worthwhile(hit_rate: f32, most: usize, rows: usize, seconds: impl Fn(usize) -> f32) -> usize {
    let mut expected = rows as f32;
    let mut chance = 1.0;
    let mut best = (0, expected / seconds(rows));
    for suggested in 1..=most {
        chance *= hit_rate;
        expected += chance;
        let speed = expected / seconds(rows + suggested);
        if speed > best.1 {
            best = (suggested, speed);
        }
    }
    best.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repeated_passage_is_suggested_again() {
        let drafter = Drafter::new(Vec::new());
        assert_eq!(drafter.suggest(&[9, 1, 2, 3, 4, 5, 6, 1, 2, 3], 2), [4, 5]);
        assert!(drafter.suggest(&[1, 2, 3, 4, 5, 6, 7], 2).is_empty());
        assert!(drafter.suggest(&[1, 2], 2).is_empty());
    }

    #[test]
    fn the_latest_of_several_passages_counts() {
        let drafter = Drafter::new(Vec::new());
        assert_eq!(drafter.suggest(&[1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3], 1), [8]);
    }

    #[test]
    fn a_prediction_is_followed_over_a_wrong_token() {
        let mut drafter = Drafter::new(vec![10, 11, 12, 13, 14]);
        assert_eq!(drafter.suggest(&[1], 3), [10, 11, 12]);
        // The second token was rejected, and another one took its place.
        drafter.learn(&[1, 10, 99], &[10, 99], 3);
        assert_eq!(drafter.suggest(&[1, 10, 99], 3), [12, 13, 14]);
    }

    #[test]
    fn a_prediction_is_found_again_where_the_text_agrees_with_it() {
        let mut drafter = Drafter::new(vec![10, 11, 12, 13, 14, 15, 16]);
        drafter.learn(&[1, 5], &[5], 0);
        drafter.learn(&[1, 5, 10], &[10], 0);
        drafter.learn(&[1, 5, 10, 11], &[11], 0);
        drafter.learn(&[1, 5, 10, 11, 12], &[12], 0);
        assert_eq!(drafter.suggest(&[1, 5, 10, 11, 12], 2), [13, 14]);
    }

    #[test]
    fn the_hit_rate_follows_what_came() {
        let mut drafter = Drafter::new(vec![1; 1_000]);
        for _ in 0..50 {
            drafter.learn(&[1], &[1, 1, 1, 1], 3);
        }
        assert!(drafter.hit_rate() > 0.95, "{}", drafter.hit_rate());
        for _ in 0..50 {
            drafter.learn(&[2], &[2], 3);
        }
        assert!(drafter.hit_rate() < 0.05, "{}", drafter.hit_rate());
    }

    #[test]
    fn who_is_never_right_says_less_and_less() {
        let mut drafter = Drafter::new(vec![1; 1_000]);
        let mut suggestions = 0;
        for _ in 0..256 {
            let suggested = drafter.suggest(&[2], 3).len();
            suggestions += usize::from(suggested > 0);
            drafter.learn(&[2], &[2], suggested);
        }
        // Five drafts, then one after 64 and one after 128 steps.
        assert_eq!(suggestions, 7);
    }

    #[test]
    fn suggestions_are_worth_it_where_rows_are_cheap_and_hits_likely() {
        let cheap = |rows: usize| if rows <= 4 { 1.0 + rows as f32 * 0.05 } else { 2.0 };
        assert_eq!(worthwhile(0.0, 3, 1, cheap), 0);
        assert_eq!(worthwhile(0.8, 3, 1, cheap), 3);
        let dear = |rows: usize| rows as f32;
        assert_eq!(worthwhile(0.8, 3, 1, dear), 0);
    }
}
