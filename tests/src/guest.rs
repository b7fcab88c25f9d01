//! Guests of a few instructions, for what `beacon` does not do: 32-bit protected mode, entered by
//! PVH at 1 MiB.
//!
//! Encodings: Intel SDM vol. 2. What goes wrong ends in a triple fault, since there is no
//! interrupt descriptor table.

const BASE: u32 = 0x10_0000;
const COM1: u16 = 0x3F8;
const COM1_LINE_STATUS: u16 = 0x3FD;
const PAGE: usize = 4096;
/// One of headers and code, and the page tables.
const PAGES: usize = 5;
/// Sizes of the ELF headers (System V ABI) that come before the code.
const EHDR: usize = 64;
const PHDR: usize = 56;
/// Present, writable; and a page of 2 MiB.
const TABLE: u64 = 3;
const LARGE_PAGE: u64 = 0x83;

/// A guest's code, instruction by instruction.
#[derive(Debug, Default)]
pub struct Guest {
    code: Vec<u8>,
    /// Guest-physical address that the second gigabyte of its addresses begins at.
    window: Option<u64>,
}

impl Guest {
    fn emit(mut self, bytes: &[u8]) -> Self {
        self.code.extend_from_slice(bytes);
        self
    }

    fn port(self, port: u16) -> Self {
        let [low, high] = port.to_le_bytes();
        self.emit(&[0x66, 0xBA, low, high]) // mov dx, port
    }

    /// Writes a byte to a port.
    #[must_use]
    pub fn out8(self, port: u16, value: u8) -> Self {
        self.port(port).emit(&[0xB0, value, 0xEE]) // mov al, value; out dx, al
    }

    /// Writes 16 bits to a port.
    #[must_use]
    pub fn out16(self, port: u16, value: u16) -> Self {
        self.port(port).mov_eax(u32::from(value)).emit(&[0x66, 0xEF]) // out dx, ax
    }

    /// Writes 32 bits to a port.
    #[must_use]
    pub fn out32(self, port: u16, value: u32) -> Self {
        self.port(port).mov_eax(value).emit(&[0xEF]) // out dx, eax
    }

    /// Reads 8 bits from a port and crashes unless they are `expected`.
    #[must_use]
    pub fn expect_in8(self, port: u16, expected: u8) -> Self {
        self.mov_eax(0).port(port).emit(&[0xEC]).expect(u32::from(expected)) // in al, dx
    }

    /// Reads 32 bits from a port and crashes unless they are `expected`.
    #[must_use]
    pub fn expect_in32(self, port: u16, expected: u32) -> Self {
        self.port(port).emit(&[0xED]).expect(expected) // in eax, dx
    }

    /// Writes 32 bits to memory.
    #[must_use]
    pub fn store(self, address: u32, value: u32) -> Self {
        // mov dword [address], value
        self.emit(&[0xC7, 0x05]).emit(&address.to_le_bytes()).emit(&value.to_le_bytes())
    }

    /// Reads 32 bits from memory and crashes unless they are `expected`.
    #[must_use]
    pub fn expect_load(self, address: u32, expected: u32) -> Self {
        self.emit(&[0xA1]).emit(&address.to_le_bytes()).expect(expected) // mov eax, [address]
    }

    /// Sets an address for breakpoint 0, which stays off.
    #[must_use]
    pub fn set_debug_register_0(self, address: u32) -> Self {
        self.mov_eax(address).emit(&[0x0F, 0x23, 0xC0]) // mov dr0, eax
    }

    /// Reads the address of breakpoint 0 and crashes unless it is `expected`.
    #[must_use]
    pub fn expect_debug_register_0(self, expected: u32) -> Self {
        self.emit(&[0x0F, 0x21, 0xC0]).expect(expected) // mov eax, dr0
    }

    fn mov_eax(self, value: u32) -> Self {
        self.emit(&[0xB8]).emit(&value.to_le_bytes())
    }

    fn expect(self, eax: u32) -> Self {
        // cmp eax, expected; je over; ud2
        self.emit(&[0x3D]).emit(&eax.to_le_bytes()).emit(&[0x74, 0x02, 0x0F, 0x0B])
    }

    /// Prints an event without anything else in it, as `beacon` would.
    #[must_use]
    pub fn say(self, event: &str) -> Self {
        let line = format!("{{\"event\":\"{event}\"}}\n");
        line.bytes().fold(self, |guest, byte| guest.out8(COM1, byte))
    }

