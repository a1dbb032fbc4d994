//! Limits how far the memory of an engine process may grow, because a chat template can ask for any amount.
//!
//! A template comes with a model and can double a text sixty times within its fuel. minijinja counts instructions,
//! not bytes, and its hooks (formatter, filters, methods) see neither `~` and `+` nor text that `{% set %}` captures.
//! So within the process only the allocator could refuse, and a failed allocation ends the process. That is
//! acceptable in an engine process: it takes down one model, as any other crash does, and does not harm the machine.
//!
//! The limit is on private writable memory (`RLIMIT_DATA`), from which allocations come. A limit on the address space
//! would also count the mapped weights and the tens of GiB that GPU drivers reserve at the first decode.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::own_process;

/// Allows the process `bytes` more memory than it has, and returns the previous limit.
///
/// Returns `None` and changes nothing if the system does not report the current use.
pub(super) fn limit_growth(bytes: u64) -> Option<Rlimit> {
    let before = getrlimit(Resource::Data);
    let wanted = data_bytes()?.saturating_add(bytes);
    let current = before.current.into_iter().chain(before.maximum).fold(wanted, u64::min);
    match setrlimit(Resource::Data, Rlimit { current: Some(current), ..before }) {
        Ok(()) => Some(before),
        Err(error) => {
            tracing::warn!(%error, "the memory of the engine process cannot be limited");
            None
        }
    }
}

/// Restores the limit that [`limit_growth`] returned.
pub(super) fn restore(before: Option<Rlimit>) {
    if let Some(before) = before
        && let Err(error) = setrlimit(Resource::Data, before)
    {
        tracing::warn!(%error, "the memory of the engine process stays limited");
    }
}

/// Returns the private writable memory of this process, including its stacks.
fn data_bytes() -> Option<u64> {
    let pages: u64 = own_process::sizes()?.split(' ').nth(5)?.parse().ok()?;
    Some(pages.saturating_mul(own_process::page_bytes()))
}
