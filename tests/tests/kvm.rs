//! A VM from boot to end: its guest, its console, its life.
#![allow(clippy::unwrap_used)]

use std::process::ExitCode;

use tests::{add, kvm, number, Host, Suite, Vm};

/// A guest that works hard enough to notice what goes wrong, and says so often.
const BUSY: &str = "ws=4 dirty=2000 report=250 pace=0";

fn main() -> ExitCode {
    let mut suite = Suite::default();
    add!(suite, &[&kvm()];
        boots_with_1_vcpu,
        boots_with_2_vcpus,
        boots_with_4_vcpus,
        the_guest_hears_its_console,
        the_guest_finds_damage,
        a_pause_stops_the_guest_and_a_resume_lets_it_go_on,
        a_vm_can_start_paused,
        power_off_ends_with_0,
        a_reboot_starts_again,
        a_reboot_can_be_the_end,
        the_reset_button_starts_again,
        a_paused_vm_that_is_reset_stays_paused,
        a_triple_fault_is_told_with_registers,
        a_reset_that_fails_is_a_crash,
        the_power_button_reaches_the_guest,
        a_guest_that_hangs_is_forced,
        signals_end_it,
        the_pidfile_lives_as_long_as_the_vm,
    );
    suite.run()
}

fn boots_with(cpus: u64) {
    let host = Host::new();
    let mut vm = host.run(BUSY, &["--cpus", &cpus.to_string()]);
    let boot = vm.console.event("boot");
    assert_eq!((number(&boot, "cpus"), boot["boot"].as_str()), (cpus, Some("pvh")), "{boot}");
    // Less what e820 reserves below 1 MiB.
    assert_eq!(number(&boot, "memory_mib"), 63, "{boot}");
    vm.console.event("ready");
    let first = vm.console.event("report");
    vm.goes_on_after(&first);
    let pages = number(&vm.verify(), "pages");
    assert_eq!(pages, number(&boot, "ws_pages"));
    vm.send("poweroff");
    vm.ends_well();
}

fn boots_with_1_vcpu() {
    boots_with(1);
}

fn boots_with_2_vcpus() {
    boots_with(2);
}

fn boots_with_4_vcpus() {
    boots_with(4);
}

fn the_guest_hears_its_console() {
    let host = Host::new();
    let mut vm = host.run(BUSY, &[]).ready();
    // More than the serial port's FIFO holds, and in one go.
    for n in 0..20 {
        vm.send(&format!("echo line {n} with quite some text in it"));
    }
    for n in 0..20 {
        let echo = vm.console.event("echo");
        assert_eq!(echo["text"], format!("line {n} with quite some text in it"));
    }
    vm.verify();
}

/// What the other tests rely on.
fn the_guest_finds_damage() {
    let host = Host::new();
    let mut vm = host.run("ws=4 report=0 pace=0", &[]).ready();
    vm.console.tolerate("corrupt");
    vm.send("poke 7");
    let corrupt = vm.console.event("corrupt");
    assert_eq!(number(&corrupt, "page"), 7, "{corrupt}");
}

fn exits(host: &Host) -> u64 {
    let stats = host.json(&["stats", "vm"]);
    stats["vcpus"].as_array().unwrap().iter().map(|vcpu| number(vcpu, "exits")).sum()
}

fn a_pause_stops_the_guest_and_a_resume_lets_it_go_on() {
    let host = Host::new();
    let mut vm = host.run(BUSY, &["--cpus", "2"]).ready();
    let before = vm.report();
    assert_eq!(number(&before, "switches"), 0, "{before}");
    for n in 1..=3 {
        assert_eq!(host.json(&["pause", "vm"])["status"], "paused");
        assert_eq!(host.json(&["pause", "vm"])["status"], "paused", "again");
        // The guest exits for its serial port all the time: not now.
        let standing = exits(&host);
        assert_eq!(host.json(&["info", "vm"])["status"], "paused");
        assert_eq!(exits(&host), standing);
        assert_eq!(host.json(&["resume", "vm"])["status"], "running");
        assert_eq!(host.json(&["resume", "vm"])["status"], "running", "again");
        // The guest knows that it stood.
        vm.goes_on_after_pauses(n, &before);
    }
    vm.verify();
    assert_eq!(number(&host.json(&["stats", "vm"]), "pauses"), 3);
}

fn a_vm_can_start_paused() {
    let host = Host::new();
    let vm = host.run(BUSY, &["--paused"]);
    // The API is there before the guest runs.
    host.wait_for_api("vm", &vm);
    assert_eq!(host.json(&["info", "vm"])["status"], "paused");
    assert_eq!(exits(&host), 0);
    host.ok(&["resume", "vm"]);
    vm.ready();
}

fn power_off_ends_with_0() {
    let host = Host::new();
    let mut vm = host.run(BUSY, &["--cpus", "2"]).ready();
    vm.ask("poweroff", "poweroff");
    let end = vm.ends_well();
    assert_eq!((end.stdout.as_str(), end.stderr.as_str()), ("", ""), "{end:#?}");
    assert_eq!(host.json(&["list"]).as_array().unwrap().len(), 0);
    let left: Vec<_> = std::fs::read_dir(host.runtime_dir()).unwrap().collect();
    assert_eq!(left.len(), 1, "only .lock stays: {left:?}");
}

