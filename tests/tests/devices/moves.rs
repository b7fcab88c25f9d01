//! Devices at work while their VM is moved, paused and reset.

use std::io::{Read, Write};
use std::net::{TcpStream, UdpSocket};

use serde_json::Value;
use tests::network::{bridge, in_private_network, GUEST_ADDRESS, HOST_ADDRESS};
use tests::{add, number, Host, Need, Suite, Vm, PATIENCE};

use super::{connect, disk, run};

/// The ports of the switch that the VM moves between.
const TAPS: [&str; 2] = ["tap0", "tap1"];

/// How often a VM is carried from process to process.
const MOVES: u64 = 10;
/// Counters that go on, and never start again.
const COUNTERS: [&str; 7] = [
    "disk_reads",
    "disk_writes",
    "disk_verified",
    "net_rx_frames",
    "net_tx_frames",
    "udp_replies",
    "rng_requests",
];

pub fn add(suite: &mut Suite, needs: &[&Need]) {
    add!(suite, needs;
        traffic_survives_10_moves_with_1_vcpu,
        traffic_survives_10_moves_with_2_vcpus,
        traffic_survives_10_moves_without_interrupts,
        traffic_survives_10_live_migrations_with_1_vcpu,
        traffic_survives_10_live_migrations_with_2_vcpus,
        traffic_survives_pauses,
        a_reset_under_load_begins_anew,
    );
}

/// A VM with every device at work: a disk that is verified, datagrams to an echo service on the
/// host and back, a TCP connection from the host, random numbers, a balloon.
struct Busy {
    host: Host,
    vm: Vm,
    stream: TcpStream,
    sent: u8,
}

impl Busy {
    fn start(notify: &str, cpus: &str) -> Self {
        bridge(&TAPS).unwrap();
        let service = UdpSocket::bind((HOST_ADDRESS, 0)).unwrap();
        let port = service.local_addr().unwrap().port();
        // Ends with the program, since nobody waits for it.
        std::thread::spawn(move || {
            let mut datagram = [0; 2000];
            while let Ok((length, from)) = service.recv_from(&mut datagram) {
                // The tap may be without a VM just now.
                let _ = service.send_to(&datagram[..length], from);
            }
        });
        let host = Host::new();
        let options = format!(
            "virtio={notify} disk=verify disk-ws=4 disk-rate=3000 disk-depth=16 rng=on balloon=on \
             ip={GUEST_ADDRESS} udp-to={HOST_ADDRESS}:{port} udp-rate=500"
        );
        let disk = disk(&host, "data", 8);
        let args = ["--disk", &disk, "--net", "id=net,tap=tap0", "--rng", "--balloon"];
        let mut vm = run(&host, &options, &[&["--cpus", cpus][..], &args].concat());
        vm.console.event("disk-ready");
        let mut busy = Self { vm, host, stream: connect(7), sent: 0 };
        busy.at_work();
        busy
    }

    fn at_work(&mut self) -> Value {
        self.vm.report_with("work", |field| COUNTERS.iter().all(|name| field(name) > 0))
    }

    /// Everything has gone on since `before`, the connection included.
    #[track_caller]
    fn goes_on_after(&mut self, before: &Value) -> Value {
        let old = COUNTERS.map(|name| (name, number(before, name)));
        let report = self.vm.report_with("more of everything", |field| {
            old.iter().all(|(name, old)| {
                assert!(field(name) >= *old, "{name} began anew, after {before}");
                field(name) > old + 5
            })
        });
        self.sent = self.sent.wrapping_add(1);
        let sent = vec![self.sent; 20_000];
        self.stream.write_all(&sent).unwrap();
        let mut back = vec![0; sent.len()];
        self.stream.read_exact(&mut back).unwrap();
        assert!(back == sent, "the connection carries something else");
        report
    }

    /// A report of the guest when its balloon is done.
    fn at_rest(&mut self) -> Value {
        self.vm.report_with("a balloon at rest", |field| {
            field("balloon_wanted") == field("balloon_actual")
        })
    }

    /// Migrates the VM to another port of the switch; the guest's last report before that.
    fn is_migrated(&mut self, tap: &str) -> Value {
        let (next, address) = self.host.receive(&["--net", &format!("net={tap}")]);
        let before = self.at_rest();
        let report = self.host.json(&["migrate", "vm", "--to", &address, "--verify"]);
        assert_eq!(report["verdict"], "handed-over", "{report}");
        std::mem::replace(&mut self.vm, next).ends_well();
        let deadline = std::time::Instant::now() + PATIENCE;
        while self.host.json(&["list"])[0]["name"] != "vm" {
            assert!(std::time::Instant::now() < deadline, "it has not taken its name");
        }
        before
    }

    /// Saves the VM and goes on with it in another process; the guest's last report before that.
    fn is_moved(&mut self) -> Value {
        let file = self.host.file("vm.snapshot");
        let before = self.at_rest();
        self.host.ok(&["save", "vm", &file, "--stop"]);
        let head = self.vm.ends_well().stdout;
        self.vm = self.host.restore_within(&head, &file, &[]);
        before
    }
}

/// Moves a busy VM [`MOVES`] times by `moved`, which is given the number of the move.
fn survives(notify: &'static str, cpus: &'static str, moved: fn(&mut Busy, u64) -> Value) {
    let test = || {
        let mut busy = Busy::start(notify, cpus);
        let mut report = busy.at_work();
        for moves in 1..=MOVES {
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
        assert!(lost < MOVES * 64 && lost < sent / 2, "{report}");
        assert_eq!(number(&report, "udp_duplicates"), 0, "{report}");
        busy.vm.send("poweroff");
        busy.vm.ends_well();
    };
    in_private_network(test).unwrap();
}

fn survives_saves(notify: &'static str, cpus: &'static str) {
    survives(notify, cpus, |busy, _| busy.is_moved());
}

fn survives_migrations(cpus: &'static str) {
    survives("irq", cpus, |busy, moves| {
        let report = busy.is_migrated(TAPS[moves as usize % 2]);
        busy.vm.report_with("an announcement", |field| field("net_announces_acked") >= moves);
        report
    });
}

fn traffic_survives_10_live_migrations_with_1_vcpu() {
    survives_migrations("1");
}

fn traffic_survives_10_live_migrations_with_2_vcpus() {
    survives_migrations("2");
}

fn traffic_survives_10_moves_with_1_vcpu() {
    survives_saves("irq", "1");
}

fn traffic_survives_10_moves_with_2_vcpus() {
    survives_saves("irq", "2");
}

fn traffic_survives_10_moves_without_interrupts() {
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
            busy.vm.console.event("boot");
            busy.vm.console.event("disk-ready");
            busy.stream = connect(7);
            let before = busy.at_work();
            busy.goes_on_after(&before);
        }
        busy.vm.verify();
    };
    in_private_network(test).unwrap();
}
