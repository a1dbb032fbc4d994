//! The seccomp filter: which system calls an engine process may make.
//!
//! Without a GPU, the calls are known, so all others are refused ([`allowed`]). Drivers of GPUs make calls that change
//! with each version, so with a GPU only those are refused that lead out of the process ([`refused`]). Of the programs
//! that serve models, less is known: they may listen and start programs, and connect to nobody
//! ([`refused_to_servers`]).

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::{Needs, call_numbers};

/// Which calls a filter means: those with any arguments, or those for which all conditions of one rule hold.
type Calls = BTreeMap<c_long, Vec<SeccompRule>>;

/// Filters this thread and all others for good.
pub(super) fn close(needs: &Needs<'_>) -> Result<(), String> {
    let filters = filters(needs, std::process::id(), arch()?).map_err(|error| error.to_string())?;
    filters.iter().try_for_each(|filter| seccompiler::apply_filter_all_threads(filter)).map_err(said)
}

/// The filters of a process that is yet to be started.
#[derive(Debug)]
pub(super) struct ServerFilters([BpfProgram; 3]);

impl ServerFilters {
    pub(super) fn new() -> Result<Self, String> {
        server_filters(arch()?).map(Self).map_err(|error| error.to_string())
    }

    /// Filters this thread for good.
    pub(super) fn close(&self) -> Result<(), String> {
        self.apply().map_err(said)
    }

    /// Does the same, and allocates no memory: it may run in a process that was just forked.
    pub(super) fn apply(&self) -> Result<(), seccompiler::Error> {
        self.0.iter().try_for_each(|filter| seccompiler::apply_filter(filter))
    }
}

fn arch() -> Result<TargetArch, String> {
    TargetArch::try_from(std::env::consts::ARCH)
        .map_err(|_| "seccomp filters are made for x86-64, ARM64 and RISC-V only".to_owned())
}

fn said(error: seccompiler::Error) -> String {
    match error {
        seccompiler::Error::Seccomp(cause) | seccompiler::Error::Prctl(cause) => {
            format!("this kernel takes no seccomp filter ({cause})")
        }
        other => format!("seccomp fails: {other}"),
    }
}

const REFUSAL: SeccompAction = SeccompAction::Errno(libc::EPERM.unsigned_abs());

fn filters(needs: &Needs<'_>, pid: u32, arch: TargetArch) -> Result<[BpfProgram; 3], BackendError> {
    let filter = if needs.drivers {
        SeccompFilter::new(refused(pid)?, SeccompAction::Allow, REFUSAL, arch)?
    } else {
        SeccompFilter::new(allowed(needs, pid)?, REFUSAL, SeccompAction::Allow, arch)?
    };
    with_fallbacks(filter, arch)
}

fn server_filters(arch: TargetArch) -> Result<[BpfProgram; 3], BackendError> {
    let filter = SeccompFilter::new(refused_to_servers()?, SeccompAction::Allow, REFUSAL, arch)?;
    with_fallbacks(filter, arch)
}

/// Adds the filters of calls that seem not to exist.
fn with_fallbacks(filter: SeccompFilter, arch: TargetArch) -> Result<[BpfProgram; 3], BackendError> {
    // The arguments of `clone3` lie in memory, where no filter sees them. As if the kernel did not have it, the C
    // library uses `clone` instead.
    let missing = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    let clone3 = Calls::from([(libc::SYS_clone3, Vec::new())]);
    let clone3 = SeccompFilter::new(clone3, SeccompAction::Allow, missing, arch)?;
    // The last filter is the one that refuses further filters.
    Ok([clone3.try_into()?, call_numbers::filter(), filter.try_into()?])
}

