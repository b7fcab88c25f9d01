//! Power-off, reset and the power button, by what ACPI says.
//!
//! Source: ACPI specification 6.5, 4.8.3.1 (PM1 event), 4.8.3.2 (PM1 control), 4.8.3.6 (reset),
//! 4.8.3.7 (sleep control).

use beacon_core::acpi::{Acpi, PowerOff, Register};

use crate::cpu::{inb, inw, outb, outw, tsc, wait_until};
use crate::phys::write8;

const POWER_BUTTON: u16 = 1 << 8;
const SLEEP_ENABLE_PM1: u16 = 1 << 13;
const SLEEP_ENABLE_REDUCED: u8 = 1 << 5;

/// Switches the machine off; returns when it does not go off.
pub fn off(acpi: &Acpi) {
    match acpi.power_off {
        Some(PowerOff::Pm1Control { port, sleep_type }) => {
            outw(port, u16::from(sleep_type) << 10 | SLEEP_ENABLE_PM1);
        }
        Some(PowerOff::SleepControl { register, sleep_type }) => {
            write(register, sleep_type << 2 | SLEEP_ENABLE_REDUCED);
        }
        None => (),
    }
    wait_a_moment();
}

/// Resets the machine; returns when it does not.
pub fn reset(acpi: &Acpi) {
    if let Some((register, value)) = acpi.reset {
        write(register, value);
        wait_a_moment();
    }
    // The keyboard controller's reset line.
    outb(0x64, 0xFE);
    wait_a_moment();
}

/// Lets the power button set its status bit.
pub fn arm_button(acpi: &Acpi) {
    if let Some((status, enable)) = acpi.pm1_event {
        outw(status, POWER_BUTTON);
        outw(enable, inw(enable) | POWER_BUTTON);
    }
}

/// Whether the power button was pressed since the last call.
pub fn button_pressed(acpi: &Acpi) -> bool {
    let Some((status, _)) = acpi.pm1_event else { return false };
    let pressed = inw(status) & POWER_BUTTON != 0;
    if pressed {
        outw(status, POWER_BUTTON);
    }
    pressed
}

fn write(register: Register, value: u8) {
    match register {
        Register::Port(port) => outb(port, value),
        Register::Memory(address) => write8(address, value),
    }
}

/// The VMM may act a little after the access: wait for some 100 ms, whatever the TSC's frequency.
fn wait_a_moment() {
    wait_until(tsc() + 300_000_000);
    let _ = inb(0x64);
}
