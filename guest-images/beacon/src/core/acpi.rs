//! The little of ACPI that beacon needs: processors, power-off, reset and the power button.
//!
//! Source: ACPI specification 6.5, chapters 4.8 and 5.2. Only tables below 4 GiB are read.

use crate::boot::Bytes;
use crate::config::MAX_CPUS;

/// Longest table that is read, in bytes.
const MAX_TABLE: u32 = 1 << 20;
/// Most tables that are looked at.
const MAX_TABLES: u64 = 64;

/// A register in port or memory space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// An I/O port.
    Port(u16),
    /// A guest physical address below 4 GiB.
    Memory(u64),
}

/// How the machine is switched off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerOff {
    /// Fixed hardware: write SLP_TYP and SLP_EN to PM1a_CNT.
    Pm1Control {
        /// The port of PM1a_CNT.
        port: u16,
        /// SLP_TYPa of \_S5.
        sleep_type: u8,
    },
    /// Hardware-reduced ACPI: write SLP_TYP and SLP_EN to SLEEP_CONTROL_REG.
    SleepControl {
        /// The register.
        register: Register,
        /// SLP_TYPa of \_S5.
        sleep_type: u8,
    },
}

/// What the tables say.
#[derive(Clone, Copy, Debug)]
pub struct Acpi {
    cpus: [u32; MAX_CPUS as usize],
    cpu_count: usize,
    /// How to power off.
    pub power_off: Option<PowerOff>,
    /// Register and value that reset the machine.
    pub reset: Option<(Register, u8)>,
    /// Ports of the PM1a status and enable registers, for the power button.
    pub pm1_event: Option<(u16, u16)>,
}

impl Acpi {
    /// What is known without tables.
    pub const NONE: Self = Self {
        cpus: [0; MAX_CPUS as usize],
        cpu_count: 0,
        power_off: None,
        reset: None,
        pm1_event: None,
    };

    /// APIC ids of the enabled processors, in the order of the MADT.
    #[must_use]
    pub fn cpus(&self) -> &[u32] {
        &self.cpus[..self.cpu_count]
    }

    /// Reads the tables behind the root pointer at `rsdp`; with 0, searches for one in the BIOS area.
    pub fn read(memory: &impl Bytes, rsdp: u64) -> Self {
        let mut acpi = Self::NONE;
        let Some(rsdp) = find_rsdp(memory, rsdp) else { return acpi };
        let xsdt = if memory.byte(rsdp + 15) >= 2 { memory.u64(rsdp + 24) } else { 0 };
        let (root, width) =
            if xsdt == 0 { (u64::from(memory.u32(rsdp + 16)), 4) } else { (xsdt, 8) };
        let Some(length) = table_length(memory, root) else { return acpi };
        for index in 0..((u64::from(length) - 36) / width).min(MAX_TABLES) {
            let entry = root + 36 + index * width;
            let table = if width == 8 { memory.u64(entry) } else { u64::from(memory.u32(entry)) };
            let Some(length) = table_length(memory, table) else { continue };
            match &memory.u32(table).to_le_bytes() {
                b"FACP" => acpi.read_fadt(memory, table, length),
                b"APIC" => acpi.read_madt(memory, table, length),
                _ => (),
            }
        }
        acpi
    }

    fn read_madt(&mut self, memory: &impl Bytes, table: u64, length: u32) {
        const ENABLED: u32 = 1;
        let end = table + u64::from(length);
        let mut entry = table + 44;
        while entry + 2 <= end {
            let size = u64::from(memory.byte(entry + 1));
            if size < 2 || entry + size > end {
                break;
            }
            let (id, flags) = match (memory.byte(entry), size) {
                (0, 8..) => (u32::from(memory.byte(entry + 3)), memory.u32(entry + 4)),
                (9, 16..) => (memory.u32(entry + 4), memory.u32(entry + 8)),
                _ => (0, 0),
            };
            if flags & ENABLED != 0 && self.cpu_count < self.cpus.len() {
                self.cpus[self.cpu_count] = id;
                self.cpu_count += 1;
            }
            entry += size;
        }
    }

