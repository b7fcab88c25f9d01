//! What the tests have in common: booting the Linux image, and looking whether it is well.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{json, Value};
use tests::lab::{image, Linux};
use tests::{number, Host};

/// `type_of_loader` that the guest saw: ours (Documentation/arch/x86/boot.rst: undefined), and
/// what Linux itself puts there when it comes by PVH (arch/x86/platform/pvh/enlighten.c).
pub const LOADER_BOOT_PARAMS: u64 = 0xff;
/// See [`LOADER_BOOT_PARAMS`].
pub const LOADER_PVH: u64 = 0xb0;

/// How long the guest may take to do something that it was asked for by other means than its
/// console.
const PATIENCE: Duration = Duration::from_secs(60);

/// Starts `kernel` as the VM `vm` with 256 MiB and these flags, and waits for its shell. `cmdline`
/// is for `init`; modules are added to the power button's.
pub fn boot(host: &Host, kernel: &Path, flags: &[&str], modules: &str, cmdline: &str) -> Linux {
    let begin = Instant::now();
    let (kernel, initrd) = (kernel.to_str().unwrap(), image("initramfs.cpio"));
    let mut command = host.command(&["run", "--name", "vm", "--console", "stdio"]);
    command.args(["--kernel", kernel, "--initrd", initrd.to_str().unwrap(), "--memory", "256M"]);
    command.args(flags);
    let kernels = "console=ttyS0 quiet panic=-1";
    command.args(["--cmdline", &format!("{kernels} modules=button,evdev{modules} {cmdline}")]);
    let guest = Linux::start(command).ready();
    measured("seconds to init", begin.elapsed().as_secs_f64());
    guest
}

/// A figure for whoever reads the results.
pub fn measured(what: &str, value: f64) {
    println!("{}", json!({ "type": "measured", "what": what, "value": value }));
}

/// Fails unless the guest has so many vCPUs, came by this loader and has its clocks and interrupts.
pub fn check(guest: &mut Linux, vcpus: u64, loader: u64) {
    assert_eq!(guest.number("nproc"), vcpus);
    assert_eq!(guest.number("cat /proc/sys/kernel/bootloader_type"), loader);
    let sources = "/sys/devices/system/clocksource/clocksource0";
    assert_eq!(guest.sh(&format!("cat {sources}/current_clocksource")), "kvm-clock");
    let timers = guest.sh("awk '/^LOC/ { print $2; if (NR) print $3 + 0 }' /proc/interrupts");
    let fired = timers.lines().filter(|count| count.parse().is_ok_and(|n: u64| n > 0)).count();
    assert_eq!(fired as u64, vcpus, "{timers}");
    healthy(guest);
}

/// Fails if the kernel's log has an error, or any of what it says after a bad pause.
pub fn healthy(guest: &mut Linux) {
    // Sought by the guest: each byte on the serial port is several exits, and the log is long.
    let bad = "^<[0-3]>|unstable|lockup|stall|BUG:|ACPI Error|ACPI BIOS Error";
    // Without an invariant TSC, Linux takes those of several processors to be apart.
    let expected = "TSCs unsynchronized|PCI: Fatal";
    let log = guest.sh(&format!("dmesg -r | grep -E '{bad}' | grep -v -E '{expected}'; true"));
    assert_eq!(log, "");
}

/// Counters of the device `id` of the VM `vm`.
pub fn device(host: &Host, id: &str) -> Value {
    let stats = host.json(&["stats", "vm"]);
    let devices = stats["devices"].as_array().unwrap();
    let found = devices.iter().find(|device| device["id"] == id);
    found.unwrap_or_else(|| panic!("no {id}: {stats:#}")).clone()
}

/// A counter of the device `id`'s own.
pub fn counter(host: &Host, id: &str, name: &str) -> u64 {
    number(&device(host, id)["counters"], name)
}

/// Fails if the device `id` was broken by its driver, or its driver did not use it.
pub fn device_healthy(host: &Host, id: &str) {
    let device = device(host, id);
    for bad in ["needs_resets", "early_notifications", "bad_accesses"] {
        assert_eq!(device[bad], 0, "{bad}: {device:#}");
    }
    assert!(number(&device, "notifications") > 0, "{device:#}");
}

/// Waits until `done` gives a value.
pub fn until<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(Instant::now() < deadline, "{what} did not come within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}
