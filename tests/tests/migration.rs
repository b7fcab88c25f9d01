//! Live migration between processes: the guest goes on, once, and nothing of it differs.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::process::{ExitCode, Stdio};
use std::time::Instant;

use serde_json::Value;
use tests::{add, kvm, number, Host, Migrating, Suite, PATIENCE};

/// A guest that works hard enough to notice what goes wrong, and says so often.
const BUSY: &str = "ws=8 dirty=4000 pattern=random report=250 pace=0";

fn main() -> ExitCode {
    let mut suite = Suite::default();
    add!(suite, &[&kvm()];
        a_guest_moves_and_its_name_with_it,
        every_pattern_arrives_verified,
        limits_of_rounds_are_configured_and_travel,
        a_paused_guest_arrives_paused,
        a_guest_arrives_paused_where_it_is_told_to,
        a_destination_that_is_killed_costs_nothing,
        a_source_that_is_killed_is_told_at_the_destination,
        a_cancelled_migration_leaves_the_guest_running,
        the_bandwidth_is_changed_under_way,
        a_guest_that_writes_faster_than_the_bandwidth_is_slowed_down,
        a_guest_that_reboots_under_way_arrives,
        a_guest_that_powers_off_under_way_ends_here,
        an_operator_ends_a_vm_under_way,
        what_does_not_fit_is_refused_with_every_reason_on_both_sides,
        nobody_listens,
        only_what_is_unresolved_is_resolved,
    );
    suite.run()
}

/// Migrates the VM `vm` of `from`, which succeeds; gives the report.
#[track_caller]
fn migrate(from: &Host, to: &str, args: &[&str]) -> Value {
    let report = from.json(&[&["migrate", "vm", "--to", to], args].concat());
    assert_eq!(report["verdict"], "handed-over", "{report}");
    report
}

fn a_guest_moves_and_its_name_with_it() {
    // Both ends on one host.
    let host = Host::new();
    let mut source = host.run(BUSY, &[]).ready();
    let before = source.report();
    let (mut destination, to) = host.receive(&[]);
    let report = migrate(&host, &to, &["--verify"]);
    assert!(number(&report, "data_pages") >= 2048, "{report}");
    assert!(!report["rounds"].as_array().unwrap().is_empty(), "{report}");
    let parts = ["stop", "save", "harvest", "send", "load", "commit", "resume"];
    let pause = &report["pause"];
    let sum: u64 = parts.iter().map(|part| number(pause, &format!("{part}_us"))).sum();
    let total = number(pause, "total_us");
    assert!(sum <= total && total - sum < 5000, "{pause}");
    source.ends_well();
    destination.goes_on_after_pauses(1, &before);
    destination.verify();
    let deadline = Instant::now() + PATIENCE;
    while host.json(&["list"])[0]["name"] != "vm" {
        assert!(Instant::now() < deadline);
    }
    let info = host.json(&["info", "vm"]);
    assert_eq!((&info["status"], &info["pid"]), (&"running".into(), &destination.pid().into()));
    let history = host.json(&["migration", "vm"]);
    let directions: Vec<_> =
        history["history"].as_array().unwrap().iter().map(|r| &r["direction"]).collect();
    assert_eq!(directions.len(), 2, "{history}");
    let journal = host.json(&["migration"]);
    let verdicts: Vec<_> = journal
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| format!("{} {}", entry["direction"], entry["verdict"]))
        .collect();
    assert!(verdicts.contains(&"\"outgoing\" \"handed-over\"".to_owned()), "{verdicts:?}");
    assert!(verdicts.contains(&"\"incoming\" \"running-here\"".to_owned()), "{verdicts:?}");
    host.ok(&["stop", "vm"]);
    destination.ends_well();
}