    fn read_fadt(&mut self, memory: &impl Bytes, table: u64, length: u32) {
        const RESET_SUPPORTED: u32 = 1 << 10;
        const HARDWARE_REDUCED: u32 = 1 << 20;
        let has = |end: u32| length >= end;
        let flags = memory.u32(table + 112);
        if has(129) && flags & RESET_SUPPORTED != 0 {
            self.reset =
                generic_address(memory, table + 116).map(|at| (at, memory.byte(table + 128)));
        }
        let x_dsdt = if has(148) { memory.u64(table + 140) } else { 0 };
        let dsdt = if x_dsdt == 0 { u64::from(memory.u32(table + 40)) } else { x_dsdt };
        let sleep_type = find_s5(memory, dsdt);
        if flags & HARDWARE_REDUCED != 0 {
            if has(256) {
                self.power_off = generic_address(memory, table + 244).map(|register| {
                    // 5 is what every VMM uses that describes \_S5 elsewhere than in the DSDT.
                    PowerOff::SleepControl { register, sleep_type: sleep_type.unwrap_or(5) }
                });
            }
            return;
        }
        // A port is 16 bits wide, whatever the width of the field.
        let port = |offset: u64| memory.u32(table + offset) as u16;
        if port(64) != 0 {
            // Without a readable \_S5: 0, which is QEMU's.
            let sleep_type = sleep_type.unwrap_or(0);
            self.power_off = Some(PowerOff::Pm1Control { port: port(64), sleep_type });
        }
        let event_length = u16::from(memory.byte(table + 88));
        if port(56) != 0 && event_length >= 4 {
            self.pm1_event = Some((port(56), port(56).wrapping_add(event_length / 2)));
        }
    }
}

fn find_rsdp(memory: &impl Bytes, hint: u64) -> Option<u64> {
    let is_rsdp =
        |at: u64| memory.u64(at).to_le_bytes() == *b"RSD PTR " && checksum_is_zero(memory, at, 20);
    if hint != 0 {
        return (hint < 0xFFFF_FF00 && is_rsdp(hint)).then_some(hint);
    }
    (0xE_0000..0x10_0000).step_by(16).find(|&at| is_rsdp(at))
}

/// The length of a table, if it is a plausible one with a right checksum.
fn table_length(memory: &impl Bytes, table: u64) -> Option<u32> {
    if table == 0 || table > 0xFFFF_FFFF - u64::from(MAX_TABLE) {
        return None;
    }
    let length = memory.u32(table + 4);
    ((36..=MAX_TABLE).contains(&length) && checksum_is_zero(memory, table, length))
        .then_some(length)
}

fn checksum_is_zero(memory: &impl Bytes, start: u64, length: u32) -> bool {
    (0..u64::from(length)).fold(0_u8, |sum, i| sum.wrapping_add(memory.byte(start + i))) == 0
}

/// Reads a Generic Address Structure (5.2.3.2) that names a port or an address below 4 GiB.
fn generic_address(memory: &impl Bytes, at: u64) -> Option<Register> {
    let address = memory.u64(at + 4);
    match memory.byte(at) {
        0 if address != 0 && address < 1 << 32 => Some(Register::Memory(address)),
        1 if address != 0 => u16::try_from(address).ok().map(Register::Port),
        _ => None,
    }
}

