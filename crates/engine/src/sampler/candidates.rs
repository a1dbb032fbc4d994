//! Selects the most likely tokens of a vocabulary.

use super::vocabulary;

/// The block size for skipping logits when few of them matter.
const BLOCK: usize = 64;
/// Up to this number, candidates are sorted instead of partitioned further.
const SORTED_MAX: usize = 64;

/// A token that may be drawn.
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate {
    pub(super) logit: f32,
    pub(super) token: u32,
}

#[derive(Debug, Default)]
pub(super) struct Candidates(Vec<Candidate>);

impl Candidates {
    /// Returns the tokens that `top_k` and then `top_p` keep, ordered by token id.
    pub(super) fn keep(&mut self, logits: &[f32], highest: f32, top_k: u32, top_p: f32) -> &[Candidate] {
        if top_k > 0 {
            self.take_likeliest(logits, highest, top_k as usize);
        }
        if top_p < 1.0 {
            if top_k == 0 {
                let goal = vocabulary::total(logits, highest) * f64::from(top_p);
                self.collect(logits, highest, |candidates| weight(candidates, highest) >= goal);
                self.cut(highest, goal);
            } else {
                self.cut(highest, weight(&self.0, highest) * f64::from(top_p));
            }
        }
        // Not ordered by logit, since that order is the first thing that rounding changes.
        self.0.sort_unstable_by_key(|candidate| candidate.token);
        &self.0
    }

    /// Returns the `count` most likely tokens, the most likely first. Tokens with probability zero are left out.
    pub(super) fn likeliest(&mut self, logits: &[f32], highest: f32, count: u32) -> &[Candidate] {
        self.take_likeliest(logits, highest, count as usize);
        self.0.sort_unstable_by(likelier);
        &self.0
    }

    fn take_likeliest(&mut self, logits: &[f32], highest: f32, count: usize) {
        self.collect(logits, highest, |candidates| candidates.len() >= count);
        if count < self.0.len() {
            self.0.select_nth_unstable_by(count, likelier);
            self.0.truncate(count);
        }
    }

    /// Collects all tokens above a floor, which is lowered until there are enough tokens or all are collected.
    fn collect(&mut self, logits: &[f32], highest: f32, enough: impl Fn(&[Candidate]) -> bool) {
        for width in [3.0, 6.0, 12.0, 24.0, f32::INFINITY] {
            let floor = (highest - width).max(f32::MIN);
            self.0.clear();
            for (number, block) in logits.chunks(BLOCK).enumerate() {
                // Most blocks contain no token above the floor.
                if vocabulary::maximum(block).0 < floor {
                    continue;
                }
                let numbered = block.iter().zip((number * BLOCK) as u32..);
                let above = numbered.filter(|(logit, _)| **logit >= floor);
                self.0.extend(above.map(|(&logit, token)| Candidate { logit, token }));
            }
            if enough(&self.0) {
                return;
            }
        }
    }

    /// Keeps the smallest set of most likely candidates with a total weight of at least `goal`.
    fn cut(&mut self, highest: f32, goal: f64) {
        // Candidates before `low` are in the set, and those from `high` on are not.
        let (mut low, mut high, mut reached) = (0, self.0.len(), 0.0);
        while high - low > SORTED_MAX {
            let middle = (high - low) / 2;
            let open = &mut self.0[low..high];
            open.select_nth_unstable_by(middle, likelier);
            let half = weight(&open[..middle], highest);
            if reached + half >= goal {
                high = low + middle;
            } else {
                reached += half;
                low += middle;
            }
        }
        self.0[low..high].sort_unstable_by(likelier);
        let needed = self.0[low..high].iter().position(|candidate| {
            reached += weight(std::slice::from_ref(candidate), highest);
            reached >= goal
        });
        self.0.truncate(needed.map_or(high, |index| low + index + 1));
    }
}

/// Returns the total weight of some candidates at temperature 1.
fn weight(candidates: &[Candidate], highest: f32) -> f64 {
    let weigh = |candidate: &Candidate| vocabulary::weight(candidate.logit, highest, f32::NEG_INFINITY, 1.0);
    candidates.iter().map(|candidate| f64::from(weigh(candidate))).sum()
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "it is handed to sorts, which compare references")]
fn likelier(left: &Candidate, right: &Candidate) -> std::cmp::Ordering {
    right.logit.total_cmp(&left.logit).then(left.token.cmp(&right.token))
}
