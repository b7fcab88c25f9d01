//! The state of one vCPU, taken and put back in the order that KVM needs.
//!
//! Order as in QEMU (`kvm_arch_get_registers`, `kvm_arch_put_registers`): MP_STATE is read first
//! because reading it makes KVM take pending INIT and SIPI, which change registers. When state is
//! put back, CPUID comes first (it decides what the rest may hold), special registers before the
//! LAPIC (they hold its base and mode), the TSC before its deadline, and the deadline after the
//! LAPIC whose timer it arms.
#![allow(unsafe_code)] // XSAVE of variable size, one attribute ioctl, rdtsc

use std::io;
use std::sync::Arc;

use devices::{Persist, PersistError};
use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_device_attr, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave, kvm_xsave2, CpuId, Msrs, Xsave,
    KVMIO, KVM_MAX_CPUID_ENTRIES, KVM_MAX_MSR_ENTRIES, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use vmm_sys_util::fam::FamStruct;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::KvmError;
use crate::cpu::missing_features;

// Documentation/virt/kvm/api.rst, 4.80 KVM_GET_DEVICE_ATTR (here on a vCPU: devices/vcpu.rst, group 4).
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);

/// IA32_TIME_STAMP_COUNTER (Intel SDM vol. 4, table 2-2).
const MSR_TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE.
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// Hyper-V's synthetic MSRs: never offered to guests, listed by KVM all the same.
const MSR_HYPERV: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_01ff;
/// Memory type ranges (MTRR) and machine-check banks: state that KVM does not list.
const MSR_UNLISTED: [std::ops::RangeInclusive<u32>; 6] = [
    0x200..=0x20f, // variable MTRRs
    0x250..=0x250, // fixed MTRR 64K
    0x258..=0x259, // fixed MTRRs 16K
    0x268..=0x26f, // fixed MTRRs 4K
    0x2ff..=0x2ff, // MTRR default type
    0x400..=0x47f, // machine-check banks
];

/// State of a vCPU, version 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VcpuStateV1 {
    /// MP_STATE: running, halted, waiting for SIPI, ...
    pub mp_state: kvm_mp_state,
    /// CPUID as the guest saw it: what KVM reports, not what it was told.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// General registers.
    pub regs: kvm_regs,
    /// Special registers, with the APIC base.
    pub sregs: kvm_sregs,
    /// XSAVE area, as many bytes as KVM gave.
    pub xsave: Vec<u8>,
    /// Extended control registers.
    pub xcrs: kvm_xcrs,
    /// Debug registers.
    pub debug_regs: kvm_debugregs,
    /// Local APIC.
    pub lapic: kvm_lapic_state,
    /// Pending and injected events.
    pub events: kvm_vcpu_events,
    /// Model-specific registers but TSC and TSC_DEADLINE: index and value.
    pub msrs: Vec<(u32, u64)>,
    /// Time.
    pub tsc: TscStateV1,
}

/// The time-stamp counter of a vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TscStateV1 {
    /// Frequency, kHz.
    pub khz: u32,
    /// The guest's TSC when the host's was `host`.
    pub value: u64,
    /// The host's TSC when `value` was read.
    pub host: u64,
    /// Guest TSC minus host TSC, where KVM tells.
    pub offset: Option<u64>,
    /// TSC_DEADLINE: 0 where the timer is not armed.
    pub deadline: u64,
}

/// A vCPU's descriptor with what is needed to save and restore it.
#[derive(Debug)]
pub struct VcpuKvm {
    /// The descriptor.
    pub fd: VcpuFd,
    id: u8,
    msrs: Arc<[u32]>,
    xsave_size: usize,
    tsc_offset: bool,
}

