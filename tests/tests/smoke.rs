//! Real Linux guests: they boot each way there is, on one and two vCPUs, take input, reboot, switch
//! off, and go on after a restore with their clocks right.
//!
//! Where the processor has no SVM or VMX, the tests run in the lab (`tests::lab`).
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use tests::lab::{self, image, Linux};
use tests::Host;

fn main() -> ExitCode {
    lab::run_suite(
        &["kvm-amd", "tun"],
        &[
            ("a_bzimage_boots_and_the_power_button_ends_it", bzimage),
            ("a_vmlinux_boots_by_pvh_and_powers_off", pvh),
            ("a_vmlinux_without_a_note_boots_by_the_64_bit_protocol", linux64),
            ("two_vcpus_reboot", two_vcpus_reboot),
            ("a_saved_guest_goes_on_in_a_new_process", save_and_restore),
        ],
    )
}

/// `type_of_loader` that the guest saw: ours (Documentation/arch/x86/boot.rst: undefined), and
/// what Linux itself puts there when it comes by PVH (arch/x86/platform/pvh/enlighten.c).
const LOADER_BOOT_PARAMS: u64 = 0xff;
const LOADER_PVH: u64 = 0xb0;

/// Starts `kernel` as the VM `vm` and waits for its shell.
fn boot(host: &Host, kernel: &Path, vcpus: u64) -> Linux {
    let begin = Instant::now();
    let (kernel, initrd) = (kernel.to_str().unwrap(), image("initramfs.cpio"));
    let mut command = host.command(&["run", "--name", "vm", "--console", "stdio"]);
    command.args(["--kernel", kernel, "--initrd", initrd.to_str().unwrap(), "--memory", "256M"]);
    command.args(["--cpus", &vcpus.to_string()]);
    command.args(["--cmdline", "console=ttyS0 quiet panic=-1 modules=button,evdev"]);
    let guest = Linux::start(command).ready();
    measured("seconds to init", begin.elapsed().as_secs_f64());
    guest
}

/// A figure for whoever reads the results.
fn measured(what: &str, value: f64) {
    println!("{}", json!({ "type": "measured", "what": what, "value": value }));
}

fn check(guest: &mut Linux, vcpus: u64, loader: u64) {
    assert_eq!(guest.number("nproc"), vcpus);
    assert_eq!(guest.number("cat /proc/sys/kernel/bootloader_type"), loader);
    let sources = "/sys/devices/system/clocksource/clocksource0";
    assert_eq!(guest.sh(&format!("cat {sources}/current_clocksource")), "kvm-clock");
    // Console input came by interrupt, and each vCPU has a timer.
    assert!(guest.number("awk '/ttyS0/ { print $2 + $3 }' /proc/interrupts") > 0);
    let timers = guest.sh("awk '/^LOC/ { print $2; if (NR) print $3 + 0 }' /proc/interrupts");
    let fired = timers.lines().filter(|count| count.parse().is_ok_and(|n: u64| n > 0)).count();
    assert_eq!(fired as u64, vcpus, "{timers}");
    healthy(guest);
}

/// Nothing in the kernel's log that is an error, and none of what it says after a bad pause.
fn healthy(guest: &mut Linux) {
    let log = guest.sh("dmesg -r");
    let bad = |line: &&str| {
        let error = ["<0>", "<1>", "<2>", "<3>"].iter().any(|level| line.starts_with(level));
        // Without an invariant TSC, Linux takes those of several processors to be apart.
        let expected = line.contains("TSCs unsynchronized") || line.contains("PCI: Fatal");
        let words = ["unstable", "lockup", "stall", "BUG:", "ACPI Error", "ACPI BIOS Error"];
        !expected && (error || words.iter().any(|word| line.contains(word)))
    };
    let found: Vec<&str> = log.lines().filter(bad).collect();
    assert!(found.is_empty(), "{found:#?}");
}

fn bzimage() {
    let host = Host::new();
    let mut guest = boot(&host, &image("vmlinuz"), 1);
    check(&mut guest, 1, LOADER_BOOT_PARAMS);
    host.ok(&["stop", "vm"]);
    guest.ends_well();
}

fn pvh() {
    let host = Host::new();
    let mut guest = boot(&host, &image("vmlinux"), 1);
    check(&mut guest, 1, LOADER_PVH);
    guest.send("poweroff -f");
    guest.ends_well();
}

fn linux64() {
    let host = Host::new();
    let kernel = host.path("vmlinux");
    fs::copy(image("vmlinux"), &kernel).unwrap();
    remove_notes(&kernel);
    let mut guest = boot(&host, &kernel, 1);
    check(&mut guest, 1, LOADER_BOOT_PARAMS);
    guest.send("poweroff -f");
    guest.ends_well();
}

