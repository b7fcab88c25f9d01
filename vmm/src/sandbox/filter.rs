//! Filters made of the calls that are needed.

use std::collections::btree_map::{BTreeMap, Entry};

use libc::{c_long, c_ulong};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

use super::calls::{
    ThreadKind, EVERY_THREAD, EVERY_THREAD_IOCTLS, PROCESS, PROCESS_IOCTLS, PROCESS_IOCTL_TYPE,
};
use crate::config::SandboxMode;

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// linux/prctl.h: how a process learns where the kernel's clock is.
const PR_GET_AUXV: libc::c_int = 0x4155_5856;

/// Type and number of an ioctl, and its type alone.
const IOCTL: u64 = 0xffff;
const IOCTL_TYPE: u64 = 0xff00;

/// The filter of all threads.
pub(super) fn process(mode: SandboxMode) -> Result<BpfProgram, BackendError> {
    let mut rules = any([&[EVERY_THREAD], PROCESS]);
    let dword = SeccompCmpArgLen::Dword;
    let mut ioctls = ioctls([&[EVERY_THREAD_IOCTLS], PROCESS_IOCTLS])?;
    let kvm = SeccompCmpOp::MaskedEq(IOCTL_TYPE);
    ioctls.push(rule([SeccompCondition::new(1, dword, kvm, PROCESS_IOCTL_TYPE)?])?);
    rules.insert(libc::SYS_ioctl, ioctls);
    // A library that is loaded late, for the names of hosts, is mapped to be run.
    rules.insert(libc::SYS_mmap, Vec::new());
    rules.insert(libc::SYS_mprotect, Vec::new());
    of_every_thread(&mut rules)?;
    let families = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];
    rules.insert(libc::SYS_socket, one_of(0, families.map(number))?);
    // Its own limits, which it reads.
    rules.insert(libc::SYS_prlimit64, one_of(0, [0])?);
    compile(rules, mode)
}

/// The filter of a thread of this kind, beside the process'.
pub(super) fn thread(kind: ThreadKind, mode: SandboxMode) -> Result<BpfProgram, BackendError> {
    let mut rules = any([&[EVERY_THREAD], kind.calls()]);
    rules.insert(libc::SYS_ioctl, ioctls([&[EVERY_THREAD_IOCTLS], kind.ioctls()])?);
    let not_executable =
        || masked(2, SeccompCmpArgLen::Dword, number(libc::PROT_EXEC), 0).map(|only| vec![only]);
    rules.insert(libc::SYS_mmap, not_executable()?);
    rules.insert(libc::SYS_mprotect, not_executable()?);
    of_every_thread(&mut rules)?;
    compile(rules, mode)
}

/// Says that there is no clone3(2), whose arguments lie in memory, where a filter cannot see them:
/// the C library takes clone(2) then.
pub(super) fn no_clone3() -> Result<BpfProgram, BackendError> {
    let rules = any([&[&[libc::SYS_clone3]]]);
    let missing = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    SeccompFilter::new(rules, SeccompAction::Allow, missing, TargetArch::x86_64)?.try_into()
}

/// Calls that depend on their arguments whatever the thread. Who may start anything may start threads,
/// no processes.
fn of_every_thread(rules: &mut Rules) -> Result<(), BackendError> {
    rules.insert(libc::SYS_tgkill, one_of(0, [std::process::id().into()])?);
    let options = [
        libc::PR_SET_NAME,
        libc::PR_GET_NAME,
        libc::PR_SET_NO_NEW_PRIVS,
        libc::PR_SET_VMA,
        PR_GET_AUXV,
    ];
    rules.insert(libc::SYS_prctl, one_of(0, options.map(number))?);
    if let Entry::Vacant(fcntl) = rules.entry(libc::SYS_fcntl) {
        // The standard library looks, when it is built for debugging, at a descriptor that it closes.
        fcntl.insert(one_of(1, [number(libc::F_GETFD)])?);
    }
    if rules.contains_key(&libc::SYS_clone3) {
        let thread = number(libc::CLONE_THREAD);
        rules.insert(libc::SYS_clone, vec![masked(0, SeccompCmpArgLen::Qword, thread, thread)?]);
    }
    Ok(())
}

fn any<const N: usize>(sets: [&[&[c_long]]; N]) -> Rules {
    sets.iter().copied().flatten().copied().flatten().map(|call| (*call, Vec::new())).collect()
}

fn ioctls<const N: usize>(sets: [&[&[c_ulong]]; N]) -> Result<Vec<SeccompRule>, BackendError> {
    let all = sets.iter().copied().flatten().copied().flatten();
    all.map(|ioctl| masked(1, SeccompCmpArgLen::Dword, IOCTL, *ioctl)).collect()
}

/// Argument `index` is one of `values`, of 32 bits.
fn one_of<const N: usize>(index: u8, values: [u64; N]) -> Result<Vec<SeccompRule>, BackendError> {
    let all = values.into_iter();
    all.map(|value| masked(index, SeccompCmpArgLen::Dword, u32::MAX.into(), value)).collect()
}

/// Argument `index`, of which only the bits of `mask` count, is `value`.
fn masked(
    index: u8,
    len: SeccompCmpArgLen,
    mask: u64,
    value: u64,
) -> Result<SeccompRule, BackendError> {
    rule([SeccompCondition::new(index, len, SeccompCmpOp::MaskedEq(mask), value)?])
}

fn rule<const N: usize>(conditions: [SeccompCondition; N]) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(conditions.into())
}

/// A constant of the C library's, none of which is negative.
fn number(constant: libc::c_int) -> u64 {
    constant.unsigned_abs().into()
}

fn compile(rules: Rules, mode: SandboxMode) -> Result<BpfProgram, BackendError> {
    let otherwise = match mode {
        SandboxMode::Log => SeccompAction::Log,
        SandboxMode::On | SandboxMode::Off => SeccompAction::KillProcess,
    };
    SeccompFilter::new(rules, otherwise, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}
