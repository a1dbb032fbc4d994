//! Sends llama.cpp's log to `tracing` instead of standard error.
//!
//! The crate's own bridge keeps llama.cpp's levels, which are too noisy, and cannot return the reason for a failed
//! load to its caller.

#![allow(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::ffi::{CStr, c_char, c_void};
use std::ptr;
use std::sync::Once;

/// The maximum number of error lines that a thread keeps.
const KEPT_LINES_MAX: usize = 4;
/// The maximum number of characters that are kept of a line.
const LINE_CHARS_MAX: usize = 300;

thread_local! {
    // A load logs on the thread that requested it, so concurrent loads keep their errors apart.
    static ERRORS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
    static IS_QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Installs the log callback of this process. Later calls do nothing.
pub(super) fn take_over() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: `on_log` lives as long as the process, expects no user data and never unwinds.
        unsafe { llama_cpp_sys_2::llama_log_set(Some(on_log), ptr::null_mut()) }
    });
}

/// Returns the errors logged on this thread since the last call, the oldest first.
pub(super) fn take_errors() -> Vec<String> {
    ERRORS.take()
}

/// Keeps the errors of a call out of the log. [`take_errors`] still returns them.
#[cfg(feature = "portable")]
pub(super) fn quietly<T>(call: impl FnOnce() -> T) -> T {
    IS_QUIET.set(true);
    let result = call();
    IS_QUIET.set(false);
    result
}

unsafe extern "C" fn on_log(level: llama_cpp_sys_2::ggml_log_level, text: *const c_char, _data: *mut c_void) {
    if text.is_null() {
        return;
    }
    // SAFETY: llama.cpp passes a zero-terminated string that is valid for the length of this call.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    let line = text.trim();
    // Progress dots arrive as lines of their own.
    if line.trim_matches('.').is_empty() {
        return;
    }
    if level == llama_cpp_sys_2::GGML_LOG_LEVEL_ERROR {
        let is_quiet = IS_QUIET.try_with(Cell::get).unwrap_or_default();
        if !is_quiet {
            tracing::warn!(target: "llama_cpp", "{line}");
        }
        // A thread that is ending no longer has its list of errors.
        let _ = ERRORS.try_with(|errors| {
            let mut errors = errors.borrow_mut();
            if errors.len() < KEPT_LINES_MAX {
                errors.push(line.chars().take(LINE_CHARS_MAX).collect());
            }
        });
    } else {
        tracing::debug!(target: "llama_cpp", "{line}");
    }
}