/// Calls that only concern the process itself and the descriptors it has.
#[rustfmt::skip]
const HARMLESS: &[c_long] = &[
    // Open descriptors.
    libc::SYS_read, libc::SYS_write, libc::SYS_readv, libc::SYS_writev, libc::SYS_pread64, libc::SYS_pwrite64,
    libc::SYS_preadv, libc::SYS_lseek, libc::SYS_close, libc::SYS_dup, libc::SYS_dup3, libc::SYS_fstat,
    libc::SYS_newfstatat, libc::SYS_statx, libc::SYS_fadvise64, libc::SYS_pipe2, libc::SYS_eventfd2,
    libc::SYS_epoll_create1, libc::SYS_epoll_ctl, libc::SYS_epoll_pwait, libc::SYS_epoll_pwait2, libc::SYS_ppoll,
    libc::SYS_pselect6, libc::SYS_recvfrom, libc::SYS_recvmsg, libc::SYS_shutdown, libc::SYS_getsockopt,
    libc::SYS_getsockname, libc::SYS_getpeername,
    // Memory.
    libc::SYS_mmap, libc::SYS_munmap, libc::SYS_mremap, libc::SYS_mprotect, libc::SYS_madvise, libc::SYS_mincore,
    libc::SYS_brk,
    // Threads.
    libc::SYS_clone3, libc::SYS_futex, libc::SYS_set_robust_list, libc::SYS_get_robust_list, libc::SYS_rseq,
    libc::SYS_membarrier, libc::SYS_set_tid_address, libc::SYS_sched_yield, libc::SYS_sched_getaffinity,
    libc::SYS_getcpu, libc::SYS_exit, libc::SYS_exit_group, libc::SYS_restart_syscall,
    // Signal handlers.
    libc::SYS_rt_sigaction, libc::SYS_rt_sigprocmask, libc::SYS_rt_sigreturn, libc::SYS_sigaltstack,
    // Clocks.
    libc::SYS_clock_gettime, libc::SYS_clock_getres, libc::SYS_clock_nanosleep, libc::SYS_nanosleep,
    libc::SYS_gettimeofday, libc::SYS_times,
    // Facts.
    libc::SYS_getpid, libc::SYS_gettid, libc::SYS_getppid, libc::SYS_getuid, libc::SYS_geteuid, libc::SYS_getgid,
    libc::SYS_getegid, libc::SYS_getrusage, libc::SYS_getrandom, libc::SYS_uname, libc::SYS_sysinfo,
];

/// Older calls that newer processors do not have.
#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const HARMLESS_BEFORE: &[c_long] = &[
    libc::SYS_arch_prctl, libc::SYS_dup2, libc::SYS_epoll_wait, libc::SYS_getrlimit, libc::SYS_poll, libc::SYS_select,
    libc::SYS_setrlimit, libc::SYS_time,
];
#[cfg(not(target_arch = "x86_64"))]
const HARMLESS_BEFORE: &[c_long] = &[];

/// Calls that lead to other processes, to files, to the network, or to rarely tested parts of the kernel.
#[rustfmt::skip]
const HARMFUL: &[c_long] = &[
    // The network.
    libc::SYS_socket, libc::SYS_connect, libc::SYS_bind, libc::SYS_listen, libc::SYS_accept, libc::SYS_accept4,
    libc::SYS_sendmsg, libc::SYS_sendmmsg,
    // These make other calls, which no filter sees.
    libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register,
    // Other processes.
    libc::SYS_execve, libc::SYS_execveat, libc::SYS_ptrace, libc::SYS_process_vm_readv, libc::SYS_process_vm_writev,
    libc::SYS_process_madvise, libc::SYS_process_mrelease, libc::SYS_pidfd_open, libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal, libc::SYS_tkill, libc::SYS_rt_sigqueueinfo, libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_kcmp, libc::SYS_setpriority, libc::SYS_ioprio_set, libc::SYS_migrate_pages, libc::SYS_setns,
    libc::SYS_unshare, libc::SYS_shmget, libc::SYS_shmat, libc::SYS_shmdt, libc::SYS_shmctl, libc::SYS_msgget,
    libc::SYS_msgsnd, libc::SYS_msgrcv, libc::SYS_msgctl, libc::SYS_semget, libc::SYS_semop, libc::SYS_semtimedop,
    libc::SYS_semctl, libc::SYS_mq_open, libc::SYS_mq_unlink,
    // Files, where Landlock does not look.
    libc::SYS_chroot, libc::SYS_pivot_root, libc::SYS_mount, libc::SYS_umount2, libc::SYS_move_mount,
    libc::SYS_open_tree, libc::SYS_fsopen, libc::SYS_fsconfig, libc::SYS_fsmount, libc::SYS_fspick,
    libc::SYS_mount_setattr, libc::SYS_name_to_handle_at, libc::SYS_open_by_handle_at, libc::SYS_quotactl,
    libc::SYS_acct, libc::SYS_swapon, libc::SYS_swapoff, libc::SYS_fanotify_init, libc::SYS_fanotify_mark,
    // What files are, which Landlock leaves alone, and their length, which it guards since its third version only.
    libc::SYS_fchmod, libc::SYS_fchmodat, libc::SYS_fchown, libc::SYS_fchownat, libc::SYS_setxattr,
    libc::SYS_lsetxattr, libc::SYS_fsetxattr, libc::SYS_removexattr, libc::SYS_lremovexattr, libc::SYS_fremovexattr,
    libc::SYS_utimensat, libc::SYS_truncate,
    // The kernel.
    libc::SYS_bpf, libc::SYS_perf_event_open, libc::SYS_userfaultfd, libc::SYS_keyctl, libc::SYS_add_key,
    libc::SYS_request_key, libc::SYS_init_module, libc::SYS_finit_module, libc::SYS_delete_module,
    libc::SYS_kexec_load, libc::SYS_kexec_file_load, libc::SYS_reboot, libc::SYS_syslog, libc::SYS_personality,
    libc::SYS_settimeofday, libc::SYS_clock_settime, libc::SYS_adjtimex, libc::SYS_clock_adjtime, libc::SYS_sethostname,
    libc::SYS_setdomainname, libc::SYS_setuid, libc::SYS_setgid, libc::SYS_setreuid, libc::SYS_setregid,
    libc::SYS_setresuid, libc::SYS_setresgid, libc::SYS_setfsuid, libc::SYS_setfsgid, libc::SYS_setgroups,
    libc::SYS_capset,
];

