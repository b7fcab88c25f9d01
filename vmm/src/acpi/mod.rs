//! ACPI tables: how the guest learns of processors, interrupts, serial port, power button and
//! virtio devices.
//!
//! One image, to be copied to its base address in the BIOS area, where a kernel also finds it by
//! searching:
//!
//! ```text
//! base   RSDP ----> XSDT ----> FADT ----> DSDT   \_S5, COM1, virtio-mmio devices
//!                     |          +------> FACS
//!                     +------> MADT              local APICs, I/O APIC, interrupt overrides
//! ```
//!
//! Formats are those of the ACPI specification 6.5, chapter 5. The machine has fixed hardware (it
//! is not "hardware reduced"), because that is the least a stock kernel needs for a power button
//! and for power-off: an event block and a control block, without GPEs, PM timer and SMM. ACPI mode
//! is on from the start, which an SMI command port of 0 says.

mod tables;
#[cfg(test)]
mod tests;

use devices::acpi_pm;

use crate::layout;

/// First address of the area for the tables (ACPI 6.5, section 5.2.5.1: where an RSDP is found).
pub const WINDOW_START: u64 = layout::ACPI_TABLES;
/// End of that area.
pub const WINDOW_END: u64 = layout::HIGH_RAM;

/// Port of the PM1a event block.
pub const PM1A_EVENT_PORT: u16 = layout::port::ACPI_PM1A as u16;
/// Port of the PM1a control block.
pub const PM1A_CONTROL_PORT: u16 = PM1A_EVENT_PORT + acpi_pm::CONTROL_OFFSET as u16;
/// Interrupt of the fixed hardware's events (SCI), an edge.
pub const SCI_IRQ: u8 = layout::irq::SCI as u8;
/// First port of the serial console.
pub const COM1_PORT: u16 = layout::port::COM1 as u16;
/// Interrupt of the serial console, an edge.
pub const COM1_IRQ: u8 = layout::irq::COM1 as u8;
/// Reset register: the command port of the keyboard controller.
pub const RESET_PORT: u16 = layout::port::I8042 as u16 + 4;
/// What resets the machine when written there.
pub const RESET_VALUE: u8 = 0xFE;
/// Registers of each processor's local APIC.
pub const LOCAL_APIC_BASE: u32 = 0xFEE0_0000;
/// Registers of the I/O APIC, whose first interrupt is GSI 0.
pub const IO_APIC_BASE: u32 = 0xFEC0_0000;
/// Interrupts of the I/O APIC.
pub const IO_APIC_PINS: u32 = 24;

/// Most processors the tables can name: their APIC ids are below 255, so that no x2APIC entries
/// are needed, and this is what the machine has at most.
pub const MAX_VCPUS: u8 = crate::config::MAX_CPUS;

/// A virtio device with memory-mapped registers, as the guest is told of it (`LNRO0005`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VirtioMmioDevice {
    /// Which of these devices: `_UID`, and part of the name in the namespace.
    pub uid: u8,
    /// First address of the registers, below 4 GiB.
    pub base: u32,
    /// Size of the register block, bytes.
    pub size: u32,
    /// Its interrupt, an edge that it shares with nobody.
    pub gsi: u32,
}

/// What the tables describe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcpiConfig {
    /// Number of processors, 1 to [`MAX_VCPUS`]. The APIC id of each is its number.
    pub vcpus: u8,
    /// I/O APIC pin at which the timer (PIT, ISA interrupt 0) arrives: 2 as on a PC, or 0, where
    /// KVM's default routing leaves it; an override says so when it is not 0.
    pub timer_gsi: u32,
    /// Virtio devices.
    pub virtio: Vec<VirtioMmioDevice>,
}

/// The tables, ready to be copied into guest memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcpiImage {
    /// Guest-physical address of the first byte.
    pub base: u64,
    /// The tables.
    pub bytes: Vec<u8>,
    /// Guest-physical address of the RSDP, for the boot protocols.
    pub rsdp_address: u64,
}