fn every_pattern_arrives_verified() {
    for (pattern, cpus, mode) in [
        ("sequential", "1", "precopy"),
        ("random", "2", "precopy"),
        ("hotspot", "1", "precopy"),
        ("stride", "2", "precopy"),
        ("random", "1", "cold"),
        ("stride", "2", "cold"),
    ] {
        let (a, b) = (Host::new(), Host::new());
        let guest = format!("ws=16 dirty=20000 pattern={pattern} report=250 pace=0");
        let mut source = a.run(&guest, &["--cpus", cpus]).ready();
        let before = source.report();
        let (mut destination, to) = b.receive(&[]);
        migrate(&a, &to, &["--mode", mode, "--verify"]);
        source.ends_well();
        destination.goes_on_after_pauses(1, &before);
        destination.verify();
    }
}

fn limits_of_rounds_are_configured_and_travel() {
    let (a, b) = (Host::new(), Host::new());
    // Whatever the guest has written after a round is little enough.
    let file = a.write("vm.toml", "migration = { dirty-pages = 1000000, max-rounds = 7 }");
    let mut source = a.run(BUSY, &["--config", &file]).ready();
    let before = source.report();
    let (mut destination, to) = b.receive(&[]);
    let report = migrate(&a, &to, &["--downtime", "1us"]);
    assert_eq!(report["rounds"].as_array().unwrap().len(), 1, "{report}");
    source.ends_well();
    destination.goes_on_after_pauses(1, &before);
    let limits = &b.json(&["info", "vm"])["config"]["migration"];
    assert_eq!((number(limits, "dirty_pages"), number(limits, "max_rounds")), (1_000_000, 7));
}

fn a_paused_guest_arrives_paused() {
    let (a, b) = (Host::new(), Host::new());
    let mut source = a.run(BUSY, &[]).ready();
    let before = source.report();
    a.ok(&["pause", "vm"]);
    let (mut destination, to) = b.receive(&[]);
    migrate(&a, &to, &[]);
    source.ends_well();
    assert_eq!(b.json(&["info", "vm"])["status"], "paused");
    b.ok(&["resume", "vm"]);
    destination.goes_on_after_pauses(1, &before);
    destination.verify();
}

fn a_guest_arrives_paused_where_it_is_told_to() {
    let (a, b) = (Host::new(), Host::new());
    let mut source = a.run(BUSY, &[]).ready();
    let before = source.report();
    let (mut destination, to) = b.receive(&["--paused"]);
    migrate(&a, &to, &["--verify"]);
    source.ends_well();
    assert_eq!(b.json(&["info", "vm"])["status"], "paused");
    let stats = |host: &Host| host.json(&["stats", "vm"])["vcpus"].clone();
    assert!(stats(&b).as_array().unwrap().iter().all(|vcpu| vcpu["exits"] == 0), "{}", stats(&b));
    b.ok(&["resume", "vm"]);
    destination.goes_on_after_pauses(1, &before);
    destination.verify();
}

fn a_destination_that_is_killed_costs_nothing() {
    let (a, b) = (Host::new(), Host::new());
    let mut source = a.run(BUSY, &[]).ready();
    let (destination, to) = b.receive(&[]);
    let slow = Migrating::slowly(&a, &to, &[]);
    destination.kill_9();
    let finished = slow.end();
    assert_eq!(finished.code, Some(1), "{finished:#?}");
    assert!(finished.stdout.contains("runs here as before"), "{finished:#?}");
    source.runs_on();
    // The next attempt has all of the memory.
    let before = source.report();
    let (mut destination, to) = b.receive(&[]);
    migrate(&a, &to, &["--verify"]);
    source.ends_well();
    destination.goes_on_after_pauses(number(&before, "switches") + 1, &before);
    destination.verify();
}

fn a_source_that_is_killed_is_told_at_the_destination() {
    let (a, b) = (Host::new(), Host::new());
    let source = a.run(BUSY, &[]).ready();
    let (mut destination, to) = b.receive(&[]);
    let slow = Migrating::slowly(&a, &to, &[]);
    assert_eq!(b.json(&["info", "vm"])["status"], "incoming");
    assert_eq!(b.cli(&["resume", "vm"]).code, Some(5));
    source.kill_9();
    let finished = destination.end();
    assert_eq!(finished.code, Some(1), "{finished:#?}");
    assert!(finished.stderr.contains("no VM came"), "{finished:#?}");
    assert_ne!(slow.end().code, Some(0));
    assert_eq!(b.json(&["list"]), Value::Array(Vec::new()));
}

