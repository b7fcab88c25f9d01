//! Registers, descriptor table and page tables of the boot CPU.

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use super::{write, BootError};
use crate::kvm::KvmError;
use crate::layout;
use crate::memory::GuestRam;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set.
const RFLAGS_RESERVED: u64 = 2;

/// Present, writable.
const PTE_PRESENT_WRITABLE: u64 = 0x3;
/// Present, writable, 2 MiB page.
const PDE_LARGE: u64 = 0x83;

/// Selectors of boot.rst: `__BOOT_CS` and `__BOOT_DS`.
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;
const BOOT_TSS: u16 = 0x20;

/// How the boot CPU begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootCpu {
    /// 32-bit protected mode, no paging, EBX = `hvm_start_info`.
    Pvh {
        /// Physical address of the entry.
        entry: u64,
    },
    /// 64-bit mode, identity map of 4 GiB, RSI = `boot_params`.
    Linux64 {
        /// Physical address of the entry.
        entry: u64,
    },
}

/// One segment: access byte and flags as in a descriptor.
fn segment(selector: u16, type_: u8, long: bool, system: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: if system { 0x67 } else { 0xffff_ffff },
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long && !system),
        s: u8::from(!system),
        l: u8::from(long),
        g: u8::from(!system),
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// Code, execute-read, accessed; data, read-write, accessed; busy TSS.
const TYPE_CODE: u8 = 0xb;
const TYPE_DATA: u8 = 0x3;
const TYPE_TSS_BUSY: u8 = 0xb;

/// Descriptors as the guest finds them in memory (Intel SDM vol. 3, 3.4.5).
fn descriptor(s: &kvm_segment) -> u64 {
    let limit = u64::from(if s.g == 1 { s.limit >> 12 } else { s.limit });
    let access = u64::from(s.type_)
        | u64::from(s.s) << 4
        | u64::from(s.dpl) << 5
        | u64::from(s.present) << 7
        | (limit >> 16 & 0xf) << 8
        | u64::from(s.l) << 13
        | u64::from(s.db) << 14
        | u64::from(s.g) << 15;
    limit & 0xffff | access << 40
}

pub(super) fn write_gdt(ram: &GuestRam) -> Result<(), BootError> {
    let table = [
        0,
        0,
        descriptor(&segment(BOOT_CS, TYPE_CODE, true, false)),
        descriptor(&segment(BOOT_DS, TYPE_DATA, false, false)),
        descriptor(&segment(BOOT_TSS, TYPE_TSS_BUSY, false, true)),
    ];
    let bytes: Vec<u8> = table.iter().flat_map(|d| d.to_le_bytes()).collect();
    write(ram, "GDT", layout::GDT, &bytes)
}

/// Identity map of the first 4 GiB with 2 MiB pages: PML4, PDPT, four page directories.
pub(super) fn write_page_tables(ram: &GuestRam) -> Result<(), BootError> {
    let pml4 = layout::BOOT_PAGE_TABLES;
    let pdpt = pml4 + 0x1000;
    let directories = pdpt + 0x1000;
    write(ram, "PML4", pml4, &(pdpt | PTE_PRESENT_WRITABLE).to_le_bytes())?;
    let entries = (0..4).map(|i| (directories + i * 0x1000) | PTE_PRESENT_WRITABLE);
    let bytes: Vec<u8> = entries.flat_map(u64::to_le_bytes).collect();
    write(ram, "PDPT", pdpt, &bytes)?;
    let bytes: Vec<u8> =
        (0..4 * 512_u64).flat_map(|i| (i << 21 | PDE_LARGE).to_le_bytes()).collect();
    write(ram, "page directories", directories, &bytes)
}

impl BootCpu {
    /// Sets the registers of a vCPU fresh from its reset.
    pub fn apply(&self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        let mut sregs = vcpu.get_sregs().map_err(KvmError::ioctl("reading special registers"))?;
        let long = matches!(self, Self::Linux64 { .. });
        sregs.cs = segment(BOOT_CS, TYPE_CODE, long, false);
        let data = segment(BOOT_DS, TYPE_DATA, false, false);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = segment(BOOT_TSS, TYPE_TSS_BUSY, false, true);
        sregs.gdt.base = layout::GDT;
        sregs.gdt.limit = 5 * 8 - 1;
        sregs.idt.base = 0;
        sregs.idt.limit = 0;
        let mut regs = kvm_regs { rflags: RFLAGS_RESERVED, ..Default::default() };
        match self {
            Self::Pvh { entry } => {
                sregs.cr0 = CR0_PE | CR0_ET;
                sregs.cr4 = 0;
                sregs.efer = 0;
                regs.rip = *entry;
                regs.rbx = layout::PVH_START_INFO;
            }
            Self::Linux64 { entry } => {
                sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
                sregs.cr3 = layout::BOOT_PAGE_TABLES;
                sregs.cr4 = CR4_PAE;
                sregs.efer = EFER_LME | EFER_LMA;
                regs.rip = *entry;
                regs.rsi = layout::BOOT_PARAMS;
                regs.rsp = layout::BOOT_STACK;
                regs.rbp = layout::BOOT_STACK;
            }
        }
        vcpu.set_sregs(&sregs).map_err(KvmError::ioctl("writing special registers"))?;
        vcpu.set_regs(&regs).map_err(KvmError::ioctl("writing registers"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_the_boot_protocol() {
        assert_eq!(descriptor(&segment(BOOT_CS, TYPE_CODE, true, false)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(BOOT_DS, TYPE_DATA, false, false)), 0x00cf_9300_0000_ffff);
        assert_eq!(
            descriptor(&segment(BOOT_TSS, TYPE_TSS_BUSY, false, true)),
            0x0000_8b00_0000_0067
        );
    }
}
