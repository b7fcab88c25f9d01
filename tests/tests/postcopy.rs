//! Post-copy between processes: the guest goes on first, its memory follows, and nothing of it differs.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::process::ExitCode;
use std::time::Instant;

use serde_json::Value;
use tests::proxy::{Cut, On, Proxy};
use tests::ways::{followed, Way};
use tests::{
    add, huge_pages, kvm, number, pairwise, userfaultfd, Host, HugePages, Migrating, Suite,
    PATIENCE,
};

/// A guest that works hard enough to notice what goes wrong, and says so often.
const BUSY: &str = "ws=16 dirty=4000 pattern=random report=250 pace=0";
/// Push that does not come far; what is asked for is answered all the same.
const SLOW: [&str; 4] = ["--mode", "postcopy", "--bandwidth", "64K"];

/// A guest that uses more than comes before anybody can look.
const WIDE: &str = "ws=48 dirty=2000 pattern=random report=250 pace=0";
/// [`SLOW`], with nothing that goes with what is asked for, and an impatience that can be waited for.
const STARVED: [&str; 8] =
    ["--mode", "postcopy", "--bandwidth", "64K", "--prepaging", "off", "--dead-after", "1s"];

fn main() -> ExitCode {
    let mut suite = Suite::default();
    // The others are a matter of `make soak`.
    for way in pairwise(&Way::all()) {
        suite.case(&[&kvm(), &userfaultfd()], &way.to_string(), move || way.run());
    }
    add!(suite, &[&kvm(), &userfaultfd()];
        demand_alone_serves_the_guest,
        what_was_sent_and_written_again_follows,
        what_does_not_converge_follows,
        an_operator_has_the_guest_move,
        a_chain_of_all_modes_with_disk_traffic,
        a_vm_that_drains_is_left_alone,
        lost_connections_are_made_again,
        an_operator_recovers_over_another_address,
        a_guest_that_ends_while_it_drains_ends_both,
        a_dead_source_is_told_and_the_vm_can_be_ended,
        a_guest_that_stands_goes_on_with_its_source,
        a_dead_destination_is_told_and_given_up_by_an_operator,
        what_cannot_be_is_refused,
    );
    add!(suite, &[&kvm(), &userfaultfd(), &huge_pages()];
        huge_pages_follow_whole,
    );
    suite.run()
}

/// Migrates the VM `vm` of `from`; all of its memory follows. Gives the report.
#[track_caller]
fn migrate(from: &Host, to: &str, args: &[&str]) -> Value {
    let report = from.json(&[&["migrate", "vm", "--to", to], args].concat());
    followed(&report);
    report
}

/// A migration whose guest runs at the destination, and whose memory hardly follows.
#[track_caller]
fn draining(from: &Host, to_host: &Host, to: &str) -> Migrating {
    let migrating = Migrating::start(from, to, &SLOW);
    until(|| current(to_host)["phase"] == "draining");
    migrating
}

/// Null where there is no VM yet, or none any more.
fn current(host: &Host) -> Value {
    let asked = host.cli(&["migration", "vm", "--json"]);
    let answer = serde_json::from_str(&asked.stdout).unwrap_or(Value::Null);
    answer["current"].clone()
}

#[track_caller]
fn until(what: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !what() {
        assert!(Instant::now() < deadline, "it does not come to that");
        std::thread::yield_now();
    }
}

fn demand_alone_serves_the_guest() {
    for prepaging in ["off", "linear", "bubble"] {
        let (a, b) = (Host::new(), Host::new());
        let mut source = a.run(BUSY, &["--cpus", "2"]).ready();
        let before = source.report();
        let (mut destination, to) = b.receive(&[]);
        let args = ["--mode", "postcopy", "--push", "off", "--prepaging", prepaging, "--json"];
        let migrating = Migrating::start(&a, &to, &args);
        // It reads all of its working set.
        destination.goes_on_after_pauses(1, &before);
        destination.verify();
        a.ok(&["migrate-set", "vm", "--push", "on"]);
        let finished = migrating.end();
        assert_eq!(finished.code, Some(0), "{finished:#?}");
        let report: Value = serde_json::from_str(&finished.stdout).unwrap();
        let there = &report["postcopy"]["destination"];
        let (asked, prepaged) = (number(there, "requests"), number(there, "prepaged_pages"));
        match prepaging {
            "off" => {
                // With the state, and before anybody asked.
                let first = number(&report["postcopy"], "first_pages");
                assert!(asked > 4000 && first > 0 && prepaged <= first, "{report}");
            }
            _ => assert!(asked < 4000 && prepaged > asked, "{there}"),
        }
        destination.runs_on();
    }
}

