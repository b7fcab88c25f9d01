//! The tables themselves. Input is checked by [`super::build`].

use acpi_tables::aml;
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::Aml;
use devices::acpi_pm::SLEEP_TYPE_S5;

use super::{
    AcpiConfig, VirtioMmioDevice, BASE_ALIGNMENT, COM1_IRQ, COM1_PORT, IO_APIC_BASE,
    LOCAL_APIC_BASE, PM1A_CONTROL_PORT, PM1A_EVENT_PORT, RESET_PORT, RESET_VALUE, SCI_IRQ,
};

const OEM_ID: [u8; 6] = *b"MINIVM";
const OEM_TABLE_ID: [u8; 8] = *b"MINIVMM ";
const OEM_REVISION: u32 = 1;

/// Revision of the DSDT: 2 and above have 64-bit integers (ACPI 6.5, section 5.2.11.1).
const DSDT_REVISION: u8 = 2;
/// Revision of the MADT (ACPI 6.5, table 5.19; nothing newer than 5 is used).
const MADT_REVISION: u8 = 5;
/// Length of a MADT before its first entry: header, local APIC address, flags.
const MADT_HEADER: u32 = 44;

/// IAPC_BOOT_ARCH (ACPI 6.5, table 5.11).
const BOOT_LEGACY_DEVICES: u16 = 1 << 0;
const BOOT_8042: u16 = 1 << 1;
const BOOT_VGA_NOT_PRESENT: u16 = 1 << 2;
const BOOT_CMOS_RTC_NOT_PRESENT: u16 = 1 << 5;

/// MADT flag: the machine has two 8259 as well (ACPI 6.5, table 5.20).
const MADT_PCAT_COMPAT: u32 = 1;
/// MADT entry types (ACPI 6.5, table 5.21).
const MADT_INTERRUPT_OVERRIDE: u8 = 2;
const MADT_LOCAL_APIC_NMI: u8 = 4;
/// MPS INTI flags (ACPI 6.5, table 5.26).
const CONFORMS_TO_BUS: u16 = 0;
const ACTIVE_HIGH: u16 = 0b01;
const EDGE: u16 = 0b01 << 2;

/// Latencies above which a C-state does not exist (ACPI 6.5, table 5.9).
const NO_C2_LATENCY_US: u16 = 101;
const NO_C3_LATENCY_US: u16 = 1001;

/// Gives the image, and the offset of the RSDP in it.
pub(super) fn assemble(config: &AcpiConfig, base: u32) -> (Vec<u8>, u64) {
    let mut image = Image { base, bytes: vec![0; Rsdp::len()] };

    let facs = image.place(&FACS::new());
    let dsdt = image.place(&dsdt(config));
    let fadt = image.place(&fadt(dsdt, facs));
    let madt = image.place(&madt(config));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt.into());
    xsdt.add_entry(madt.into());
    let xsdt = image.place(&xsdt);

    let rsdp = bytes_of(&Rsdp::new(OEM_ID, xsdt.into()));
    image.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    (image.bytes, 0)
}

/// Tables one behind the other.
struct Image {
    base: u32,
    bytes: Vec<u8>,
}

impl Image {
    /// Appends a table. Gives its guest-physical address.
    fn place(&mut self, table: &dyn Aml) -> u32 {
        self.bytes.resize(self.bytes.len().next_multiple_of(BASE_ALIGNMENT as usize), 0);
        let offset = u32::try_from(self.bytes.len())
            .expect("a machine has at most 256 virtio devices: its tables are far below 4 GiB");
        table.to_aml_bytes(&mut self.bytes);
        self.base + offset
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn io_register(port: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, port.into())
}

/// Fixed ACPI Description Table (ACPI 6.5, section 5.2.9).
fn fadt(dsdt: u32, facs: u32) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .firmware_ctrl_32(facs)
        .dsdt_32(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // The power button is fixed hardware (its flag is 0); there is no sleep button and no RTC.
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup);
    fadt.x_dsdt = u64::from(dsdt).into();
    fadt.sci_int = u16::from(SCI_IRQ).into();

    fadt.pm1a_evt_blk = u32::from(PM1A_EVENT_PORT).into();
    fadt.pm1_evt_len = 4;
    fadt.x_pm1a_evt_blk = io_register(PM1A_EVENT_PORT, 32, AccessSize::WordAccess);
    fadt.pm1a_cnt_blk = u32::from(PM1A_CONTROL_PORT).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_cnt_blk = io_register(PM1A_CONTROL_PORT, 16, AccessSize::WordAccess);

