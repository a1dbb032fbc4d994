//! Keys and values of evicted sequences, kept in host memory within a budget of bytes.

use super::kv_cache::common_prefix;
use super::native::{Token, Window};
use crate::model_runtime::AdapterId;

/// Snapshots of sequences in LRU order.
#[derive(Debug)]
pub(super) struct Snapshots {
    bytes_max: u64,
    window: Window,
    entries: Vec<Snapshot>,
}

#[derive(Debug)]
pub(super) struct Snapshot {
    pub(super) tokens: Vec<Token>,
    /// The adapter it was evaluated with.
    pub(super) adapter: Option<AdapterId>,
    /// The first position that every layer has.
    pub(super) first: usize,
    /// Its keys and values, as llama.cpp writes them.
    pub(super) bytes: Vec<u8>,
}

impl Snapshot {
    /// Returns whether a sequence can go on after so many of its tokens.
    fn is_whole(&self, length: usize, window: Window) -> bool {
        self.first <= window.first_seen(length)
    }
}

impl Snapshots {
    /// Returns an empty store for so many bytes.
    pub(super) fn new(bytes_max: u64, window: Window) -> Self {
        Self { bytes_max, window, entries: Vec::new() }
    }

    /// Returns whether a snapshot of so many bytes could be kept.
    pub(super) fn takes(&self, bytes: u64) -> bool {
        bytes <= self.bytes_max
    }

    /// Keeps a snapshot. Snapshots of its prefixes are dropped, and the least recently used over the budget.
    pub(super) fn keep(&mut self, snapshot: Snapshot) {
        if !self.takes(snapshot.bytes.len() as u64) {
            return;
        }
        let window = self.window;
        self.entries.retain(|old| {
            let goes_on = old.adapter == snapshot.adapter && snapshot.tokens.starts_with(&old.tokens);
            !(goes_on && snapshot.is_whole(old.tokens.len(), window))
        });
        self.entries.push(snapshot);
        let mut bytes: u64 = self.entries.iter().map(|entry| entry.bytes.len() as u64).sum();
        let excess = self.entries.iter().take_while(|entry| {
            let over = bytes > self.bytes_max;
            bytes -= entry.bytes.len() as u64;
            over
        });
        let excess = excess.count();
        self.entries.drain(..excess);
    }

    /// Returns the index of the snapshot with the longest usable common prefix, and the length of that.
    pub(super) fn find(&self, prompt: &[Token], adapter: Option<AdapterId>) -> Option<(usize, usize)> {
        let entries = self.entries.iter().enumerate().filter(|(_, entry)| entry.adapter == adapter);
        let common = entries.filter_map(|(index, entry)| {
            let common = common_prefix(&entry.tokens, prompt);
            entry.is_whole(common, self.window).then_some((index, common))
        });
        common.max_by_key(|(_, common)| *common)
    }

    /// Takes a snapshot out.
    pub(super) fn take(&mut self, index: usize) -> Snapshot {
        self.entries.remove(index)
    }

    /// Drops every snapshot of an adapter.
    pub(super) fn forget(&mut self, adapter: AdapterId) {
        self.entries.retain(|entry| entry.adapter != Some(adapter));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(tokens: &[Token], bytes: usize) -> Snapshot {
        Snapshot { tokens: tokens.to_vec(), adapter: None, first: 0, bytes: vec![0; bytes] }
    }

    fn kept(snapshots: &Snapshots) -> Vec<&[Token]> {
        snapshots.entries.iter().map(|entry| entry.tokens.as_slice()).collect()
    }

    #[test]
    fn the_least_recently_used_gives_way() {
        let mut snapshots = Snapshots::new(100, Window::All);
        for token in 1..=3 {
            snapshots.keep(snapshot(&[token], 40));
        }
        assert_eq!(kept(&snapshots), [[2], [3]]);
        let used = snapshots.take(0);
        snapshots.keep(used);
        snapshots.keep(snapshot(&[4], 40));
        assert_eq!(kept(&snapshots), [[2], [4]]);
    }

    #[test]
    fn a_longer_conversation_replaces_its_own_beginning() {
        let mut snapshots = Snapshots::new(100, Window::All);
        snapshots.keep(snapshot(&[1, 2], 10));
        snapshots.keep(Snapshot { adapter: Some(AdapterId(7)), ..snapshot(&[1], 10) });
        snapshots.keep(snapshot(&[1, 2, 3], 10));
        assert_eq!(kept(&snapshots), [&[1][..], &[1, 2, 3]]);
    }

    #[test]
    fn what_is_larger_than_the_budget_is_not_kept() {
        let mut snapshots = Snapshots::new(100, Window::All);
        snapshots.keep(snapshot(&[1], 50));
        snapshots.keep(snapshot(&[2], 101));
        assert_eq!(kept(&snapshots), [[1]]);
    }

    #[test]
    fn the_longest_common_beginning_of_the_same_adapter_is_found() {
        let mut snapshots = Snapshots::new(100, Window::All);
        snapshots.keep(snapshot(&[1, 2, 9], 10));
        snapshots.keep(snapshot(&[1, 2, 3, 9], 10));
        snapshots.keep(Snapshot { adapter: Some(AdapterId(7)), ..snapshot(&[1, 2, 3, 4], 10) });
        assert_eq!(snapshots.find(&[1, 2, 3, 4], None), Some((1, 3)));
        assert_eq!(snapshots.find(&[1, 2, 3, 4], Some(AdapterId(7))), Some((2, 4)));
        snapshots.forget(AdapterId(7));
        assert_eq!(snapshots.find(&[1], Some(AdapterId(7))), None);
    }

    #[test]
    fn what_a_window_hid_when_a_snapshot_was_made_is_not_found_in_it() {
        let mut snapshots = Snapshots::new(100, Window::Sliding(3));
        let cut =
            |length: i32| Snapshot { first: length as usize - 3, ..snapshot(&(0..length).collect::<Vec<_>>(), 10) };
        snapshots.keep(cut(9));
        assert_eq!(snapshots.find(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 99], None), Some((0, 9)));
        assert_eq!(snapshots.find(&[0, 1, 2, 3, 4, 5, 6, 7, 99], None), Some((0, 8)));
        assert_eq!(snapshots.find(&[0, 1, 2, 3, 4, 5, 6, 99], None), None);
        // What the longer one cannot serve is kept beside it.
        snapshots.keep(cut(5));
        snapshots.keep(cut(10));
        assert_eq!(kept(&snapshots).iter().map(|tokens| tokens.len()).collect::<Vec<_>>(), [5, 10]);
    }
}
