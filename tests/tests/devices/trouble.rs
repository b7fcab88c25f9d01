//! Drivers that break the rules, and a host that cannot.

use std::process::Command;

use tests::{add, binary, number, Host, Need, Suite, Vm};

use super::{disk, run, stats_of, wait_until, TALK};

pub fn add(suite: &mut Suite, kvm: &Need, mounts: &[&Need]) {
    add!(suite, &[kvm]; an_attack_breaks_its_own_device_only);
    add!(suite, mounts; a_full_disk_of_the_host_is_an_error_for_the_guest);
}

fn an_attack_breaks_its_own_device_only() {
    for seed in [1, 2, 3, 77, 4711, 1_000_003] {
        let host = Host::new();
        let (good, bad) = (disk(&host, "good", 4), disk(&host, "bad", 4));
        let options = format!("virtio=irq disk=verify disk-ws=2 rng=on attack={seed}");
        let args = ["--disk", &good, "--disk", &bad, "--rng"];
        let mut vm = run(&host, &options, &args);
        vm.console.event("disk-ready");
        let report = vm.report_with("an attack and work beside it", |field| {
            field("attack_misdeeds") > 1000
                && field("attack_good") > 10
                && field("attack_needs_reset") > 0
                && field("disk_verified") > 100
                && field("rng_requests") > 5
        });
        let bad = stats_of(&host, "bad");
        assert!(number(&bad, "needs_resets") >= number(&report, "attack_needs_reset"), "{bad}");
        assert!(number(&bad, "resets") > 0, "{bad}");
        for id in ["good", "rng"] {
            let stats = stats_of(&host, id);
            assert_eq!(number(&stats, "needs_resets"), 0, "seed {seed}: {stats}");
        }
        vm.verify();
        // The machine can be taken down whatever the device is in the middle of.
        host.ok(&["pause", "vm"]);
        host.ok(&["save", "vm", &host.file("saved"), "--stop"]);
        vm.ends_well();
        let mut vm = host.restore(&host.file("saved"), &[]);
        let misdeeds = number(&report, "attack_misdeeds");
        vm.report_with("an attack that goes on", |field| field("attack_misdeeds") > misdeeds + 100);
    }
}

fn a_full_disk_of_the_host_is_an_error_for_the_guest() {
    let host = Host::new();
    // A disk of 8 MiB that has room for 1 MiB.
    let script = "mount -t tmpfs -o size=1m tmpfs \"$1\" && truncate -s 8M \"$1/data\" && shift && exec \"$@\"";
    let place = host.file("small");
    std::fs::create_dir(&place).unwrap();
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", script, "sh", &place]).arg(binary());
    let cmdline = format!("{TALK} virtio=irq disk=verify disk-ws=8 disk-rate=max");
    command.args(["run", "--name", "vm", "--memory", "128M", "--console", "stdio"]);
    let disk = format!("id=data,path={place}/data");
    command.args(["--cmdline", &cmdline, "--disk", &disk]);
    host.environment(&mut command);
    let mut vm = Vm::start(command);
    vm.console.tolerate("disk-error");
    vm.console.tolerate("disk_errors");
    let error = vm.console.event("disk-error");
    assert_eq!((&error["kind"], &error["op"]), (&"status".into(), &"write".into()), "{error}");
    assert_eq!(error["status"], 1, "VIRTIO_BLK_S_IOERR: {error}");
    wait_until("errors are counted", || number(&stats_of(&host, "data")["counters"], "errors") > 0);
    assert_eq!(number(&stats_of(&host, "data"), "needs_resets"), 0);
    // What there was room for is read as it was written, and the guest is well.
    let before = number(&vm.report(), "disk_verified");
    vm.report_with("more reads", |field| field("disk_verified") > before + 1000);
    vm.verify();
    vm.send("poweroff");
    vm.ends_well();
}
