//! The ways to boot and to end, random numbers, and the balloon.

use tests::lab::{image, Linux};
use tests::Host;

use crate::guest::{
    boot, check, counter, device_healthy, healthy, measured, until, LOADER_BOOT_PARAMS, LOADER_PVH,
};

const MIB: u64 = 1 << 20;

/// A bzImage, ended by the power button.
pub fn bzimage() {
    let host = Host::new();
    let mut guest = boot(&host, &image("vmlinuz"), &[], "", "");
    check(&mut guest, 1, LOADER_BOOT_PARAMS);
    // Console input comes by interrupt.
    assert!(guest.number("awk '/ttyS0/ { print $2 }' /proc/interrupts") > 0);
    host.ok(&["stop", "vm", "--timeout", "50"]);
    guest.ends_well();
}

/// An ELF kernel by PVH, with a source of random numbers and a balloon, ended by the guest.
pub fn pvh_rng_balloon() {
    let host = Host::new();
    let flags = ["--rng", "--balloon"];
    let modules = ",virtio_mmio,virtio-rng,virtio_balloon";
    let mut guest = boot(&host, &image("vmlinux"), &flags, modules, "");
    check(&mut guest, 1, LOADER_PVH);
    random_numbers(&mut guest);
    balloon(&host, &mut guest);
    for id in ["rng", "balloon"] {
        device_healthy(&host, id);
    }
    healthy(&mut guest);
    guest.send("poweroff -f");
    guest.ends_well();
}

/// The kernel takes the device as its source, and what comes from it is not all the same.
pub fn random_numbers(guest: &mut Linux) {
    let current = guest.sh("cat /sys/class/misc/hw_random/rng_current");
    assert!(current.starts_with("virtio_rng"), "{current}");
    let read = "dd if=/dev/hwrng bs=4096 count=4 iflag=fullblock 2>/dev/null";
    let once = guest.sh(&format!("{read} | tee /tmp/random | md5sum"));
    assert_eq!(guest.number("wc -c </tmp/random"), 16384);
    assert_ne!(guest.sh(&format!("{read} | md5sum")), once);
    // Random bytes do not shrink.
    assert!(guest.number("gzip -c /tmp/random | wc -c") > 16000);
}

/// Memory that the guest has used and no longer needs goes back to the host, and comes again.
fn balloon(host: &Host, guest: &mut Linux) {
    const SIZE: u64 = 96 * MIB;
    /// The guest chooses which pages it gives: some were never touched.
    const GIVEN_BACK: u64 = 56 * MIB;

    guest.sh("dd if=/dev/zero of=/tmp/used bs=1M count=80 2>/dev/null && rm /tmp/used");
    let (total, before) = (guest.number(TOTAL), guest.resident());
    host.ok(&["balloon", "vm", "96M"]);
    until("a full balloon", || (in_balloon(host) == SIZE).then_some(()));
    let given_back = before.saturating_sub(guest.resident());
    measured("MiB that a balloon of 96 MiB gave back", (given_back / MIB) as f64);
    assert!(given_back >= GIVEN_BACK, "{given_back} bytes of {before}");
    assert_eq!(total - guest.number(TOTAL), SIZE >> 10);
    // It lives with what it has, the balloon's pages apart.
    guest.sh("dd if=/dev/zero of=/tmp/used bs=1M count=16 2>/dev/null && rm /tmp/used");

    host.ok(&["balloon", "vm", "0"]);
    until("an empty balloon", || (in_balloon(host) == 0).then_some(()));
    assert_eq!(guest.number(TOTAL), total);
    guest.sh("dd if=/dev/urandom of=/tmp/used bs=1M count=80 2>/dev/null && rm /tmp/used");
    assert_eq!(counter(host, "balloon", "discard_errors"), 0);
}

/// Memory as the guest has it, KiB.
const TOTAL: &str = "awk '/MemTotal/ { print $2 }' /proc/meminfo";

/// What the guest says is in the balloon, bytes.
pub fn in_balloon(host: &Host) -> u64 {
    counter(host, "balloon", "actual_pages") * 4096
}
