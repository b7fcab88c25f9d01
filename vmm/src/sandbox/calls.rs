//! The system calls that each kind of thread needs.
//!
//! Numbers of ioctls are type and number alone (asm-generic/ioctl.h), without direction and size.

use libc::*;

/// What a thread is there for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadKind {
    /// Runs a vCPU.
    Vcpu,
    /// Serves a virtio disk.
    Disk,
    /// Serves a virtio network card.
    Card,
    /// Serves a virtio device that has no descriptors of the host's to work on but open ones to read:
    /// entropy, balloon, console.
    Device,
    /// Moves bytes between console and terminal, socket or file.
    Console,
    /// Waits for signals, or for the size of a terminal.
    Signals,
    /// Makes vCPUs rest.
    Throttle,
    /// Source of a migration: sends pages.
    Sender,
    /// Destination of a migration: receives pages.
    Receiver,
    /// Either end of a migration: reads or writes records of the main connection.
    Link,
    /// Destination of a migration: accepts connections, and starts a thread for each.
    Door,
    /// Destination of a migration: finds out what a connection is for, reads it or answers it from the
    /// journal.
    Stranger,
    /// Serves page faults of a guest whose memory is still elsewhere, and other threads of the
    /// migration engine.
    Faults,
}

impl ThreadKind {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::Vcpu,
        Self::Disk,
        Self::Card,
        Self::Device,
        Self::Console,
        Self::Signals,
        Self::Throttle,
        Self::Sender,
        Self::Receiver,
        Self::Link,
        Self::Door,
        Self::Stranger,
        Self::Faults,
    ];

    /// The kind of a thread of the migration engine; `None` for one that is restricted as the
    /// process is.
    #[must_use]
    pub fn of_engine(name: &str) -> Option<Self> {
        let is = |prefix| name.starts_with(prefix);
        match name {
            "mig-alive" | "mig-main-in" | "mig-frames" => Some(Self::Link),
            // As `receive`, whose work it does.
            "mig-load" => None,
            "mig-door" => Some(Self::Door),
            "mig-stranger" => Some(Self::Stranger),
            _ if is("mig-send-") => Some(Self::Sender),
            _ if is("mig-recv-") => Some(Self::Receiver),
            _ if is("mig-") || is("pc-") => Some(Self::Faults),
            _ => None,
        }
    }

    /// The kind of the thread that serves a virtio device of this kind (`virtio-block`, ...).
    #[must_use]
    pub fn of_device(name: &str) -> Self {
        match name {
            "virtio-block" => Self::Disk,
            "virtio-net" => Self::Card,
            _ => Self::Device,
        }
    }

    /// The calls that it needs beyond those of [`EVERY_THREAD`].
    pub(super) fn calls(self) -> &'static [&'static [c_long]] {
        match self {
            Self::Vcpu | Self::Throttle => &[],
            Self::Disk => &[EPOLL, DISK],
            Self::Card => &[EPOLL, VECTORS],
            Self::Device => &[EPOLL],
            Self::Console => &[POLL, CONNECTION, &[SYS_accept4, SYS_fcntl]],
            Self::Signals => &[EPOLL, CONNECTION],
            Self::Sender | Self::Receiver => &[POLL, CONNECTION, VECTORS],
            Self::Link => &[POLL, CONNECTION],
            Self::Door => &[POLL, CONNECTION, FILES, NEW_THREADS, &[SYS_accept4, SYS_fcntl]],
            Self::Stranger => &[POLL, CONNECTION, FILES],
            Self::Faults => &[EPOLL, POLL, CONNECTION, VECTORS, DISK, FAULTS],
        }
    }

    /// The ioctls that it needs beyond those of [`EVERY_THREAD_IOCTLS`].
    pub(super) fn ioctls(self) -> &'static [&'static [c_ulong]] {
        match self {
            Self::Vcpu => &[&[KVM_RUN, KVM_IRQ_LINE, KVM_GET_REGS, KVM_GET_SREGS, TUNSETOFFLOAD]],
            Self::Disk | Self::Device => &[&[KVM_IRQ_LINE]],
            Self::Card => &[&[KVM_IRQ_LINE, TUNSETOFFLOAD]],
            Self::Console => &[&[KVM_IRQ_LINE, FIONBIO_]],
            Self::Signals => &[&[KVM_IRQ_LINE, TIOCGWINSZ_]],
            Self::Sender => &[&[KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG]],
            Self::Throttle | Self::Receiver | Self::Link | Self::Stranger => &[],
            Self::Door => &[&[FIONBIO_]],
            Self::Faults => &[&[KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG], USERFAULTFD],
        }
    }
}

