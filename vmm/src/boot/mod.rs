//! From a kernel image to a boot CPU about to run it.
//!
//! Three ways in, chosen by the image: PVH where an ELF image has the note, the 64-bit Linux
//! boot protocol for other ELF images (`vmlinux`) and for bzImage. Sources: Linux
//! Documentation/arch/x86/boot.rst; Xen docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h.

mod cpu;
mod image;
mod params;

use std::io;
use std::path::PathBuf;

use vm_memory::{Bytes, GuestAddress};

pub use cpu::BootCpu;
pub use image::{Image, ImageKind};

use crate::layout;
use crate::memory::{GuestRam, PAGE_SIZE};

/// Why a guest cannot be booted from what was given.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The file cannot be read.
    #[error("{what} {}: {error}", path.display())]
    Read {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// Not an image at all.
    #[error("kernel {0} is not a kernel image: expected an ELF vmlinux or a bzImage (a vmlinuz)")]
    NotAKernel(String),
    /// An image for something else.
    #[error("kernel {image} cannot be booted here: {why}")]
    Unsupported {
        /// Which image.
        image: String,
        /// Why not.
        why: String,
    },
    /// Parts of the image are missing.
    #[error("kernel {image} is truncated: it has {size} bytes, its headers speak of {wanted}")]
    Truncated {
        /// Which image.
        image: String,
        /// Bytes there.
        size: u64,
        /// Bytes that should be there.
        wanted: u64,
    },
    /// The image does not fit into memory.
    #[error(
        "{what} is too big: it needs guest memory up to {end:#x}, and memory below 3 GiB ends at \
         {limit:#x}: give the guest more memory"
    )]
    TooBig {
        /// What does not fit.
        what: String,
        /// Where it would end.
        end: u64,
        /// Where memory ends.
        limit: u64,
    },
    /// The image would overwrite what the loader puts into low memory.
    #[error("kernel {image} wants to be loaded at {at:#x}, below 1 MiB")]
    TooLow {
        /// Which image.
        image: String,
        /// Where.
        at: u64,
    },
    /// The command line is too long.
    #[error("command line has {length} bytes; {what} takes {limit}")]
    CmdlineTooLong {
        /// Its length.
        length: usize,
        /// Most that is taken.
        limit: usize,
        /// Who takes no more.
        what: &'static str,
    },
    /// The command line has a zero byte.
    #[error("command line has a zero byte at position {0}")]
    CmdlineZero(usize),
    /// The loader failed.
    #[error("loading kernel {image}: {error}")]
    Load {
        /// Which image.
        image: String,
        /// What the loader said.
        error: String,
    },
    /// Guest memory could not be written.
    #[error("writing {what} to guest memory at {at:#x}: {error}")]
    Write {
        /// What was to be written.
        what: &'static str,
        /// Where.
        at: u64,
        /// What went wrong.
        error: String,
    },
}

/// All that is loaded before the first instruction.
pub struct BootSource<'a> {
    /// Kernel.
    pub kernel: &'a Image,
    /// Initial RAM disk.
    pub initrd: Option<&'a Image>,
    /// Command line.
    pub cmdline: &'a str,
    /// ACPI tables, to be placed at [`layout::ACPI_TABLES`].
    pub acpi: &'a [u8],
    /// Address of the RSDP.
    pub rsdp: u64,
    /// Memory holds an earlier boot: what the image leaves to be zero is made zero.
    pub again: bool,
}

impl BootSource<'_> {
    /// Loads everything and says how the boot CPU is to begin.
    pub fn load(&self, ram: &GuestRam) -> Result<BootCpu, BootError> {
        let limit = ram.regions().first().map_or(0, |r| r.len);
        let loaded = self.kernel.load_kernel(ram, limit, self.again)?;
        self.check_cmdline(loaded.cmdline_limit)?;
        let mut cmdline = self.cmdline.as_bytes().to_vec();
        cmdline.push(0);
        write(ram, "command line", layout::CMDLINE, &cmdline)?;
        write(ram, "ACPI tables", layout::ACPI_TABLES, self.acpi)?;
        let initrd = self.initrd.map(|i| load_initrd(i, ram, &loaded, limit)).transpose()?;
        let info = params::BootInfo {
            memory: ram.size(),
            cmdline_len: self.cmdline.len(),
            initrd,
            rsdp: self.rsdp,
        };
        cpu::write_gdt(ram)?;
        if let Some(entry) = loaded.pvh_entry {
            params::write_pvh(ram, &info)?;
            return Ok(BootCpu::Pvh { entry });
        }
        params::write_boot_params(ram, &info, loaded.setup_header)?;
        cpu::write_page_tables(ram)?;
        Ok(BootCpu::Linux64 { entry: loaded.entry })
    }

    fn check_cmdline(&self, kernel_limit: usize) -> Result<(), BootError> {
        if let Some(at) = self.cmdline.bytes().position(|b| b == 0) {
            return Err(BootError::CmdlineZero(at));
        }
        let length = self.cmdline.len();
        if length >= layout::CMDLINE_SIZE {
            let limit = layout::CMDLINE_SIZE - 1;
            return Err(BootError::CmdlineTooLong { length, limit, what: "minivmm" });
        }
        if length > kernel_limit {
            return Err(BootError::CmdlineTooLong {
                length,
                limit: kernel_limit,
                what: "this kernel",
            });
        }
        Ok(())
    }
}

/// Places the initrd as high as it may be, page-aligned: kernels unpack upwards from below.
fn load_initrd(
    initrd: &Image,
    ram: &GuestRam,
    kernel: &image::LoadedKernel,
    limit: u64,
) -> Result<(u64, u64), BootError> {
    let size = initrd.len();
    let top = limit.min(kernel.initrd_limit);
    let at = top.saturating_sub(size) & !(PAGE_SIZE - 1);
    if at < kernel.end || size > top {
        let what = format!("initrd {} ({size} bytes)", initrd.name());
        let end = kernel.end.saturating_add(size).next_multiple_of(PAGE_SIZE);
        return Err(BootError::TooBig { what, end, limit: top });
    }
    initrd.copy_to(ram, at, size, "initrd")?;
    Ok((at, size))
}

fn write(ram: &GuestRam, what: &'static str, at: u64, bytes: &[u8]) -> Result<(), BootError> {
    ram.memory().write_slice(bytes, GuestAddress(at)).map_err(|e| BootError::Write {
        what,
        at,
        error: e.to_string(),
    })
}