/// Makes program headers of type PT_NOTE ones of type PT_NULL (System V ABI, "Program Header").
fn remove_notes(kernel: &Path) {
    const PT_NULL: [u8; 4] = [0; 4];
    const PT_NOTE: [u8; 4] = [4, 0, 0, 0];
    let file = fs::File::options().read(true).write(true).open(kernel).unwrap();
    let mut header = [0; 64];
    file.read_exact_at(&mut header, 0).unwrap();
    let table = u64::from_le_bytes(header[32..40].try_into().unwrap());
    let count = u16::from_le_bytes(header[56..58].try_into().unwrap());
    let mut removed = 0;
    for index in 0..u64::from(count) {
        let mut kind = [0; 4];
        file.read_exact_at(&mut kind, table + 56 * index).unwrap();
        if kind == PT_NOTE {
            file.write_all_at(&PT_NULL, table + 56 * index).unwrap();
            removed += 1;
        }
    }
    assert!(removed > 0, "{} has no notes to remove", kernel.display());
}

fn two_vcpus_reboot() {
    let host = Host::new();
    let mut guest = boot(&host, &image("vmlinux"), 2);
    check(&mut guest, 2, LOADER_PVH);
    guest.sh("touch /tmp/before");
    guest.send("reboot -f");
    guest.wait_ready();
    assert_eq!(host.json(&["stats", "vm"])["reboots"], 1);
    check(&mut guest, 2, LOADER_PVH);
    assert_ne!(guest.try_sh("test -e /tmp/before").0, 0, "memory was not started afresh");
    guest.send("poweroff -f");
    guest.ends_well();
}

/// What the guest's clocks say: the counter lies between two readings of the uptime.
struct Clocks {
    before: f64,
    cycles: u64,
    after: f64,
}

fn clocks(guest: &mut Linux) -> Clocks {
    let text = guest.sh("clocks");
    let mut words = text.split_whitespace();
    let mut word = || words.next().unwrap_or_else(|| panic!("clocks: {text:?}"));
    let (before, cycles, after) = (word(), word(), word());
    Clocks {
        before: before.parse().unwrap(),
        cycles: cycles.parse().unwrap(),
        after: after.parse().unwrap(),
    }
}

fn save_and_restore() {
    /// How long the VM does not exist: time that its clocks must not contain.
    const AWAY: Duration = Duration::from_secs(5);
    /// Of /proc/uptime, seconds, twice.
    const RESOLUTION: f64 = 0.02;
    /// Between the TSC's frequency as it was measured and as it is.
    const RATE: f64 = 0.001;

    let host = Host::new();
    let file = host.file("saved.vm");
    let mut guest = boot(&host, &image("vmlinux"), 2);
    let mhz = guest.sh("dmesg | sed -n 's/.*tsc: Detected \\([0-9.]*\\) MHz.*/\\1/p'");
    let hertz = mhz.parse::<f64>().unwrap() * 1e6;
    guest.sh("copy 4 & until [ -s /run/copies ]; do sleep 0.1; done");
    let begin = Instant::now();
    let old = clocks(&mut guest);
    let (ticks, copies) = (guest.number("cat /run/tick"), guest.number("cat /run/copies"));
    let wall = guest.number("date +%s");
    host.ok(&["save", "vm", &file, "--stop"]);
    guest.ends_well();

    // Not to wait for something: the passing of time is what is tested.
    thread::sleep(AWAY);

    let command = host.command(&["restore", &file, "--console", "stdio"]);
    let mut guest = Linux::start(command);
    let new = clocks(&mut guest);
    let lived = (begin.elapsed() - AWAY).as_secs_f64();

    // Uptime went on, without the time away.
    assert!(new.before >= old.after, "uptime {} after {}", new.before, old.after);
    assert!(
        new.after - old.before <= lived + RESOLUTION,
        "{} s in {lived} s",
        new.after - old.before
    );
    assert!(guest.number("date +%s") >= wall);
    // So did the TSC, in step.
    assert!(new.cycles > old.cycles, "TSC {} after {}", new.cycles, old.cycles);
    let counted = (new.cycles - old.cycles) as f64 / hertz;
    let (least, most) = (new.before - old.after, new.after - old.before);
    let range = least * (1. - RATE) - RESOLUTION..=most * (1. + RATE) + RESOLUTION;
    assert!(range.contains(&counted), "TSC counted {counted} s, the clock {least}..{most} s");
    measured("seconds of guest time across the restore", most);
    measured("seconds that the TSC counted", counted);

    // Work goes on, and nothing of it is wrong.
    let more = |name: &str, than: u64| {
        format!("until [ \"$(cat /run/{name})\" -gt {than} ]; do sleep 0.1; done")
    };
    guest.sh(&more("tick", ticks + 2));
    guest.sh(&more("copies", copies + 2));
    assert_eq!(guest.sh("cat /run/copy-errors"), "");
    assert_eq!(guest.number("nproc"), 2);
    healthy(&mut guest);
    guest.send("poweroff -f");
    guest.ends_well();
}
