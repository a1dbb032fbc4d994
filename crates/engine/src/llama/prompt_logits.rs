//! The logits after prompts, kept so that the same prompt need not be evaluated again.
//!
//! With many kernels the last bits of a row differ between a row alone and a row in a batch. If only the last token of
//! a prompt were evaluated again, its logits would differ slightly from the first time, and 8-bit activations turn a
//! slight difference into another text. A repeated prompt goes on from exactly the logits of the first time.

use std::sync::Arc;

use super::native::Token;
use crate::model_runtime::AdapterId;

/// The logits after prompts within a budget of bytes, in LRU order.
#[derive(Debug)]
pub(super) struct PromptLogits {
    bytes_max: u64,
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    prompt: Vec<Token>,
    adapter: Option<AdapterId>,
    logits: Arc<[f32]>,
}

impl Entry {
    fn bytes(&self) -> u64 {
        (size_of_val(&*self.logits) + size_of_val(&*self.prompt)) as u64
    }

    fn is_of(&self, prompt: &[Token], adapter: Option<AdapterId>) -> bool {
        self.adapter == adapter && self.prompt == prompt
    }
}

impl PromptLogits {
    /// Returns an empty store for so many bytes.
    pub(super) fn new(bytes_max: u64) -> Self {
        Self { bytes_max, entries: Vec::new() }
    }

    /// Keeps the logits after a prompt and evicts the least recently used over the budget.
    pub(super) fn keep(&mut self, prompt: &[Token], adapter: Option<AdapterId>, logits: &[f32]) {
        if (size_of_val(logits) + size_of_val(prompt)) as u64 > self.bytes_max {
            return;
        }
        self.entries.retain(|entry| !entry.is_of(prompt, adapter));
        self.entries.push(Entry { prompt: prompt.to_vec(), adapter, logits: logits.into() });
        let mut bytes: u64 = self.entries.iter().map(Entry::bytes).sum();
        let excess = self.entries.iter().take_while(|entry| {
            let over = bytes > self.bytes_max;
            bytes -= entry.bytes();
            over
        });
        let excess = excess.count();
        self.entries.drain(..excess);
    }

    /// Returns whether the logits after a prompt are kept.
    pub(super) fn has(&self, prompt: &[Token], adapter: Option<AdapterId>) -> bool {
        self.entries.iter().any(|entry| entry.is_of(prompt, adapter))
    }

    /// Returns the logits after a prompt and marks them as the most recently used.
    pub(super) fn find(&mut self, prompt: &[Token], adapter: Option<AdapterId>) -> Option<Arc<[f32]>> {
        let index = self.entries.iter().position(|entry| entry.is_of(prompt, adapter))?;
        let entry = self.entries.remove(index);
        let logits = Arc::clone(&entry.logits);
        self.entries.push(entry);
        Some(logits)
    }

    /// Drops all that an adapter made.
    pub(super) fn forget(&mut self, adapter: AdapterId) {
        self.entries.retain(|entry| entry.adapter != Some(adapter));
    }

    pub(super) fn clear(&mut self) {
        self.entries.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_gives_way() {
        // Each takes eight bytes of logits and four of prompt.
        let mut endings = PromptLogits::new(24);
        endings.keep(&[1], None, &[0.1, 0.2]);
        endings.keep(&[2], None, &[0.3, 0.4]);
        assert_eq!(endings.find(&[1], None).as_deref(), Some(&[0.1, 0.2][..]));
        endings.keep(&[3], None, &[0.5, 0.6]);
        assert!(endings.has(&[1], None) && !endings.has(&[2], None) && endings.has(&[3], None));
        // One that never fits leaves nothing of itself.
        endings.keep(&[4], None, &[0.0; 99]);
        assert!(!endings.has(&[4], None));
    }

    #[test]
    fn a_prompt_is_known_by_all_its_tokens_and_its_adapter() {
        let mut endings = PromptLogits::new(1_000);
        endings.keep(&[1, 2], Some(AdapterId(7)), &[0.5]);
        assert!(!endings.has(&[1, 2], None) && !endings.has(&[1], Some(AdapterId(7))));
        endings.keep(&[1, 2], Some(AdapterId(7)), &[0.7]);
        assert_eq!(endings.find(&[1, 2], Some(AdapterId(7))).as_deref(), Some(&[0.7][..]));
        endings.forget(AdapterId(7));
        assert!(!endings.has(&[1, 2], Some(AdapterId(7))));
    }
}
