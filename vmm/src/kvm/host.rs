//! Opening /dev/kvm, what is needed of it, and making a VM.
#![allow(unsafe_code)] // memory slots

use std::io;

use kvm_bindings::{
    kvm_enable_cap, kvm_pit_config, kvm_userspace_memory_region, CpuId, KVM_CAP_EXCEPTION_PAYLOAD,
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_PMU_CAPABILITY, KVM_CAP_X86_TRIPLE_FAULT_EVENT,
    KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, KVM_PIT_SPEAKER_DUMMY, KVM_PMU_CAP_DISABLE,
};
use kvm_ioctls::{Cap, Kvm, VmFd};

use crate::layout;
use crate::memory::{GuestRam, RamRegion};

const DEV_KVM: &str = "/dev/kvm";

/// `KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET` (api.rst, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2).
const MANUAL_PROTECT_INITIALLY_SET: u64 = 3;

/// Why KVM did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// The device is not there.
    #[error(
        "/dev/kvm does not exist: load the module (modprobe kvm_intel or kvm_amd) and check that \
         virtualization is on in the firmware, or, in a virtual machine, that nesting is on"
    )]
    Missing,
    /// The device may not be opened.
    #[error(
        "/dev/kvm may not be opened (permission denied): add this user to the group that owns it \
         (usually: usermod -aG kvm $USER, then log in again)"
    )]
    Denied,
    /// Opening failed otherwise.
    #[error("cannot open /dev/kvm: {0}")]
    Open(io::Error),
    /// A needed capability is missing.
    #[error("this host's KVM has no {0}, which minivmm needs: use a newer kernel")]
    Capability(&'static str),
    /// An ioctl failed.
    #[error("{what}: {error}")]
    Ioctl {
        /// Which one, for what.
        what: String,
        /// What the kernel said.
        error: io::Error,
    },
    /// KVM did not take or give a model-specific register.
    #[error("MSR {index:#x} of vCPU {vcpu} could not be {what}: the CPUs or kernels differ")]
    Msr {
        /// Which vCPU.
        vcpu: u8,
        /// Which register.
        index: u32,
        /// `read` or `written`.
        what: &'static str,
    },
    /// The guest saw features that this host's KVM does not show.
    #[error("vCPU {vcpu} ran with CPU features that this host lacks: {}", missing.join(", "))]
    Features {
        /// Which vCPU.
        vcpu: u8,
        /// Their names.
        missing: Vec<String>,
    },
    /// An XSAVE area that does not fit here.
    #[error("saved XSAVE area has {found} bytes, this host takes up to {here}: its CPU lacks features that the guest had")]
    XsaveSize {
        /// Bytes in the state.
        found: usize,
        /// Bytes here.
        here: usize,
    },
    /// A state without one of the interrupt controllers.
    #[error("saved state has no interrupt controller {0}")]
    NoIrqchip(u32),
    /// A list is longer than KVM takes.
    #[error("too many {0}")]
    TooMany(&'static str),
    /// A saved state could not be encoded or decoded.
    #[error(transparent)]
    State(devices::PersistError),
}

impl KvmError {
    /// For `map_err` on an ioctl.
    pub fn ioctl(what: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        let what = what.into();
        move |e| Self::Ioctl { what, error: io::Error::from_raw_os_error(e.errno()) }
    }
}

/// Capabilities without which nothing works here.
const NEEDED: [(Cap, &str); 9] = [
    (Cap::Irqchip, "in-kernel irqchip"),
    (Cap::UserMemory, "user memory slots"),
    (Cap::Pit2, "PIT"),
    (Cap::Irqfd, "irqfd"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::ImmediateExit, "immediate_exit"),
    (Cap::AdjustClock, "clock access"),
    (Cap::VcpuEvents, "vCPU events"),
    (Cap::Xsave2, "XSAVE2 (Linux 5.17)"),
];

/// An open /dev/kvm that can do what is needed.
#[derive(Debug)]
pub struct HostKvm {
    kvm: Kvm,
}

impl HostKvm {
    /// Opens /dev/kvm.
    pub fn open() -> Result<Self, KvmError> {
        let kvm = Kvm::new().map_err(|e| match e.errno() {
            libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::Missing,
            libc::EACCES | libc::EPERM => KvmError::Denied,
            errno => KvmError::Open(io::Error::from_raw_os_error(errno)),
        })?;
        let version = kvm.get_api_version();
        if version != 12 {
            return Err(KvmError::Open(io::Error::other(format!(
                "{DEV_KVM} speaks API version {version}, 12 is needed"
            ))));
        }
        for (cap, name) in NEEDED {
            if !kvm.check_extension(cap) {
                return Err(KvmError::Capability(name));
            }
        }
        Ok(Self { kvm })
    }

    /// The CPUID that a guest can be offered here.
    pub fn cpuid(&self) -> Result<CpuId, KvmError> {
        let supported = self
            .kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::ioctl("reading the CPUID that KVM supports"))?;
        // KVM leaves this one bit to a capability of its own (api.rst, KVM_CAP_TSC_DEADLINE_TIMER).
        let tsc_deadline = self.kvm.check_extension(Cap::TscDeadlineTimer);
        crate::cpu::host_cpuid(&supported, tsc_deadline)
            .map_err(|e| KvmError::Open(io::Error::other(e.to_string())))
    }

    /// Frequency of the host's TSC as a guest sees it, kHz, and whether KVM can scale it.
    pub fn tsc(&self) -> (u32, bool) {
        let khz = self.kvm.create_vm().and_then(|vm| vm.create_vcpu(0)?.get_tsc_khz()).unwrap_or(0);
        (khz, self.kvm.check_extension(Cap::TscControl))
    }

    /// MSRs that KVM says must be saved.
    pub fn msr_index_list(&self) -> Result<Vec<u32>, KvmError> {
        let list =
            self.kvm.get_msr_index_list().map_err(KvmError::ioctl("reading the list of MSRs"))?;
        Ok(list.as_slice().to_vec())
    }

    /// Makes a VM with irqchip and PIT, its memory in slots.
    pub fn create_vm(&self, ram: &GuestRam) -> Result<VmFd, KvmError> {
        let vm = self.kvm.create_vm().map_err(KvmError::ioctl("creating a VM"))?;
        let at = usize::try_from(layout::KVM_TSS).unwrap_or_default();
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(KvmError::ioctl("placing the identity map"))?;
        vm.set_tss_address(at).map_err(KvmError::ioctl("placing the TSS"))?;
        vm.create_irq_chip().map_err(KvmError::ioctl("creating the irqchip"))?;
        vm.create_pit2(kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() })
            .map_err(KvmError::ioctl("creating the PIT"))?;
        // Counters are not carried to another host, so there are none, whatever CPUID says.
        enable(&vm, KVM_CAP_PMU_CAPABILITY, u64::from(KVM_PMU_CAP_DISABLE));
        enable(&vm, KVM_CAP_EXCEPTION_PAYLOAD, 1);
        enable(&vm, KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1);
        enable(&vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, MANUAL_PROTECT_INITIALLY_SET);
        for (slot, region) in ram.regions().iter().enumerate() {
            set_slot(&vm, slot, region, false)?;
        }
        Ok(vm)
    }
}