fn a_cancelled_migration_leaves_the_guest_running() {
    let (a, b) = (Host::new(), Host::new());
    let mut source = a.run(BUSY, &[]).ready();
    assert_eq!(a.cli(&["cancel", "vm"]).code, Some(5));
    let (mut destination, to) = b.receive(&[]);
    let slow = Migrating::slowly(&a, &to, &[]);
    let second = a.cli(&["migrate", "vm", "--to", &to]);
    assert_eq!(second.code, Some(5), "{second:#?}");
    a.ok(&["cancel", "vm"]);
    let finished = slow.end();
    assert_eq!(finished.code, Some(1), "{finished:#?}");
    assert!(finished.stdout.contains("cancelled"), "{finished:#?}");
    let finished = destination.end();
    assert!(finished.stderr.contains("cancelled"), "{finished:#?}");
    for (host, verdict) in [(&a, "running-here"), (&b, "not-here")] {
        assert_eq!(host.json(&["migration"])[0]["verdict"], verdict);
    }
    source.runs_on();
    let before = source.report();
    let (mut destination, to) = b.receive(&[]);
    migrate(&a, &to, &["--verify"]);
    destination.goes_on_after_pauses(1, &before);
    destination.verify();
}

fn the_bandwidth_is_changed_under_way() {
    let (a, b) = (Host::new(), Host::new());
    let mut source = a.run(BUSY, &[]).ready();
    let before = source.report();
    let (mut destination, to) = b.receive(&[]);
    let slow = Migrating::slowly(&a, &to, &["--json"]);
    a.ok(&["migrate-set", "vm", "--bandwidth", "0", "--downtime", "50ms"]);
    let finished = slow.end();
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    destination.goes_on_after_pauses(1, &before);
    destination.verify();
}

/// Threads of a process by this name.
fn threads(pid: u32, name: &str) -> usize {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let named = |path: std::path::PathBuf| std::fs::read_to_string(path.join("comm")).ok();
    tasks.filter_map(|task| named(task.unwrap().path())).filter(|comm| comm.trim() == name).count()
}

fn a_guest_that_writes_faster_than_the_bandwidth_is_slowed_down() {
    // One vCPU writes all of its 8 MiB again and again, the other one nothing.
    const WRITER: &str = "ws=8 dirty=50000 pattern=random report=250 pace=0";
    // The pause is not capped, so it has to be short to need it.
    const SLOW: [&str; 6] = ["--bandwidth", "8M", "--downtime", "5ms", "--on-stall", "throttle"];
    let host = Host::new();
    let mut source = host.run(WRITER, &[]).ready();
    let (abandoned, to) = host.receive(&[]);
    // Cancelled once it is slowed down, it is as fast as before.
    let mut command = host.command(&[&["migrate", "vm", "--to", &to], &SLOW[..]].concat());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while threads(source.pid(), "throttle") == 0 {
        assert!(Instant::now() < deadline && child.try_wait().unwrap().is_none());
        std::thread::yield_now();
    }
    host.ok(&["cancel", "vm"]);
    assert_eq!(tests::wait(&mut child, PATIENCE).unwrap().code(), Some(1));
    assert_eq!(threads(source.pid(), "throttle"), 0);
    source.runs_on();
    drop(abandoned);

    let (mut destination, to) = host.receive(&[]);
    let report = migrate(&host, &to, &[&SLOW[..], &["--verify"]].concat());
    assert!(report["stall"].as_str().unwrap().contains("pages/s"), "{report}");
    let runs = |round: &Value| round["vcpu_run"][0].as_f64();
    let slowest = report["rounds"].as_array().unwrap().iter().filter_map(runs).fold(1.0, f64::min);
    assert!((0.1..1.0).contains(&slowest), "{report}");
    source.ends_well();
    assert_eq!(threads(destination.pid(), "throttle"), 0);
    destination.runs_on();
}

