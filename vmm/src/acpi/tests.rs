//! The tables, walked as a guest does it: by address, from the RSDP.
#![allow(clippy::unwrap_used)]

use super::*;

const BASE: u64 = WINDOW_START;

fn config(vcpus: u8) -> AcpiConfig {
    AcpiConfig { vcpus, timer_gsi: 2, virtio: Vec::new() }
}

fn device(uid: u8) -> VirtioMmioDevice {
    VirtioMmioDevice {
        uid,
        base: 0xD000_0000 + 0x1000 * u32::from(uid),
        size: 0x1000,
        gsi: 16 + u32::from(uid),
    }
}

/// Guest memory that holds nothing but the image.
struct Guest(AcpiImage);

impl Guest {
    fn new(config: &AcpiConfig) -> Self {
        Self(build(config, BASE).unwrap())
    }

    fn bytes(&self, address: u64, length: usize) -> &[u8] {
        let start = usize::try_from(address - self.0.base).unwrap();
        &self.0.bytes[start..start + length]
    }

    fn number(&self, address: u64, length: usize) -> u64 {
        let mut value = [0; 8];
        value[..length].copy_from_slice(self.bytes(address, length));
        u64::from_le_bytes(value)
    }

    /// A table with header: checked, and given whole.
    fn table(&self, address: u64, signature: &[u8; 4]) -> &[u8] {
        assert_eq!(self.bytes(address, 4), signature);
        let length = usize::try_from(self.number(address + 4, 4)).unwrap();
        let table = self.bytes(address, length);
        assert_eq!(sum(table), 0, "checksum of {signature:?}");
        table
    }

    fn xsdt_entry(&self, index: u64) -> u64 {
        let xsdt = self.number(self.0.rsdp_address + 24, 8);
        assert_eq!(self.table(xsdt, b"XSDT").len(), 36 + 2 * 8);
        self.number(xsdt + 36 + 8 * index, 8)
    }

    fn fadt(&self) -> u64 {
        self.xsdt_entry(0)
    }

    fn madt(&self) -> &[u8] {
        self.table(self.xsdt_entry(1), b"APIC")
    }

    fn dsdt(&self) -> &[u8] {
        self.table(self.number(self.fadt() + 40, 4), b"DSDT")
    }