/// Newer calls that the C library does not name on every processor. All have them under the same number.
const HARMFUL_SINCE: &[c_long] = &[
    443, // `quotactl_fd`
    452, // `fchmodat2`
    463, // `setxattrat`
    466, // `removexattrat`
    467, // `open_tree_attr`
    469, // `file_setattr`
];

/// Older calls that newer processors do not have.
#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const HARMFUL_BEFORE: &[c_long] = &[
    libc::SYS_fork, libc::SYS_vfork, libc::SYS_chmod, libc::SYS_chown, libc::SYS_lchown, libc::SYS_utime,
    libc::SYS_utimes, libc::SYS_futimesat, libc::SYS_iopl, libc::SYS_ioperm, libc::SYS_modify_ldt,
];
#[cfg(not(target_arch = "x86_64"))]
const HARMFUL_BEFORE: &[c_long] = &[];

/// Calls that change where and when a thread runs, or where its memory lies, of this process or of another one.
#[rustfmt::skip]
const SCHEDULING: &[c_long] = &[
    libc::SYS_sched_setaffinity, libc::SYS_sched_setscheduler, libc::SYS_sched_setparam, libc::SYS_sched_setattr,
    libc::SYS_move_pages,
];

/// Commands of `ioctl` that change files through a descriptor that only reads, or that reach other processes.
const HARMFUL_COMMANDS: &[u64] = &[
    0x4008_6602, // `FS_IOC_SETFLAGS`
    0x4004_6602, // the same for 32 bits
    0x4008_7602, // `FS_IOC_SETVERSION`
    0x401c_5820, // `FS_IOC_FSSETXATTR`
    0x4080_6685, // `FS_IOC_ENABLE_VERITY`
    0xc004_5877, // `FIFREEZE`
    0xc004_5878, // `FITHAW`
    0xc018_5879, // `FITRIM`
    0x8901,      // `FIOSETOWN`
    0x8902,      // `SIOCSPGRP`
    0x5412,      // `TIOCSTI`
    0x541c,      // `TIOCLINUX`
];

/// Operations of `fcntl` that make the kernel signal other processes, or hold them up when they open a file.
const HARMFUL_OPERATIONS: &[u64] = &[
    8,     // `F_SETOWN`
    10,    // `F_SETSIG`
    15,    // `F_SETOWN_EX`
    1_024, // `F_SETLEASE`
    1_026, // `F_NOTIFY`
];

