//! The hardware on a counting line, and 16-bit register accesses.

use std::sync::Arc;

use super::AcpiPm;
use crate::test_utils::{CountingLine, CountingPower};
use crate::BusDevice;

pub(super) const STATUS: u64 = 0;
pub(super) const ENABLE: u64 = 2;
pub(super) const CONTROL: u64 = 4;

pub(super) struct Fixture {
    pub(super) device: AcpiPm,
    pub(super) sci: Arc<CountingLine>,
    pub(super) power: Arc<CountingPower>,
}

impl Fixture {
    pub(super) fn read16(&mut self, offset: u64) -> u16 {
        let mut data = [0; 2];
        self.device.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    pub(super) fn write16(&mut self, offset: u64, value: u16) {
        self.device.write(offset, &value.to_le_bytes());
    }
}

pub(super) fn fixture() -> Fixture {
    let sci = Arc::new(CountingLine::default());
    let power = Arc::new(CountingPower::default());
    Fixture { device: AcpiPm::new(sci.clone(), power.clone()), sci, power }
}