    /// The entries of the MADT.
    fn madt_entries(&self) -> Vec<&[u8]> {
        let mut rest = &self.madt()[44..];
        let mut entries = Vec::new();
        while !rest.is_empty() {
            let (entry, tail) = rest.split_at(rest[1].into());
            entries.push(entry);
            rest = tail;
        }
        entries
    }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

#[test]
fn the_rsdp_is_found_by_search() {
    let guest = Guest::new(&config(1));
    let address = guest.0.rsdp_address;
    assert!(address % 16 == 0 && (WINDOW_START..WINDOW_END).contains(&address));
    let rsdp = guest.bytes(address, 36);
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!((sum(&rsdp[..20]), sum(rsdp)), (0, 0));
    assert_eq!(rsdp[15], 2, "revision with XSDT");
    assert_eq!(guest.number(address + 20, 4), 36);
    assert_eq!(guest.number(address + 16, 4), 0, "no RSDT");
}

#[test]
fn the_fadt_describes_the_fixed_hardware() {
    let guest = Guest::new(&config(1));
    let fadt = guest.fadt();
    assert_eq!(guest.table(fadt, b"FACP").len(), 276);
    let field = |offset: u64, length| guest.number(fadt + offset, length);

    assert_eq!(field(46, 2), 9, "SCI");
    assert_eq!(field(48, 4), 0, "no SMI command port: ACPI is on");
    assert_eq!((field(56, 4), field(64, 4)), (0x600, 0x604), "PM1a event and control");
    assert_eq!((field(88, 1), field(89, 1)), (4, 2), "their lengths");
    assert_eq!((field(60, 4), field(68, 4), field(72, 4)), (0, 0, 0), "no PM1b, no PM2");
    assert_eq!((field(76, 4), field(80, 4), field(84, 4)), (0, 0, 0), "no timer, no GPE");
    assert_eq!((field(91, 1), field(92, 1), field(93, 1)), (0, 0, 0));
    assert_eq!(field(109, 2), 0b10_0111, "legacy devices, 8042, no VGA, no CMOS RTC");
    // WBINVD, PROC_C1, SLP_BUTTON, FIX_RTC, RESET_REG_SUP; not PWR_BUTTON, not HW_REDUCED.
    assert_eq!(field(112, 4), 1 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 10);
    assert_eq!((field(116, 1), field(117, 1), field(120, 8)), (1, 8, 0x64), "reset register");
    assert_eq!(field(128, 1), 0xFE);
    assert_eq!((field(148, 1), field(149, 1), field(152, 8)), (1, 32, 0x600));
    assert_eq!((field(172, 1), field(173, 1), field(176, 8)), (1, 16, 0x604));

    assert_eq!(field(40, 4), field(140, 8), "one DSDT");
    let facs = field(36, 4);
    assert_eq!(facs % 64, 0);
    assert_eq!((guest.bytes(facs, 4), guest.number(facs + 4, 4)), (&b"FACS"[..], 64));
    assert_eq!(field(132, 8), 0, "one FACS");
}

#[test]
fn the_madt_names_every_processor() {
    for vcpus in [1, 2, 64] {
        let guest = Guest::new(&config(vcpus));
        assert_eq!(guest.madt()[36..44], [0, 0, 0xE0, 0xFE, 1, 0, 0, 0]);
        let entries = guest.madt_entries();
        let ids: Vec<u8> = entries
            .iter()
            .filter(|entry| entry[0] == 0)
            .map(|entry| {
                assert_eq!((entry[1], &entry[4..]), (8, &[1, 0, 0, 0][..]), "enabled");
                assert_eq!(entry[2], entry[3], "processor and APIC number");
                entry[3]
            })
            .collect();
        assert_eq!(ids, (0..vcpus).collect::<Vec<_>>());
    }
}

#[test]
fn the_madt_describes_the_interrupts() {
    let guest = Guest::new(&config(1));
    let entries = guest.madt_entries();
    assert_eq!(entries[1], [1, 12, 0, 0, 0, 0, 0xC0, 0xFE, 0, 0, 0, 0], "I/O APIC");
    assert_eq!(entries[2], [2, 10, 0, 0, 2, 0, 0, 0, 0, 0], "timer at pin 2");
    assert_eq!(entries[3], [2, 10, 0, 9, 9, 0, 0, 0, 5, 0], "SCI: active high, edge");
    assert_eq!(entries[4], [4, 6, 0xFF, 0, 0, 1], "NMI at LINT1");
    assert_eq!(entries.len(), 5);

    let direct = Guest::new(&AcpiConfig { timer_gsi: 0, ..config(1) });
    let overrides: Vec<u8> =
        direct.madt_entries().iter().filter(|entry| entry[0] == 2).map(|entry| entry[3]).collect();
    assert_eq!(overrides, [9]);
}

#[test]
fn the_dsdt_has_soft_off_and_the_serial_port() {
    let guest = Guest::new(&config(1));
    let dsdt = guest.dsdt();
    // Name (_S5_, Package (4) { 5, 5, 0, 0 })
    assert!(contains(dsdt, b"\x08_S5_\x12\x08\x04\x0A\x05\x0A\x05\x00\x00"));
    // IO (Decode16, 0x3F8, 0x3F8, 1, 8); Interrupt (consumer, edge, active high, exclusive) { 4 }
    assert!(contains(
        dsdt,
        b"\x47\x01\xF8\x03\xF8\x03\x01\x08\x89\x06\x00\x03\x01\x04\x00\x00\x00\x79\x00"
    ));
    // EISAID ("PNP0501")
    assert!(contains(dsdt, b"COM1\x08_HID\x0C\x41\xD0\x05\x01"));
}

#[test]
fn the_dsdt_lists_virtio_devices() {
    let none = Guest::new(&config(1));
    assert!(!contains(none.dsdt(), b"LNRO0005"));

    let guest = Guest::new(&AcpiConfig { virtio: vec![device(0), device(3)], ..config(1) });
    let dsdt = guest.dsdt();
    assert!(contains(dsdt, b"VM00\x08_HID\x0DLNRO0005\0\x08_UID\x00"));
    // Memory32Fixed (ReadWrite, 0xD0003000, 0x1000); Interrupt (edge) { 19 }
    assert!(contains(
        dsdt,
        b"\x86\x09\x00\x01\x00\x30\x00\xD0\x00\x10\x00\x00\x89\x06\x00\x03\x01\x13\x00\x00\x00"
    ));
}

#[test]
fn the_image_has_to_fit() {
    let size = build(&config(64), BASE).unwrap().bytes.len() as u64;
    let last = (WINDOW_END - size) / BASE_ALIGNMENT * BASE_ALIGNMENT;
    assert!(build(&config(64), last).is_ok());
    for base in [last + BASE_ALIGNMENT, WINDOW_START - 64, WINDOW_END, 1 << 40, 0] {
        let error = build(&config(64), base).unwrap_err();
        assert!(matches!(error, AcpiError::OutsideWindow { .. }), "{error}");
    }
    assert_eq!(build(&config(1), BASE + 16), Err(AcpiError::Misaligned { base: BASE + 16 }));
}

#[test]
fn what_cannot_be_described_is_refused() {
    for vcpus in [0, 65, 255] {
        assert_eq!(build(&config(vcpus), BASE), Err(AcpiError::VcpuCount { vcpus }));
    }
    let timer = AcpiConfig { timer_gsi: 1, ..config(1) };
    assert_eq!(build(&timer, BASE), Err(AcpiError::TimerInterrupt { gsi: 1 }));
    let with = |devices: &[VirtioMmioDevice]| {
        build(&AcpiConfig { virtio: devices.to_vec(), ..config(1) }, BASE).map(|_| ())
    };
    assert_eq!(with(&[device(1), device(1)]), Err(AcpiError::DuplicateUid { uid: 1 }));
    for gsi in [2, 4, 9, 24, u32::MAX] {
        let taken = VirtioMmioDevice { gsi, ..device(1) };
        assert_eq!(with(&[taken]), Err(AcpiError::Interrupt { uid: 1, gsi }));
    }
    let shared = VirtioMmioDevice { gsi: device(0).gsi, ..device(1) };
    assert_eq!(with(&[device(0), shared]), Err(AcpiError::Interrupt { uid: 1, gsi: 16 }));
    for (base, size) in [(0xFFFF_F000, 0x1001), (0xD000_0000, 0)] {
        let beyond = VirtioMmioDevice { base, size, ..device(1) };
        assert_eq!(with(&[beyond]), Err(AcpiError::Registers { uid: 1, base, size }));
    }
    assert_eq!(with(&[VirtioMmioDevice { base: 0xFFFF_F000, ..device(1) }]), Ok(()));
}
