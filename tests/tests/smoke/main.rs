//! Real Linux guests: they boot each way there is, on one and two vCPUs, use every device, reboot,
//! switch off, and go on after a restore or a migration with their clocks right.
//!
//! Where the processor has no SVM or VMX, the tests run in the lab (`tests::lab`). Each boots a
//! guest of its own, which takes seconds there: hence few tests that look at much.
#![allow(clippy::unwrap_used)]

mod boot;
mod console;
mod disk;
mod guest;
mod moved;
mod network;
mod saved;

use std::process::ExitCode;

use tests::lab::{run_suite, LabSuite};

const SUITE: LabSuite = LabSuite {
    programs: &["e2fsck", "ip", "mkfs.ext4"],
    modules: &[],
    files: &[],
    tests: &[
        ("a_bzimage_boots_and_the_power_button_ends_it", boot::bzimage),
        ("a_vmlinux_boots_by_pvh_with_random_numbers_and_a_balloon", boot::pvh_rng_balloon),
        ("a_vmlinux_without_a_note_boots_with_a_virtio_console", console::linux64_hvc0),
        ("two_vcpus_find_their_files_after_a_reboot", disk::reboot),
        ("a_tap_carries_ping_and_tcp_and_has_a_cable", network::tap),
        ("a_saved_guest_with_all_devices_goes_on_in_a_new_process", saved::save_and_restore),
        ("a_guest_at_work_is_migrated_live_there_and_back", moved::there_and_back),
    ],
};

fn main() -> ExitCode {
    run_suite(SUITE)
}