fn what_was_sent_and_written_again_follows() {
    for (rounds, connections) in [("1", "1"), ("3", "4")] {
        let (a, b) = (Host::new(), Host::new());
        let guest = "ws=16 dirty=50000 pattern=random report=250 pace=0";
        let mut source = a.run(guest, &["--cpus", "2"]).ready();
        let before = source.report();
        let (mut destination, to) = b.receive(&[]);
        let args = ["--mode", "hybrid", "--rounds", rounds, "--connections", connections];
        let report = migrate(
            &a,
            &to,
            &[&args[..], &["--downtime", "1us", "--dirty-pages", "0", "--bandwidth", "20M"]]
                .concat(),
        );
        assert_eq!(report["rounds"].as_array().unwrap().len().to_string(), rounds, "{report}");
        assert!(number(&report["postcopy"], "missing_pages") > 0, "{report}");
        source.ends_well();
        destination.goes_on_after_pauses(1, &before);
        destination.verify();
    }
}

fn what_does_not_converge_follows() {
    let (a, b) = (Host::new(), Host::new());
    let guest = "ws=16 dirty=50000 pattern=random report=250 pace=0";
    let mut source = a.run(guest, &[]).ready();
    let before = source.report();
    let (mut destination, to) = b.receive(&[]);
    let args = [
        "--on-stall",
        "postcopy",
        "--max-rounds",
        "1",
        "--downtime",
        "1us",
        "--dirty-pages",
        "0",
        "--bandwidth",
        "20M",
    ];
    let report = migrate(&a, &to, &args);
    assert!(report["stall"].as_str().unwrap().contains("pages/s"), "{report}");
    assert!(!report["postcopy"].is_null(), "{report}");
    source.ends_well();
    destination.goes_on_after_pauses(1, &before);
    destination.verify();
}

fn an_operator_has_the_guest_move() {
    let (a, b) = (Host::new(), Host::new());
    let mut source = a.run(BUSY, &[]).ready();
    let before = source.report();
    let (mut destination, to) = b.receive(&[]);
    // Precopy that was not begun with that in view cannot.
    let plain = Migrating::start(&a, &to, &["--bandwidth", "64K"]);
    until(|| current(&a)["phase"] == "copying");
    assert_eq!(a.cli(&["migrate-start-postcopy", "vm"]).code, Some(5));
    a.ok(&["cancel", "vm"]);
    assert_eq!(plain.end().code, Some(1));
    destination.end();
    let (mut destination, to) = b.receive(&[]);
    let slow =
        Migrating::start(&a, &to, &["--mode", "hybrid", "--rounds", "9", "--bandwidth", "64K"]);
    until(|| current(&a)["progress"]["bytes"].as_u64() > Some(0));
    a.ok(&["migrate-start-postcopy", "vm"]);
    until(|| current(&b)["phase"] == "draining");
    a.ok(&["migrate-set", "vm", "--bandwidth", "0"]);
    assert_eq!(slow.end().code, Some(0));
    source.ends_well();
    destination.goes_on_after_pauses(number(&before, "switches") + 1, &before);
    destination.verify();
}

fn a_chain_of_all_modes_with_disk_traffic() {
    let hosts = [Host::new(), Host::new()];
    let disk = hosts[0].path("disk");
    File::create(&disk).unwrap().set_len(16 << 20).unwrap();
    let disk = format!("id=d,path={}", disk.display());
    let guest = "ws=8 dirty=4000 pattern=random report=0 pace=0 virtio=irq disk=verify disk-ws=4 \
                 disk-rate=2000 rng=on";
    let args = ["--cpus", "2", "--disk", &disk, "--rng", "--balloon"];
    let mut vm = hosts[0].run(guest, &args).ready();
    vm.console.event("disk-ready");
    let modes: [&[&str]; 8] = [
        &["--mode", "postcopy"],
        &["--mode", "precopy", "--verify"],
        &["--mode", "hybrid", "--downtime", "1us", "--dirty-pages", "0", "--bandwidth", "10M"],
        &["--mode", "postcopy", "--connections", "4", "--prepaging", "linear"],
        &["--mode", "cold", "--verify"],
        &["--mode", "postcopy", "--prepaging", "off"],
        &["--mode", "hybrid", "--downtime", "1us", "--rounds", "2", "--connections", "2"],
        &["--mode", "precopy", "--verify"],
    ];
    for (moves, mode) in (1..).zip(modes) {
        let (from, to) = (&hosts[(moves as usize + 1) % 2], &hosts[moves as usize % 2]);
        let before = vm.report();
        let (next, address) = to.receive(&[]);
        migrate(from, &address, mode);
        vm.ends_well();
        vm = next;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let after = vm.goes_on_after_pauses(moves, &before);
            for counter in ["disk_errors", "disk_stuck", "disk_irqs_lost", "rng_errors"] {
                assert_eq!(after[counter], 0, "move {moves}: {after}");
            }
            if number(&after, "disk_verified") > number(&before, "disk_verified") {
                break;
            }
            assert!(Instant::now() < deadline, "{before}, then {after}");
        }
    }
    vm.verify();
}