/// SLP_TYPa from `Name (_S5, Package () {a, ...})` in the DSDT, found by its bytes: beacon has no
/// AML interpreter, and every firmware of interest states it in this form.
fn find_s5(memory: &impl Bytes, dsdt: u64) -> Option<u8> {
    const PACKAGE_OP: u8 = 0x12;
    const BYTE_PREFIX: u8 = 0x0A;
    let length = u64::from(table_length(memory, dsdt)?);
    (36..length.saturating_sub(12)).map(|offset| dsdt + offset).find_map(|at| {
        if memory.byte(at) != b'_' || memory.u32(at).to_le_bytes() != *b"_S5_" {
            return None;
        }
        if memory.byte(at + 4) != PACKAGE_OP {
            return None;
        }
        // PkgLength has 1..4 bytes, NumElements one.
        let element = at + 5 + u64::from(memory.byte(at + 5) >> 6) + 1 + 1;
        match memory.byte(element) {
            BYTE_PREFIX => Some(memory.byte(element + 1) & 7),
            value @ (0 | 1) => Some(value),
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::tests::Memory;

    fn table(signature: &[u8; 4], body: &[u8]) -> Vec<u8> {
        let mut table = vec![0; 36];
        table[..4].copy_from_slice(signature);
        table.extend_from_slice(body);
        let length = table.len() as u32;
        table[4..8].copy_from_slice(&length.to_le_bytes());
        seal(&mut table, 9);
        table
    }

    fn seal(bytes: &mut [u8], at: usize) {
        let sum = bytes.iter().fold(0_u8, |sum, &byte| sum.wrapping_add(byte));
        bytes[at] = bytes[at].wrapping_sub(sum);
    }

    fn fadt(set: impl FnOnce(&mut [u8])) -> Vec<u8> {
        let mut body = vec![0; 276 - 36];
        body[140 - 36..142 - 36].copy_from_slice(&0x3000_u16.to_le_bytes());
        set(&mut body);
        table(b"FACP", &body)
    }

    fn machine(fadt: &[u8], dsdt: &[u8]) -> Memory {
        let mut memory = Memory::default();
        let mut rsdp = b"RSD PTR \0TESTER\x02".to_vec();
        rsdp.resize(36, 0);
        rsdp[24..28].copy_from_slice(&0x1000_u32.to_le_bytes());
        seal(&mut rsdp[..20], 8);
        memory.put(0xF_0010, &rsdp);
        let mut madt = vec![0; 8];
        madt.extend_from_slice(&[0, 8, 0, 0, 1, 0, 0, 0]);
        madt.extend_from_slice(&[0, 8, 1, 7, 1, 0, 0, 0]);
        madt.extend_from_slice(&[0, 8, 2, 9, 0, 0, 0, 0]); // disabled
        madt.extend_from_slice(&[9, 16, 0, 0, 44, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        madt.extend_from_slice(&[5, 0]); // an entry without end
        let mut xsdt = Vec::new();
        for address in [0x2000_u64, 0x4000, 0x5000] {
            xsdt.extend_from_slice(&address.to_le_bytes());
        }
        memory.put(0x1000, &table(b"XSDT", &xsdt));
        memory.put(0x2000, fadt);
        memory.put(0x3000, dsdt);
        memory.put(0x4000, &table(b"APIC", &madt));
        memory
    }

    fn s5(value: &[u8]) -> Vec<u8> {
        table(b"DSDT", &[b"\x08_S5_\x12\x0A\x04", value, &[0; 10]].concat())
    }

    #[test]
    fn fixed_hardware() {
        let fadt = fadt(|body| {
            body[56 - 36..58 - 36].copy_from_slice(&0x600_u16.to_le_bytes());
            body[64 - 36..66 - 36].copy_from_slice(&0x604_u16.to_le_bytes());
            body[88 - 36] = 4;
            body[113 - 36] = 4; // RESET_REG_SUP, bit 10
            body[116 - 36] = 1;
            body[120 - 36] = 0x64;
            body[128 - 36] = 0xFE;
        });
        let acpi = Acpi::read(&machine(&fadt, &s5(b"\x0A\x05")), 0);
        assert_eq!(acpi.cpus(), [0, 7, 300]);
        assert_eq!(acpi.power_off, Some(PowerOff::Pm1Control { port: 0x604, sleep_type: 5 }));
        assert_eq!(acpi.reset, Some((Register::Port(0x64), 0xFE)));
        assert_eq!(acpi.pm1_event, Some((0x600, 0x602)));
        // QEMU's pc writes \_S5 with ZeroOp.
        let acpi = Acpi::read(&machine(&fadt, &s5(b"\x00")), 0xF_0010);
        assert_eq!(acpi.power_off, Some(PowerOff::Pm1Control { port: 0x604, sleep_type: 0 }));
    }

    #[test]
    fn hardware_reduced() {
        let fadt = fadt(|body| {
            body[114 - 36] = 0x10; // bit 20
            body[248 - 36..252 - 36].copy_from_slice(&0xFEA0_0200_u32.to_le_bytes());
        });
        let acpi = Acpi::read(&machine(&fadt, &s5(b"\x0A\x05")), 0);
        assert_eq!(
            acpi.power_off,
            Some(PowerOff::SleepControl { register: Register::Memory(0xFEA0_0200), sleep_type: 5 })
        );
        assert_eq!((acpi.reset, acpi.pm1_event), (None, None));
    }

    #[test]
    fn garbage_gives_nothing() {
        assert!(Acpi::read(&Memory::default(), 0).cpus().is_empty());
        assert!(Acpi::read(&Memory::default(), 0x1234).cpus().is_empty());
        let mut broken = machine(&fadt(|_| ()), &s5(b"\x00"));
        broken.put(0x4000 + 10, &[0x55]); // a wrong checksum in the MADT
        let acpi = Acpi::read(&broken, 0);
        assert!(acpi.cpus().is_empty());
        assert_eq!(acpi.power_off, None);
    }
}