/// The host's time-stamp counter.
#[must_use]
pub fn host_tsc() -> u64 {
    // SAFETY: RDTSC has no preconditions on x86-64.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Which MSRs a vCPU's state is made of, from KVM's own list.
pub fn msrs_to_save(listed: &[u32]) -> Arc<[u32]> {
    let mut all: Vec<u32> = listed
        .iter()
        .copied()
        .chain(MSR_UNLISTED.into_iter().flatten())
        .filter(|i| ![MSR_TSC, MSR_TSC_DEADLINE].contains(i) && !MSR_HYPERV.contains(i))
        .collect();
    all.sort_unstable();
    all.dedup();
    all.into()
}

impl VcpuKvm {
    /// Makes vCPU `id` of `vm` with the CPUID it is to have. `msrs` as from [`msrs_to_save`].
    pub fn new(vm: &VmFd, id: u8, cpuid: &CpuId, msrs: Arc<[u32]>) -> Result<Self, KvmError> {
        let fd = vm
            .create_vcpu(u64::from(id))
            .map_err(KvmError::ioctl(format!("creating vCPU {id}")))?;
        fd.set_cpuid2(cpuid).map_err(KvmError::ioctl(format!("setting CPUID of vCPU {id}")))?;
        let xsave_size = usize::try_from(vm.check_extension_int(Cap::Xsave2))
            .unwrap_or(0)
            .max(size_of::<kvm_xsave>());
        let tsc_offset = tsc_offset(&fd).is_ok();
        let vcpu = Self { fd, id, msrs, xsave_size, tsc_offset };
        Ok(vcpu.without_unreadable_msrs())
    }

    /// Number of the vCPU.
    #[must_use]
    pub fn id(&self) -> u8 {
        self.id
    }

    fn failed(&self, what: &str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
        KvmError::ioctl(format!("{what} of vCPU {}", self.id))
    }

    /// KVM lists MSRs that this CPU model does not have: find that out once, not in every pause.
    fn without_unreadable_msrs(mut self) -> Self {
        let readable: Vec<u32> =
            self.msrs.iter().copied().filter(|i| self.read_msr(*i).is_ok()).collect();
        if readable.len() != self.msrs.len() {
            self.msrs = readable.into();
        }
        self
    }

    fn read_msr(&self, index: u32) -> Result<u64, KvmError> {
        let mut one = msr_list(&[(index, 0)])?;
        let read = self.fd.get_msrs(&mut one).map_err(self.failed("reading an MSR"))?;
        match one.as_slice().first() {
            Some(entry) if read == 1 => Ok(entry.data),
            _ => Err(KvmError::Msr { vcpu: self.id, index, what: "read" }),
        }
    }

    fn write_msr(&self, index: u32, value: u64) -> Result<(), KvmError> {
        let one = msr_list(&[(index, value)])?;
        match self.fd.set_msrs(&one).map_err(self.failed("writing an MSR"))? {
            1 => Ok(()),
            _ => Err(KvmError::Msr { vcpu: self.id, index, what: "written" }),
        }
    }

    fn save_msrs(&self) -> Result<Vec<(u32, u64)>, KvmError> {
        let mut all = Vec::with_capacity(self.msrs.len());
        for chunk in self.msrs.chunks(KVM_MAX_MSR_ENTRIES) {
            let wanted: Vec<(u32, u64)> = chunk.iter().map(|i| (*i, 0)).collect();
            let mut list = msr_list(&wanted)?;
            let read = self.fd.get_msrs(&mut list).map_err(self.failed("reading MSRs"))?;
            if read != chunk.len() {
                return Err(KvmError::Msr { vcpu: self.id, index: chunk[read], what: "read" });
            }
            all.extend(list.as_slice().iter().map(|e| (e.index, e.data)));
        }
        Ok(all)
    }

    /// Sets MSRs and checks how many KVM took: it stops at the first that it refuses. One that
    /// holds the wanted value already is no loss (KVM refuses writes to some read-only ones).
    fn restore_msrs(&self, mut wanted: &[(u32, u64)]) -> Result<(), KvmError> {
        while !wanted.is_empty() {
            let chunk = &wanted[..wanted.len().min(KVM_MAX_MSR_ENTRIES)];
            let taken = self.fd.set_msrs(&msr_list(chunk)?).map_err(self.failed("writing MSRs"))?;
            let Some((index, value)) = chunk.get(taken).copied() else {
                wanted = &wanted[chunk.len()..];
                continue;
            };
            if self.read_msr(index).ok() != Some(value) {
                return Err(KvmError::Msr { vcpu: self.id, index, what: "written" });
            }
            wanted = &wanted[taken + 1..];
        }
        Ok(())
    }

    fn save_xsave(&self) -> Result<Vec<u8>, KvmError> {
        let mut xsave = new_xsave(self.xsave_size)?;
        // SAFETY: the area has the size that KVM_CAP_XSAVE2 gave for this VM, and no feature is
        // enabled dynamically afterwards.
        unsafe { self.fd.get_xsave2(&mut xsave) }.map_err(self.failed("reading XSAVE"))?;
        let inner = xsave.as_fam_struct_ref();
        let words = inner.xsave.region.iter().chain(inner.as_slice());
        Ok(words.flat_map(|w| w.to_le_bytes()).collect())
    }

    fn restore_xsave(&self, bytes: &[u8]) -> Result<(), KvmError> {
        if bytes.len() % 4 != 0 || bytes.len() > self.xsave_size {
            return Err(KvmError::XsaveSize { found: bytes.len(), here: self.xsave_size });
        }
        let mut xsave = new_xsave(self.xsave_size)?;
        let mut words = bytes.chunks_exact(4).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]]));
        // SAFETY: the length of the flexible array is not changed.
        let inner = unsafe { xsave.as_mut_fam_struct() };
        for (to, from) in inner.xsave.region.iter_mut().zip(words.by_ref()) {
            *to = from;
        }
        for (to, from) in inner.as_mut_slice().iter_mut().zip(words) {
            *to = from;
        }
        // SAFETY: as above: the area is as large as KVM reads.
        unsafe { self.fd.set_xsave2(&xsave) }.map_err(self.failed("writing XSAVE"))
    }

    fn cpuid(&self) -> Result<CpuId, KvmError> {
        self.fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(self.failed("reading CPUID"))
    }

    fn save_tsc(&self) -> Result<TscStateV1, KvmError> {
        let before = host_tsc();
        let value = self.read_msr(MSR_TSC)?;
        let host = before + host_tsc().wrapping_sub(before) / 2;
        let offset = self.tsc_offset.then(|| tsc_offset(&self.fd)).transpose()?;
        Ok(TscStateV1 {
            khz: self.fd.get_tsc_khz().unwrap_or(0),
            value,
            host,
            offset,
            deadline: self.read_msr(MSR_TSC_DEADLINE).unwrap_or(0),
        })
    }

    /// Lets the TSC go on from where it stood when the host's TSC was `saved_at`, as if the host's
    /// were `now`, then arms the timer. All vCPUs get the same two moments, so that they stay as
    /// far from each other as they were.
    pub fn restore_tsc(&self, tsc: &TscStateV1, saved_at: u64, now: u64) -> Result<(), KvmError> {
        /// The two reads behind `value - host` are this close, in ticks; on a host that scales,
        /// they are farther from the offset by far.
        const CLOSE: u64 = 1_000_000;
        let scaled = self.set_tsc_frequency(tsc.khz)?;
        let was_scaled = |offset: u64| {
            let off_by = tsc.value.wrapping_sub(tsc.host).wrapping_sub(offset);
            off_by.min(off_by.wrapping_neg()) > CLOSE
        };
        match tsc.offset {
            // An offset counts ticks of the guest's frequency: it moves by the host's ticks only
            // where the two are the same, there and here.
            Some(offset) if self.tsc_offset && !scaled && !was_scaled(offset) => {
                let offset = offset.wrapping_add(saved_at).wrapping_sub(now);
                set_tsc_offset(&self.fd, offset)?;
            }
            _ => {
                let at_save = tsc.value.wrapping_add(saved_at.wrapping_sub(tsc.host));
                self.write_msr(MSR_TSC, at_save)?;
            }
        }
        if tsc.deadline != 0 {
            self.write_msr(MSR_TSC_DEADLINE, tsc.deadline)?;
        }
        Ok(())
    }

    /// Gives the guest the frequency that it had; tells whether the host's is another. Whether KVM
    /// can do so was checked before the machine was made.
    fn set_tsc_frequency(&self, khz: u32) -> Result<bool, KvmError> {
        let here = self.fd.get_tsc_khz().unwrap_or(0);
        let differs = crate::identity::tsc_differs(khz, here);
        if differs {
            self.fd.set_tsc_khz(khz).map_err(self.failed("setting the TSC frequency"))?;
        }
        Ok(differs)
    }

    /// Tells the guest that it was stopped (kvmclock's PVCLOCK_GUEST_STOPPED), so that its
    /// watchdogs do not take the pause for a lock-up. No error when it uses no kvmclock.
    pub fn notify_stopped(&self) {
        let _ = self.fd.kvmclock_ctrl();
    }
}

