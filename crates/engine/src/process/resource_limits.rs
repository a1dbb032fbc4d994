//! Limits what an engine process may take besides memory.
//!
//! The number of processes is not limited here: `RLIMIT_NPROC` counts all processes and threads of a user, is not
//! enforced for root, and would keep a busy user's engine from starting its threads. The sandbox refuses to start
//! processes instead.

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The maximum number of open files: a split model has up to 250, which are opened twice, and GPU drivers open some
/// hundred devices.
const FILES_MAX: u64 = 4_096;

/// Lowers the limits of this process for good. A core file would hold prompts and answers.
pub(super) fn lower() {
    if let Err((resource, error)) = try_lower() {
        tracing::warn!(%error, ?resource, "a limit of the engine process cannot be lowered");
    }
}

/// Does the same, and allocates no memory: it may run in a process that was just forked.
pub(super) fn try_lower() -> Result<(), (Resource, Errno)> {
    let limits = [(Resource::Core, 0), (Resource::Nofile, FILES_MAX)];
    limits.into_iter().try_for_each(|(resource, max)| {
        setrlimit(resource, lowered(getrlimit(resource), max)).map_err(|error| (resource, error))
    })
}

fn lowered(limit: Rlimit, max: u64) -> Rlimit {
    let lower = |limit: Option<u64>| Some(limit.map_or(max, |limit| limit.min(max)));
    Rlimit { current: lower(limit.current), maximum: lower(limit.maximum) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_lowered_and_never_raised() {
        let limit = |current, maximum| Rlimit { current, maximum };
        assert_eq!(lowered(limit(Some(1_024), None), 4_096), limit(Some(1_024), Some(4_096)));
        assert_eq!(lowered(limit(None, Some(100)), 0), limit(Some(0), Some(0)));
    }
}