/// Returns the only calls that an engine without a GPU may make.
fn allowed(needs: &Needs<'_>, pid: u32) -> Result<Calls, BackendError> {
    let mut calls: Calls = HARMLESS.iter().chain(HARMLESS_BEFORE).map(|call| (*call, Vec::new())).collect();
    let own = || is(0, pid.into());
    let unix = [is(0, libc::AF_UNIX as u64)?, masked(1, SOCKET_TYPE, libc::SOCK_STREAM as u64)?];
    let namespaces = NAMESPACES.into_iter().fold(0, |all, namespace| all | namespace);
    let thread = masked(0, (libc::CLONE_THREAD | namespaces) as u64, libc::CLONE_THREAD as u64);
    calls.extend([
        (libc::SYS_clone, vec![rule([thread?])?]),
        (libc::SYS_kill, vec![rule([own()?])?]),
        (libc::SYS_tgkill, vec![rule([own()?])?]),
        // No address: the socket's peer gets it.
        (libc::SYS_sendto, vec![rule([nowhere()?])?]),
        (libc::SYS_socketpair, vec![rule(unix)?]),
        (libc::SYS_prlimit64, vec![rule([is(0, 0)?])?]),
        // 0 is the calling thread.
        (libc::SYS_sched_setaffinity, vec![rule([is(0, 0)?])?]),
        (
            libc::SYS_prctl,
            any(0, &[libc::PR_SET_NAME, libc::PR_GET_NAME, libc::PR_SET_VMA].map(|option| option as u64))?,
        ),
        (
            libc::SYS_ioctl,
            any(1, &[libc::FIONBIO as i32, libc::FIOCLEX as i32, libc::TCGETS as i32].map(|command| command as u64))?,
        ),
        (
            libc::SYS_fcntl,
            // Not `F_SETOWN`, which makes the kernel signal another process.
            any(
                1,
                &[libc::F_DUPFD, libc::F_DUPFD_CLOEXEC, libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_SETFL]
                    .map(|operation| operation as u64),
            )?,
        ),
    ]);
    if !needs.files.is_empty() {
        // Landlock says which files. Before its third version, it lets a file that may be read be emptied as well.
        let changing = (libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC) as u64;
        calls.insert(libc::SYS_openat, vec![rule([masked(2, changing, libc::O_RDONLY as u64)?])?]);
    }
    Ok(calls)
}

fn harmful() -> impl Iterator<Item = c_long> {
    [HARMFUL, HARMFUL_SINCE, HARMFUL_BEFORE].into_iter().flatten().copied()
}

/// Returns the calls that an engine with a GPU may not make.
fn refused(pid: u32) -> Result<Calls, BackendError> {
    let mut calls: Calls = harmful().map(|call| (call, Vec::new())).collect();
    let others = || is_not(0, pid.into());
    let others_than_caller = vec![rule([others()?, is_not(0, 0)?])?];
    calls.extend(SCHEDULING.iter().map(|call| (*call, others_than_caller.clone())));
    calls.extend([
        (libc::SYS_clone, vec![rule([masked(0, libc::CLONE_THREAD as u64, 0)?])?]),
        (libc::SYS_kill, vec![rule([others()?])?]),
        (libc::SYS_tgkill, vec![rule([others()?])?]),
        (libc::SYS_sendto, vec![rule([somewhere()?])?]),
        (libc::SYS_ioctl, any(1, HARMFUL_COMMANDS)?),
        (libc::SYS_fcntl, any(1, HARMFUL_OPERATIONS)?),
        (libc::SYS_prlimit64, others_than_caller),
    ]);
    Ok(calls)
}

/// The bits of a socket's type that are no flags.
const SOCKET_TYPE: u64 = 0xf;

/// Flags of `clone` for a process with a view of its own of the system, in which it may do what it else may not.
const NAMESPACES: [i32; 7] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWNET,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWCGROUP,
];

/// Calls that a server makes, and an engine does not. Landlock refuses it the signals to others since Linux 6.12, and
/// ports of its choice, but not `listen` without a port: the kernel then picks one.
#[rustfmt::skip]
const SERVING: &[c_long] = &[
    libc::SYS_socket, libc::SYS_bind, libc::SYS_listen, libc::SYS_accept, libc::SYS_accept4, libc::SYS_sendmsg,
    libc::SYS_sendmmsg, libc::SYS_execve, libc::SYS_execveat, libc::SYS_tkill,
];

/// Older calls of the same kind, which newer processors do not have.
#[cfg(target_arch = "x86_64")]
const SERVING_BEFORE: &[c_long] = &[libc::SYS_fork, libc::SYS_vfork];
#[cfg(not(target_arch = "x86_64"))]
const SERVING_BEFORE: &[c_long] = &[];

