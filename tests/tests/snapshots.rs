//! Save in one process, restore in another: nothing is lost, and nothing differs.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use serde_json::Value;
use tests::{
    add, goes_on, huge_pages, kvm, number, Guest, Host, HugePages, Snapshot, Suite, Vm, PATIENCE,
};

/// A guest that works hard enough to notice what goes wrong, and says so often.
const BUSY: &str = "ws=8 dirty=4000 pattern=random report=250 pace=0";
/// How often a VM is carried from process to process.
const MOVES: u64 = 100;

fn main() -> ExitCode {
    let mut suite = Suite::default();
    let large = large_host();
    add!(suite, &[&kvm()];
        survives_100_moves_with_1_vcpu,
        survives_100_moves_with_2_vcpus,
        what_is_restored_is_what_was_saved,
        a_running_vm_that_is_saved_goes_on,
        a_paused_vm_that_is_saved_stays_paused,
        one_file_restores_twice,
        a_restored_vm_reboots_without_its_kernel_file,
        another_save_replaces_the_file,
        what_the_guest_set_up_is_there,
        a_hanging_guest_is_still_there,
    );
    add!(suite, &[&kvm(), &large];
        memory_above_4_gib_is_saved,
        a_large_vm_costs_what_it_uses,
    );
    add!(suite, &[&kvm(), &huge_pages()]; huge_pages_are_saved);
    suite.run()
}

/// Memory for a VM of 16 GiB.
fn large_host() -> Result<(), String> {
    let memory = vmm::config::HostLimits::detect().memory;
    if memory >= 16 << 30 {
        Ok(())
    } else {
        Err("needs 16 GiB of memory".into())
    }
}

/// A guest's reports, none of which may be missing or come twice.
struct Reports {
    seq: u64,
    dropped: u64,
    last: Value,
}

impl Reports {
    fn next(&mut self, vm: &mut Vm) {
        let report = vm.console.event("report");
        self.take(report);
    }

    fn take(&mut self, report: Value) {
        let seq = number(&report, "seq");
        // The guest itself leaves out what its own buffer has no room for, and counts that.
        let dropped = number(&report, "dropped");
        let lost = seq.wrapping_sub(self.seq + 1);
        assert!(
            lost == 0 || lost <= dropped - self.dropped,
            "a report was lost or came twice, {} was the last one: {report}",
            self.seq
        );
        (self.seq, self.dropped, self.last) = (seq, dropped, report);
    }

    /// Reads what the console of a VM that is ending still has. Gives the beginning of a line
    /// that the next process will end.
    fn drain(&mut self, vm: &mut Vm) -> String {
        while let Some(event) = vm.console.next_event() {
            if event["event"] == "report" {
                self.take(event);
            }
        }
        vm.ends_well().stdout
    }
}

fn survives_moves(cpus: &str) {
    // Both at once want more processors than there are, and each waits for the other's.
    static ONE_BY_ONE: Mutex<()> = Mutex::new(());
    let _guard = ONE_BY_ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let host = Host::new();
    let file = host.file("vm.snapshot");
    let mut vm = host.run(BUSY, &["--cpus", cpus]).ready();
    let mut reports = Reports { seq: 0, dropped: 0, last: Value::Null };
    reports.next(&mut vm);
    for moves in 1..=MOVES {
        // Both ways: of a VM that stands, and of one that runs.
        if moves % 2 == 0 {
            host.ok(&["pause", "vm"]);
        }
        host.ok(&["save", "vm", &file, "--stop"]);
        let head = reports.drain(&mut vm);
        let before = reports.last.clone();
        vm = host.restore_within(&head, &file, &[]);
        // The line that was cut in two comes first, and tells of the time before.
        let deadline = Instant::now() + PATIENCE;
        while number(&reports.last, "switches") < moves || !goes_on(&before, &reports.last) {
            assert!(Instant::now() < deadline, "move {moves}: {before}, then {}", reports.last);
            vm.send("report");
            reports.next(&mut vm);
        }
        assert_eq!(number(&reports.last, "switches"), moves, "{}", reports.last);
        vm.send("verify");
        let verified = vm.console.find("the end of the full pass", |event| {
            if event["event"] == "report" {
                reports.take(event.clone());
            }
            event["event"] == "verified"
        });
        assert_eq!(verified["errors"], 0, "{verified}");
    }
    vm.send("poweroff");
    vm.ends_well();
}

