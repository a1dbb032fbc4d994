//! The random numbers of the operating system, drawn from the seed.
//!
//! The order of a `HashMap` and the branch that `select!` tries first depend on them. `std` asks for the symbol
//! `getrandom` and leaves it to the program to provide another one; `rust-lang/rust` calls it an interposition.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ffi::{c_uint, c_void};
use std::sync::atomic::{AtomicU64, Ordering};

/// The seed plus one, or 0 while none is set.
static SEED: AtomicU64 = AtomicU64::new(0);

thread_local! {
    // Each thread has numbers of its own, so that their order does not depend on how threads are scheduled.
    static DRAWN: Cell<u64> = const { Cell::new(0) };
}

/// Makes all random numbers of this process follow from a seed.
pub(crate) fn begin(seed: u64) {
    SEED.store(seed.wrapping_add(1).max(1), Ordering::Relaxed);
}

/// Replaces the function of the C library.
///
/// # Safety
/// `buffer` must be valid for writes of `length` bytes.
#[cfg(target_os = "linux")]
#[unsafe(no_mangle)]
unsafe extern "C" fn getrandom(buffer: *mut c_void, length: usize, flags: c_uint) -> isize {
    let seed = SEED.load(Ordering::Relaxed);
    if seed == 0 {
        // SAFETY: the caller vouches for the buffer.
        return unsafe { libc::syscall(libc::SYS_getrandom, buffer, length, flags) } as isize;
    }
    // SAFETY: the caller vouches for the buffer.
    let bytes = unsafe { std::slice::from_raw_parts_mut(buffer.cast::<u8>(), length) };
    for chunk in bytes.chunks_mut(8) {
        let drawn = DRAWN.get().wrapping_add(1);
        DRAWN.set(drawn);
        let number = fastrand::Rng::with_seed(seed ^ drawn.rotate_left(32)).u64(..).to_le_bytes();
        chunk.copy_from_slice(&number[..chunk.len()]);
    }
    length as isize
}