fn a_guest_that_reboots_under_way_arrives() {
    let (a, b) = (Host::new(), Host::new());
    let mut source = a.run(BUSY, &[]).ready();
    let (mut destination, to) = b.receive(&[]);
    let slow = Migrating::slowly(&a, &to, &["--verify"]);
    source.send("reboot");
    source.console.event("reboot");
    source.console.event("ready");
    a.ok(&["migrate-set", "vm", "--bandwidth", "0"]);
    assert_eq!(slow.end().code, Some(0));
    source.ends_well();
    destination.runs_on();
}

fn a_guest_that_powers_off_under_way_ends_here() {
    let (a, b) = (Host::new(), Host::new());
    let mut source = a.run(BUSY, &[]).ready();
    let (mut destination, to) = b.receive(&[]);
    let slow = Migrating::slowly(&a, &to, &[]);
    source.send("poweroff");
    source.ends_well();
    assert_ne!(slow.end().code, Some(0));
    let finished = destination.end();
    assert_eq!(finished.code, Some(1), "{finished:#?}");
    assert!(finished.stderr.contains("guest ended"), "{finished:#?}");
}

fn an_operator_ends_a_vm_under_way() {
    let (a, b) = (Host::new(), Host::new());
    let mut source = a.run(BUSY, &[]).ready();
    let (mut destination, to) = b.receive(&[]);
    let slow = Migrating::slowly(&a, &to, &[]);
    a.ok(&["kill", "vm"]);
    source.ends_well();
    assert_ne!(slow.end().code, Some(0));
    assert_eq!(destination.end().code, Some(1));
}

fn what_does_not_fit_is_refused_with_every_reason_on_both_sides() {
    let (a, b) = (Host::new(), Host::new());
    let disks = ["one", "two"].map(|name| {
        File::create(a.path(name)).unwrap().set_len(1 << 20).unwrap();
        format!("id={name},path={}", a.file(name))
    });
    let args = ["--disk", &disks[0], "--disk", &disks[1]];
    let mut source = a.run(BUSY, &args).ready();
    let small = b.write("small", [0; 512]);
    let other = format!("one={small}");
    let gone = format!("two={}", b.file("gone"));
    let (mut destination, to) = b.receive(&["--disk", &other, "--disk", &gone]);
    let refused = a.cli(&["migrate", "vm", "--to", &to]);
    assert_eq!(refused.code, Some(1), "{refused:#?}");
    let finished = destination.end();
    assert_eq!(finished.code, Some(1), "{finished:#?}");
    for text in [&refused.stdout, &finished.stderr] {
        assert!(text.contains("has 512 bytes, the disk at the source 1048576 bytes"), "{text}");
        assert!(text.contains("gone") && text.contains("create it"), "{text}");
    }
    source.runs_on();
}

fn nobody_listens() {
    let host = Host::new();
    let mut vm = host.run(BUSY, &[]).ready();
    // A port that was free a moment ago.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap().to_string();
    drop(listener);
    let failed = host.cli(&["migrate", "vm", "--to", &to]);
    assert_eq!(failed.code, Some(1), "{failed:#?}");
    assert!(failed.stdout.contains("runs here as before"), "{failed:#?}");
    let wrong = host.cli(&["migrate", "vm", "--to", "host-without-port"]);
    assert_eq!(wrong.code, Some(2), "{wrong:#?}");
    assert!(wrong.stderr.contains("HOST:PORT"), "{wrong:#?}");
    let report = host.cli(&["receive", "--listen", "300.0.0.1:1"]);
    assert_eq!(report.code, Some(2), "{report:#?}");
    vm.runs_on();
}

fn only_what_is_unresolved_is_resolved() {
    let host = Host::new();
    let unknown = host.cli(&["resolve", "abc", "--owner", "here"]);
    assert_eq!(unknown.code, Some(2), "{unknown:#?}");
    assert!(unknown.stderr.contains("no migration abc"), "{unknown:#?}");
    let mut source = host.run(BUSY, &[]).ready();
    let (_destination, to) = host.receive(&[]);
    let report = migrate(&host, &to, &[]);
    source.ends_well();
    let id = report["id"].as_str().unwrap();
    for owner in ["here", "there"] {
        let decided = host.cli(&["resolve", id, "--owner", owner]);
        assert_eq!(decided.code, Some(5), "{decided:#?}");
    }
}