/// Turns a capability on where KVM has it; what depends on it asks KVM again.
fn enable(vm: &VmFd, cap: u32, arg: u64) {
    if vm.check_extension_raw(cap.into()) > 0 {
        let enable = kvm_enable_cap { cap, args: [arg, 0, 0, 0], ..Default::default() };
        if let Err(error) = vm.enable_cap(&enable) {
            tracing::debug!(cap, %error, "capability not enabled");
        }
    }
}

/// Turns dirty logging of all slots on or off.
pub fn set_dirty_logging(vm: &VmFd, regions: &[RamRegion], on: bool) -> Result<(), KvmError> {
    regions.iter().enumerate().try_for_each(|(slot, region)| set_slot(vm, slot, region, on))
}

/// Sets memory slot `slot`, with or without dirty logging.
fn set_slot(vm: &VmFd, slot: usize, region: &RamRegion, log_dirty: bool) -> Result<(), KvmError> {
    let region = kvm_userspace_memory_region {
        slot: u32::try_from(slot).unwrap_or(u32::MAX),
        flags: if log_dirty { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
        guest_phys_addr: region.gpa,
        memory_size: region.len,
        userspace_addr: region.hva,
    };
    // SAFETY: the range is a mapping of `GuestRam`, which the machine keeps for as long as the
    // VM's descriptor; slots do not overlap, as regions do not.
    unsafe { vm.set_user_memory_region(region) }.map_err(KvmError::ioctl(format!(
        "giving the guest {} bytes of memory at {:#x}",
        region.memory_size, region.guest_phys_addr
    )))
}