fn survives_100_moves_with_1_vcpu() {
    survives_moves("1");
}

fn survives_100_moves_with_2_vcpus() {
    survives_moves("2");
}

fn what_is_restored_is_what_was_saved() {
    let host = Host::new();
    let (first, second) = (host.file("first"), host.file("second"));
    for cpus in ["1", "2", "4"] {
        let mut vm = host.run(BUSY, &["--cpus", cpus]).ready();
        let report = vm.report();
        vm.goes_on_after(&report);
        host.ok(&["save", "vm", &first, "--stop"]);
        vm.ends_well();
        let vm = host.restore(&first, &["--paused"]);
        host.wait_for_api("vm", &vm);
        host.ok(&["save", "vm", &second]);
        let (loaded, saved) = (Snapshot::open(first.as_ref()), Snapshot::open(second.as_ref()));
        let differences = loaded.differences(&saved);
        assert!(differences.is_empty(), "{cpus} vCPUs: {differences:#?}");

        // And a guest that has run is another: the comparison sees it.
        host.ok(&["resume", "vm"]);
        let mut vm = vm;
        vm.verify();
        host.ok(&["save", "vm", &second, "--stop"]);
        let other = loaded.differences(&Snapshot::open(second.as_ref()));
        assert!(other.iter().any(|d| d.contains("memory")), "{other:?}");
        assert!(other.iter().any(|d| d.contains("registers")), "{other:?}");
    }
}

fn a_running_vm_that_is_saved_goes_on() {
    let host = Host::new();
    let file = host.file("vm.snapshot");
    let mut vm = host.run(BUSY, &["--cpus", "2"]).ready();
    let before = vm.report();
    for _ in 0..3 {
        let report = host.json(&["save", "vm", &file]);
        assert_eq!(report["path"], file.as_str());
        assert_eq!(number(&report, "file_bytes"), fs::metadata(&file).unwrap().len(), "{report}");
        assert_eq!(host.json(&["info", "vm"])["status"], "running");
    }
    assert_eq!(host.files(), ["vm.snapshot"], "no temporary files");
    let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&file).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600, "guest memory holds secrets");
    vm.goes_on_after_pauses(3, &before);
    vm.verify();
}

fn a_paused_vm_that_is_saved_stays_paused() {
    let host = Host::new();
    let file = host.file("vm.snapshot");
    let mut vm = host.run(BUSY, &["--cpus", "2"]).ready();
    host.ok(&["pause", "vm"]);
    let report = host.json(&["save", "vm", &file]);
    assert_eq!(report["paused_ms"], 0.0, "{report}");
    assert_eq!(host.json(&["info", "vm"])["status"], "paused");
    // A restored VM runs, whatever the saved one did.
    let mut copy = host.restore(&file, &["--name", "copy"]);
    copy.verify();
    assert_eq!(host.json(&["info", "copy"])["status"], "running");
    host.ok(&["resume", "vm"]);
    vm.verify();
}

fn one_file_restores_twice() {
    let host = Host::new();
    let file = host.file("vm.snapshot");
    let mut vm = host.run(BUSY, &["--cpus", "2"]).ready();
    let before = vm.report();
    host.ok(&["save", "vm", &file, "--stop"]);
    vm.ends_well();
    let mut copies = ["one", "two"].map(|name| host.restore(&file, &["--name", name]));
    for copy in &mut copies {
        copy.goes_on_after_pauses(1, &before);
        copy.verify();
    }
    let names: Vec<_> = host.json(&["list"]).as_array().unwrap().clone();
    assert_eq!(names.len(), 2, "{names:?}");
}