const KVM: c_ulong = 0xae00;
const KVM_GET_DIRTY_LOG: c_ulong = KVM | 0x42;
const KVM_IRQ_LINE: c_ulong = KVM | 0x61;
const KVM_RUN: c_ulong = KVM | 0x80;
const KVM_GET_REGS: c_ulong = KVM | 0x81;
const KVM_GET_SREGS: c_ulong = KVM | 0x83;
const KVM_CLEAR_DIRTY_LOG: c_ulong = KVM | 0xc0;

const TTY: c_ulong = 0x5400;
const TCGETS_: c_ulong = TTY | 0x01;
const TCSETS_: c_ulong = TTY | 0x02;
const TIOCGPGRP_: c_ulong = TTY | 0x0f;
const TIOCGWINSZ_: c_ulong = TTY | 0x13;
const FIONREAD_: c_ulong = TTY | 0x1b;
const FIONBIO_: c_ulong = TTY | 0x21;
const TCGETS2_: c_ulong = TTY | 0x2a;
const TCSETS2_: c_ulong = TTY | 0x2b;
const TIOCGPTN_: c_ulong = TTY | 0x30;
const TIOCSPTLCK_: c_ulong = TTY | 0x31;
const TIOCGPTPEER_: c_ulong = TTY | 0x41;
const FIOCLEX_: c_ulong = TTY | 0x51;
const TUNSETIFF: c_ulong = TTY | 202;
const TUNSETOFFLOAD: c_ulong = TTY | 208;
const TUNSETVNETHDRSZ: c_ulong = TTY | 216;

const PAGEMAP_SCAN: c_ulong = 0x6610;
const SIOCGIFINDEX_: c_ulong = 0x8933;
/// linux/userfaultfd.h: USERFAULTFD_IOC_NEW, UNREGISTER and WAKE, COPY to CONTINUE, POISON and MOVE.
const USERFAULTFD: &[c_ulong] =
    &[0xaa00, 0xaa01, 0xaa02, 0xaa03, 0xaa04, 0xaa05, 0xaa06, 0xaa07, 0xaa08, 0xaa3f];

/// Of all ioctls on descriptors of KVM, whatever the number.
pub(super) const PROCESS_IOCTL_TYPE: c_ulong = KVM;

/// The other ioctls of the process.
pub(super) const PROCESS_IOCTLS: &[&[c_ulong]] = &[
    &[TUNSETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ, SIOCGIFINDEX_],
    &[TIOCGPGRP_, TIOCGWINSZ_, TIOCGPTN_, TIOCSPTLCK_, TIOCGPTPEER_, FIONREAD_, FIONBIO_, FIOCLEX_],
    &[PAGEMAP_SCAN],
    USERFAULTFD,
];

/// What a thread needs to be one: memory, locks, time, logging, handlers of signals (one of them
/// sends a byte), panic, abort, and its end.
pub(super) const EVERY_THREAD: &[c_long] = &[
    SYS_brk,
    SYS_clock_getres,
    SYS_clock_gettime,
    SYS_clock_nanosleep,
    SYS_close,
    SYS_exit,
    SYS_exit_group,
    SYS_futex,
    SYS_getpid,
    SYS_getrandom,
    SYS_gettid,
    SYS_gettimeofday,
    SYS_madvise,
    SYS_mremap,
    SYS_munmap,
    SYS_nanosleep,
    SYS_read,
    SYS_restart_syscall,
    SYS_rseq,
    SYS_rt_sigaction,
    SYS_rt_sigprocmask,
    SYS_rt_sigreturn,
    SYS_sched_getaffinity,
    SYS_sched_yield,
    SYS_sendto,
    SYS_set_robust_list,
    SYS_sigaltstack,
    SYS_write,
    SYS_writev,
];

