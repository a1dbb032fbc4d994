//! Decides how many bytes of fetched files must be evicted for a new file.

use std::fmt;
use std::sync::Arc;

/// Bytes of the disk that always stay free.
pub(crate) const SPARE_BYTES: u64 = 1 << 30;

/// Returns how many bytes the disk has free, if the system reports it.
pub(crate) type FreeBytes = Arc<dyn Fn() -> Option<u64> + Send + Sync>;

/// Use of the disk at one moment, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Usage {
    /// What this user may still write; `None` if the system does not report it.
    pub(crate) free: Option<u64>,
    /// The most that fetched files may take.
    pub(crate) most: Option<u64>,
    /// The size of the fetched files.
    pub(crate) fetched: u64,
    /// The size of incomplete files.
    pub(crate) partial: u64,
    /// What the other files that are being fetched still need.
    pub(crate) coming: u64,
}

impl Usage {
    /// Returns how many bytes of fetched files must be evicted so that `wanted` bytes can be written.
    pub(crate) fn missing(&self, wanted: u64) -> u64 {
        let wanted = wanted.saturating_add(self.coming);
        let by_disk = self.free.map_or(0, |free| wanted.saturating_add(SPARE_BYTES).saturating_sub(free));
        let used = self.fetched.saturating_add(self.partial);
        let by_budget = self.most.map_or(0, |most| used.saturating_add(wanted).saturating_sub(most));
        by_disk.max(by_budget)
    }

    /// Returns whether `wanted` bytes can be written once all fetched files are evicted.
    pub(crate) fn could_take(&self, wanted: u64) -> bool {
        self.missing(wanted) <= self.fetched
    }
}

/// There is not enough disk space for a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shortage {
    pub(crate) wanted: u64,
    pub(crate) usage: Usage,
}

impl fmt::Display for Shortage {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Usage { free, most, .. } = self.usage;
        let mib = |bytes: u64| bytes >> 20;
        write!(formatter, "{} MiB more are to be written", mib(self.wanted))?;
        match (free, most) {
            (Some(free), _) if free < self.wanted.saturating_add(SPARE_BYTES) => {
                write!(formatter, ", and of the {} MiB that the disk has free 1024 stay so", mib(free))
            }
            (_, Some(most)) => write!(formatter, ", and disk_max_mib allows {} for all fetched files", mib(most)),
            _ => Ok(()),
        }?;
        formatter.write_str("; make room, or raise disk_max_mib of the worker")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn usage() -> Usage {
        Usage { free: Some(10 * GIB), most: None, fetched: 4 * GIB, partial: GIB, coming: 0 }
    }

    #[test]
    fn a_gib_of_the_disk_stays_free() {
        assert_eq!(usage().missing(9 * GIB), 0);
        assert_eq!(usage().missing(9 * GIB + 1), 1);
        assert!(usage().could_take(13 * GIB) && !usage().could_take(13 * GIB + 1));
        assert_eq!(Usage { free: None, ..usage() }.missing(1 << 60), 0, "the disk itself will say so");
    }

    #[test]
    fn fetched_files_take_no_more_than_they_may() {
        let bounded = Usage { most: Some(6 * GIB), ..usage() };
        assert_eq!((bounded.missing(GIB), bounded.missing(3 * GIB)), (0, 2 * GIB));
        assert!(bounded.could_take(5 * GIB) && !bounded.could_take(5 * GIB + 1));
    }

    #[test]
    fn what_others_that_are_fetched_take_yet_counts_as_well() {
        let busy = Usage { most: Some(8 * GIB), coming: 2 * GIB, ..usage() };
        assert_eq!((busy.missing(GIB), busy.missing(2 * GIB)), (0, GIB));
        assert_eq!(busy.missing(u64::MAX), u64::MAX - 8 * GIB, "no number does harm");
    }

    #[test]
    fn a_shortage_says_which_bound_it_is() {
        let message = |usage, wanted| Shortage { wanted, usage }.to_string();
        assert!(message(usage(), 20 * GIB).contains("10240 MiB that the disk has free"));
        let bounded = Usage { most: Some(GIB), ..usage() };
        assert!(message(bounded, 2 * GIB).contains("disk_max_mib allows 1024"));
    }
}
