//! Kernel and initrd images: where they come from, and what they are.

use std::fs::File;
use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::path::Path;

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult};
use vm_memory::{Bytes, GuestAddress, ReadVolatile};

use super::BootError;
use crate::layout;
use crate::memory::GuestRam;

/// `COMMAND_LINE_SIZE` of Linux on x86, less the terminating zero: what an image without a
/// header of its own takes.
const LINUX_CMDLINE_LIMIT: usize = 2047;
/// PVH gives no limit; ours is the room in memory.
const PVH_CMDLINE_LIMIT: usize = layout::CMDLINE_SIZE - 1;

/// ELF constants: System V ABI, "Object Files".
mod elf {
    pub const MAGIC: [u8; 4] = *b"\x7fELF";
    pub const CLASS_64: u8 = 2;
    pub const MACHINE_X86_64: u16 = 62;
    pub const HEADER_LEN: usize = 64;
    pub const PHDR_LEN: usize = 56;
    pub const PT_LOAD: u32 = 1;
    pub const PT_NOTE: u32 = 4;
    pub const PHDRS_MAX: u16 = 256;
    pub const NOTES_MAX: u64 = 1 << 20;
}

/// bzImage constants: Documentation/arch/x86/boot.rst.
mod bz {
    pub const HEADER_AT: u64 = 0x1F1;
    pub const MAGIC_AT: usize = 0x202;
    pub const MAGIC: [u8; 4] = *b"HdrS";
    /// First version with `xloadflags`.
    pub const VERSION_MIN: u16 = 0x020c;
    pub const XLF_KERNEL_64: u16 = 1;
    pub const ENTRY_64: u64 = 0x200;
    pub const SECTOR: u64 = 512;
}

/// What an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageKind {
    /// ELF.
    Elf,
    /// bzImage.
    BzImage,
}

#[derive(Debug)]
enum Source {
    File(File),
    Embedded(&'static [u8]),
}

/// A kernel or initrd. A file stays open, so that a reboot finds what the first boot found.
#[derive(Debug)]
pub struct Image {
    name: String,
    len: u64,
    bytes: Source,
}

/// Where a loaded kernel is and what it wants.
pub(super) struct LoadedKernel {
    pub entry: u64,
    pub pvh_entry: Option<u64>,
    /// End of what the kernel uses before it looks at the memory map.
    pub end: u64,
    pub initrd_limit: u64,
    pub cmdline_limit: usize,
    pub setup_header: Option<setup_header>,
}

impl Image {
    /// Opens `path`; `what` is `kernel` or `initrd` in messages.
    pub fn open(what: &'static str, path: &Path) -> Result<Self, BootError> {
        let failed = |error| BootError::Read { what, path: path.to_owned(), error };
        let file = File::open(path).map_err(failed)?;
        let meta = file.metadata().map_err(failed)?;
        if !meta.is_file() {
            return Err(failed(io::Error::other("not a regular file")));
        }
        Ok(Self { name: path.display().to_string(), len: meta.len(), bytes: Source::File(file) })
    }

    /// An image that came in a stream or saved file and lies in an anonymous file.
    pub fn from_file(name: &str, file: File) -> io::Result<Self> {
        let len = file.metadata()?.len();
        Ok(Self { name: name.to_owned(), len, bytes: Source::File(file) })
    }

    /// An image that is part of this program.
    #[must_use]
    pub fn embedded(name: &str, bytes: &'static [u8]) -> Self {
        Self { name: name.to_owned(), len: bytes.len() as u64, bytes: Source::Embedded(bytes) }
    }

