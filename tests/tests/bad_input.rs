//! Whatever is wrong is refused, with a message that says what and what to do. Nothing is lost.
#![allow(clippy::unwrap_used)]

use std::process::ExitCode;

use tests::{add, kvm, Guest, Host, Suite};

#[path = "bad_input/api.rs"]
mod api;
#[path = "bad_input/devices.rs"]
mod devices;
#[path = "bad_input/machine.rs"]
mod machine;
#[path = "bad_input/snapshot.rs"]
mod snapshot;

fn main() -> ExitCode {
    let mut suite = Suite::default();
    let kvm = kvm();
    machine::add(&mut suite, &kvm);
    snapshot::add(&mut suite, &kvm);
    api::add(&mut suite, &kvm);
    devices::add(&mut suite, &kvm);
    add!(suite, &[&kvm];
        unmapped_accesses_are_ignored_and_counted,
        unmapped_accesses_of_any_guest_are_counted,
    );
    suite.run()
}

fn unmapped_accesses_are_ignored_and_counted() {
    let host = Host::new();
    let guest = Guest::default()
        .out8(0x1234, 1)
        .out8(0x1235, 1)
        .out32(0x1238, 1)
        .expect_in8(0x1234, 0xFF)
        .expect_in32(0x1238, 0xFFFF_FFFF)
        .store(0xD800_0000, 1)
        .store(0xFFFF_FFF0, 1)
        .expect_load(0xD800_0000, 0xFFFF_FFFF)
        .expect_load(0xD800_0004, 0xFFFF_FFFF)
        // Beyond 64 MiB of memory.
        .expect_load(0x0400_0000, 0xFFFF_FFFF)
        // Not counted: the port that is there to be written to.
        .out8(0x80, 1)
        .say("done")
        .wait_for_input()
        .power_off();
    let kernel = host.write("kernel", guest.build());
    let mut vm = host.run("", &["--kernel", &kernel]);
    vm.console.event("done");
    let unmapped = host.json(&["stats", "vm"])["unmapped"].clone();
    let expected = serde_json::json!({
        "pio_reads": 2, "pio_writes": 3, "mmio_reads": 3, "mmio_writes": 2,
    });
    assert_eq!(unmapped, expected);
    vm.send("");
    vm.ends_well();
}

fn unmapped_accesses_of_any_guest_are_counted() {
    let host = Host::new();
    let mut vm = host.run("mode=exits samples=100 ws=1 report=0", &[]);
    let exits = vm.console.event("exits");
    assert_eq!(exits["samples"], 100, "{exits}");
    let unmapped = host.json(&["stats", "vm"])["unmapped"].clone();
    assert_eq!((&unmapped["mmio_reads"], &unmapped["mmio_writes"]), (&100.into(), &0.into()));
    vm.verify();
}
