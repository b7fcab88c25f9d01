//! Interrupt lines into KVM's irqchip, and requests out of the devices.

use std::io;
use std::sync::Arc;

use devices::{InterruptLine, PowerRequests};
use kvm_ioctls::VmFd;

use crate::vcpu::{GuestRequest, RequestSink};

/// An edge on a line of the in-kernel irqchip. Synchronous: when `pulse` returns the edge is in
/// the irqchip's state, so that nothing is on its way when the machine is saved.
pub(super) struct IrqLine {
    pub vm: Arc<VmFd>,
    pub gsi: u32,
}

impl InterruptLine for IrqLine {
    fn pulse(&self) -> io::Result<()> {
        for active in [true, false] {
            self.vm
                .set_irq_line(self.gsi, active)
                .map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        }
        Ok(())
    }
}

/// Passes on what the guest asks of i8042 and ACPI.
pub(super) struct PowerSink(pub RequestSink);

impl PowerRequests for PowerSink {
    fn reset(&self) {
        (self.0)(GuestRequest::Reset);
    }

    fn power_off(&self) {
        (self.0)(GuestRequest::PowerOff);
    }
}