fn a_vm_that_drains_is_left_alone() {
    let (a, b, c) = (Host::new(), Host::new(), Host::new());
    let mut source = a.run(BUSY, &[]).ready();
    let (mut destination, to) = b.receive(&[]);
    let slow = draining(&a, &b, &to);
    let now = current(&b);
    assert_eq!((&now["direction"], &now["interrupted"]), (&"incoming".into(), &false.into()));
    assert!(number(&now, "missing_pages") > 0);
    assert_eq!(b.json(&["info", "vm"])["status"], "running");
    b.json(&["stats", "vm"]);
    let (_elsewhere, there) = c.receive(&[]);
    let file = b.file("saved");
    assert_eq!(a.cli(&["save", "vm", &file, "--incomplete"]).code, Some(5), "it follows");
    for args in [&["migrate", "vm", "--to", &there][..], &["save", "vm", &file]] {
        let refused = b.cli(args);
        assert_eq!(refused.code, Some(5), "{refused:#?}");
        assert!(refused.stderr.contains("memory is still on the host"), "{refused:#?}");
    }
    assert_eq!(a.cli(&["cancel", "vm"]).code, Some(5));
    assert_eq!(a.cli(&["resume", "vm"]).code, Some(5));
    // It would wait for memory, with all that waits for it.
    let refused = b.cli(&["reset", "vm"]);
    assert_eq!(refused.code, Some(5), "{refused:#?}");
    assert!(refused.stderr.contains("guest memory is not all here"), "{refused:#?}");
    // Pause and reboot are the guest's affair.
    b.ok(&["pause", "vm"]);
    b.ok(&["resume", "vm"]);
    destination.send("reboot");
    destination.console.event("reboot");
    destination.console.event("ready");
    a.ok(&["migrate-set", "vm", "--bandwidth", "0"]);
    assert_eq!(slow.end().code, Some(0));
    source.ends_well();
    destination.runs_on();
    // Now it can move again at once.
    migrate(&b, &there, &["--mode", "postcopy"]);
    destination.ends_well();
}

fn lost_connections_are_made_again() {
    for on in [On::Main, On::Pages, On::Requests] {
        let (a, b) = (Host::new(), Host::new());
        let mut source = a.run(BUSY, &["--cpus", "2"]).ready();
        let before = source.report();
        let (mut destination, to) = b.receive(&[]);
        let proxy = Proxy::to(&to);
        let args = [&SLOW[..], &["--connections", "2", "--json"]].concat();
        let migrating = Migrating::start(&a, &proxy.address(), &args);
        until(|| current(&b)["phase"] == "draining");
        // Several in a row.
        for times in 1..=3 {
            proxy.cut(on, Cut::Reset);
            until(|| current(&a)["interruptions"].as_u64() >= Some(times));
            until(|| current(&a)["interrupted"] == false && current(&b)["interrupted"] == false);
        }
        // Nobody can come through for a while.
        proxy.close_door(true);
        proxy.cut(on, Cut::Reset);
        until(|| current(&a)["interrupted"] == true && current(&b)["interrupted"] == true);
        proxy.close_door(false);
        a.recovers();
        a.ok(&["migrate-set", "vm", "--bandwidth", "0"]);
        let finished = migrating.end();
        assert_eq!(finished.code, Some(0), "{finished:#?}");
        let report: Value = serde_json::from_str(&finished.stdout).unwrap();
        assert!(number(&report["postcopy"], "interruptions") >= 4, "{report}");
        source.ends_well();
        destination.goes_on_after_pauses(1, &before);
        destination.verify();
    }
}