fn rebooted(host: &Host, vm: &mut Vm) {
    let boot = vm.console.event("boot");
    assert_eq!(number(&boot, "cpus"), 2, "{boot}");
    vm.console.event("ready");
    let report = vm.report();
    assert_eq!(number(&report, "switches"), 0, "{report}");
    vm.goes_on_after(&report);
    vm.verify();
    assert_eq!(host.json(&["info", "vm"])["status"], "running");
}

fn a_reboot_starts_again() {
    let host = Host::new();
    let mut vm = host.run(BUSY, &["--cpus", "2"]).ready();
    for n in 1..=3 {
        vm.ask("reboot", "reboot");
        rebooted(&host, &mut vm);
        assert_eq!(number(&host.json(&["stats", "vm"]), "reboots"), n);
    }
    vm.send("poweroff");
    vm.ends_well();
}

fn a_reboot_can_be_the_end() {
    let host = Host::new();
    let mut vm = host.run(BUSY, &["--on-reboot", "exit"]).ready();
    vm.ask("reboot", "reboot");
    vm.ends_well();
}

fn the_reset_button_starts_again() {
    let host = Host::new();
    let mut vm = host.run(BUSY, &["--cpus", "2"]).ready();
    // The guest may be anywhere, in the middle of a line too.
    vm.send("hang");
    vm.console.event("hang");
    host.ok(&["reset", "vm"]);
    rebooted(&host, &mut vm);
    assert_eq!(number(&host.json(&["stats", "vm"]), "reboots"), 1);
}

fn a_paused_vm_that_is_reset_stays_paused() {
    let host = Host::new();
    let mut vm = host.run("ws=4 report=0", &["--cpus", "2"]).ready();
    host.ok(&["pause", "vm"]);
    assert_eq!(host.json(&["reset", "vm"])["status"], "paused");
    let standing = exits(&host);
    assert_eq!(exits(&host), standing);
    host.ok(&["resume", "vm"]);
    vm.console.event("boot");
    vm.console.event("ready");
}

fn a_triple_fault_is_told_with_registers() {
    let host = Host::new();
    let mut vm = host.run(BUSY, &["--cpus", "2"]).ready();
    vm.ask("triple", "triple");
    let end = vm.end();
    assert_eq!(end.code, Some(3), "{end:#?}");
    let said = end.stderr.to_lowercase();
    assert!(said.starts_with("minivmm: the guest crashed: "), "{said}");
    for word in ["vcpu 0", "triple fault", "rip", "rsp", "cr3", "efer"] {
        assert!(said.contains(word), "nothing about {word}: {said}");
    }
}

fn a_reset_that_fails_is_a_crash() {
    let host = Host::new();
    let kernel = host.write("kernel", guest_images::BEACON);
    let mut vm = host.run(BUSY, &["--kernel", &kernel]).ready();
    // In place: the open file that the VM keeps for reboots has other contents now.
    std::fs::write(&kernel, "no kernel any more").unwrap();
    host.cli(&["reset", "vm"]).refused(1, &["kernel"]);
    let end = vm.end();
    assert_eq!(end.code, Some(3), "{end:#?}");
    assert!(end.stderr.contains("could not be reset"), "{end:#?}");
}

fn the_power_button_reaches_the_guest() {
    let host = Host::new();
    let mut vm = host.run(BUSY, &["--cpus", "2"]).ready();
    let stop = host.json(&["stop", "vm"]);
    assert_eq!(stop["status"], "stopped");
    vm.console.event("power-button");
    vm.ends_well();
}

fn a_guest_that_hangs_is_forced() {
    let host = Host::new();
    let mut vm = host.run(BUSY, &["--cpus", "2"]).ready();
    vm.ask("hang", "hang");
    let patient = host.cli(&["stop", "vm", "--timeout", "0"]);
    patient.refused(6, &["power button", "minivmm stop vm --force"]);
    assert_eq!(host.json(&["info", "vm"])["status"], "running");
    host.ok(&["stop", "vm", "--timeout", "0", "--force"]);
    vm.ends_well();

    let mut vm = host.run(BUSY, &[]).ready();
    host.ok(&["kill", "vm"]);
    vm.ends_well();

    // Paused VMs can be ended too.
    let mut vm = host.run(BUSY, &["--cpus", "2"]).ready();
    host.ok(&["pause", "vm"]);
    host.ok(&["stop", "vm", "--force"]);
    vm.ends_well();
}

fn signals_end_it() {
    let host = Host::new();
    for signal in ["-TERM", "-INT", "-HUP"] {
        let mut vm = host.run(BUSY, &["--cpus", "2"]).ready();
        let mut kill = std::process::Command::new("kill");
        kill.args([signal, &vm.pid().to_string()]);
        tests::finish(kill, b"").ok();
        vm.ends_well();
        let left: Vec<_> = std::fs::read_dir(host.runtime_dir()).unwrap().collect();
        assert_eq!(left.len(), 1, "{signal}: {left:?}");
    }
}

fn the_pidfile_lives_as_long_as_the_vm() {
    let host = Host::new();
    let pidfile = host.file("vm.pid");
    let mut vm = host.run(BUSY, &["--pidfile", &pidfile]).ready();
    let text = std::fs::read_to_string(&pidfile).unwrap();
    assert_eq!(text.trim(), vm.pid().to_string());
    let other = host.cli(&["run", "--name", "other", "--console", "socket", "--pidfile", &pidfile]);
    other.refused(5, &[&pidfile, &vm.pid().to_string(), "--pidfile"]);
    vm.send("poweroff");
    vm.ends_well();
    assert!(host.files().is_empty(), "{:?}", host.files());
}
