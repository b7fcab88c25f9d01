//! The live ACPI fixed hardware.

use std::sync::Arc;

use tracing::warn;

use super::AcpiPmMetrics;
use crate::{BusDevice, InterruptLine, PowerRequests};

/// Number of port addresses: event block (4) and control block (2).
pub const SIZE: u64 = 6;

/// Offset of the control block.
pub const CONTROL_OFFSET: u64 = 4;

/// SLP_TYP of the soft-off state S5, as `\_S5` of the DSDT must say.
pub const SLEEP_TYPE_S5: u8 = 5;

/// Status register: the power button was pressed (PWRBTN_STS). Enable register: PWRBTN_EN.
pub(super) const POWER_BUTTON: u16 = 1 << 8;
/// Enable register: global lock released (GBL_EN). Nobody but the guest has the lock, so the event
/// never comes; but ACPICA reports an error when the bit does not stick.
const GLOBAL_LOCK: u16 = 1 << 5;
/// Bits of the enable register that exist.
pub(super) const ENABLE_BITS: u16 = POWER_BUTTON | GLOBAL_LOCK;

/// Control register: events raise SCI, not SMI. Fixed: the machine has no SMM.
const SCI_EN: u16 = 1 << 0;
const SLP_TYP_SHIFT: u32 = 10;
pub(super) const SLP_TYP: u16 = 0b111 << SLP_TYP_SHIFT;
const SLP_EN: u16 = 1 << 13;

/// The PM1a event and control blocks.
pub struct AcpiPm {
    pub(super) status: u16,
    pub(super) enable: u16,
    /// SLP_TYP as last written; the other bits of the register are fixed or not stored.
    pub(super) sleep_type: u16,
    sci: Arc<dyn InterruptLine>,
    power: Arc<dyn PowerRequests>,
    metrics: Arc<AcpiPmMetrics>,
}

impl AcpiPm {
    /// The hardware after power-on, with the system control interrupt and the way to power-off.
    pub fn new(sci: Arc<dyn InterruptLine>, power: Arc<dyn PowerRequests>) -> Self {
        Self { status: 0, enable: 0, sleep_type: 0, sci, power, metrics: Arc::default() }
    }

    /// Presses the power button. Gives whether the guest listens: a press that no driver has
    /// enabled stays in the status register until one does.
    pub fn press_power_button(&mut self) -> bool {
        self.metrics.button_presses.increment();
        self.status |= POWER_BUTTON;
        // Also when the bit was set already: one edge too many is harmless, a lost one is not.
        self.raise_pending();
        self.enable & POWER_BUTTON != 0
    }

    /// Back to the state after power-on.
    pub fn reset(&mut self) {
        (self.status, self.enable, self.sleep_type) = (0, 0, 0);
    }

    /// Raises the SCI when an enabled event has not been served; see the crate's description.
    pub fn raise_pending(&self) {
        if self.status & self.enable == 0 {
            return;
        }
        match self.sci.pulse() {
            Ok(()) => self.metrics.sci_raised.increment(),
            Err(error) => {
                if self.metrics.interrupt_errors.get() == 0 {
                    warn!(%error, "the SCI cannot be raised");
                }
                self.metrics.interrupt_errors.increment();
            }
        }
    }

    /// The counters, readable without the device.
    pub fn metrics(&self) -> Arc<AcpiPmMetrics> {
        Arc::clone(&self.metrics)
    }

    fn registers(&self) -> [u8; SIZE as usize] {
        let [s0, s1] = self.status.to_le_bytes();
        let [e0, e1] = self.enable.to_le_bytes();
        let [c0, c1] = (SCI_EN | self.sleep_type).to_le_bytes();
        [s0, s1, e0, e1, c0, c1]
    }

    fn write_control(&mut self, value: u16) {
        self.sleep_type = value & SLP_TYP;
        if value & SLP_EN == 0 {
            return;
        }
        if self.sleep_type == u16::from(SLEEP_TYPE_S5) << SLP_TYP_SHIFT {
            self.power.power_off();
        } else {
            self.metrics.ignored_sleeps.increment();
        }
    }
}