fn an_operator_recovers_over_another_address() {
    let (a, b) = (Host::new(), Host::new());
    let mut source = a.run(BUSY, &[]).ready();
    let before = source.report();
    let (mut destination, to) = b.receive(&[]);
    let proxy = Proxy::to(&to);
    let migrating = Migrating::start(&a, &proxy.address(), &SLOW);
    until(|| current(&b)["phase"] == "draining");
    assert_eq!(a.cli(&["migrate", "vm", "--recover"]).code, Some(5), "it is not interrupted");
    proxy.close_door(true);
    proxy.cut(On::Main, Cut::Reset);
    until(|| current(&a)["interrupted"] == true);
    a.ok(&["migrate", "vm", "--recover", "--to", &to]);
    until(|| current(&a)["interrupted"] == false);
    a.ok(&["migrate-set", "vm", "--bandwidth", "0"]);
    assert_eq!(migrating.end().code, Some(0));
    source.ends_well();
    destination.goes_on_after_pauses(1, &before);
    destination.verify();
}

fn a_guest_that_ends_while_it_drains_ends_both() {
    let (a, b) = (Host::new(), Host::new());
    let mut source = a.run(BUSY, &[]).ready();
    let (mut destination, to) = b.receive(&[]);
    let slow = draining(&a, &b, &to);
    destination.send("poweroff");
    destination.ends_well();
    let finished = slow.end();
    assert_eq!(finished.code, Some(8), "{finished:#?}");
    assert!(finished.stdout.contains("the guest ended"), "{finished:#?}");
    source.ends_well();
}

fn a_dead_source_is_told_and_the_vm_can_be_ended() {
    let (a, b) = (Host::new(), Host::new());
    // Both vCPUs turn in a loop, and use no memory that they have not used yet.
    let source = a.run("ws=48 dirty=0 verify=off report=0 pace=0", &["--cpus", "2"]).ready();
    let (mut destination, to) = b.receive(&[]);
    let slow = Migrating::start(&a, &to, &STARVED);
    until(|| current(&b)["phase"] == "draining");
    destination.ask("echo here", "echo");
    source.kill_9();
    assert_ne!(slow.end().code, Some(0));
    until(|| current(&b)["interrupted"] == true);
    let now = current(&b);
    let missing = number(&now, "missing_pages");
    assert!(missing > 0 && now["note"].as_str().is_some(), "{now}");
    let info = b.json(&["info", "vm"]);
    assert_eq!(
        (&info["status"], &info["draining"]["connected"]),
        (&"running".into(), &false.into())
    );
    let (runs, listed) = missing_runs(&info);
    match runs > 32 {
        true => assert!(listed < missing * 4096, "{info}"),
        false => assert_eq!(listed, missing * 4096, "{info}"),
    }
    assert_eq!(info["draining"]["frozen"], false, "it needs none of them");
    // Its first vCPU does, and the other one, which has all that it needs, does not go on without it.
    destination.send("verify");
    until(|| b.json(&["info", "vm"])["draining"]["frozen"] == true);
    let worked = || {
        let stats = b.json(&["stats", "vm"]);
        let vcpus = stats["vcpus"].as_array().unwrap().iter();
        vcpus.map(|vcpu| number(vcpu, "cpu_ms")).sum::<u64>()
    };
    until(|| {
        let before = worked();
        (0..20).for_each(|_| drop(b.json(&["info", "vm"])));
        worked() == before
    });
    let text = b.ok(&["info", "vm"]);
    assert!(text.contains("memory missing") && text.contains("stands until it comes"), "{text}");
    assert!(b.cli(&["kill", "vm"]).code.is_some());
    destination.end();
    let journal = b.json(&["migration"]);
    let entry = &journal[0];
    assert_eq!(
        (&entry["verdict"], number(entry, "missing_pages")),
        (&"running-here".into(), missing)
    );
    assert!(b.ok(&["migration"]).contains(&format!("without {missing} pages")));
    assert!(destination.log().contains("memory does not come any more"), "{}", destination.log());
}

/// Runs of missing pages, and the bytes of those that are listed.
#[track_caller]
fn missing_runs(info: &Value) -> (u64, u64) {
    let missing = &info["draining"]["missing"];
    let first = missing["first"].as_array().unwrap();
    let runs = number(missing, "runs");
    assert_eq!(first.len() as u64, runs.min(32), "{info}");
    (runs, first.iter().map(|run| number(run, "bytes")).sum())
}

