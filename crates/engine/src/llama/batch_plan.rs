//! Decides which tokens one decode step evaluates. A pure function.

/// What a slot wants of the next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    /// Nothing: it is empty or paused.
    Nothing,
    /// Its last token, to get the next.
    Next,
    /// This many prompt tokens are still to be evaluated.
    Prompt(usize),
}

/// Prompt tokens that may ride along while others generate: a longer step delays their next token.
const PROMPT_BESIDE_OTHERS_MAX: usize = 256;

/// Returns how many tokens of each slot enter the next step, at most `room` in all.
///
/// Every generating slot gets its one token. Slots with prompts share what is left evenly, so that a short prompt
/// does not wait for a long one; what cannot be shared evenly goes to the slots from `first` on.
pub(super) fn plan(needs: &[Need], first: usize, room: usize) -> Vec<usize> {
    let mut shares = vec![0; needs.len()];
    let mut left = room;
    for (share, need) in shares.iter_mut().zip(needs) {
        if *need == Need::Next && left > 0 {
            *share = 1;
            left -= 1;
        }
    }
    if left < room {
        left = left.min(PROMPT_BESIDE_OTHERS_MAX);
    }
    loop {
        let wants = |slot: usize| match needs[slot] {
            Need::Prompt(tokens) => tokens - shares[slot],
            Need::Nothing | Need::Next => 0,
        };
        let order = (0..needs.len()).map(|step| (first + step) % needs.len());
        let open: Vec<usize> = order.filter(|slot| wants(*slot) > 0).collect();
        if open.is_empty() || left == 0 {
            return shares;
        }
        let even = (left / open.len()).max(1);
        for slot in open {
            let Need::Prompt(tokens) = needs[slot] else { continue };
            let more = even.min(tokens - shares[slot]).min(left);
            shares[slot] += more;
            left -= more;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_generating_slot_gets_its_token_beside_a_long_prompt() {
        let shares = plan(&[Need::Next, Need::Prompt(5_000), Need::Next, Need::Nothing], 0, 512);
        assert_eq!(shares, [1, PROMPT_BESIDE_OTHERS_MAX, 1, 0]);
    }

    #[test]
    fn a_prompt_alone_takes_the_whole_step() {
        assert_eq!(plan(&[Need::Nothing, Need::Prompt(5_000)], 0, 512), [0, 512]);
    }

    #[test]
    fn a_short_prompt_does_not_wait_for_a_long_one() {
        assert_eq!(plan(&[Need::Prompt(5_000), Need::Prompt(20)], 0, 512), [492, 20]);
    }

    #[test]
    fn an_odd_token_goes_round() {
        let needs = [Need::Prompt(100); 3];
        assert_eq!(plan(&needs, 0, 4), [2, 1, 1]);
        assert_eq!(plan(&needs, 2, 4), [1, 1, 2]);
    }

    proptest! {
        #[test]
        fn a_step_is_never_overfull_and_never_idle_without_cause(
            kinds in prop::collection::vec((0_u8..3, 1_usize..700), 1..40),
            first in 0_usize..40,
            room in 1_usize..600,
        ) {
            let needs: Vec<Need> = kinds.iter().map(|(kind, tokens)| match kind {
                0 => Need::Nothing,
                1 => Need::Next,
                _ => Need::Prompt(*tokens),
            }).collect();
            let shares = plan(&needs, first % needs.len(), room);
            prop_assert!(shares.iter().sum::<usize>() <= room);
            for (share, need) in shares.iter().zip(&needs) {
                match need {
                    Need::Nothing => prop_assert_eq!(*share, 0),
                    Need::Next => prop_assert!(*share <= 1),
                    Need::Prompt(tokens) => prop_assert!(share <= tokens),
                }
            }
            let wanted = needs.iter().any(|need| *need != Need::Nothing);
            prop_assert_eq!(shares.iter().sum::<usize>() > 0, wanted);
        }
    }
}