fn a_restored_vm_reboots_without_its_kernel_file() {
    let host = Host::new();
    let kernel = host.write("kernel", guest_images::BEACON);
    let file = host.file("vm.snapshot");
    let mut vm = host.run(BUSY, &["--kernel", &kernel, "--cpus", "2"]).ready();
    fs::remove_file(&kernel).unwrap();
    vm.ask("reboot", "reboot");
    vm.console.event("ready");
    host.ok(&["save", "vm", &file, "--stop"]);
    vm.ends_well();
    let mut vm = host.restore(&file, &[]);
    for _ in 0..2 {
        vm.ask("reboot", "reboot");
        let boot = vm.console.event("boot");
        assert_eq!((number(&boot, "cpus"), number(&boot, "ws_pages")), (2, 2048), "{boot}");
        vm.console.event("ready");
        vm.verify();
    }
}

fn another_save_replaces_the_file() {
    let host = Host::new();
    let file = host.write("vm.snapshot", "what was here before");
    let mut vm = host.run("ws=1 report=0", &[]).ready();
    host.ok(&["save", "vm", &file]);
    vm.ask("echo a", "echo");
    host.ok(&["save", "vm", &file, "--stop"]);
    vm.ends_well();
    host.restore(&file, &[]).verify();
    assert_eq!(host.files(), ["vm.snapshot"]);
}

fn a_hanging_guest_is_still_there() {
    let host = Host::new();
    let file = host.file("vm.snapshot");
    let mut vm = host.run(BUSY, &["--cpus", "2"]).ready();
    // Interrupts off and halted: nothing but a reset helps, and nothing breaks by it.
    vm.ask("hang", "hang");
    host.ok(&["save", "vm", &file, "--stop"]);
    vm.ends_well();
    let mut vm = host.restore(&file, &[]);
    host.wait_for_api("vm", &vm);
    host.ok(&["reset", "vm"]);
    vm.console.event("ready");
    vm.verify();
}

/// Registers that `beacon` leaves as they are at power-on.
fn what_the_guest_set_up_is_there() {
    const IOAPIC_SELECT: u32 = 0xFEC0_0000;
    const IOAPIC_WINDOW: u32 = 0xFEC0_0010;
    let check = |guest: Guest| {
        guest
            .store(IOAPIC_SELECT, 0x10 + 2 * 9)
            .expect_load(IOAPIC_WINDOW, 0x0001_0077)
            .expect_in8(0x21, 0xA5)
            .expect_in8(0xA1, 0x5A)
            .expect_in8(0x3FF, 0xC3)
            .expect_in8(0x3FB, 0x03)
            .expect_in8(0x602, 0x00)
            .expect_in8(0x603, 0x01)
            .expect_debug_register_0(0x0012_3456)
    };
    let set_up = Guest::default()
        // Redirection of interrupt 9: masked, vector 0x77.
        .store(IOAPIC_SELECT, 0x10 + 2 * 9)
        .store(IOAPIC_WINDOW, 0x0001_0077)
        // Masks of both PICs.
        .out8(0x21, 0xA5)
        .out8(0xA1, 0x5A)
        // Scratch register and line control of the serial port.
        .out8(0x3FF, 0xC3)
        .out8(0x3FB, 0x03)
        // PM1 enable: power button.
        .out16(0x602, 0x0100)
        // PIT, channel 0: mode 2, 0x1234 ticks.
        .out8(0x43, 0x34)
        .out8(0x40, 0x34)
        .out8(0x40, 0x12)
        .set_debug_register_0(0x0012_3456);
    let guest = check(check(set_up).say("done").wait_for_input()).say("found").power_off();

    let host = Host::new();
    let (first, second) = (host.file("first"), host.file("second"));
    let kernel = host.write("kernel", guest.build());
    let mut vm = host.run("", &["--kernel", &kernel]);
    vm.console.event("done");
    host.ok(&["save", "vm", &first, "--stop"]);
    vm.ends_well();
    let mut vm = host.restore(&first, &["--paused"]);
    host.wait_for_api("vm", &vm);
    host.ok(&["save", "vm", &second]);
    let (loaded, saved) = (Snapshot::open(first.as_ref()), Snapshot::open(second.as_ref()));
    let differences = loaded.differences(&saved);
    assert!(differences.is_empty(), "{differences:#?}");
    host.ok(&["resume", "vm"]);
    vm.send("");
    vm.console.event("found");
    vm.ends_well();
}

