//! The state of the machine outside its vCPUs that KVM keeps: PICs, IOAPIC, PIT, clock.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

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
    /// Host's wall clock at that moment, nanoseconds since 1970.
    pub realtime_ns: Option<u64>,
    /// Host's TSC at that moment.
    pub host_tsc: u64,
}

/// The host's wall clock, nanoseconds since 1970; `None` before that.
fn realtime_ns() -> Option<u64> {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok()?;
    u64::try_from(since.as_nanos()).ok()
}

impl ClockStateV1 {
    /// How long the guest has been standing, if it began to about `standing` ago as far as this
    /// host knows, which hears of it a little late or early. The hosts' wall clocks tell exactly
    /// if they agree; if they obviously do not, what this host knows has to do.
    #[must_use]
    pub fn time_away(&self, standing: Duration) -> Duration {
        /// Wall clocks that are set from the same source are far closer.
        const AGREE: Duration = Duration::from_secs(1);
        let by_wall_clock = self
            .realtime_ns
            .and_then(|then| realtime_ns()?.checked_sub(then))
            .map(Duration::from_nanos);
        match by_wall_clock {
            Some(away) if away.abs_diff(standing) <= AGREE => away,
            _ => standing,
        }
    }
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
            realtime_ns: if has(kvm_bindings::KVM_CLOCK_REALTIME) {
                Some(clock.realtime)
            } else {
                realtime_ns()
            },
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn saved_ago(by_wall_clock: Duration) -> ClockStateV1 {
        let realtime_ns = realtime_ns().unwrap() - by_wall_clock.as_nanos() as u64;
        ClockStateV1 { clock_ns: 0, realtime_ns: Some(realtime_ns), host_tsc: 0 }
    }

    #[test]
    fn wall_clocks_tell_the_time_away_if_they_agree() {
        let standing = Duration::from_secs(100);
        let away = saved_ago(Duration::from_millis(100_020)).time_away(standing);
        assert!(away >= Duration::from_millis(100_020), "{away:?}");
        for wrong in [0, 50, 3600] {
            assert_eq!(saved_ago(Duration::from_secs(wrong)).time_away(standing), standing);
        }
        let unknown = ClockStateV1 { realtime_ns: None, ..saved_ago(standing) };
        assert_eq!(unknown.time_away(standing), standing);
    }
}
