//! The workers of one model: the data that scoring reads in one pass, and their cached prompt prefixes.

use std::collections::HashMap;

use protocol::health::{LoadProgress, ModelServer, PREFIXES_MAX};
use protocol::prefix::PrefixChain;
use protocol::{Digest, PrefixDigest};

/// The workers that support one model, stored contiguously so that scoring is one pass.
#[derive(Default)]
pub(super) struct Replicas {
    pub(super) list: Vec<Replica>,
    position: HashMap<usize, usize>,
    /// The workers that have a prompt prefix cached, by the prefix's digest.
    warm: HashMap<PrefixDigest, Vec<usize>>,
    /// The prefixes that each worker reported.
    reported: HashMap<usize, Vec<PrefixDigest>>,
}

#[derive(Clone, Copy)]
pub(super) struct Replica {
    pub(super) worker: usize,
    pub(super) resident: bool,
    /// The worker does not have the file yet.
    pub(super) to_fetch: bool,
    pub(super) failed: bool,
    /// An adopted server runs the model.
    pub(super) is_adopted: bool,
    /// The server that runs the model, adopted or not.
    pub(super) server: Option<ModelServer>,
    pub(super) loading: Option<LoadProgress>,
    /// Context length in tokens; 0 if unknown.
    pub(super) context_length: u32,
    pub(super) tokens_per_second: f32,
    /// Digest of the file that the worker reports for the model, if it has it in memory.
    pub(super) digest: Option<Digest>,
}

impl Replicas {
    pub(super) fn put(&mut self, replica: Replica) {
        if let Some(&position) = self.position.get(&replica.worker) {
            self.list[position] = replica;
        } else {
            self.position.insert(replica.worker, self.list.len());
            self.list.push(replica);
        }
    }

    /// Marks a worker as fetching the model.
    pub(super) fn expect_fetch(&mut self, worker: usize) {
        if let Some(&position) = self.position.get(&worker) {
            self.list[position].loading = Some(LoadProgress { fetching: true, ..LoadProgress::default() });
        }
    }

    /// Replaces the prefixes that a worker has cached.
    pub(super) fn warm_up(&mut self, worker: usize, mut prefixes: Vec<PrefixDigest>) {
        self.cool_down(worker);
        prefixes.truncate(PREFIXES_MAX);
        prefixes.sort_unstable();
        prefixes.dedup();
        for digest in &prefixes {
            self.warm.entry(*digest).or_default().push(worker);
        }
        if !prefixes.is_empty() {
            self.reported.insert(worker, prefixes);
        }
    }

    fn cool_down(&mut self, worker: usize) {
        for digest in self.reported.remove(&worker).unwrap_or_default() {
            if let Some(workers) = self.warm.get_mut(&digest) {
                workers.retain(|warm| *warm != worker);
                if workers.is_empty() {
                    self.warm.remove(&digest);
                }
            }
        }
    }

    /// Returns the share of a prompt that each worker has cached. Few workers have any of it, or all have only a
    /// little, so searching by the prompt's prefixes costs less than searching by worker.
    pub(super) fn shares(&self, prefix: &PrefixChain) -> HashMap<usize, f32> {
        let mut shares = HashMap::new();
        for (digest, share) in prefix.shares() {
            for worker in self.warm.get(&digest).into_iter().flatten() {
                shares.entry(*worker).or_insert(share);
            }
        }
        shares
    }

    pub(super) fn remove(&mut self, worker: usize) {
        self.cool_down(worker);
        if let Some(position) = self.position.remove(&worker) {
            self.list.swap_remove(position);
            if let Some(moved) = self.list.get(position) {
                self.position.insert(moved.worker, position);
            }
        }
    }

    /// Returns whether no worker has any prefix cached.
    #[cfg(test)]
    pub(super) fn is_cold(&self) -> bool {
        self.warm.is_empty() && self.reported.is_empty()
    }
}
