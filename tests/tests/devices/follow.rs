//! What is on its way to a guest that moves: none of it is lost, none comes twice, and switches know where it is.

use std::net::UdpSocket;
use std::process::Command;
use std::time::Instant;

use migration::stream::RecordType;
use serde_json::Value;
use tests::capture::Rarps;
use tests::network::{bridge, guest, in_private_network, ip};
use tests::numbered::{Numbered, Tally};
use tests::proxy::{Cut, On, Proxy, Spot, Way};
use tests::{add, number, Host, Migrating, Need, Suite, Traffic, Vm, PATIENCE};

use super::{stats_of, GUEST_ADDRESS};

const MAC: [u8; 6] = [0x52, 0x54, 0, 0x0a, 0, 2];
/// Datagrams per second. The test is of what follows the guest, not of how fast a guest is: while it does not get
/// its processor for a second, the queues on the way hold them.
const RATE: u64 = 200;

pub fn add(suite: &mut Suite, needs: &[&Need], postcopy: &[&Need]) {
    add!(suite, needs;
        packets_follow_a_guest_there_and_back,
        without_forwarding_none_comes_twice,
        packets_of_the_pause_follow_unless_told_not_to,
        a_restored_guest_is_announced,
    );
    add!(suite, postcopy;
        packets_follow_a_guest_before_its_memory,
        packets_of_the_pause_follow_a_guest_before_its_memory,
        packets_wait_while_a_guest_waits_for_its_memory,
    );
}

fn mac() -> String {
    MAC.map(|byte| format!("{byte:02x}")).join(":")
}

/// A guest that echoes, at the first port of a switch with two.
#[track_caller]
fn start(host: &Host) -> Vm {
    bridge(&Traffic::TAPS).unwrap();
    let options = format!("ws=8 dirty=2000 report=0 pace=0 beat=50 ip={GUEST_ADDRESS}");
    let net = format!("id=net,tap={},mac={}", Traffic::TAPS[0], mac());
    let vm = host.run(&options, &["--memory", "128M", "--net", &net]).ready();
    // It answers from here on.
    drop(tests::network::connect(7));
    vm
}

