//! What the loader tells the kernel: Linux `boot_params`, PVH `hvm_start_info`.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info, XEN_HVM_MEMMAP_TYPE_RAM,
    XEN_HVM_MEMMAP_TYPE_RESERVED, XEN_HVM_START_MAGIC_VALUE,
};
use vm_memory::ByteValued;

use super::{write, BootError};
use crate::layout::{self, MemoryKind};
use crate::memory::GuestRam;

/// `E820_TYPE_RAM` and `E820_TYPE_RESERVED`: Linux arch/x86/include/asm/e820/types.h.
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// `boot_flag` and `header` of a setup header that we make ourselves (for vmlinux).
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
/// `type_of_loader`: undefined.
const LOADER_UNDEFINED: u8 = 0xff;
const KERNEL_ALIGNMENT: u32 = 0x0100_0000;

/// What is the same for every way to boot.
pub(super) struct BootInfo {
    /// Guest memory, bytes.
    pub memory: u64,
    /// Length of the command line without its zero.
    pub cmdline_len: usize,
    /// Where the initrd is, and its length.
    pub initrd: Option<(u64, u64)>,
    /// Address of the RSDP.
    pub rsdp: u64,
}

pub(super) fn write_boot_params(
    ram: &GuestRam,
    info: &BootInfo,
    header: Option<setup_header>,
) -> Result<(), BootError> {
    let mut params = boot_params {
        hdr: header.unwrap_or(setup_header {
            boot_flag: BOOT_FLAG,
            header: HEADER_MAGIC,
            kernel_alignment: KERNEL_ALIGNMENT,
            ..Default::default()
        }),
        acpi_rsdp_addr: info.rsdp,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = low32(layout::CMDLINE);
    params.hdr.cmdline_size = low32(info.cmdline_len as u64);
    if let Some((at, len)) = info.initrd {
        params.hdr.ramdisk_image = low32(at);
        params.hdr.ramdisk_size = low32(len);
    }
    for (entry, (addr, size, kind)) in
        params.e820_table.iter_mut().zip(layout::memory_map(info.memory))
    {
        let type_ = match kind {
            MemoryKind::Ram => E820_RAM,
            MemoryKind::Reserved => E820_RESERVED,
        };
        *entry = boot_e820_entry { addr, size, r#type: type_ };
        params.e820_entries += 1;
    }
    write(ram, "boot_params", layout::BOOT_PARAMS, params.as_slice())
}

pub(super) fn write_pvh(ram: &GuestRam, info: &BootInfo) -> Result<(), BootError> {
    let map = layout::memory_map(info.memory);
    let start = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: u32::from(info.initrd.is_some()),
        modlist_paddr: info.initrd.map_or(0, |_| layout::PVH_MODLIST),
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: info.rsdp,
        memmap_paddr: layout::PVH_MEMMAP,
        memmap_entries: low32(map.len() as u64),
        ..Default::default()
    };
    write(ram, "hvm_start_info", layout::PVH_START_INFO, start.as_slice())?;
    if let Some((paddr, size)) = info.initrd {
        let module = hvm_modlist_entry { paddr, size, ..Default::default() };
        write(ram, "PVH module list", layout::PVH_MODLIST, module.as_slice())?;
    }
    for (i, (addr, size, kind)) in map.into_iter().enumerate() {
        let type_ = match kind {
            MemoryKind::Ram => XEN_HVM_MEMMAP_TYPE_RAM,
            MemoryKind::Reserved => XEN_HVM_MEMMAP_TYPE_RESERVED,
        };
        let entry = hvm_memmap_table_entry { addr, size, type_, ..Default::default() };
        let at = layout::PVH_MEMMAP + (i * size_of::<hvm_memmap_table_entry>()) as u64;
        write(ram, "PVH memory map", at, entry.as_slice())?;
    }
    Ok(())
}

/// Everything placed here lies below 4 GiB.
fn low32(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