fn a_guest_that_stands_goes_on_with_its_source() {
    let (a, b) = (Host::new(), Host::new());
    let mut source = a.run(WIDE, &["--cpus", "2"]).ready();
    let before = source.report();
    let (mut destination, to) = b.receive(&[]);
    let proxy = Proxy::to(&to);
    let migrating = Migrating::start(&a, &proxy.address(), &STARVED);
    until(|| current(&b)["phase"] == "draining");
    proxy.close_door(true);
    proxy.cut(On::Main, Cut::Reset);
    until(|| b.json(&["info", "vm"])["draining"]["frozen"] == true);
    assert!(!b.json(&["migration"])[0]["missing_pages"].is_null());
    proxy.close_door(false);
    a.recovers();
    a.ok(&["migrate-set", "vm", "--bandwidth", "0"]);
    assert_eq!(migrating.end().code, Some(0));
    source.ends_well();
    destination.goes_on_after_pauses(1, &before);
    destination.verify();
    assert!(b.json(&["info", "vm"])["draining"].is_null());
    assert!(b.json(&["migration"])[0]["missing_pages"].is_null());
}

fn a_dead_destination_is_told_and_given_up_by_an_operator() {
    let (a, b) = (Host::new(), Host::new());
    let mut source = a.run(BUSY, &[]).ready();
    let (destination, to) = b.receive(&[]);
    let slow = draining(&a, &b, &to);
    destination.kill_9();
    until(|| current(&a)["interrupted"] == true);
    let refused = a.cli(&["resume", "vm"]);
    assert_eq!(refused.code, Some(5), "{refused:#?}");
    assert!(refused.stderr.contains("memory is only here"), "{refused:#?}");
    // What is here is memory, no VM.
    let file = a.file("remains");
    let refused = a.cli(&["save", "vm", &file]);
    assert_eq!(refused.code, Some(5), "{refused:#?}");
    assert!(refused.stderr.contains("--incomplete"), "{refused:#?}");
    assert!(current(&a)["progress"]["note"].as_str().unwrap().contains("it is lost"));
    let saved = a.json(&["save", "vm", &file, "--incomplete"]);
    assert!(number(&saved, "pages") >= 4096, "the working set is in it: {saved}");
    let refused = a.cli(&["restore", &file]);
    assert_eq!(refused.code, Some(1), "{refused:#?}");
    assert!(refused.stderr.contains("no VM but memory that one left behind"), "{refused:#?}");
    assert_eq!(current(&a)["interrupted"], true, "it is kept all the same");
    source.terminate();
    assert_eq!(slow.end().code, Some(8));
    source.ends_well();
}

fn what_cannot_be_is_refused() {
    let (a, b) = (Host::new(), Host::new());
    let mut vm = a.run(BUSY, &[]).ready();
    let (_destination, to) = b.receive(&[]);
    let migrate = ["migrate", "vm", "--to", &to, "--mode", "postcopy"];
    let refused = a.cli(&[&migrate[..], &["--verify"]].concat());
    assert_eq!(refused.code, Some(2), "{refused:#?}");
    assert!(refused.stderr.contains("checksum"), "{refused:#?}");
    assert_eq!(a.cli(&["migrate", "vm", "--recover"]).code, Some(5));
    assert_eq!(a.cli(&["migrate-start-postcopy", "vm"]).code, Some(5));
    vm.runs_on();
}

fn huge_pages_follow_whole() {
    // Of 2 MiB, for 64 MiB at both ends.
    let pages = HugePages::reserve(64).unwrap();
    let postcopy = ["--mode", "postcopy", "--connections", "2"];
    let asked = ["--mode", "postcopy", "--prepaging", "off"];
    let hybrid =
        ["--mode", "hybrid", "--downtime", "1us", "--dirty-pages", "0", "--bandwidth", "40M"];
    for mode in [&postcopy[..], &asked, &hybrid] {
        let (a, b) = (Host::new(), Host::new());
        let mut source = a.run(BUSY, &["--hugepages", "--cpus", "2"]).ready();
        let before = source.report();
        let (mut destination, to) = b.receive(&[]);
        let report = migrate(&a, &to, mode);
        let missing = number(&report["postcopy"], "missing_pages");
        assert!(missing > 0 && missing % 512 == 0, "{report}");
        source.ends_well();
        destination.goes_on_after_pauses(1, &before);
        destination.verify();
        assert_eq!(b.json(&["info", "vm"])["config"]["memory"]["hugepages"], true);
    }
    drop(pages);
}
