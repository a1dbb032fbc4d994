//! Decides which tokens one step evaluates: continuous batching with chunked prefill. A pure function.

use crate::model_runtime::AdapterId;

/// What a slot wants of the next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Need {
    /// The adapter that its tokens are evaluated with.
    pub(super) adapter: Option<AdapterId>,
    pub(super) tokens: Tokens,
}

/// The tokens that a slot wants evaluated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tokens {
    /// None: the slot is empty or paused.
    None,
    /// Decode: its last token and so many draft tokens.
    Next(usize),
    /// Prefill: so many prompt tokens.
    Prompt(usize),
}

/// The tokens of one step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plan {
    /// The adapter that all of them are evaluated with.
    pub(super) adapter: Option<AdapterId>,
    /// How many of each slot.
    pub(super) shares: Vec<usize>,
}

/// Limits of one step.
#[derive(Debug, Clone, Copy)]
pub(super) struct StepLimits {
    pub(super) batch_tokens_max: usize,
    /// Prompt tokens while any slot decodes: a longer step delays its next token.
    pub(super) prefill_tokens_max: usize,
    /// Whether a step may have tokens of several slots.
    ///
    /// Where llama.cpp keeps states, sequences in one batch disturb each other:
    /// <https://github.com/ggml-org/llama.cpp/issues/29002>.
    pub(super) together: bool,
}

/// Pauses the slots that yield. Returns whether one of them wants tokens.
pub(super) fn pause_yielding(needs: &mut [Need], yields: &[bool]) -> bool {
    let mut has_paused = false;
    for (need, _) in needs.iter_mut().zip(yields).filter(|(_, yields)| **yields) {
        has_paused |= need.tokens != Tokens::None;
        need.tokens = Tokens::None;
    }
    has_paused
}

/// Returns the next step, or `None` where no slot wants anything.
///
/// A step evaluates with one adapter. Adapters take turns, step by step; `last` is the adapter of the last step. Every
/// decoding slot of the adapter gets its tokens. Slots in prefill share the rest evenly, so that a short prompt does
/// not wait for a long one; a remainder goes to the slots from `first` on.
pub(super) fn plan(needs: &[Need], last: Option<AdapterId>, first: usize, limits: StepLimits) -> Option<Plan> {
    let adapter = next_in_turn(needs, last)?.adapter;
    if !limits.together {
        return Some(Plan { adapter, shares: alone(needs, adapter, first, limits) });
    }
    let mut shares = vec![0; needs.len()];
    let mut left = limits.batch_tokens_max;
    for (share, need) in shares.iter_mut().zip(needs) {
        if let Tokens::Next(suggested) = need.tokens
            && need.adapter == adapter
        {
            *share = (1 + suggested).min(left);
            left -= *share;
        }
    }
    if needs.iter().any(|need| matches!(need.tokens, Tokens::Next(_))) {
        left = left.min(limits.prefill_tokens_max);
    }
    loop {
        let wants = |slot: usize| match needs[slot] {
            Need { tokens: Tokens::Prompt(tokens), adapter: of } if of == adapter => tokens - shares[slot],
            _ => 0,
        };
        let order = (0..needs.len()).map(|step| (first + step) % needs.len());
        let open: Vec<usize> = order.filter(|slot| wants(*slot) > 0).collect();
        if open.is_empty() || left == 0 {
            return Some(Plan { adapter, shares });
        }
        let even = (left / open.len()).max(1);
        for slot in open {
            let Tokens::Prompt(tokens) = needs[slot].tokens else { continue };
            let more = even.min(tokens - shares[slot]).min(left);
            shares[slot] += more;
            left -= more;
        }
    }
}

/// Returns the shares of a step with a single slot: the first that wants tokens, from `first` on.
fn alone(needs: &[Need], adapter: Option<AdapterId>, first: usize, limits: StepLimits) -> Vec<usize> {
    let mut shares = vec![0; needs.len()];
    let wants = |slot: &usize| needs[*slot].adapter == adapter && needs[*slot].tokens != Tokens::None;
    if let Some(slot) = (0..needs.len()).map(|step| (first + step) % needs.len()).find(wants) {
        shares[slot] = match needs[slot].tokens {
            Tokens::None => 0,
            Tokens::Next(suggested) => (1 + suggested).min(limits.batch_tokens_max),
            Tokens::Prompt(tokens) => {
                let others = needs.iter().any(|need| matches!(need.tokens, Tokens::Next(_)));
                tokens.min(if others {
                    limits.prefill_tokens_max.clamp(1, limits.batch_tokens_max)
                } else {
                    limits.batch_tokens_max
                })
            }
        };
    }
    shares
}

