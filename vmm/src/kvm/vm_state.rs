//! The state of the machine outside its vCPUs that KVM keeps: PICs, IOAPIC, PIT, clock.

use std::sync::Arc;

use devices::Persist;
use kvm_bindings::{
    kvm_clock_data, kvm_irqchip, kvm_pit_state2, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::vcpu_state::host_tsc;
use super::KvmError;

/// State of interrupt controllers and timer, version 1.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VmStateV1 {
    /// Master PIC, slave PIC, IOAPIC.
    pub irqchips: Vec<kvm_irqchip>,
    /// Interval timer.
    pub pit: kvm_pit_state2,
}

/// kvmclock and the moment it was read, version 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClockStateV1 {
    /// kvmclock of the VM, nanoseconds.
    pub clock_ns: u64,
    /// Host's wall clock at that moment, nanoseconds since 1970, where KVM tells.
    pub realtime_ns: Option<u64>,
    /// Host's TSC at that moment.
    pub host_tsc: u64,
}

/// The VM's descriptor as something that can be saved.
#[derive(Debug, Clone)]
pub struct VmKvm {
    /// The descriptor.
    pub fd: Arc<VmFd>,
}

const IRQCHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// kvmclock as a part of its own: it is put back when everything else is.
#[derive(Debug, Clone)]
pub struct VmClock {
    /// The VM's descriptor.
    pub fd: Arc<VmFd>,
}

impl Persist for VmClock {
    const KIND: &'static str = "clock";
    const VERSION: u16 = 1;
    type State = ClockStateV1;
    type Error = KvmError;

    fn save(&self) -> Result<ClockStateV1, KvmError> {
        let clock = self.fd.get_clock().map_err(KvmError::ioctl("reading the VM's clock"))?;
        // The flags say which fields KVM filled; on some hosts none, whatever is advertised.
        let has = |flag: u32| clock.flags & flag != 0;
        let host_tsc =
            if has(kvm_bindings::KVM_CLOCK_HOST_TSC) { clock.host_tsc } else { host_tsc() };
        Ok(ClockStateV1 {
            clock_ns: clock.clock,
            realtime_ns: has(kvm_bindings::KVM_CLOCK_REALTIME).then_some(clock.realtime),
            host_tsc,
        })
    }

    /// Lets the clock go on from the saved value: the time in between does not exist for the
    /// guest.
    fn restore(&mut self, state: &ClockStateV1) -> Result<(), KvmError> {
        let clock = kvm_clock_data { clock: state.clock_ns, ..Default::default() };
        self.fd.set_clock(&clock).map_err(KvmError::ioctl("setting the VM's clock"))
    }
}

impl Persist for VmKvm {
    const KIND: &'static str = "irqchip-pit";
    const VERSION: u16 = 1;
    type State = VmStateV1;
    type Error = KvmError;

    fn save(&self) -> Result<VmStateV1, KvmError> {
        let mut irqchips = Vec::with_capacity(IRQCHIPS.len());
        for chip_id in IRQCHIPS {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            self.fd
                .get_irqchip(&mut chip)
                .map_err(KvmError::ioctl(format!("reading interrupt controller {chip_id}")))?;
            irqchips.push(chip);
        }
        let pit = self.fd.get_pit2().map_err(KvmError::ioctl("reading the PIT"))?;
        Ok(VmStateV1 { irqchips, pit })
    }

    /// After the vCPUs: setting the IOAPIC delivers what is pending in it to their LAPICs.
    fn restore(&mut self, state: &VmStateV1) -> Result<(), KvmError> {
        for chip_id in IRQCHIPS {
            let chip = state.irqchips.iter().find(|c| c.chip_id == chip_id);
            let chip = chip.ok_or(KvmError::NoIrqchip(chip_id))?;
            self.fd
                .set_irqchip(chip)
                .map_err(KvmError::ioctl(format!("writing interrupt controller {chip_id}")))?;
        }
        self.fd.set_pit2(&state.pit).map_err(KvmError::ioctl("writing the PIT"))
    }
}
