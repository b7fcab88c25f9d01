//! A guest, and a snapshot, that do anything: bytes become memory, rings, accesses to registers,
//! notifications, events of the host, moves to another process.
//!
//! Besides not panicking, a device keeps these rules whatever happens ([`world`]):
//! - every byte of guest memory that changes is marked in the device bitmap;
//! - a mistake is counted once, sets DEVICE_NEEDS_RESET and is told to a driver that is there;
//! - a notification is work of a bounded size;
//! - what was saved, restored and saved again is the same;
//! - after a reset the driver can set the device up again.
//!
//! The same functions are run by the fuzz targets and, on a few inputs, by the ordinary tests
//! (devices/tests/fuzz.rs).

mod restoring;
mod subjects;
mod world;

pub use restoring::restore;

/// A disk on a file.
pub fn block(bytes: &[u8]) {
    world::drive::<subjects::Disk>(bytes);
}

/// A card on a descriptor.
pub fn net(bytes: &[u8]) {
    world::drive::<subjects::Card>(bytes);
}

/// The entropy device.
pub fn rng(bytes: &[u8]) {
    world::drive::<subjects::Entropy>(bytes);
}

/// The balloon.
pub fn balloon(bytes: &[u8]) {
    world::drive::<subjects::Ballast>(bytes);
}

/// The console.
pub fn console(bytes: &[u8]) {
    world::drive::<subjects::Screen>(bytes);
}

/// The transport, around a device that copies what it reads to where it writes.
pub fn mmio(bytes: &[u8]) {
    world::drive::<subjects::Echo>(bytes);
}
