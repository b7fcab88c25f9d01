//! Placeholder.
#![no_std]
#![no_main]
#![allow(unsafe_code)]
#[no_mangle]
extern "C" fn _start() {}
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}
