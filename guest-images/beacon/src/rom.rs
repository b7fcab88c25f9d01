//! The boot ROM for QEMU: nothing but `rom.s`. `guest_images::qemu_bios` makes the image of it.
#![no_std]
#![no_main]
#![allow(unsafe_code)]

core::arch::global_asm!(include_str!("rom.s"));

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}