/// Returns a need with the next adapter after `last`, round robin by number.
fn next_in_turn(needs: &[Need], last: Option<AdapterId>) -> Option<&Need> {
    let wanted = || needs.iter().filter(|need| need.tokens != Tokens::None);
    let later = wanted().filter(|need| need.adapter > last).min_by_key(|need| need.adapter);
    later.or_else(|| wanted().min_by_key(|need| need.adapter))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITS: StepLimits = StepLimits { batch_tokens_max: 512, prefill_tokens_max: 256, together: true };

    fn plain(tokens: Tokens) -> Need {
        Need { adapter: None, tokens }
    }

    fn with(adapter: u64, tokens: Tokens) -> Need {
        Need { adapter: Some(AdapterId(adapter)), tokens }
    }

    fn shares(needs: &[Tokens], first: usize, limits: StepLimits) -> Vec<usize> {
        let needs: Vec<Need> = needs.iter().map(|tokens| plain(*tokens)).collect();
        plan(&needs, None, first, limits).expect("there is something to do").shares
    }

    #[test]
    fn every_generating_slot_gets_its_tokens_beside_a_long_prompt() {
        let needs = [Tokens::Next(0), Tokens::Prompt(5_000), Tokens::Next(3), Tokens::None];
        assert_eq!(shares(&needs, 0, LIMITS), [1, 256, 4, 0]);
    }

    #[test]
    fn a_prompt_alone_takes_the_whole_step() {
        assert_eq!(shares(&[Tokens::None, Tokens::Prompt(5_000)], 0, LIMITS), [0, 512]);
    }

    #[test]
    fn a_short_prompt_does_not_wait_for_a_long_one() {
        assert_eq!(shares(&[Tokens::Prompt(5_000), Tokens::Prompt(20)], 0, LIMITS), [492, 20]);
    }

    #[test]
    fn an_odd_token_goes_round() {
        let needs = [Tokens::Prompt(100); 3];
        let limits = StepLimits { batch_tokens_max: 4, ..LIMITS };
        assert_eq!(shares(&needs, 0, limits), [2, 1, 1]);
        assert_eq!(shares(&needs, 2, limits), [1, 1, 2]);
    }

    #[test]
    fn adapters_take_turns_step_by_step() {
        let needs = [
            with(1, Tokens::Next(0)),
            with(2, Tokens::Prompt(5_000)),
            plain(Tokens::Next(0)),
            with(1, Tokens::Next(0)),
        ];
        let mut last = None;
        let steps: Vec<_> = (0..4)
            .map(|_| {
                let plan = plan(&needs, last, 0, LIMITS).expect("there is something to do");
                last = plan.adapter;
                plan.shares
            })
            .collect();
        assert_eq!(steps, [[1, 0, 0, 1], [0, 256, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]]);
    }

    #[test]
    fn slots_that_must_be_alone_take_turns() {
        let needs = [Tokens::Next(0), Tokens::Prompt(600), Tokens::None, Tokens::Prompt(9)];
        let limits = StepLimits { together: false, ..LIMITS };
        let steps: Vec<_> = (0..4).map(|first| shares(&needs, first, limits)).collect();
        assert_eq!(steps, [[1, 0, 0, 0], [0, 256, 0, 0], [0, 0, 0, 9], [0, 0, 0, 9]]);
        assert_eq!(shares(&[Tokens::None, Tokens::Prompt(600)], 0, limits), [0, 512]);
    }

    #[test]
    fn nothing_wanted_is_no_step() {
        assert_eq!(plan(&[plain(Tokens::None), with(1, Tokens::None)], None, 0, LIMITS), None);
    }

    proptest! {
        #[test]
        fn only_the_slots_that_yield_are_paused(
            slots in prop::collection::vec((0_u8..3, any::<bool>()), 0..20),
        ) {
            let tokens = |kind| match kind {
                0 => Tokens::None,
                1 => Tokens::Next(0),
                _ => Tokens::Prompt(9),
            };
            let before: Vec<Need> = slots.iter().map(|(kind, _)| plain(tokens(*kind))).collect();
            let yields: Vec<bool> = slots.iter().map(|(_, yields)| *yields).collect();
            let mut after = before.clone();
            let has_paused = pause_yielding(&mut after, &yields);
            for ((before, after), yields) in before.iter().zip(&after).zip(&yields) {
                prop_assert_eq!(after.tokens, if *yields { Tokens::None } else { before.tokens });
            }
            prop_assert_eq!(has_paused, before != after);
        }

        #[test]
        fn a_step_is_never_overfull_and_never_idle_without_cause(
            kinds in prop::collection::vec((0_u8..3, 1_usize..700, 0_u64..3), 1..40),
            first in 0_usize..40,
            batch_tokens_max in 1_usize..600,
            last in 0_u64..3,
            together: bool,
        ) {
            let needs: Vec<Need> = kinds.iter().map(|(kind, tokens, adapter)| Need {
                adapter: Some(AdapterId(*adapter)),
                tokens: match kind {
                    0 => Tokens::None,
                    1 => Tokens::Next(*tokens % 4),
                    _ => Tokens::Prompt(*tokens),
                },
            }).collect();
            let limits = StepLimits { batch_tokens_max, prefill_tokens_max: 256, together };
            let Some(plan) = plan(&needs, Some(AdapterId(last)), first % needs.len(), limits) else {
                prop_assert!(needs.iter().all(|need| need.tokens == Tokens::None));
                return Ok(());
            };
            prop_assert!((1..=batch_tokens_max).contains(&plan.shares.iter().sum::<usize>()));
            for (share, need) in plan.shares.iter().zip(&needs) {
                let most = match need.tokens {
                    Tokens::None => 0,
                    Tokens::Next(suggested) => 1 + suggested,
                    Tokens::Prompt(tokens) => tokens,
                };
                let most = if need.adapter == plan.adapter { most } else { 0 };
                prop_assert!(*share <= most);
            }
            prop_assert!(together || plan.shares.iter().filter(|share| **share > 0).count() == 1);
        }
    }
}