/// The port of the switch that the guest's address was last seen at.
#[track_caller]
fn known_at() -> String {
    let output = Command::new("bridge").args(["fdb", "show", "br", "br0"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let line = text.lines().find(|line| line.starts_with(&mac()));
    let line = line.unwrap_or_else(|| panic!("the switch does not know {}: {text}", mac()));
    let words: Vec<_> = line.split(' ').collect();
    words[words.iter().position(|word| *word == "dev").unwrap() + 1].to_owned()
}

/// Migrates `vm` from `here` to the other port of the switch; the report.
#[track_caller]
fn migrate(here: &Host, there: &Host, vm: &mut Vm, port: usize, args: &[&str]) -> Value {
    let net = Traffic::at(port);
    let (next, address) = there.receive(&net.each_ref().map(String::as_str));
    let report = here.json(&[&["migrate", "vm", "--to", &address], args].concat());
    assert_eq!(report["verdict"], "handed-over", "{report}");
    std::mem::replace(vm, next).ends_well();
    report
}

/// A stream of packets while the guest moves there and back.
fn there_and_back(args: &[&str]) -> (Tally, [Value; 2]) {
    let test = || {
        let (a, b) = (Host::new(), Host::new());
        let mut vm = start(&a);
        let rarps = Rarps::begin();
        let stream = Numbered::start(RATE);
        let first = migrate(&a, &b, &mut vm, 1, args);
        rarps.of(MAC, 1);
        assert_eq!(known_at(), Traffic::TAPS[1]);
        let second = migrate(&b, &a, &mut vm, 0, args);
        rarps.of(MAC, 1);
        assert_eq!(known_at(), Traffic::TAPS[0]);
        vm.report_with("an announcement", |field| field("net_announces_acked") >= 2);
        let tally = stream.finish();
        println!("{args:?}: {tally:?}; {}; {}", first["late_frames"], second["late_frames"]);
        let late = second["late_frames"]["frames"].as_u64().unwrap_or(0);
        let counters = &stats_of(&a, "net")["counters"];
        assert_eq!(number(counters, "late"), late, "all that was sent has come: {counters}");
        assert!(number(counters, "announced") >= 1, "{counters}");
        vm.verify();
        vm.send("poweroff");
        vm.ends_well();
        (tally, [first, second])
    };
    in_private_network(test).unwrap()
}

fn packets_follow_a_guest_there_and_back() {
    let (tally, reports) = there_and_back(&[]);
    assert_eq!((tally.lost, tally.doubled), (0, 0), "{tally:?}, {reports:?}");
}

fn packets_follow_a_guest_before_its_memory() {
    let (tally, reports) = there_and_back(&["--mode", "postcopy"]);
    assert_eq!((tally.lost, tally.doubled), (0, 0), "{tally:?}, {reports:?}");
}

fn without_forwarding_none_comes_twice() {
    let (tally, reports) = there_and_back(&["--forward-packets", "off"]);
    assert_eq!(tally.doubled, 0, "{tally:?}");
    assert!(reports.iter().all(|report| report["late_frames"].is_null()), "{reports:?}");
}

/// Numbers of datagrams that are answered: 0 to 19 were sent while nobody ran the guest, 20 when it had moved.
fn answered(args: &[&str]) -> Vec<u64> {
    let test = || {
        let (a, b) = (Host::new(), Host::new());
        let mut vm = start(&a);
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect(guest(7)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let send = |number: u64| assert_eq!(socket.send(&number.to_le_bytes()).unwrap(), 8);
        let net = Traffic::at(1);
        let (mut next, address) = b.receive(&net.each_ref().map(String::as_str));
        let proxy = Proxy::to(&address);
        let paused = proxy.hold(Spot::new(On::Main, Way::Forth, RecordType::Complete));
        let args = [&["--dead-after", "60s"], args].concat();
        let migrating = Migrating::start(&a, &proxy.address(), &args);
        paused.wait();
        (0..20).for_each(send);
        paused.release();
        let finished = migrating.end();
        assert_eq!(finished.code, Some(0), "{finished:#?}");
        vm.ends_well();
        send(20);
        let mut answers = Vec::new();
        while answers.last() != Some(&20) {
            let mut number = [0; 8];
            socket.recv(&mut number).unwrap();
            answers.push(u64::from_le_bytes(number));
        }
        next.verify();
        answers
    };
    in_private_network(test).unwrap()
}

fn packets_of_the_pause_follow_unless_told_not_to() {
    assert_eq!(answered(&[]), (0..=20).collect::<Vec<_>>());
    assert_eq!(answered(&["--forward-packets", "off"]), [20]);
}

fn packets_of_the_pause_follow_a_guest_before_its_memory() {
    assert_eq!(answered(&["--mode", "postcopy"]), (0..=20).collect::<Vec<_>>());
}

/// Far more than the guest has buffers for, and the tap that the test gives has room for; and so many of them at once.
const WAITING: u64 = 1536;
const BURST: usize = 64;

fn packets_wait_while_a_guest_waits_for_its_memory() {
    let test = || {
        let (a, b) = (Host::new(), Host::new());
        let mut vm = start(&a);
        let net = Traffic::at(1);
        ip(&["link", "set", Traffic::TAPS[1], "txqueuelen", "100"]).unwrap();
        let (mut next, address) = b.receive(&net.each_ref().map(String::as_str));
        let proxy = Proxy::to(&address);
        // What is pushed does not come far, and without its source the guest stands after a second.
        let slow = [
            "--mode",
            "postcopy",
            "--bandwidth",
            "64K",
            "--prepaging",
            "off",
            "--dead-after",
            "1s",
        ];
        let migrating = Migrating::start(&a, &proxy.address(), &slow);
        let until = |state: &str, pointer: &str, command: &[&str]| {
            let deadline = Instant::now() + PATIENCE;
            loop {
                let finished = b.cli(command);
                let answer: Value = serde_json::from_str(&finished.stdout).unwrap_or_default();
                if answer
                    .pointer(pointer)
                    .is_some_and(|at| at.to_string().trim_matches('"') == state)
                {
                    return;
                }
                assert!(Instant::now() < deadline, "{pointer} is not {state}: {finished:#?}");
                std::thread::yield_now();
            }
        };
        until("draining", "/current/phase", &["migration", "vm", "--json"]);
        proxy.close_door(true);
        proxy.cut(On::Main, Cut::Reset);
        until("true", "/draining/frozen", &["info", "vm", "--json"]);

        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect(guest(7)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, 16 << 20).unwrap();
        let backlogged = || number(&stats_of(&b, "net")["counters"], "backlogged");
        let before = backlogged();
        for burst in (0..WAITING).step_by(BURST) {
            for number in burst..burst + BURST as u64 {
                socket.send(&number.to_le_bytes()).unwrap();
            }
            let deadline = Instant::now() + PATIENCE;
            while backlogged() < before + burst + BURST as u64 {
                assert!(Instant::now() < deadline, "nobody takes frames from the tap");
                std::thread::yield_now();
            }
        }
        proxy.close_door(false);
        a.recovers();
        a.ok(&["migrate-set", "vm", "--bandwidth", "0"]);
        assert_eq!(migrating.end().code, Some(0));
        vm.ends_well();
        let answers: Vec<u64> = (0..WAITING)
            .map(|_| {
                let mut number = [0; 8];
                socket.recv(&mut number).unwrap();
                u64::from_le_bytes(number)
            })
            .collect();
        assert!(answers == (0..WAITING).collect::<Vec<_>>(), "in their order: {answers:?}");
        next.verify();
    };
    in_private_network(test).unwrap();
}

fn a_restored_guest_is_announced() {
    let test = || {
        let host = Host::new();
        let mut vm = start(&host);
        let file = host.file("vm.snapshot");
        host.ok(&["save", "vm", &file, "--stop"]);
        let head = vm.ends_well().stdout;
        let rarps = Rarps::begin();
        let mut vm = host.restore_within(&head, &file, &["--net", "net=tap1"]);
        // The switch sees each frame as it comes in and, where it has an interface of its own, once more.
        let to: std::collections::BTreeSet<_> = rarps.were_for(MAC, 3).into_iter().collect();
        assert!(
            to.contains(&[0xff; 6]) && to.len() > 1,
            "to everybody, and to a new group: {to:x?}"
        );
        assert_eq!(known_at(), Traffic::TAPS[1]);
        vm.report_with("an announcement", |field| field("net_announces_acked") >= 1);
    };
    in_private_network(test).unwrap();
}
