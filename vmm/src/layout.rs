//! The guest-physical map of the machine: one rule for every size.
//!
//! ```text
//! 0            640K      1M                     3G          4G
//! |--- RAM -----|reserved|--------- RAM --------|-- hole ----|--------- RAM ------>
//!  boot data      ACPI     kernel, initrd         virtio-mmio  what is above 3 GiB
//!                 tables                          IOAPIC, LAPIC
//! ```

/// Start of the hole for devices; RAM that does not fit below continues at 4 GiB.
pub const HOLE_START: u64 = 0xC000_0000;
/// End of the hole.
pub const HOLE_END: u64 = 0x1_0000_0000;

/// Long-mode GDT of the 64-bit Linux boot protocol and of PVH.
pub const GDT: u64 = 0x500;
/// PVH `hvm_start_info`, followed by module list and memory map.
pub const PVH_START_INFO: u64 = 0x6000;
/// Module list of PVH.
pub const PVH_MODLIST: u64 = 0x6040;
/// Memory map of PVH.
pub const PVH_MEMMAP: u64 = 0x6100;
/// Linux `boot_params` ("zero page").
pub const BOOT_PARAMS: u64 = 0x7000;
/// Stack of the boot CPU until the kernel has its own.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Page tables: PML4, one PDPT, four page directories.
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Room for the command line, with its terminating zero.
pub const CMDLINE_SIZE: usize = 0x1_0000;
/// End of conventional memory, where the reserved region with the ACPI tables begins.
pub const LOW_RAM_END: u64 = 0x9_FC00;
/// Where the ACPI tables are.
pub const ACPI_TABLES: u64 = 0xE_0000;
/// Start of extended memory.
pub const HIGH_RAM: u64 = 0x10_0000;

/// Registers of the first virtio device.
const VIRTIO_MMIO: u64 = 0xD000_0000;

/// Address of the registers of the virtio device in `slot`.
#[must_use]
pub fn virtio_mmio(slot: u32) -> u64 {
    VIRTIO_MMIO + u64::from(slot) * devices::virtio::mmio::SIZE
}

/// Interrupt line (GSI) of the virtio device in `slot`: first those above the ISA interrupts, then
/// the ISA interrupts that nothing in this machine has.
#[must_use]
pub fn virtio_gsi(slot: u32) -> u32 {
    const LINES: [u32; crate::config::MAX_DEVICES] =
        [16, 17, 18, 19, 20, 21, 22, 23, 5, 6, 7, 10, 11, 12, 14, 15];
    LINES[slot as usize % LINES.len()]
}

/// Three pages that KVM on Intel needs for real mode; inside the hole, used by nothing else.
pub const KVM_TSS: u64 = 0xFFFB_D000;
/// One page for KVM's identity map.
pub const KVM_IDENTITY_MAP: u64 = 0xFFFB_C000;

/// I/O ports.
pub mod port {
    /// COM1 (16550).
    pub const COM1: u64 = 0x3F8;
    /// i8042 data port; its command port is four above.
    pub const I8042: u64 = 0x60;
    /// POST code: written by firmware and by Linux as a delay.
    pub const POST: u16 = 0x80;
    /// ACPI PM1a event and control blocks.
    pub const ACPI_PM1A: u64 = 0x600;
}

/// Interrupt lines (GSI).
pub mod irq {
    /// COM1.
    pub const COM1: u32 = 4;
    /// ACPI system control interrupt.
    pub const SCI: u32 = 9;
}

/// Sizes of RAM below and above the hole for `size` bytes in all.
#[must_use]
pub fn split_ram(size: u64) -> (u64, u64) {
    let low = size.min(HOLE_START);
    (low, size - low)
}

/// What a range of guest-physical memory is, as firmware would say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryKind {
    /// Usable.
    Ram,
    /// Not to be used by the guest's allocator (holds the ACPI tables).
    Reserved,
}

/// The memory map given to the guest: start, length, kind.
#[must_use]
pub fn memory_map(size: u64) -> Vec<(u64, u64, MemoryKind)> {
    let (low, high) = split_ram(size);
    let mut map = vec![
        (0, LOW_RAM_END, MemoryKind::Ram),
        (LOW_RAM_END, HIGH_RAM - LOW_RAM_END, MemoryKind::Reserved),
        (HIGH_RAM, low - HIGH_RAM, MemoryKind::Ram),
    ];
    if high > 0 {
        map.push((HOLE_END, high, MemoryKind::Ram));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_is_split_around_the_hole() {
        assert_eq!(split_ram(16 << 20), (16 << 20, 0));
        assert_eq!(split_ram(HOLE_START), (HOLE_START, 0));
        assert_eq!(split_ram(HOLE_START + 4096), (HOLE_START, 4096));
        assert_eq!(split_ram(16 << 30), (HOLE_START, (16 << 30) - HOLE_START));
    }

    #[test]
    fn memory_map_has_all_ram_but_the_reserved_part() {
        for size in [16 << 20, 3 << 30, 5 << 30] {
            let map = memory_map(size);
            let total: u64 = map.iter().map(|m| m.1).sum();
            assert_eq!(total, size);
            assert!(map.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0));
        }
    }
}