impl BusDevice for AcpiPm {
    /// Any access within the block, of 1, 2 or 4 bytes.
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match within(offset, data.len()) {
            Some(range) => data.copy_from_slice(&self.registers()[range]),
            None => {
                data.fill(0xFF);
                self.metrics.odd_accesses.increment();
            }
        }
    }

    /// Any access within the block, of 1, 2 or 4 bytes. Bytes that are not written stay, except
    /// that only written ones clear their status bits.
    fn write(&mut self, offset: u64, data: &[u8]) {
        let Some(range) = within(offset, data.len()) else {
            self.metrics.odd_accesses.increment();
            return;
        };
        let touches = |first: usize| range.start < first + 2 && first < range.end;
        let mut bytes = self.registers();
        // Status is cleared by ones: what is not written must be zero.
        bytes[..2].fill(0);
        bytes[range.clone()].copy_from_slice(data);
        let [s0, s1, e0, e1, c0, c1] = bytes;

        self.status &= !u16::from_le_bytes([s0, s1]);
        if touches(2) {
            self.enable = u16::from_le_bytes([e0, e1]) & ENABLE_BITS;
            self.raise_pending();
        }
        if touches(4) {
            self.write_control(u16::from_le_bytes([c0, c1]));
        }
    }
}

/// The registers of an access, if it is one that a chipset would do.
fn within(offset: u64, length: usize) -> Option<std::ops::Range<usize>> {
    let start = usize::try_from(offset).ok()?;
    let end = start.checked_add(length)?;
    (matches!(length, 1 | 2 | 4) && end <= SIZE as usize).then_some(start..end)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::super::test_utils::*;
    use super::*;

    #[test]
    fn a_press_reaches_a_guest_that_listens() {
        let mut pm = fixture();
        pm.write16(ENABLE, POWER_BUTTON);
        assert_eq!(pm.sci.take(), 0);
        assert!(pm.device.press_power_button());
        assert_eq!(pm.sci.take(), 1);
        assert_eq!(pm.read16(STATUS), POWER_BUTTON);

        // What the guest's handler does: clear the bit, by writing it.
        pm.write16(STATUS, 0);
        assert_eq!(pm.read16(STATUS), POWER_BUTTON, "a zero clears nothing");
        pm.write16(STATUS, POWER_BUTTON);
        assert_eq!(pm.read16(STATUS), 0);
        assert_eq!(pm.sci.take(), 0);

        assert!(pm.device.press_power_button());
        assert_eq!(pm.sci.take(), 1, "the next press is another edge");
        assert_eq!(pm.device.metrics().button_presses.get(), 2);
    }

    #[test]
    fn a_press_before_the_driver_came_is_kept() {
        let mut pm = fixture();
        assert!(!pm.device.press_power_button());
        assert_eq!(pm.sci.take(), 0);
        pm.write16(ENABLE, POWER_BUTTON);
        assert_eq!(pm.sci.take(), 1);
    }

    #[test]
    fn only_existing_bits_stick() {
        let mut pm = fixture();
        pm.write16(ENABLE, 0xFFFF);
        assert_eq!(pm.read16(ENABLE), POWER_BUTTON | GLOBAL_LOCK);
        pm.write16(STATUS, 0xFFFF);
        assert_eq!(pm.read16(STATUS), 0);
        pm.write16(CONTROL, 0xDFFE);
        assert_eq!(pm.read16(CONTROL), 0x1C01);
        assert_eq!(pm.power.take(), (0, 0), "SLP_EN was not set");
    }

    #[test]
    fn power_off_as_linux_does_it() {
        let mut pm = fixture();
        pm.write16(CONTROL, 5 << 10 | 1);
        assert_eq!(pm.power.take(), (0, 0));
        pm.write16(CONTROL, 5 << 10 | 1 << 13 | 1);
        assert_eq!(pm.power.take(), (0, 1));
        assert_eq!(pm.read16(CONTROL), 5 << 10 | 1, "SLP_EN reads as zero");
    }

    #[test]
    fn power_off_by_the_high_byte_alone() {
        let mut pm = fixture();
        pm.device.write(CONTROL + 1, &[0x34]);
        assert_eq!(pm.power.take(), (0, 1));
    }

    #[test]
    fn other_sleep_states_are_ignored() {
        let mut pm = fixture();
        for sleep_type in [0, 1, 3, 7] {
            pm.write16(CONTROL, sleep_type << 10 | 1 << 13);
        }
        assert_eq!(pm.power.take(), (0, 0));
        assert_eq!(pm.device.metrics().ignored_sleeps.get(), 4);
    }

    #[test]
    fn bytes_and_double_words_are_parts_of_the_same_registers() {
        let mut pm = fixture();
        pm.device.press_power_button();
        pm.device.write(ENABLE + 1, &[1]);
        assert_eq!(pm.sci.take(), 1);
        let mut all = [0; 4];
        pm.device.read(STATUS, &mut all);
        assert_eq!(all, [0, 1, 0, 1]);
        pm.device.write(STATUS, &[0]);
        assert_eq!(pm.read16(STATUS), POWER_BUTTON, "the other byte of the status stays");
        // Status and enable at once: the event is cleared before it is enabled.
        pm.device.write(STATUS, &[0, 1, 0, 1]);
        assert_eq!((pm.read16(STATUS), pm.sci.take()), (0, 0));
        assert_eq!(pm.read16(ENABLE), POWER_BUTTON);
    }

    #[test]
    fn accesses_of_other_sizes_change_nothing() {
        let mut pm = fixture();
        pm.device.press_power_button();
        for (offset, size) in [(0, 0), (0, 3), (0, 8), (4, 4), (5, 2), (6, 1), (u64::MAX, 2)] {
            let mut data = vec![0; size];
            pm.device.read(offset, &mut data);
            assert_eq!(data, vec![0xFF; size]);
            pm.device.write(offset, &vec![0xFF; size]);
        }
        assert_eq!(pm.read16(STATUS), POWER_BUTTON);
        assert_eq!(pm.power.take(), (0, 0));
        assert_eq!(pm.device.metrics().odd_accesses.get(), 14);
    }

    #[test]
    fn a_broken_interrupt_is_counted() {
        let mut pm = fixture();
        pm.sci.break_it();
        pm.write16(ENABLE, POWER_BUTTON);
        pm.device.press_power_button();
        assert_eq!(pm.device.metrics().interrupt_errors.get(), 1);
        assert_eq!(pm.device.metrics().sci_raised.get(), 0);
    }

    #[test]
    fn a_reset_forgets_everything() {
        let mut pm = fixture();
        pm.write16(ENABLE, POWER_BUTTON);
        pm.write16(CONTROL, SLP_TYP);
        pm.device.press_power_button();
        pm.device.reset();
        assert_eq!([pm.read16(STATUS), pm.read16(ENABLE), pm.read16(CONTROL)], [0, 0, 1]);
    }

    proptest! {
        #[test]
        fn a_hostile_guest_breaks_nothing(
            accesses in proptest::collection::vec(
                (any::<bool>(), 0u64..8, proptest::collection::vec(any::<u8>(), 0..6)),
                0..100,
            ),
        ) {
            let mut pm = fixture();
            for (is_write, offset, mut data) in accesses {
                if is_write {
                    pm.device.write(offset, &data);
                } else {
                    pm.device.read(offset, &mut data);
                }
                prop_assert_eq!(pm.read16(ENABLE) & !ENABLE_BITS, 0);
                prop_assert_eq!(pm.read16(CONTROL) & !SLP_TYP, SCI_EN);
            }
        }
    }
}
