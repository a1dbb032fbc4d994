//! Puts the rules of Landlock in force in a process that was just forked, and takes the rights of root from it.
//!
//! Its folder below `/proc` exists only then, so the last rule is added here. Nothing else may happen between `fork`
//! and `exec` than such calls: another thread of the worker may have held the allocator's lock.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

/// `LANDLOCK_RULE_PATH_BENEATH`.
const PATH_BENEATH: libc::c_int = 1;
/// Reading and writing files, and listing folders. Links in the folder lead to files that stay closed.
const ACCESS: u64 = 1 << 1 | 1 << 2 | 1 << 3;

/// `struct landlock_path_beneath_attr`.
#[repr(C, packed)]
struct Beneath {
    allowed_access: u64,
    parent_fd: libc::c_int,
}

/// Lets this process read what the kernel says of it, and name its threads, and puts the rules in force for good.
pub(super) fn enter(rules: BorrowedFd<'_>) -> io::Result<()> {
    let own = own_folder()?;
    let beneath = Beneath { allowed_access: ACCESS, parent_fd: own.as_raw_fd() };
    // SAFETY: the descriptors are open, and the kernel reads the structure that it expects for this kind of rule.
    check(unsafe {
        libc::syscall(libc::SYS_landlock_add_rule, rules.as_raw_fd(), PATH_BENEATH, &raw const beneath, 0)
    })?;
    // SAFETY: the call takes numbers only.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())?;
    // SAFETY: the descriptor is open.
    check(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, rules.as_raw_fd(), 0) })
}

/// Has the next program start without capabilities, also as root.
pub(super) fn drop_capabilities() {
    let none: libc::c_ulong = 0;
    let clear = libc::PR_CAP_AMBIENT_CLEAR_ALL as libc::c_ulong;
    // SAFETY: the call takes numbers only. A process may always do this.
    unsafe { libc::prctl(libc::PR_CAP_AMBIENT, clear, none, none, none) };
    // More than there are. Whoever may not drop them is not root, or is a root with few rights.
    for capability in 0_u64..64 {
        // SAFETY: the call takes numbers only.
        unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
    }
}

fn own_folder() -> io::Result<OwnedFd> {
    // SAFETY: the path ends with a zero.
    let folder = unsafe { libc::open(c"/proc/self".as_ptr(), libc::O_PATH | libc::O_CLOEXEC) };
    check(folder.into())?;
    // SAFETY: the descriptor was just opened and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(folder) })
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