/// Where the guest stores above 4 GiB.
const HIGH: u64 = 0x1_1220_0000;

fn memory_above_4_gib_is_saved() {
    let host = Host::new();
    let file = host.file("vm.snapshot");
    let guest = Guest::default()
        .map_window(HIGH)
        .expect_load(Guest::WINDOW, 0)
        .store(Guest::WINDOW, 0xC0FF_EE01)
        .store(Guest::WINDOW + 0x1F_FFFC, 0xC0FF_EE02)
        .say("stored")
        .wait_for_input()
        .expect_load(Guest::WINDOW, 0xC0FF_EE01)
        .expect_load(Guest::WINDOW + 0x1F_FFFC, 0xC0FF_EE02)
        .expect_load(Guest::WINDOW + 0x1000, 0)
        .say("found")
        .power_off();
    let kernel = host.write("kernel", guest.build());
    let mut vm = host.run("", &["--kernel", &kernel, "--memory", "5G"]);
    vm.console.event("stored");
    let report = host.json(&["save", "vm", &file, "--stop"]);
    vm.ends_well();
    let saved = Snapshot::open(&host.path("vm.snapshot"));
    assert_eq!(saved.header.layout.regions().count(), 2);
    assert_eq!((saved.word(HIGH), saved.word(HIGH + 0x1F_FFFC)), (0xC0FF_EE01, 0xC0FF_EE02));
    let size = number(&report, "file_bytes");
    assert!(size < 1 << 20, "{size} bytes for a guest of a few pages: {report}");
    let mut vm = host.restore(&file, &[]);
    vm.send("");
    vm.console.event("found");
    vm.ends_well();
}

fn a_large_vm_costs_what_it_uses() {
    const MIB: u64 = 1 << 20;
    let host = Host::new();
    let file = host.file("vm.snapshot");
    let busy = BUSY.replace("ws=8", "ws=64");
    let mut vm = host.run(&busy, &["--memory", "16G", "--cpus", "2"]).ready();
    let before = vm.report();
    let report = host.json(&["save", "vm", &file, "--stop"]);
    vm.ends_well();
    let size = fs::metadata(&file).unwrap().len();
    assert!((64 * MIB..80 * MIB).contains(&size), "{size} bytes: {report}");
    let mut vm = host.restore(&file, &[]);
    vm.goes_on_after_pauses(1, &before);
    vm.verify();
    let populated = number(&host.json(&["stats", "vm"]), "memory_populated_bytes");
    assert!((64 * MIB..80 * MIB).contains(&populated), "{populated} bytes are populated");
}

fn huge_pages_are_saved() {
    let host = Host::new();
    let file = host.file("vm.snapshot");
    let args = ["--hugepages", "--cpus", "2"];
    // As many as the VM has, and no more.
    let pages = HugePages::reserve(32).unwrap();
    let mut vm = host.run(BUSY, &args).ready();
    let before = vm.report();
    // A second one finds none left.
    let other = host.cli(&["run", "--name", "other", "--memory", "64M", "--hugepages"]);
    other.refused(1, &["huge pages", "nr_hugepages"]);
    host.ok(&["save", "vm", &file, "--stop"]);
    vm.ends_well();
    let mut vm = host.restore(&file, &[]);
    vm.goes_on_after_pauses(1, &before);
    vm.verify();
    assert_eq!(host.json(&["info", "vm"])["config"]["memory"]["hugepages"], true);
    drop(vm);
    drop(pages);
}
