//! The virtio console beside the serial port.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use tests::lab::image;
use tests::Host;
use vmm::api::{Client, ConsoleSizeRequest};

use crate::guest::{boot, check, device_healthy, until, LOADER_BOOT_PARAMS};

/// An ELF kernel by the 64-bit Linux protocol, with its shell on the virtio console.
pub fn linux64_hvc0() {
    let host = Host::new();
    let kernel = host.path("vmlinux");
    fs::copy(image("vmlinux"), &kernel).unwrap();
    remove_notes(&kernel);
    let modules = ",virtio_mmio,virtio_console";
    let mut guest = boot(&host, &kernel, &["--virtio-console"], modules, "shell=hvc0");
    check(&mut guest, 1, LOADER_BOOT_PARAMS);
    assert_eq!(guest.sh("readlink /proc/self/fd/1"), "/dev/hvc0");
    // More than all buffers of a queue, both ways.
    let long = "x".repeat(3000);
    assert_eq!(guest.sh(&format!("echo {long}")), long);
    assert_eq!(guest.sh("seq 1 5000").lines().count(), 5000);
    // The serial port is still there, for output.
    assert_eq!(guest.sh("echo serial >/dev/ttyS0; sleep 1"), "serial");

    let client = Client::new(&host.runtime_dir().join("vm.sock")).unwrap();
    for (columns, rows) in [(132, 43), (80, 25)] {
        client.command_with("console-size", &ConsoleSizeRequest { columns, rows }).unwrap();
        let size = format!("{rows} {columns}");
        until("the console's new size", || (guest.sh("stty size") == size).then_some(()));
    }
    device_healthy(&host, "console");
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
