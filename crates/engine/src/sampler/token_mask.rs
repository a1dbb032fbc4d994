//! A mask of the tokens that may come next.

/// A bit set of tokens. Tokens beyond its end are not in it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenMask {
    words: Vec<u32>,
}

impl TokenMask {
    /// Creates a mask from words of 32 tokens, the lowest bit first.
    pub fn from_words(words: Vec<u32>) -> Self {
        Self { words }
    }

    /// Returns whether a token may come next.
    pub fn allows(&self, token: u32) -> bool {
        self.words.get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 == 1)
    }

    /// Bans all tokens that are not in the mask.
    pub(super) fn apply(&self, logits: &mut [f32]) {
        for (number, logits) in logits.chunks_mut(32).enumerate() {
            match self.words.get(number) {
                Some(&u32::MAX) => {}
                None | Some(0) => logits.fill(f32::NEG_INFINITY),
                Some(word) => {
                    for (bit, logit) in logits.iter_mut().enumerate() {
                        *logit = if word >> bit & 1 == 1 { *logit } else { f32::NEG_INFINITY };
                    }
                }
            }
        }
    }
}

impl FromIterator<u32> for TokenMask {
    fn from_iter<I: IntoIterator<Item = u32>>(tokens: I) -> Self {
        let mut words = Vec::new();
        for token in tokens {
            let number = token as usize / 32;
            if words.len() <= number {
                words.resize(number + 1, 0);
            }
            words[number] |= 1 << (token % 32);
        }
        Self { words }
    }
}
