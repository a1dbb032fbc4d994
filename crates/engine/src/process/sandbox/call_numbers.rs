//! A seccomp filter by the numbers of system calls alone.
//!
//! A list of refused calls says nothing of numbers that are not in it. On x86-64, each call has a second number, of the
//! x32 ABI, under the same architecture; and each release of Linux adds calls. This filter refuses both kinds.

use seccompiler::{BpfProgram, sock_filter};

/// The bit in the numbers of the x32 ABI. No other number is as high.
const X32: u32 = 0x4000_0000;

/// The newest call that was reviewed for this sandbox: `file_setattr` of Linux 6.17. Since Linux 5.1, new calls have
/// the same number on all processors.
pub(super) const NEWEST_REVIEWED: u32 = 469;

/// Returns a filter that refuses x32 calls, and calls that are too new to have been reviewed.
///
/// For a new call, the kernel seems not to have it, and the C library falls back on an older one.
pub(super) fn filter() -> BpfProgram {
    vec![
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        jump_forward(libc::BPF_JGE, X32, 2),
        jump_forward(libc::BPF_JGT, NEWEST_REVIEWED, 2),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
        statement(libc::BPF_RET | libc::BPF_K, refusal(libc::EPERM)),
        statement(libc::BPF_RET | libc::BPF_K, refusal(libc::ENOSYS)),
    ]
}

fn statement(code: u32, operand: u32) -> sock_filter {
    sock_filter { code: code as u16, jt: 0, jf: 0, k: operand }
}

/// Skips as many instructions if the comparison with the number holds.
fn jump_forward(comparison: u32, number: u32, skipped: u8) -> sock_filter {
    sock_filter { code: (libc::BPF_JMP | comparison | libc::BPF_K) as u16, jt: skipped, jf: 0, k: number }
}

fn refusal(errno: i32) -> u32 {
    libc::SECCOMP_RET_ERRNO | errno.unsigned_abs()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns what the filter says about a number, by following its jumps.
    fn verdict(number: u32) -> u32 {
        let program = filter();
        let mut at = 1;
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            let holds = match u32::from(code) & 0xf0 {
                _ if u32::from(code) & 0x07 == libc::BPF_RET => return k,
                libc::BPF_JGE => number >= k,
                _ => number > k,
            };
            at += 1 + usize::from(if holds { jt } else { jf });
        }
    }

    #[test]
    fn known_numbers_pass_and_x32_and_newer_ones_are_refused() {
        for number in [0, 39, NEWEST_REVIEWED] {
            assert_eq!(verdict(number), libc::SECCOMP_RET_ALLOW, "{number}");
        }
        for number in [NEWEST_REVIEWED + 1, 1_000, X32 - 1] {
            assert_eq!(verdict(number), refusal(libc::ENOSYS), "{number}");
        }
        for number in [X32, X32 + 59, u32::MAX] {
            assert_eq!(verdict(number), refusal(libc::EPERM), "{number}");
        }
    }
}