impl Persist for VcpuKvm {
    const KIND: &'static str = "vcpu";
    const VERSION: u16 = 1;
    type State = VcpuStateV1;
    type Error = KvmError;

    fn save(&self) -> Result<VcpuStateV1, KvmError> {
        let fd = &self.fd;
        let mp_state = fd.get_mp_state().map_err(self.failed("reading MP_STATE"))?;
        let regs = fd.get_regs().map_err(self.failed("reading registers"))?;
        let sregs = fd.get_sregs().map_err(self.failed("reading special registers"))?;
        let xsave = self.save_xsave()?;
        let xcrs = fd.get_xcrs().map_err(self.failed("reading XCRs"))?;
        let debug_regs = fd.get_debug_regs().map_err(self.failed("reading debug registers"))?;
        let tsc = self.save_tsc()?;
        let lapic = fd.get_lapic().map_err(self.failed("reading the LAPIC"))?;
        let msrs = self.save_msrs()?;
        let events = fd.get_vcpu_events().map_err(self.failed("reading events"))?;
        let cpuid = fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(self.failed("reading CPUID"))?;
        let cpuid = cpuid.as_slice().to_vec();
        Ok(VcpuStateV1 {
            mp_state,
            cpuid,
            regs,
            sregs,
            xsave,
            xcrs,
            debug_regs,
            lapic,
            events,
            msrs,
            tsc,
        })
    }

