//! kvmclock, and the frequency of the time stamp counter.
//!
//! Source: Documentation/virt/kvm/x86/msr.rst and cpuid.rst.

use core::sync::atomic::{
    fence, AtomicI8, AtomicU32, AtomicU64, AtomicU8,
    Ordering::{Acquire, Relaxed},
};

use beacon_core::time::{ClockPage, TscScale, GUEST_STOPPED};

use crate::cpu::{cpuid, inb, outb, tsc};
use crate::ring0::wrmsr;

const MSR_KVM_SYSTEM_TIME_NEW: u32 = 0x4B56_4D01;
const KVM_LEAF: u32 = 0x4000_0000;
const KVM_FEATURE_CLOCKSOURCE2: u32 = 1 << 3;

/// `struct pvclock_vcpu_time_info`, which KVM writes.
#[repr(C, align(64))]
pub struct Page {
    version: AtomicU32,
    _pad0: u32,
    tsc_timestamp: AtomicU64,
    system_time: AtomicU64,
    tsc_to_system_mul: AtomicU32,
    tsc_shift: AtomicI8,
    flags: AtomicU8,
    _pad: [u8; 2],
}

impl Page {
    /// Has KVM keep this page up to date for the vCPU that calls. False if this is no KVM.
    pub fn register(&'static self) -> bool {
        if !is_kvm() {
            return false;
        }
        wrmsr(MSR_KVM_SYSTEM_TIME_NEW, &raw const *self as u64 | 1);
        self.read().is_some()
    }

    /// A consistent copy; `None` if KVM never wrote one.
    pub fn read(&self) -> Option<ClockPage> {
        self.read_with_tsc().map(|(page, _)| page)
    }

    /// The clock now, in nanoseconds.
    pub fn now(&self) -> Option<u64> {
        self.read_with_tsc().map(|(page, tsc)| page.nanoseconds(tsc))
    }

    /// A consistent copy, and a TSC that it holds for: read before the version is looked at
    /// again. When the VM is stopped in between, its TSC may go on while its clock does not, and
    /// the older page with the newer TSC would be a time that never was.
    fn read_with_tsc(&self) -> Option<(ClockPage, u64)> {
        loop {
            let version = self.version.load(Acquire);
            if version == 0 {
                return None;
            }
            let page = ClockPage {
                tsc_timestamp: self.tsc_timestamp.load(Relaxed),
                system_time: self.system_time.load(Relaxed),
                tsc_to_system_mul: self.tsc_to_system_mul.load(Relaxed),
                tsc_shift: self.tsc_shift.load(Relaxed),
            };
            let now = tsc();
            fence(Acquire);
            if version & 1 == 0 && self.version.load(Relaxed) == version {
                return Some((page, now));
            }
        }
    }

    /// Whether the host stopped this vCPU since the last call. KVM keeps the flag until the guest
    /// clears it, and sets it only while this vCPU does not run.
    pub fn take_stopped(&self) -> bool {
        self.flags.load(Relaxed) & GUEST_STOPPED != 0
            && self.flags.fetch_and(!GUEST_STOPPED, Relaxed) & GUEST_STOPPED != 0
    }
}

fn is_kvm() -> bool {
    let leaf = cpuid(KVM_LEAF, 0);
    let name = [leaf.ebx, leaf.ecx, leaf.edx].map(u32::to_le_bytes);
    cpuid(1, 0).ecx >> 31 == 1
        && name.as_flattened() == b"KVMKVMKVM\0\0\0"
        && leaf.eax > KVM_LEAF
        && cpuid(KVM_LEAF + 1, 0).eax & KVM_FEATURE_CLOCKSOURCE2 != 0
}

/// The scale of the TSC: from kvmclock, else from CPUID, else measured against the PIT.
pub fn tsc_scale(page: Option<ClockPage>) -> TscScale {
    let khz = page.and_then(|page| page.tsc_khz()).or_else(khz_from_cpuid);
    TscScale::new(khz.unwrap_or_else(khz_from_pit))
}

fn khz_from_cpuid() -> Option<u64> {
    if cpuid(0, 0).eax < 0x15 {
        return None;
    }
    let leaf = cpuid(0x15, 0);
    let khz = u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax.max(1)) / 1000;
    (khz != 0).then_some(khz)
}

/// Counts TSC ticks while the PIT's channel 0 counts down 10 ms (8254 data sheet, mode 2); 0 without
/// a PIT. Not channel 2, whose gate and output microvm lacks.
fn khz_from_pit() -> u64 {
    const PIT_HZ: u64 = 1_193_182;
    const CHANNEL_0: u16 = 0x40;
    const COMMAND: u16 = 0x43;
    let count = || {
        outb(COMMAND, 0); // latch
        u16::from_le_bytes([inb(CHANNEL_0), inb(CHANNEL_0)])
    };
    outb(COMMAND, 0x34);
    outb(CHANNEL_0, 0);
    outb(CHANNEL_0, 0);
    let (first, start) = (count(), tsc());
    loop {
        let (passed, ticks) = (u64::from(first.wrapping_sub(count())), tsc() - start);
        if passed >= PIT_HZ / 100 {
            return ticks * PIT_HZ / passed / 1000;
        }
        // What is a second at 4 GHz.
        if ticks > 4_000_000_000 {
            return 0;
        }
    }
}