/// A panic gives the terminal its settings back.
pub(super) const EVERY_THREAD_IOCTLS: &[c_ulong] = &[TCGETS_, TCSETS_, TCGETS2_, TCSETS2_];

const EPOLL: &[c_long] = &[SYS_epoll_ctl, SYS_epoll_pwait, SYS_epoll_pwait2, SYS_epoll_wait];

const POLL: &[c_long] = &[SYS_poll, SYS_ppoll];

/// Work on a socket that exists.
const CONNECTION: &[c_long] = &[
    SYS_getpeername,
    SYS_getsockname,
    SYS_getsockopt,
    SYS_recvfrom,
    SYS_recvmsg,
    SYS_sendmsg,
    SYS_setsockopt,
    SYS_shutdown,
];

const VECTORS: &[c_long] = &[SYS_readv];

/// Work on a disk that is open.
const DISK: &[c_long] = &[
    SYS_fadvise64,
    SYS_fallocate,
    SYS_fdatasync,
    SYS_fsync,
    SYS_lseek,
    SYS_pread64,
    SYS_preadv,
    SYS_preadv2,
    SYS_pwrite64,
    SYS_pwritev,
    SYS_pwritev2,
];

/// Files by name: the journal, what was saved, the runtime directory.
const FILES: &[c_long] = &[
    SYS_access,
    SYS_chmod,
    SYS_copy_file_range,
    SYS_faccessat,
    SYS_faccessat2,
    SYS_fchmod,
    SYS_fchmodat,
    SYS_flock,
    SYS_fstat,
    SYS_fstatfs,
    SYS_fsync,
    SYS_fdatasync,
    SYS_ftruncate,
    SYS_getcwd,
    SYS_getdents64,
    SYS_link,
    SYS_linkat,
    SYS_lseek,
    SYS_lstat,
    SYS_mkdir,
    SYS_mkdirat,
    SYS_newfstatat,
    SYS_open,
    SYS_openat,
    SYS_readlink,
    SYS_readlinkat,
    SYS_rename,
    SYS_renameat,
    SYS_renameat2,
    SYS_rmdir,
    SYS_sendfile,
    SYS_splice,
    SYS_stat,
    SYS_statfs,
    SYS_statx,
    SYS_symlink,
    SYS_symlinkat,
    SYS_umask,
    SYS_unlink,
    SYS_unlinkat,
];

/// Threads, and filters for them, which can only be narrower. `clone` is restricted beyond that.
const NEW_THREADS: &[c_long] = &[SYS_clone3, SYS_seccomp];

/// userfaultfd, and what serving its events takes.
const FAULTS: &[c_long] = &[SYS_eventfd2, SYS_userfaultfd];

/// What the process needs beyond [`EVERY_THREAD`]: what its threads need, and what the main thread
/// and those of the API do, which start VMs' threads, migrations and their connections.
pub(super) const PROCESS: &[&[c_long]] = &[
    EPOLL,
    POLL,
    CONNECTION,
    VECTORS,
    DISK,
    FILES,
    NEW_THREADS,
    FAULTS,
    &[
        SYS_accept,
        SYS_accept4,
        SYS_arch_prctl,
        SYS_bind,
        SYS_capget,
        SYS_connect,
        SYS_dup,
        SYS_dup2,
        SYS_dup3,
        SYS_epoll_create,
        SYS_epoll_create1,
        SYS_fcntl,
        SYS_getcpu,
        SYS_getegid,
        SYS_geteuid,
        SYS_getgid,
        SYS_getpgid,
        SYS_getpgrp,
        SYS_getppid,
        SYS_getrusage,
        SYS_getuid,
        SYS_listen,
        SYS_membarrier,
        SYS_memfd_create,
        SYS_pipe2,
        SYS_pselect6,
        SYS_recvmmsg,
        SYS_sched_setaffinity,
        SYS_select,
        SYS_sendmmsg,
        SYS_set_tid_address,
        SYS_socketpair,
        SYS_sync_file_range,
        SYS_sysinfo,
        SYS_timerfd_create,
        SYS_timerfd_settime,
        SYS_uname,
    ],
];
