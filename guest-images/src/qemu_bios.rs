//! The image of a boot ROM that starts `beacon` in QEMU without firmware.
//!
//! ```text
//! 0x0000  code (beacon/src/rom.s), linked at 0xFFFF_0000
//! 0x8000  ACPI tables, copied by the code to 0xA000:
//!         +0x000 RSDP pc        +0x080 XSDT pc        +0x400 FADT pc
//!         +0x040 RSDP microvm   +0x0C0 XSDT microvm   +0x600 FADT microvm
//!         +0x100 MADT, 64 processors, all disabled    +0x800 DSDT pc
//!                                                     +0x840 DSDT microvm
//! 0xFFF0  reset vector
//! ```
//!
//! Sources: ACPI specification 6.5, chapter 5.2; QEMU `hw/acpi/piix4.c`, `hw/i386/acpi-microvm.c`.

const ROM_SIZE: usize = 0x1_0000;
const ROM_BASE: u64 = 0xFFFF_0000;
const TABLES_IN_ROM: usize = 0x8000;
/// Where the code copies the tables to.
const TABLES: u64 = 0xA000;

const MADT: usize = 0x100;
const MADT_PROCESSORS: u8 = 64;

static CODE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/qemu-rom.elf"));

/// What differs between the machine types.
struct Machine {
    rsdp: usize,
    xsdt: usize,
    fadt: usize,
    dsdt: usize,
    sleep_type: u8,
    fill_fadt: fn(&mut [u8]),
}

/// PIIX4: the ports that `rom.s` sets; power-off is sleep type 0.
const PC: Machine = Machine {
    rsdp: 0,
    xsdt: 0x80,
    fadt: 0x400,
    dsdt: 0x800,
    sleep_type: 0,
    fill_fadt: |fadt| {
        put(fadt, 56, &0x600_u32.to_le_bytes()); // PM1a_EVT_BLK
        put(fadt, 64, &0x604_u32.to_le_bytes()); // PM1a_CNT_BLK
        put(fadt, 88, &[4, 2]); // PM1_EVT_LEN, PM1_CNT_LEN
        put(fadt, 112, &(1_u32 << 10).to_le_bytes()); // RESET_REG_SUP
        put(fadt, 116, &[1, 8, 0, 1]); // RESET_REG: port
        put(fadt, 120, &0xCF9_u64.to_le_bytes());
        put(fadt, 128, &[0x0F]);
    },
};

/// microvm: hardware-reduced, registers of the generic event device.
const MICROVM: Machine = Machine {
    rsdp: 0x40,
    xsdt: 0xC0,
    fadt: 0x600,
    dsdt: 0x840,
    sleep_type: 5,
    fill_fadt: |fadt| {
        const REGISTERS: u64 = 0xFEA0_0200;
        put(fadt, 112, &(1_u32 << 10 | 1 << 20).to_le_bytes()); // RESET_REG_SUP, HW_REDUCED_ACPI
        put(fadt, 116, &[0, 8, 0, 1]); // RESET_REG: memory
        put(fadt, 120, &(REGISTERS + 2).to_le_bytes());
        put(fadt, 128, &[0x42]);
        put(fadt, 244, &[0, 8, 0, 1]); // SLEEP_CONTROL_REG: memory
        put(fadt, 248, &REGISTERS.to_le_bytes());
    },
};

/// A 64 KiB ROM for `qemu-system-x86_64 -bios FILE -kernel BEACON -append OPTIONS`, for the machine
/// types `microvm` and `pc`. It starts any PVH kernel, and takes command line, memory map and number of
/// vCPUs (at most 64) from QEMU.
///
/// # Panics
/// If the embedded ELF file is not what the build script links, which a test would have shown.
#[must_use]
pub fn qemu_bios() -> Vec<u8> {
    let mut rom = vec![0; ROM_SIZE];
    for (address, bytes) in segments(CODE) {
        put(&mut rom, (address - ROM_BASE) as usize, bytes);
    }
    let tables = &mut rom[TABLES_IN_ROM..TABLES_IN_ROM + 0x1000];
    put(tables, MADT, &madt());
    for machine in [PC, MICROVM] {
        let address = |offset: usize| TABLES + offset as u64;
        put(tables, machine.rsdp, &rsdp(address(machine.xsdt)));
        let entries = [address(machine.fadt), address(MADT)].map(u64::to_le_bytes);
        put(tables, machine.xsdt, &table(b"XSDT", 1, entries.as_flattened()));
        put(tables, machine.fadt, &fadt(&machine, address(machine.dsdt)));
        put(tables, machine.dsdt, &dsdt(machine.sleep_type));
    }
    rom
}

