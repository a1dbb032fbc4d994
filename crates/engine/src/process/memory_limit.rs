//! Holds an engine process to a growth of memory, because a chat template can ask for any amount of it.
//!
//! A template comes with a model and doubles a text sixty times within its fuel. minijinja counts instructions, not
//! bytes, and its hooks (formatter, filters, methods) see neither `~` and `+` nor text that `{% set %}` captures, so
//! within the process only the allocator could refuse, and a refusal of the allocator ends the process. An engine
//! process may end so: it takes one model along, as after any other crash, and the machine comes to no harm.
//!
//! The limit is on private writable memory (`RLIMIT_DATA`), which is what allocations take. A limit on the address
//! space would count the mapped weights and what GPU drivers reserve, tens of GiB at the first decode, as well.

use std::fs;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Lets the process take so many bytes beyond what it has, and returns the limit that held before.
///
/// Returns `None` and changes nothing where the system does not tell what the process has.
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

/// Puts back the limit that [`limit_growth`] returned.
pub(super) fn restore(before: Option<Rlimit>) {
    if let Some(before) = before
        && let Err(error) = setrlimit(Resource::Data, before)
    {
        tracing::warn!(%error, "the memory of the engine process stays limited");
    }
}

/// Returns the private writable memory of this process, its stacks included.
fn data_bytes() -> Option<u64> {
    let pages: u64 = fs::read_to_string("/proc/self/statm").ok()?.split(' ').nth(5)?.parse().ok()?;
    Some(pages.saturating_mul(rustix::param::page_size() as u64))
}