    /// All but the TSC and its deadline: see [`VcpuKvm::restore_tsc`]. CPUID was set when the
    /// vCPU was made; a KVM that shows the host's own whatever it was told is found out here.
    fn restore(&mut self, state: &VcpuStateV1) -> Result<(), KvmError> {
        let fd = &self.fd;
        let saw =
            CpuId::from_entries(&state.cpuid).map_err(|_| KvmError::TooMany("CPUID leaves"))?;
        let missing = missing_features(&saw, &self.cpuid()?);
        if !missing.is_empty() {
            return Err(KvmError::Features { vcpu: self.id, missing });
        }
        fd.set_mp_state(state.mp_state).map_err(self.failed("writing MP_STATE"))?;
        fd.set_regs(&state.regs).map_err(self.failed("writing registers"))?;
        fd.set_sregs(&state.sregs).map_err(self.failed("writing special registers"))?;
        // XCR0 first: it decides which parts of the XSAVE area may be in use. A host without XSAVE
        // has none to read, and refuses that they be written.
        if state.xcrs.nr_xcrs != 0 {
            fd.set_xcrs(&state.xcrs).map_err(self.failed("writing XCRs"))?;
        }
        self.restore_xsave(&state.xsave)?;
        fd.set_debug_regs(&state.debug_regs).map_err(self.failed("writing debug registers"))?;
        fd.set_lapic(&state.lapic).map_err(self.failed("writing the LAPIC"))?;
        self.restore_msrs(&state.msrs)?;
        fd.set_vcpu_events(&state.events).map_err(self.failed("writing events"))
    }
}

fn tsc_offset_attr(addr: u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr,
    }
}

/// Guest TSC minus host TSC.
fn tsc_offset(fd: &VcpuFd) -> Result<u64, KvmError> {
    let mut offset = 0_u64;
    let attr = tsc_offset_attr(std::ptr::from_mut(&mut offset) as u64);
    // SAFETY: the kernel writes one u64 to the address in `attr`, which is `offset`.
    let rc = unsafe { ioctl_with_ref(fd, KVM_GET_DEVICE_ATTR(), &attr) };
    attr_result(rc, "reading the TSC offset").map(|()| offset)
}

fn set_tsc_offset(fd: &VcpuFd, offset: u64) -> Result<(), KvmError> {
    let attr = tsc_offset_attr(std::ptr::from_ref(&offset) as u64);
    // SAFETY: the kernel reads one u64 from the address in `attr`, which is `offset`.
    let rc = unsafe { ioctl_with_ref(fd, KVM_SET_DEVICE_ATTR(), &attr) };
    attr_result(rc, "setting the TSC offset")
}

fn attr_result(rc: i32, what: &str) -> Result<(), KvmError> {
    if rc == 0 {
        return Ok(());
    }
    Err(KvmError::Ioctl { what: what.to_owned(), error: io::Error::last_os_error() })
}

fn msr_list(wanted: &[(u32, u64)]) -> Result<Msrs, KvmError> {
    let entries: Vec<kvm_msr_entry> = wanted
        .iter()
        .map(|(index, data)| kvm_msr_entry { index: *index, data: *data, ..Default::default() })
        .collect();
    Msrs::from_entries(&entries).map_err(|_| KvmError::TooMany("MSRs"))
}

fn new_xsave(size: usize) -> Result<Xsave, KvmError> {
    let extra = size.saturating_sub(size_of::<kvm_xsave>());
    Xsave::new(extra.div_ceil(size_of::<<kvm_xsave2 as FamStruct>::Entry>()))
        .map_err(|_| KvmError::TooMany("XSAVE bytes"))
}

impl From<PersistError> for KvmError {
    fn from(error: PersistError) -> Self {
        Self::State(error)
    }
}