/// Address and bytes of the loadable segments of a little-endian 64-bit ELF file.
fn segments(elf: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    const PT_LOAD: u64 = 1;
    let number = |at: usize, size: usize| {
        elf[at..at + size].iter().rev().fold(0_u64, |value, &byte| value << 8 | u64::from(byte))
    };
    let (table, size, count) = (number(32, 8) as usize, number(54, 2) as usize, number(56, 2));
    (0..count as usize)
        .map(move |index| table + index * size)
        .filter(move |&header| number(header, 4) == PT_LOAD)
        .map(move |header| {
            let (offset, length) =
                (number(header + 8, 8) as usize, number(header + 32, 8) as usize);
            (number(header + 24, 8), &elf[offset..offset + length])
        })
}

fn rsdp(xsdt: u64) -> Vec<u8> {
    let mut rsdp = vec![0; 36];
    put(&mut rsdp, 0, b"RSD PTR \0BEACON\x02");
    put(&mut rsdp, 20, &36_u32.to_le_bytes());
    put(&mut rsdp, 24, &xsdt.to_le_bytes());
    rsdp[8] = checksum(&rsdp[..20]);
    rsdp[32] = checksum(&rsdp);
    rsdp
}

/// The processors 0..64; the code enables those that exist and corrects the checksum.
fn madt() -> Vec<u8> {
    let mut body = 0xFEE0_0000_u64.to_le_bytes().to_vec();
    for id in 0..MADT_PROCESSORS {
        body.extend_from_slice(&[0, 8, id, id, 0, 0, 0, 0]);
    }
    table(b"APIC", 3, &body)
}

fn fadt(machine: &Machine, dsdt: u64) -> Vec<u8> {
    let mut fadt = table(b"FACP", 6, &[0; 276 - 36]);
    put(&mut fadt, 140, &dsdt.to_le_bytes()); // X_DSDT
    (machine.fill_fadt)(&mut fadt);
    seal(&mut fadt);
    fadt
}

/// `Name (_S5, Package () {type, type, 0, 0})`
fn dsdt(sleep_type: u8) -> Vec<u8> {
    let aml = [b"\x08_S5_\x12\x08\x04", &[0x0A, sleep_type, 0x0A, sleep_type, 0, 0][..]].concat();
    table(b"DSDT", 2, &aml)
}

fn table(signature: &[u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut table = vec![0; 36];
    put(&mut table, 0, signature);
    put(&mut table, 4, &(36 + body.len() as u32).to_le_bytes());
    put(&mut table, 8, &[revision]);
    put(&mut table, 10, b"BEACONBEACON  ");
    table.extend_from_slice(body);
    seal(&mut table);
    table
}

fn seal(table: &mut [u8]) {
    table[9] = 0;
    table[9] = checksum(table);
}

/// The byte that makes the sum zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, &byte| sum.wrapping_sub(byte))
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_has_a_reset_vector_and_sealed_tables() {
        let rom = qemu_bios();
        assert_eq!(rom.len(), ROM_SIZE);
        assert_eq!(rom[0xFFF0], 0xE9, "a near jump");
        assert_ne!(rom[0], 0, "code at the beginning");
        let tables = &rom[TABLES_IN_ROM..];
        for (offset, signature) in [
            (0x80, b"XSDT"),
            (0xC0, b"XSDT"),
            (MADT, b"APIC"),
            (0x400, b"FACP"),
            (0x600, b"FACP"),
            (0x800, b"DSDT"),
            (0x840, b"DSDT"),
        ] {
            let table = &tables[offset..];
            assert_eq!(&table[..4], signature);
            let length = u32::from_le_bytes([table[4], table[5], table[6], table[7]]) as usize;
            assert_eq!(checksum(&table[..length]), 0, "table at {offset:#x}");
        }
    }

    #[test]
    fn nothing_overlaps() {
        let tables = &qemu_bios()[TABLES_IN_ROM..];
        let mut end = 0;
        for offset in [0x80, 0xC0, MADT, 0x400, 0x600, 0x800, 0x840] {
            assert!(end <= offset, "{end:#x} > {offset:#x}");
            let length = [tables[offset + 4], tables[offset + 5]];
            end = offset + usize::from(u16::from_le_bytes(length));
        }
    }
}
