//! What the loader hands over: PVH `hvm_start_info` or Linux `boot_params`.
//!
//! Sources: xen/include/public/arch-x86/hvm/start_info.h; Linux Documentation/arch/x86/boot.rst
//! and zero-page.rst.

use crate::pages::PAGE_SIZE;

/// Most memory map entries that are read.
pub const MAX_MAP: usize = 64;
/// Longest command line that is read, in bytes.
pub const MAX_COMMAND_LINE: usize = 2048;

/// Reads guest physical memory below 4 GiB, which is all that boot information may use.
pub trait Bytes {
    /// The byte at `address`.
    fn byte(&self, address: u64) -> u8;

    /// A little-endian 16-bit number.
    fn u16(&self, address: u64) -> u16 {
        u16::from(self.byte(address)) | u16::from(self.byte(address + 1)) << 8
    }

    /// A little-endian 32-bit number.
    fn u32(&self, address: u64) -> u32 {
        u32::from(self.u16(address)) | u32::from(self.u16(address + 2)) << 16
    }

    /// A little-endian 64-bit number.
    fn u64(&self, address: u64) -> u64 {
        u64::from(self.u32(address)) | u64::from(self.u32(address + 4)) << 32
    }
}

/// By which protocol beacon was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// PVH, 32-bit entry.
    Pvh,
    /// The 64-bit Linux boot protocol.
    Linux,
}

impl Protocol {
    /// The name that the console uses.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pvh => "pvh",
            Self::Linux => "linux",
        }
    }
}

/// A range of RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ram {
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub length: u64,
}

/// What the loader said.
#[derive(Clone, Debug)]
pub struct BootInfo {
    ram: [Ram; MAX_MAP],
    ram_count: usize,
    command_line: [u8; MAX_COMMAND_LINE],
    command_line_length: usize,
    /// Address of the ACPI root pointer, 0 if unknown.
    pub rsdp: u64,
}

/// `hvm_start_info.magic`.
const PVH_MAGIC: u32 = 0x336E_C578;
/// Type of RAM in both kinds of memory map.
const MAP_RAM: u32 = 1;

impl BootInfo {
    const EMPTY: Self = Self {
        ram: [Ram { start: 0, length: 0 }; MAX_MAP],
        ram_count: 0,
        command_line: [0; MAX_COMMAND_LINE],
        command_line_length: 0,
        rsdp: 0,
    };