/// Why there are no tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AcpiError {
    /// The number of processors is out of range.
    #[error("{vcpus} vCPUs: the ACPI tables name 1 to {MAX_VCPUS}")]
    VcpuCount {
        /// What was asked for.
        vcpus: u8,
    },
    /// The tables do not fit where they are to be.
    #[error(
        "ACPI tables of {size} bytes at {base:#x} do not fit into \
         {WINDOW_START:#x}..{WINDOW_END:#x}: use fewer devices or a lower address"
    )]
    OutsideWindow {
        /// Where they were to be.
        base: u64,
        /// Their size, bytes.
        size: usize,
    },
    /// The base address is not a multiple of [`BASE_ALIGNMENT`].
    #[error("ACPI tables at {base:#x}: the address must be a multiple of {BASE_ALIGNMENT}")]
    Misaligned {
        /// Where they were to be.
        base: u64,
    },
    /// A device's interrupt is not there, or is somebody else's.
    #[error(
        "interrupt {gsi} of virtio device {uid} is taken or above {}: choose another",
        IO_APIC_PINS - 1
    )]
    Interrupt {
        /// The device.
        uid: u8,
        /// Its interrupt.
        gsi: u32,
    },
    /// The timer's interrupt is none of the two it can have.
    #[error(
        "the timer cannot arrive at interrupt {gsi}: 0 (KVM's default routing) or 2 (as on a PC)"
    )]
    TimerInterrupt {
        /// What was asked for.
        gsi: u32,
    },
    /// Two devices have the same number.
    #[error("two virtio devices have the number {uid}")]
    DuplicateUid {
        /// The number.
        uid: u8,
    },
    /// A device's registers are empty or reach beyond 4 GiB.
    #[error("virtio device {uid} has {size:#x} bytes of registers at {base:#x}, not below 4 GiB")]
    Registers {
        /// The device.
        uid: u8,
        /// First address.
        base: u32,
        /// Size in bytes.
        size: u32,
    },
}

/// What the base address of the image is a multiple of: the FACS needs it.
pub const BASE_ALIGNMENT: u64 = 64;

/// Builds the tables for a machine, to be placed at `base`.
///
/// # Errors
///
/// When the machine cannot be described, or the tables do not fit at `base`.
pub fn build(config: &AcpiConfig, base: u64) -> Result<AcpiImage, AcpiError> {
    check(config)?;
    if base % BASE_ALIGNMENT != 0 {
        return Err(AcpiError::Misaligned { base });
    }
    // All addresses in the tables are of the window, so they fit into 32 bits.
    let Some(base32) =
        u32::try_from(base).ok().filter(|_| (WINDOW_START..WINDOW_END).contains(&base))
    else {
        return Err(AcpiError::OutsideWindow { base, size: 0 });
    };
    let (bytes, rsdp_offset) = tables::assemble(config, base32);
    if bytes.len() as u64 > WINDOW_END - base {
        return Err(AcpiError::OutsideWindow { base, size: bytes.len() });
    }
    Ok(AcpiImage { base, bytes, rsdp_address: base + rsdp_offset })
}

fn check(config: &AcpiConfig) -> Result<(), AcpiError> {
    if !(1..=MAX_VCPUS).contains(&config.vcpus) {
        return Err(AcpiError::VcpuCount { vcpus: config.vcpus });
    }
    if !matches!(config.timer_gsi, 0 | 2) {
        return Err(AcpiError::TimerInterrupt { gsi: config.timer_gsi });
    }
    let mut taken = vec![config.timer_gsi, COM1_IRQ.into(), SCI_IRQ.into()];
    for (index, device) in config.virtio.iter().enumerate() {
        let VirtioMmioDevice { uid, base, size, gsi } = *device;
        if config.virtio[..index].iter().any(|other| other.uid == uid) {
            return Err(AcpiError::DuplicateUid { uid });
        }
        if size == 0 || base.checked_add(size - 1).is_none() {
            return Err(AcpiError::Registers { uid, base, size });
        }
        if gsi >= IO_APIC_PINS || taken.contains(&gsi) {
            return Err(AcpiError::Interrupt { uid, gsi });
        }
        taken.push(gsi);
    }
    Ok(())
}
