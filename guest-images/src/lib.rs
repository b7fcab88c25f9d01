//! Guest images.
//!
//! [`BEACON`] is the freestanding guest of the demos, tests and benchmarks; `beacon/README.md` says
//! what it does and prints. [`qemu_bios`] makes a boot ROM that starts it in QEMU as quickly as a small
//! VMM would, so that the two can be compared.

mod qemu_bios;

pub use qemu_bios::qemu_bios;

/// The guest `beacon`: a static ELF executable with a PVH note and a 64-bit Linux entry.
pub static BEACON: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/beacon.elf"));
