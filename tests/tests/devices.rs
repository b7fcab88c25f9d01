//! Virtio devices of real VMs, with beacon as their driver: each works, by interrupt and by
//! polling; all survive moves, pauses and resets under load; what a driver or a full disk of the
//! host does wrong stays where it is.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, UdpSocket};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::network::{connect, guest, in_private_network, tap, GUEST_ADDRESS};
use tests::{
    add, kvm, namespaces, network_namespaces, number, root, userfaultfd, Host, Suite, Vm, PATIENCE,
};

#[path = "devices/follow.rs"]
mod follow;
#[path = "devices/moves.rs"]
mod moves;
#[path = "devices/trouble.rs"]
mod trouble;

const NOTIFY: [&str; 2] = ["irq", "poll"];
/// Reports come when they are asked for, so that no line is dropped or cut in two.
const TALK: &str = "ws=2 report=0 pace=0";

fn main() -> ExitCode {
    let mut suite = Suite::default();
    let (kvm, root) = (kvm(), root());
    let (networks, mounts) = (network_namespaces(), namespaces());
    add!(suite, &[&kvm];
        a_disk_keeps_what_is_written,
        what_was_flushed_is_in_the_file,
        random_bytes_come,
        memory_goes_into_the_balloon_and_back,
    );
    add!(suite, &[&root, &networks, &kvm];
        the_network_carries_everything,
        a_cable_is_pulled_out_and_plugged_in,
        a_tap_that_the_source_has_is_refused_by_name,
    );
    moves::add(&mut suite, &[&root, &networks, &kvm]);
    follow::add(&mut suite, &[&root, &networks, &kvm], &[&root, &networks, &kvm, &userfaultfd()]);
    trouble::add(&mut suite, &kvm, &[&root, &mounts, &kvm]);
    suite.run()
}

/// Makes a disk; gives the value of `--disk`.
fn disk(host: &Host, id: &str, mib: u64) -> String {
    File::create(host.path(id)).unwrap().set_len(mib << 20).unwrap();
    format!("id={id},path={}", host.file(id))
}

/// Starts a VM with devices.
#[track_caller]
fn run(host: &Host, options: &str, args: &[&str]) -> Vm {
    host.run(&format!("{TALK} {options}"), &[&["--memory", "128M"], args].concat())
}

/// What `minivmm stats` says of the device with this name.
#[track_caller]
fn stats_of(host: &Host, id: &str) -> Value {
    let stats = host.json(&["stats", "vm"]);
    let devices = stats["devices"].as_array().unwrap();
    devices.iter().find(|device| device["id"] == id).unwrap_or_else(|| panic!("{stats}")).clone()
}

fn a_disk_keeps_what_is_written() {
    for notify in NOTIFY {
        for (block, op) in [(512, "mixed"), (4096, "read"), (131_072, "mixed")] {
            let host = Host::new();
            let disk = disk(&host, "data", 8);
            let options = format!(
                "virtio={notify} disk=verify disk-bs={block} disk-op={op} disk-ws=4 \
                 disk-rate=max disk-discard=on disk-depth=8"
            );
            let mut vm = run(&host, &options, &["--disk", &disk]);
            let found = vm.console.event("disk");
            assert_eq!((&found["id"], &found["sectors"]), (&"data".into(), &16384.into()));
            vm.console.event("disk-ready");
            vm.report_with("work of all kinds", |field| {
                field("disk_verified") > 4096
                    && field("disk_flushes") > 1
                    && field("disk_discards") > 1
                    && field("disk_zeroes") > 1
                    && (notify == "poll") == (field("disk_irqs") == 0)
            });
            let stats = stats_of(&host, "data");
            assert_eq!(
                (&stats["needs_resets"], &stats["counters"]["errors"]),
                (&0.into(), &0.into())
            );
            vm.send("poweroff");
            vm.ends_well();
        }
    }
}

/// Whether each sector of the first `sectors` has its own number at its beginning, as beacon
/// writes it.
fn is_written(path: &Path, sectors: usize) -> bool {
    let bytes = std::fs::read(path).unwrap();
    let mut all = bytes.chunks_exact(512).take(sectors).zip(0_u64..);
    all.all(|(sector, number)| {
        // Sector 0 has number 0, but a boot and a generation behind it.
        sector[..8] == number.to_le_bytes() && sector[8..16] != [0; 8]
    })
}

fn what_was_flushed_is_in_the_file() {
    let host = Host::new();
    let disk = disk(&host, "data", 4);
    let options = "virtio=irq disk=verify disk-op=read disk-ws=4 disk-rate=max";
    let mut vm = run(&host, options, &["--disk", &disk]);
    vm.console.event("disk-ready");
    let flushes = |vm: &mut Vm| number(&vm.report(), "disk_flushes");
    let before = flushes(&mut vm);
    vm.report_with("another flush", |field| field("disk_flushes") > before);
    vm.kill_9();
    assert!(is_written(&host.path("data"), 8192));
}

fn random_bytes_come() {
    for notify in NOTIFY {
        let host = Host::new();
        let mut vm = run(&host, &format!("virtio={notify} rng=on"), &["--rng"]);
        let report = vm.report_with("random bytes", |field| {
            field("rng_requests") > 10 && field("rng_bytes") == 64 * field("rng_requests")
        });
        assert_eq!(notify == "poll", report["rng_irqs"] == 0, "{report}");
        assert!(number(&stats_of(&host, "rng")["counters"], "bytes") >= 640);
    }
}