/// Returns the calls that a server of others may not make.
fn refused_to_servers() -> Result<Calls, BackendError> {
    let is_served = |call: &c_long| SERVING.contains(call) || SERVING_BEFORE.contains(call);
    let mut calls: Calls = harmful().filter(|call| !is_served(call)).map(|call| (call, Vec::new())).collect();
    let others_than_caller = vec![rule([is_not(0, 0)?])?];
    calls.extend(SCHEDULING.iter().map(|call| (*call, others_than_caller.clone())));
    let fast_open = |argument| masked(argument, libc::MSG_FASTOPEN as u64, libc::MSG_FASTOPEN as u64);
    let namespaces = NAMESPACES.map(|flag| rule([masked(0, flag as u64, flag as u64)?]));
    calls.extend([
        (libc::SYS_socket, all_but_tcp()?),
        (libc::SYS_socketpair, other_types_than_stream()?),
        (libc::SYS_clone, namespaces.into_iter().collect::<Result<_, _>>()?),
        // Each could connect by the way.
        (libc::SYS_sendto, vec![rule([somewhere()?])?]),
        (libc::SYS_sendmsg, vec![rule([fast_open(2)?])?]),
        (libc::SYS_sendmmsg, vec![rule([fast_open(3)?])?]),
        (libc::SYS_ioctl, any(1, HARMFUL_COMMANDS)?),
        (libc::SYS_fcntl, any(1, HARMFUL_OPERATIONS)?),
        (libc::SYS_prlimit64, others_than_caller),
    ]);
    Ok(calls)
}

/// Returns a rule for each way to make a socket that is not one of TCP, which Landlock guards.
fn all_but_tcp() -> Result<Vec<SeccompRule>, BackendError> {
    let family = rule([is_not(0, libc::AF_INET as u64)?, is_not(0, libc::AF_INET6 as u64)?])?;
    // 0 stands for TCP as well.
    let protocol = rule([is_not(2, 0)?, is_not(2, libc::IPPROTO_TCP as u64)?])?;
    Ok([family, protocol].into_iter().chain(other_types_than_stream()?).collect())
}

fn other_types_than_stream() -> Result<Vec<SeccompRule>, BackendError> {
    let others = (0..=SOCKET_TYPE).filter(|kind| *kind != libc::SOCK_STREAM as u64);
    others.map(|kind| rule([masked(1, SOCKET_TYPE, kind)?])).collect()
}

fn rule(conditions: impl Into<Vec<SeccompCondition>>) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(conditions.into())
}

fn is(argument: u8, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
}

fn is_not(argument: u8, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, value)
}

fn masked(argument: u8, mask: u64, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(mask), value)
}

/// An address of null.
fn nowhere() -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(4, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)
}

/// An address of other than null.
fn somewhere() -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(4, SeccompCmpArgLen::Qword, SeccompCmpOp::Ne, 0)
}

/// Returns rules of which one holds if the argument is one of these values.
fn any(argument: u8, values: &[u64]) -> Result<Vec<SeccompRule>, BackendError> {
    values.iter().map(|value| rule([is(argument, *value)?])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_filters_are_made_for_every_processor_of_a_release() {
        for arch in [TargetArch::x86_64, TargetArch::aarch64] {
            assert!(server_filters(arch).is_ok_and(|filters| filters.iter().all(|filter| !filter.is_empty())));
            for drivers in [false, true] {
                let filters = filters(&Needs { files: Vec::new(), drivers }, 7, arch).expect("it is sound");
                assert!(filters.iter().all(|filter| !filter.is_empty()));
            }
        }
    }

    #[test]
    fn every_call_of_a_list_is_known_to_the_filter_of_numbers() {
        let newest = refused(7).expect("it is sound").into_keys().max();
        assert!(newest.is_some_and(|newest| newest <= c_long::from(call_numbers::NEWEST_REVIEWED)), "{newest:?}");
    }

    #[test]
    fn no_call_that_leads_out_is_among_the_harmless() {
        let allowed = allowed(&Needs::default(), 7).expect("it is sound");
        assert_eq!(harmful().filter(|call| allowed.contains_key(call)).count(), 0);
        assert!(!allowed.contains_key(&libc::SYS_openat));
        for call in [libc::SYS_clone, libc::SYS_kill, libc::SYS_sendto, libc::SYS_fcntl, libc::SYS_ioctl] {
            assert!(!allowed[&call].is_empty(), "{call} is allowed with any argument");
        }
    }
}