    fadt.p_lvl2_lat = NO_C2_LATENCY_US.into();
    fadt.p_lvl3_lat = NO_C3_LATENCY_US.into();
    fadt.iapc_boot_arch =
        (BOOT_LEGACY_DEVICES | BOOT_8042 | BOOT_VGA_NOT_PRESENT | BOOT_CMOS_RTC_NOT_PRESENT).into();
    fadt.reset_reg = io_register(RESET_PORT, 8, AccessSize::ByteAccess);
    fadt.reset_value = RESET_VALUE;
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE_ID).into();
    fadt.finalize()
}

/// Multiple APIC Description Table (ACPI 6.5, section 5.2.12).
fn madt(config: &AcpiConfig) -> Sdt {
    let mut madt =
        Sdt::new(*b"APIC", MADT_HEADER, MADT_REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    madt.write_u32(36, LOCAL_APIC_BASE);
    madt.write_u32(40, MADT_PCAT_COMPAT);
    for id in 0..config.vcpus {
        let entry = ProcessorLocalApic::new(id, id, EnabledStatus::Enabled);
        madt.append_slice(&bytes_of(&entry));
    }
    madt.append_slice(&bytes_of(&IoApic::new(0, IO_APIC_BASE, 0)));
    if config.timer_gsi != 0 {
        madt.append_slice(&interrupt_override(0, config.timer_gsi, CONFORMS_TO_BUS));
    }
    // Without it, the SCI would be taken for level-triggered and active low.
    madt.append_slice(&interrupt_override(SCI_IRQ, SCI_IRQ.into(), ACTIVE_HIGH | EDGE));
    // An NMI (of KVM_NMI, say) arrives at LINT1 of every local APIC, as on a PC.
    madt.append_slice(&[MADT_LOCAL_APIC_NMI, 6, 0xFF, 0, 0, 1]);
    madt
}

/// Interrupt Source Override (ACPI 6.5, section 5.2.12.5).
fn interrupt_override(isa_irq: u8, gsi: u32, flags: u16) -> [u8; 10] {
    let [g0, g1, g2, g3] = gsi.to_le_bytes();
    let [f0, f1] = flags.to_le_bytes();
    [MADT_INTERRUPT_OVERRIDE, 10, 0, isa_irq, g0, g1, g2, g3, f0, f1]
}

/// Differentiated System Description Table: what AML tells.
fn dsdt(config: &AcpiConfig) -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", 36, DSDT_REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    // SLP_TYP for PM1a and PM1b; two reserved values (ACPI 6.5, section 7.4.2).
    let s5 = aml::Package::new(vec![&SLEEP_TYPE_S5, &SLEEP_TYPE_S5, &aml::ZERO, &aml::ZERO]);
    dsdt.append_slice(&bytes_of(&aml::Name::new("_S5_".into(), &s5)));

    let mut devices = serial_port();
    for device in &config.virtio {
        devices.extend(virtio_mmio(device));
    }
    dsdt.append_slice(&aml::Scope::raw("\\_SB_".into(), devices));
    dsdt
}

fn serial_port() -> Vec<u8> {
    let registers = aml::IO::new(COM1_PORT, COM1_PORT, 1, devices::serial::SIZE as u8);
    let interrupt = edge_interrupt(COM1_IRQ.into());
    bytes_of(&aml::Device::new(
        "COM1".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&registers, &interrupt]),
            ),
        ],
    ))
}

fn virtio_mmio(device: &VirtioMmioDevice) -> Vec<u8> {
    let registers = aml::Memory32Fixed::new(true, device.base, device.size);
    let interrupt = edge_interrupt(device.gsi);
    bytes_of(&aml::Device::new(
        format!("VM{:02X}", device.uid).as_str().into(),
        vec![
            &aml::Name::new("_HID".into(), &"LNRO0005"),
            &aml::Name::new("_UID".into(), &device.uid),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&registers, &interrupt]),
            ),
        ],
    ))
}

/// Consumed by the device, edge-triggered, active high, not shared.
fn edge_interrupt(gsi: u32) -> aml::Interrupt {
    aml::Interrupt::new(true, true, false, false, gsi)
}