    /// Its path or name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its length, bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Reads up to `buf.len()` bytes at `offset`; fewer only at the end.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        match &self.bytes {
            Source::File(file) => {
                let mut done = 0;
                while done < buf.len() {
                    use std::os::unix::fs::FileExt;
                    match file.read_at(&mut buf[done..], offset + done as u64) {
                        Ok(0) => break,
                        Ok(n) => done += n,
                        Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                        Err(e) => return Err(e),
                    }
                }
                Ok(done)
            }
            Source::Embedded(bytes) => {
                let mut cursor = Cursor::new(bytes);
                cursor.seek(SeekFrom::Start(offset))?;
                cursor.read(buf)
            }
        }
    }

    fn head(&self, offset: u64, len: usize) -> Result<Vec<u8>, BootError> {
        let mut buf = vec![0; len];
        let n = self.read_at(offset, &mut buf).map_err(|e| self.load_error(e))?;
        buf.truncate(n);
        Ok(buf)
    }

    fn load_error(&self, error: impl ToString) -> BootError {
        BootError::Load { image: self.name.clone(), error: error.to_string() }
    }

    fn unsupported(&self, why: impl Into<String>) -> BootError {
        BootError::Unsupported { image: self.name.clone(), why: why.into() }
    }

    /// What it is, from its magic numbers.
    pub fn kind(&self) -> Result<ImageKind, BootError> {
        let head = self.head(0, bz::MAGIC_AT + bz::MAGIC.len())?;
        if head.starts_with(&elf::MAGIC) {
            return Ok(ImageKind::Elf);
        }
        if head.get(bz::MAGIC_AT..) == Some(&bz::MAGIC[..]) {
            return Ok(ImageKind::BzImage);
        }
        Err(BootError::NotAKernel(self.name.clone()))
    }

    /// Loads it as a kernel; `limit` is the end of memory below the hole.
    pub(super) fn load_kernel(
        &self,
        ram: &GuestRam,
        limit: u64,
        again: bool,
    ) -> Result<LoadedKernel, BootError> {
        match self.kind()? {
            ImageKind::Elf => self.load_elf(ram, limit, again),
            ImageKind::BzImage => self.load_bzimage(ram, limit),
        }
    }

    fn load_elf(&self, ram: &GuestRam, limit: u64, again: bool) -> Result<LoadedKernel, BootError> {
        let segments = self.check_elf(limit)?;
        if again {
            for s in segments.iter().filter(|s| s.memsz > s.filesz) {
                zero(ram, s.paddr + s.filesz, s.memsz - s.filesz)?;
            }
        }
        let loaded = self.with_loader::<Elf>(ram)?;
        let pvh_entry = match loaded.pvh_boot_cap {
            PvhBootCapability::PvhEntryPresent(at) => Some(at.0),
            _ => None,
        };
        // linux-loader forgets segments that are all zero.
        let end = segments.iter().map(|s| s.paddr + s.memsz).max().unwrap_or(0);
        Ok(LoadedKernel {
            entry: loaded.kernel_load.0,
            pvh_entry,
            end,
            initrd_limit: layout::HOLE_START,
            cmdline_limit: if pvh_entry.is_some() {
                PVH_CMDLINE_LIMIT
            } else {
                LINUX_CMDLINE_LIMIT
            },
            setup_header: None,
        })
    }

    fn load_bzimage(&self, ram: &GuestRam, limit: u64) -> Result<LoadedKernel, BootError> {
        let header = self.check_bzimage(limit)?;
        let loaded = self.with_loader::<BzImage>(ram)?;
        let init_size = u64::from(header.init_size);
        Ok(LoadedKernel {
            entry: loaded.kernel_load.0 + bz::ENTRY_64,
            pvh_entry: None,
            end: loaded.kernel_end.max(header.pref_address.max(layout::HIGH_RAM) + init_size),
            initrd_limit: u64::from(header.initrd_addr_max) + 1,
            cmdline_limit: header.cmdline_size as usize,
            setup_header: loaded.setup_header,
        })
    }

    fn with_loader<L: KernelLoader>(
        &self,
        ram: &GuestRam,
    ) -> Result<KernelLoaderResult, BootError> {
        fn run<L: KernelLoader, F: Read + ReadVolatile + Seek>(
            ram: &GuestRam,
            from: &mut F,
        ) -> Result<KernelLoaderResult, linux_loader::loader::Error> {
            L::load(ram.memory(), None, from, Some(GuestAddress(layout::HIGH_RAM)))
        }
        match &self.bytes {
            Source::File(file) => {
                let mut file = file.try_clone().map_err(|e| self.load_error(e))?;
                run::<L, _>(ram, &mut file)
            }
            Source::Embedded(bytes) => run::<L, _>(ram, &mut Cursor::new(*bytes)),
        }
        .map_err(|e| self.load_error(e))
    }

    /// Checks what the loader takes on trust: everything it says lies in the file and in memory.
    fn check_elf(&self, limit: u64) -> Result<Vec<Segment>, BootError> {
        let header = self.head(0, elf::HEADER_LEN)?;
        if header.len() < elf::HEADER_LEN {
            return Err(self.truncated(elf::HEADER_LEN as u64));
        }
        if header[4] != elf::CLASS_64 || u16_at(&header, 18) != elf::MACHINE_X86_64 {
            return Err(self.unsupported("it is not an x86-64 ELF image"));
        }
        let count = u16_at(&header, 56);
        let table = u64_at(&header, 32);
        if count == 0 || count > elf::PHDRS_MAX || usize::from(u16_at(&header, 54)) != elf::PHDR_LEN
        {
            return Err(self.unsupported(format!("it has {count} program headers")));
        }
        let bytes = self.head(table, usize::from(count) * elf::PHDR_LEN)?;
        if bytes.len() < usize::from(count) * elf::PHDR_LEN {
            return Err(self.truncated(table.saturating_add(u64::from(count) * 56)));
        }
        let mut segments = Vec::new();
        for phdr in bytes.chunks_exact(elf::PHDR_LEN) {
            let kind = u32_at(phdr, 0);
            let filesz = u64_at(phdr, 32);
            if kind == elf::PT_LOAD || kind == elf::PT_NOTE {
                let end = u64_at(phdr, 8).saturating_add(filesz);
                if end > self.len {
                    return Err(self.truncated(end));
                }
            }
            if kind == elf::PT_NOTE && filesz > elf::NOTES_MAX {
                return Err(self.unsupported(format!("its notes have {filesz} bytes")));
            }
            if kind == elf::PT_LOAD {
                segments.push(Segment { paddr: u64_at(phdr, 24), filesz, memsz: u64_at(phdr, 40) });
            }
        }
        segments.retain(|s| s.memsz > 0);
        for s in &segments {
            if s.paddr < layout::HIGH_RAM {
                return Err(BootError::TooLow { image: self.name.clone(), at: s.paddr });
            }
            if s.filesz > s.memsz {
                return Err(self.unsupported("a segment is larger in the file than in memory"));
            }
            self.check_end(s.paddr.saturating_add(s.memsz), limit)?;
        }
        if segments.is_empty() {
            return Err(self.unsupported("it has nothing to load"));
        }
        Ok(segments)
    }

    fn check_bzimage(&self, limit: u64) -> Result<setup_header, BootError> {
        let bytes = self.head(bz::HEADER_AT, size_of::<setup_header>())?;
        if bytes.len() < size_of::<setup_header>() {
            return Err(self.truncated(bz::HEADER_AT + size_of::<setup_header>() as u64));
        }
        let mut header = setup_header::default();
        vm_memory::ByteValued::as_mut_slice(&mut header).copy_from_slice(&bytes);
        let (version, flags) = (header.version, header.xloadflags);
        if version < bz::VERSION_MIN || flags & bz::XLF_KERNEL_64 == 0 {
            return Err(self.unsupported(format!(
                "it has no 64-bit entry (boot protocol {}.{:02})",
                version >> 8,
                version & 0xff
            )));
        }
        let sects = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
        let wanted = (sects + 1) * bz::SECTOR + u64::from(header.syssize) * 16;
        // syssize is in units of 16 bytes, rounded up.
        if self.len + 16 <= wanted {
            return Err(self.truncated(wanted));
        }
        let at = header.pref_address.max(layout::HIGH_RAM);
        self.check_end(at.saturating_add(u64::from(header.init_size)), limit)?;
        self.check_end(layout::HIGH_RAM.saturating_add(self.len), limit)?;
        Ok(header)
    }

    fn check_end(&self, end: u64, limit: u64) -> Result<(), BootError> {
        if end <= limit {
            return Ok(());
        }
        Err(BootError::TooBig { what: format!("kernel {}", self.name), end, limit })
    }

    fn truncated(&self, wanted: u64) -> BootError {
        BootError::Truncated { image: self.name.clone(), size: self.len, wanted }
    }

    /// Copies `len` bytes of the image to guest memory.
    pub(super) fn copy_to(
        &self,
        ram: &GuestRam,
        at: u64,
        len: u64,
        what: &'static str,
    ) -> Result<(), BootError> {
        let failed = |e: &dyn ToString| BootError::Write { what, at, error: e.to_string() };
        let count = usize::try_from(len).map_err(|e| failed(&e))?;
        match &self.bytes {
            Source::File(file) => {
                let mut file = file.try_clone().map_err(|e| failed(&e))?;
                file.rewind().map_err(|e| failed(&e))?;
                ram.memory().read_exact_volatile_from(GuestAddress(at), &mut file, count)
            }
            Source::Embedded(bytes) => ram.memory().write_slice(&bytes[..count], GuestAddress(at)),
        }
        .map_err(|e| failed(&e))
    }
}

struct Segment {
    paddr: u64,
    filesz: u64,
    memsz: u64,
}

fn zero(ram: &GuestRam, at: u64, len: u64) -> Result<(), BootError> {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    let mut done = 0;
    while done < len {
        let n = usize::try_from(len - done).unwrap_or(usize::MAX).min(ZEROS.len());
        super::write(ram, "zeros", at + done, &ZEROS[..n])?;
        done += n as u64;
    }
    Ok(())
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