    /// Reads what the loader left at `address`.
    ///
    /// # Errors
    /// One sentence when there is no usable memory map.
    pub fn read(
        memory: &impl Bytes,
        protocol: Protocol,
        address: u64,
    ) -> Result<Self, &'static str> {
        let info = match protocol {
            Protocol::Pvh => Self::read_pvh(memory, address)?,
            Protocol::Linux => Self::read_linux(memory, address),
        };
        if info.ram_count == 0 {
            return Err("the loader's memory map has no RAM");
        }
        Ok(info)
    }

    fn read_pvh(memory: &impl Bytes, address: u64) -> Result<Self, &'static str> {
        if memory.u32(address) != PVH_MAGIC {
            return Err("the PVH start_info has a wrong magic number");
        }
        if memory.u32(address + 4) < 1 {
            return Err("the PVH start_info is version 0, which has no memory map");
        }
        let mut info = Self::EMPTY;
        info.read_command_line(memory, memory.u64(address + 24));
        info.rsdp = memory.u64(address + 32);
        let map = memory.u64(address + 40);
        info.read_map(memory, map, memory.u32(address + 48), 24);
        Ok(info)
    }

    fn read_linux(memory: &impl Bytes, address: u64) -> Self {
        let mut info = Self::EMPTY;
        let pointer =
            u64::from(memory.u32(address + 0x228)) | u64::from(memory.u32(address + 0xC8)) << 32;
        info.read_command_line(memory, pointer);
        info.rsdp = memory.u64(address + 0x70);
        info.read_map(memory, address + 0x2D0, u32::from(memory.byte(address + 0x1E8)), 20);
        info
    }

    fn read_map(&mut self, memory: &impl Bytes, address: u64, entries: u32, size: u64) {
        for index in 0..u64::from(entries).min(MAX_MAP as u64) {
            let entry = address + index * size;
            let (start, length) = (memory.u64(entry), memory.u64(entry + 8));
            if memory.u32(entry + 16) == MAP_RAM && length >= PAGE_SIZE {
                self.ram[self.ram_count] = Ram { start, length };
                self.ram_count += 1;
            }
        }
    }

    fn read_command_line(&mut self, memory: &impl Bytes, address: u64) {
        if address == 0 {
            return;
        }
        for index in 0..MAX_COMMAND_LINE {
            let byte = memory.byte(address + index as u64);
            if byte == 0 {
                break;
            }
            self.command_line[index] = byte;
            self.command_line_length = index + 1;
        }
    }

    /// The command line without its terminating zero.
    #[must_use]
    pub fn command_line(&self) -> &[u8] {
        &self.command_line[..self.command_line_length]
    }

    /// The RAM of the memory map.
    #[must_use]
    pub fn ram(&self) -> &[Ram] {
        &self.ram[..self.ram_count]
    }
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::collections::BTreeMap;

    /// Sparse memory; what nobody wrote reads as 0xFF, like an unmapped address.
    #[derive(Default)]
    pub(crate) struct Memory(BTreeMap<u64, u8>);

    impl Memory {
        pub(crate) fn put(&mut self, address: u64, bytes: &[u8]) {
            for (index, &byte) in bytes.iter().enumerate() {
                self.0.insert(address + index as u64, byte);
            }
        }
    }

    impl Bytes for Memory {
        fn byte(&self, address: u64) -> u8 {
            self.0.get(&address).copied().unwrap_or(0xFF)
        }
    }

    fn pvh(version: u32, entries: u32) -> Memory {
        let mut memory = Memory::default();
        memory.put(0x6000, &[0; 56]);
        memory.put(0x6000, &PVH_MAGIC.to_le_bytes());
        memory.put(0x6004, &version.to_le_bytes());
        memory.put(0x6018, &0x2_0000_u64.to_le_bytes());
        memory.put(0x6020, &0xE_0000_u64.to_le_bytes());
        memory.put(0x6028, &0x6100_u64.to_le_bytes());
        memory.put(0x6030, &entries.to_le_bytes());
        memory.put(0x2_0000, b"dirty=1 ws=2\0");
        for (index, (start, length, kind)) in
            [(0_u64, 0x9_FC00_u64, 1_u32), (0x9_FC00, 0x400, 2), (1 << 32, 1 << 30, 1)]
                .into_iter()
                .enumerate()
        {
            let at = 0x6100 + 24 * index as u64;
            memory.put(at, &start.to_le_bytes());
            memory.put(at + 8, &length.to_le_bytes());
            memory.put(at + 16, &kind.to_le_bytes());
        }
        memory
    }

    #[test]
    fn reads_pvh() {
        let info = BootInfo::read(&pvh(1, 3), Protocol::Pvh, 0x6000).unwrap();
        assert_eq!(info.command_line(), b"dirty=1 ws=2");
        assert_eq!(info.rsdp, 0xE_0000);
        assert_eq!(
            info.ram(),
            [Ram { start: 0, length: 0x9_FC00 }, Ram { start: 1 << 32, length: 1 << 30 }]
        );
    }

    #[test]
    fn refuses_what_is_no_pvh() {
        assert!(BootInfo::read(&Memory::default(), Protocol::Pvh, 0x6000).is_err());
        assert!(BootInfo::read(&pvh(0, 3), Protocol::Pvh, 0x6000).is_err());
        assert!(BootInfo::read(&pvh(1, 0), Protocol::Pvh, 0x6000).is_err());
        // Far more entries than there is room for must not go out of bounds.
        assert!(BootInfo::read(&pvh(1, u32::MAX), Protocol::Pvh, 0x6000).is_ok());
    }

    #[test]
    fn reads_linux_and_bounds_the_command_line() {
        let mut memory = Memory::default();
        memory.put(0x7000, &[0; 4096]);
        memory.put(0x71E8, &[1]);
        memory.put(0x72D0, &0x10_0000_u64.to_le_bytes());
        memory.put(0x72D8, &0x100_0000_u64.to_le_bytes());
        memory.put(0x72E0, &1_u32.to_le_bytes());
        memory.put(0x7228, &0x2_0000_u32.to_le_bytes());
        memory.put(0x7070, &0xF_0000_u64.to_le_bytes());
        let info = BootInfo::read(&memory, Protocol::Linux, 0x7000).unwrap();
        assert_eq!(info.ram(), [Ram { start: 0x10_0000, length: 0x100_0000 }]);
        assert_eq!(info.rsdp, 0xF_0000);
        assert_eq!(info.command_line().len(), MAX_COMMAND_LINE, "no terminator: cut");
    }
}
