//! Devices at work while their VM is moved, paused and reset.

use serde_json::Value;
use tests::network::in_private_network;
use tests::{add, number, Host, Need, Suite, Traffic, Vm};

use super::disk;

/// How often a VM is saved and restored.
const SAVES: u64 = 5;
/// How often a VM is carried from host to host and back.
const MIGRATIONS: u64 = 20;

pub fn add(suite: &mut Suite, needs: &[&Need]) {
    add!(suite, needs;
        traffic_survives_5_moves_with_2_vcpus,
        traffic_survives_5_moves_without_interrupts,
        traffic_survives_20_live_migrations_with_2_vcpus,
        traffic_survives_pauses,
        a_reset_under_load_begins_anew,
    );
}

/// A VM with every device at work, and another host.
struct Busy {
    host: Host,
    other: Host,
    vm: Vm,
    traffic: Traffic,
}

impl Busy {
    #[track_caller]
    fn start(notify: &str, cpus: &str) -> Self {
        let host = Host::new();
        let (traffic, vm) = Traffic::start(&host, notify, cpus, &disk(&host, "data", 8));
        Self { host, other: Host::new(), vm, traffic }
    }

    #[track_caller]
    fn goes_on_after(&mut self, before: &Value) -> Value {
        self.traffic.goes_on_after(&mut self.vm, before)
    }

    /// A report of the guest when its balloon is done.
    #[track_caller]
    fn at_rest(&mut self) -> Value {
        self.vm.report_with("a balloon at rest", |field| {
            field("balloon_wanted") == field("balloon_actual")
        })
    }

    /// Migrates the VM to the other host, compared page by page; the guest's last report before that.
    #[track_caller]
    fn is_migrated(&mut self, moves: u64) -> Value {
        let connections = ["4", "1"][moves as usize % 2];
        let net = Traffic::at(moves as usize % 2);
        let (next, address) = self.other.receive(&net.each_ref().map(String::as_str));
        let before = self.at_rest();
        let args = ["migrate", "vm", "--to", &address, "--verify", "--connections", connections];
        let report = self.host.json(&args);
        assert_eq!(report["verdict"], "handed-over", "{report}");
        assert_eq!(report["connection_bytes"].as_array().unwrap().len().to_string(), connections);
        std::mem::replace(&mut self.vm, next).ends_well();
        std::mem::swap(&mut self.host, &mut self.other);
        before
    }

    /// Saves the VM and goes on with it in another process; the guest's last report before that.
    #[track_caller]
    fn is_moved(&mut self) -> Value {
        let file = self.host.file("vm.snapshot");
        let before = self.at_rest();
        self.host.ok(&["save", "vm", &file, "--stop"]);
        let head = self.vm.ends_well().stdout;
        self.vm = self.host.restore_within(&head, &file, &[]);
        before
    }
}

/// Moves a busy VM so many times by `moved`, which is given the number of the move.
fn survives(
    notify: &'static str,
    cpus: &'static str,
    times: u64,
    moved: fn(&mut Busy, u64) -> Value,
) {
    let test = || {
        let mut busy = Busy::start(notify, cpus);
        let mut report = Value::Null;
        for moves in 1..=times {
            let before = moved(&mut busy, moves);
            let after = busy.goes_on_after(&before);
            if notify == "irq" {
                // It has nothing to say by itself: this is the notification after a restore.
                let interrupts = |report| number(report, "balloon_irqs");
                assert!(interrupts(&after) > interrupts(&before), "{before}, then {after}");
            }
            // In and out of the balloon on the way.
            let size = if moves % 2 == 0 { "0" } else { "8M" };
            busy.host.ok(&["balloon", "vm", size]);
            busy.vm.console.event("balloon-done");
            report = busy.goes_on_after(&after);
            assert_eq!(number(&report, "switches"), moves, "{report}");
        }
        busy.vm.verify();
        // Datagrams that were on their way when a VM left; none is answered twice.
        let (sent, lost) = (number(&report, "udp_sent"), number(&report, "udp_lost"));
        assert!(lost < times * 64 && lost < sent / 2, "{report}");
        assert_eq!(number(&report, "udp_duplicates"), 0, "{report}");
        busy.vm.send("poweroff");
        busy.vm.ends_well();
    };
    in_private_network(test).unwrap();
}

fn survives_saves(notify: &'static str, cpus: &'static str) {
    survives(notify, cpus, SAVES, |busy, _| busy.is_moved());
}

fn traffic_survives_20_live_migrations_with_2_vcpus() {
    survives("irq", "2", MIGRATIONS, |busy, moves| {
        let report = busy.is_migrated(moves);
        busy.vm.report_with("an announcement", |field| field("net_announces_acked") >= moves);
        report
    });
}

fn traffic_survives_5_moves_with_2_vcpus() {
    survives_saves("irq", "2");
}

fn traffic_survives_5_moves_without_interrupts() {
    survives_saves("poll", "1");
}

fn traffic_survives_pauses() {
    let test = || {
        let mut busy = Busy::start("irq", "2");
        for _ in 0..20 {
            let before = busy.vm.report();
            busy.host.ok(&["pause", "vm"]);
            busy.host.ok(&["resume", "vm"]);
            busy.goes_on_after(&before);
        }
        busy.vm.verify();
    };
    in_private_network(test).unwrap();
}

fn a_reset_under_load_begins_anew() {
    let test = || {
        let mut busy = Busy::start("irq", "2");
        for _ in 0..5 {
            busy.host.ok(&["reset", "vm"]);
            // A beat that was cut off, and the event `boot` behind it.
            busy.vm.console.may_begin_within_a_line();
            busy.vm.console.event("disk-ready");
            busy.traffic.reconnect();
            let before = Traffic::at_work(&mut busy.vm);
            busy.goes_on_after(&before);
        }
        busy.vm.verify();
    };
    in_private_network(test).unwrap();
}