    /// Waits for a byte on the console.
    #[must_use]
    pub fn wait_for_input(self) -> Self {
        // again: in al, dx; test al, 1; je again
        self.port(COM1_LINE_STATUS).emit(&[0xEC, 0xA8, 0x01, 0x74, 0xFB]).port(COM1).emit(&[0xEC])
    }

    /// Switches paging on: the first 2 MiB as they are, and at 1 GiB the 2 MiB from `physical`
    /// on. Once. Four-level paging, which every KVM has, below code that stays 32-bit
    /// (compatibility mode, SDM vol. 3, "IA-32e Mode").
    #[must_use]
    pub fn map_window(mut self, physical: u64) -> Self {
        self.window = Some(physical);
        let tables = BASE + u32::try_from(PAGE).unwrap();
        // mov cr3, eax; mov eax, cr4; or eax, PAE; mov cr4, eax; mov ecx, EFER; mov eax, LME;
        // xor edx, edx; wrmsr; mov eax, cr0; or eax, PG; mov cr0, eax
        self.mov_eax(tables).emit(&[
            0x0F, 0x22, 0xD8, 0x0F, 0x20, 0xE0, 0x83, 0xC8, 0x20, 0x0F, 0x22, 0xE0, 0xB9, 0x80,
            0x00, 0x00, 0xC0, 0xB8, 0x00, 0x01, 0x00, 0x00, 0x31, 0xD2, 0x0F, 0x30, 0x0F, 0x20,
            0xC0, 0x0D, 0x00, 0x00, 0x00, 0x80, 0x0F, 0x22, 0xC0,
        ])
    }

    /// Where the window of [`Guest::map_window`] is.
    pub const WINDOW: u32 = 0x4000_0000;

    /// Switches the machine off (PM1a control: SLP_TYP 5, SLP_EN).
    #[must_use]
    pub fn power_off(self) -> Self {
        self.out16(0x604, 0x3400)
    }

    /// The image: an ELF file, one page of headers and code, then the page tables.
    ///
    /// # Panics
    /// The code does not fit.
    #[must_use]
    pub fn build(self) -> Vec<u8> {
        const NOTE: usize = EHDR + 2 * PHDR;
        const CODE: usize = NOTE + 24;
        let entry = u64::from(BASE) + CODE as u64;
        let mut image = Vec::new();
        let put = |image: &mut Vec<u8>, numbers: &[(u64, usize)]| {
            for (number, size) in numbers {
                image.extend_from_slice(&number.to_le_bytes()[..*size]);
            }
        };
        // ELF-64, little-endian, version 1, executable for x86-64.
        image.extend_from_slice(&[0x7F, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        put(&mut image, &[(2, 2), (62, 2), (1, 4), (entry, 8), (EHDR as u64, 8), (0, 8), (0, 4)]);
        put(&mut image, &[(EHDR as u64, 2), (PHDR as u64, 2), (2, 2), (0, 2), (0, 2), (0, 2)]);
        let size = (PAGES * PAGE) as u64;
        for (kind, offset, size) in [(1, 0, size), (4, NOTE as u64, 24)] {
            let at = u64::from(BASE) + offset;
            put(&mut image, &[(kind, 4), (7, 4), (offset, 8), (at, 8), (at, 8)]);
            put(&mut image, &[(size, 8), (size, 8), (8, 8)]);
        }
        // XEN_ELFNOTE_PHYS32_ENTRY (Xen public/elfnote.h).
        put(&mut image, &[(4, 4), (8, 4), (18, 4)]);
        image.extend_from_slice(b"Xen\0");
        put(&mut image, &[(entry, 8)]);
        image.extend_from_slice(&self.code);
        image.extend_from_slice(&[0xFA, 0xF4, 0xEB, 0xFD]); // cli; again: hlt; jmp again
        assert!(image.len() <= PAGE, "{} bytes of code", self.code.len());
        image.resize(PAGES * PAGE, 0);
        let mut table = |at: usize, entry: u64| {
            image[at..at + 8].copy_from_slice(&entry.to_le_bytes());
        };
        // Level 4, page directory pointers, and a directory for each of the first two gigabytes.
        let page = |n: usize| u64::from(BASE) + (n * PAGE) as u64;
        table(PAGE, page(2) | TABLE);
        table(2 * PAGE, page(3) | TABLE);
        table(2 * PAGE + 8, page(4) | TABLE);
        table(3 * PAGE, LARGE_PAGE);
        table(4 * PAGE, self.window.unwrap_or(0) | LARGE_PAGE);
        image
    }
}
