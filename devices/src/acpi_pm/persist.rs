//! The frozen state of the ACPI fixed hardware.

use serde::{Deserialize, Serialize};

use super::device::{ENABLE_BITS, POWER_BUTTON, SLP_TYP};
use super::AcpiPm;
use crate::{Persist, PersistError};

/// State of the ACPI fixed hardware, version 1: the registers as in the module's drawing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcpiPmState {
    /// PM1a status.
    pub status: u16,
    /// PM1a enable.
    pub enable: u16,
    /// PM1a control, SLP_TYP only.
    pub control: u16,
}

impl Persist for AcpiPm {
    const KIND: &'static str = "acpi-pm";
    const VERSION: u16 = 1;
    type State = AcpiPmState;
    type Error = PersistError;

    fn save(&self) -> Result<AcpiPmState, PersistError> {
        Ok(AcpiPmState { status: self.status, enable: self.enable, control: self.sleep_type })
    }

    fn restore(&mut self, state: &AcpiPmState) -> Result<(), PersistError> {
        for (name, value, allowed) in [
            ("PM1a status", state.status, POWER_BUTTON),
            ("PM1a enable", state.enable, ENABLE_BITS),
            ("PM1a control", state.control, SLP_TYP),
        ] {
            if value & !allowed != 0 {
                let reason = format!("{name} is {value:#06x}, its bits are {allowed:#06x}");
                return Err(PersistError::Invalid { kind: Self::KIND, reason });
            }
        }
        self.status = state.status;
        self.enable = state.enable;
        self.sleep_type = state.control;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::test_utils::*;
    use super::*;
    use crate::Payload;

    /// A pressed and enabled power button, not served yet.
    fn pressed() -> Fixture {
        let mut pm = fixture();
        pm.write16(ENABLE, POWER_BUTTON);
        pm.write16(CONTROL, 5 << 10);
        pm.device.press_power_button();
        pm
    }

    #[test]
    fn the_state_survives() {
        let saved = pressed().device.save_payload(0).unwrap();
        let mut pm = fixture();
        pm.device.restore_payload(&saved).unwrap();
        assert_eq!(pm.device.save_payload(0).unwrap(), saved);
        assert_eq!(pm.sci.take(), 0, "restoring raises nothing");
        pm.device.raise_pending();
        assert_eq!(pm.sci.take(), 1);
        assert_eq!(
            [pm.read16(STATUS), pm.read16(ENABLE), pm.read16(CONTROL)],
            [POWER_BUTTON, POWER_BUTTON, 5 << 10 | 1]
        );
    }

    #[test]
    fn an_event_that_is_not_enabled_raises_nothing() {
        let mut pm = pressed();
        pm.write16(ENABLE, 0);
        pm.sci.take();
        pm.device.raise_pending();
        assert_eq!(pm.sci.take(), 0);
    }

    #[test]
    fn version_1_still_decodes() {
        // Each is a 16-bit integer, announced by 0xFB.
        let golden = [0xFB, 0, 1, 0xFB, 0, 1, 0xFB, 0, 0x14];
        assert_eq!(pressed().device.save_payload(0).unwrap().data, golden);
        let payload =
            Payload { kind: "acpi-pm".into(), instance: 0, version: 1, data: golden.to_vec() };
        let mut pm = fixture();
        pm.device.restore_payload(&payload).unwrap();
        assert_eq!(pm.device.save().unwrap(), pressed().device.save().unwrap());
    }

    #[test]
    fn bits_that_do_not_exist_are_refused() {
        let good = pressed().device.save().unwrap();
        for bad in [
            AcpiPmState { status: 1, ..good },
            AcpiPmState { enable: 1 << 15, ..good },
            AcpiPmState { control: 1 << 13, ..good },
        ] {
            let mut pm = fixture();
            assert!(matches!(pm.device.restore(&bad), Err(PersistError::Invalid { .. })));
            assert_eq!(pm.read16(ENABLE), 0, "nothing was taken over");
        }
    }
}