fn memory_goes_into_the_balloon_and_back() {
    const PAGE: u64 = 4096;
    for notify in NOTIFY {
        let host = Host::new();
        let options = format!("virtio={notify} balloon=on balloon-pool=16");
        let mut vm = run(&host, &options, &["--balloon"]).ready();
        let populated = || number(&host.json(&["stats", "vm"]), "memory_populated_bytes");
        vm.report_with("a target", |field| field("balloon_wanted") == 0);
        let before = populated();
        for (size, pages) in [("8M", 2048), ("2M", 512), ("16M", 4096), ("0", 0), ("12M", 3072)] {
            host.ok(&["balloon", "vm", size]);
            let done = vm.console.event("balloon-done");
            assert_eq!((number(&done, "wanted"), number(&done, "actual")), (pages, pages));
            // What comes back the guest writes to at once, and checks when it goes in again.
            let (now, gone) = (populated(), pages * PAGE);
            let expected = before - gone;
            // Stacks and buffers of the guest change a little.
            assert!(
                now.abs_diff(expected) < 64 * PAGE,
                "{now} bytes with {pages} in the balloon, {before} before"
            );
        }
        let counters = stats_of(&host, "balloon")["counters"].clone();
        assert_eq!(number(&counters, "actual_pages"), 3072, "{counters}");
        vm.verify();
        vm.report();
    }
}

/// A socket for beacon's UDP echo.
fn echo_socket(patience: Duration) -> UdpSocket {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.connect(guest(7)).unwrap();
    socket.set_read_timeout(Some(patience)).unwrap();
    socket
}

/// What chargen sends.
fn generated(offset: usize) -> u8 {
    (offset ^ offset >> 8 ^ offset >> 16) as u8
}

fn the_network_carries_everything() {
    let test = || {
        tap("tap0").unwrap();
        NOTIFY.into_iter().for_each(traffic);
    };
    in_private_network(test).unwrap();
}

fn traffic(notify: &str) {
    let host = Host::new();
    let options = format!("virtio={notify} ip={GUEST_ADDRESS}");
    let mut vm = run(&host, &options, &["--net", "id=net,tap=tap0"]).ready();
    let socket = echo_socket(PATIENCE);
    let mut answer = [0; 2000];
    for length in [1, 100, 1400] {
        let sent = vec![length as u8; length];
        socket.send(&sent).unwrap();
        let received = socket.recv(&mut answer).unwrap();
        assert!(answer[..received] == sent);
    }

    let sent: Vec<u8> = (0..3 << 20).map(generated).collect();
    let mut stream = connect(7);
    let mut reader = stream.try_clone().unwrap();
    let mut back = vec![0; sent.len()];
    std::thread::scope(|scope| {
        scope.spawn(|| stream.write_all(&sent).unwrap());
        reader.read_exact(&mut back).unwrap();
    });
    assert!(back == sent, "what came back is something else");

    let mut stream = connect(19);
    stream.read_exact(&mut back).unwrap();
    assert!(back == sent, "what came is something else");
    drop(stream);

    let mut stream = connect(9);
    stream.write_all(&sent).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(stream.read(&mut answer).unwrap(), 0);
    vm.report_with("all of it", |field| {
        field("tcp_discarded") == 3 << 20
            && field("tcp_echoed") == 3 << 20
            && field("udp_echoes") == 3
            && (notify == "poll") == (field("net_irqs") == 0)
    });
    let stats = stats_of(&host, "net");
    assert_eq!(
        (number(&stats, "needs_resets"), number(&stats["counters"], "backend_errors")),
        (0, 0)
    );
    vm.send("poweroff");
    vm.ends_well();
}

fn a_cable_is_pulled_out_and_plugged_in() {
    let test = || {
        tap("tap0").unwrap();
        let host = Host::new();
        let options = format!("virtio=irq ip={GUEST_ADDRESS}");
        let _vm = run(&host, &options, &["--net", "id=net,tap=tap0"]).ready();
        let (quick, slow) = (echo_socket(Duration::from_millis(300)), echo_socket(PATIENCE));
        let mut answer = [0; 10];
        for round in 0..3 {
            slow.send(&[round]).unwrap();
            assert_eq!((slow.recv(&mut answer).unwrap(), answer[0]), (1, round));
            host.ok(&["link", "vm", "net", "down"]);
            quick.send(&[round]).unwrap();
            assert!(quick.recv(&mut answer).is_err(), "through a cable that is not there");
            host.ok(&["link", "vm", "net", "up"]);
        }
        assert!(number(&stats_of(&host, "net")["counters"], "rx_dropped") >= 3);
    };
    in_private_network(test).unwrap();
}

fn a_tap_that_the_source_has_is_refused_by_name() {
    let test = || {
        for name in ["tap0", "tap1"] {
            tap(name).unwrap();
        }
        let host = Host::new();
        let mut vm = run(&host, "virtio=irq", &["--net", "id=net,tap=tap0"]).ready();
        let (mut destination, address) = host.receive(&[]);
        let refused = host.cli(&["migrate", "vm", "--to", &address]);
        assert_eq!(refused.code, Some(1), "{refused:#?}");
        let finished = destination.end();
        assert_eq!(finished.code, Some(1), "{finished:#?}");
        for text in [&refused.stdout, &finished.stderr] {
            assert!(text.contains("network net: tap tap0 is in use"), "{text}");
            assert!(text.contains("receive --net net=TAP"), "{text}");
        }
        vm.verify();
        let (mut destination, address) = host.receive(&["--net", "net=tap1"]);
        host.ok(&["migrate", "vm", "--to", &address]);
        vm.ends_well();
        destination.verify();
    };
    in_private_network(test).unwrap();
}

/// Waits until `done` says yes.
#[track_caller]
fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::yield_now();
    }
}
