//! VMs with cards on bridges and declared networks.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use tests::network::{guest, GUEST_ADDRESS, HOST_ADDRESS};
use tests::{kvm, Vm, PATIENCE};

use super::*;

pub fn add(suite: &mut Suite, needs: &[&Need]) {
    let kvm = kvm();
    let needs: Vec<&Need> = needs.iter().copied().chain([&kvm]).collect();
    add!(suite, &needs;
        a_card_on_a_network_is_a_port_while_its_vm_lives,
        a_card_on_a_bridge_is_a_port_while_its_vm_lives,
        a_card_that_cannot_be_plugged_in_is_refused,
        an_address_is_on_a_network_once,
        a_vm_that_comes_is_plugged_in_by_name,
        a_saved_vm_is_plugged_in_elsewhere,
    );
}

/// The guest answers, also after it was moved.
#[track_caller]
fn echoes() {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.connect(guest(7)).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let deadline = Instant::now() + PATIENCE;
    let mut answer = [0; 10];
    while !socket.send(b"hello").is_ok_and(|_| socket.recv(&mut answer).is_ok_and(|n| n == 5)) {
        assert!(Instant::now() < deadline, "the guest does not answer");
    }
}

#[track_caller]
fn run(host: &Host, args: &[&str]) -> Vm {
    host.run(&format!("virtio=irq ip={GUEST_ADDRESS} report=0"), args).ready()
}

/// The taps that were made for cards.
fn taps() -> Vec<Value> {
    let made = |link: &Value| link["ifname"].as_str().unwrap().starts_with("mvtap");
    links().into_iter().filter(made).collect()
}

/// Waits until there is no tap any more.
#[track_caller]
fn taps_are_gone() {
    let deadline = Instant::now() + PATIENCE;
    while !taps().is_empty() {
        assert!(Instant::now() < deadline, "{:?}", taps());
        std::thread::yield_now();
    }
}

fn lan(host: &Host, name: &str, options: &str) {
    network(host, &format!("create {name} --type bridge {options}")).ok();
}

fn a_card_on_a_network_is_a_port_while_its_vm_lives() {
    let test = || {
        let host = Host::new();
        lan(&host, "lan", &format!("--address {HOST_ADDRESS}/24 --mtu 1400"));
        let vm = run(&host, &["--net", "id=net,network=lan"]);
        echoes();
        let taps = taps();
        assert_eq!((taps.len(), &taps[0]["master"]), (1, &"mv-lan".into()), "{taps:?}");
        assert_eq!((&taps[0]["mtu"], &taps[0]["up"]), (&1400.into(), &true.into()));
        // A guest that is away for a second finds what came meanwhile.
        let queue = said(Command::new("ip").args(["link", "show", "mvtap0"]));
        assert!(queue.contains("qlen 10000"), "{queue}");
        let alias = taps[0]["ifalias"].as_str().unwrap();
        assert!(alias.starts_with("minivmm card vm net 52:54:"), "{alias}");
        // It travels with the VM.
        let net = host.json(&["info", "vm"])["config"]["nets"][0].clone();
        assert_eq!((&net["attachment"], &net["mtu"]), (&"network=lan".into(), &1400.into()));
        network(&host, "delete lan").refused(5, &["in use by mvtap0"]);
        vm.kill_9();
        taps_are_gone();
        network(&host, "delete lan").ok();
    };
    in_private_network(test).unwrap();
}

fn a_card_on_a_bridge_is_a_port_while_its_vm_lives() {
    let test = || {
        ip(&["link", "add", "br0", "type", "bridge"]).unwrap();
        ip(&["address", "add", &format!("{HOST_ADDRESS}/24"), "dev", "br0"]).unwrap();
        ip(&["link", "set", "br0", "up"]).unwrap();
        let host = Host::new();
        let mut vm = run(&host, &["--net", "id=net,bridge=br0"]);
        echoes();
        assert_eq!(taps()[0]["master"], "br0");
        vm.send("poweroff");
        vm.ends_well();
        taps_are_gone();
        assert_eq!(link("br0")["ifname"], "br0");
    };
    in_private_network(test).unwrap();
}

fn a_card_that_cannot_be_plugged_in_is_refused() {
    const CASES: &[(&str, i32, &str)] = &[
        ("network=nothere", 2, "no network nothere"),
        ("bridge=nothere", 2, "no interface nothere"),
        ("bridge=lo", 2, "lo is not a bridge"),
        ("network=a.b", 2, "no name of a network"),
        ("network=lan,bridge=br0", 2, "plugged into one thing"),
        ("network=lan,mtu=1401", 2, "at most 1400"),
        ("network=half", 5, "lacks mv-half"),
    ];
    let test = || {
        let host = Host::new();
        lan(&host, "lan", "--mtu 1400");
        lan(&host, "half", "");
        ip(&["link", "delete", "mv-half"]).unwrap();
        let before = everything(false);
        for (case, code, word) in CASES {
            let card = format!("id=net,{case}");
            host.cli(&["run", "--name", "vm", "--net", &card]).refused(*code, &[word]);
            assert_eq!(everything(false), before, "{case}");
        }
        let mut command = Command::new("setpriv");
        command.args(["--bounding-set", "-net_admin", "--"]).arg(tests::binary());
        command.args(["run", "--name", "vm", "--net", "id=net,network=lan"]);
        host.environment(&mut command);
        finish(command, b"").refused(1, &["network card net", "CAP_NET_ADMIN"]);
        assert_eq!(everything(false), before);
    };
    in_private_network(test).unwrap();
}

fn an_address_is_on_a_network_once() {
    let test = || {
        let host = Host::new();
        lan(&host, "lan", "");
        lan(&host, "other", "");
        let card = "id=net,network=lan,mac=52:54:00:00:00:01";
        let _vm = run(&host, &["--net", card]);
        let twice = host.cli(&["run", "--name", "second", "--net", card]);
        twice.refused(
            5,
            &["the VM vm has a card with the address 52:54:00:00:00:01 on network=lan"],
        );
        let elsewhere = ["--name", "third", "--net", "id=net,network=other,mac=52:54:00:00:00:01"];
        let mut third = run(&host, &elsewhere);
        // Nor does one come there.
        let (mut destination, address) = host.receive(&["--net", "net=network=lan"]);
        let refused = host.cli(&["migrate", "third", "--to", &address]);
        assert_eq!(refused.code, Some(1), "{refused:#?}");
        let finished = destination.end();
        for text in [&refused.stdout, &finished.stderr] {
            assert!(text.contains("the VM vm has a card with the address"), "{text}");
        }
        third.verify();
    };
    in_private_network(test).unwrap();
}

fn a_vm_that_comes_is_plugged_in_by_name() {
    let test = || {
        let host = Host::new();
        lan(&host, "lan", &format!("--address {HOST_ADDRESS}/24"));
        lan(&host, "small", "--mtu 1400");
        let mut vm = run(&host, &["--net", "id=net,network=lan"]);
        echoes();
        for (net, word) in [
            ("net=network=blue", "there is no network blue on this host"),
            ("net=network=small", "network=small takes 1400 here"),
            ("net=bridge=br7", "there is no interface br7"),
        ] {
            let (mut destination, address) = host.receive(&["--net", net]);
            let refused = host.cli(&["migrate", "vm", "--to", &address]);
            assert_eq!(refused.code, Some(1), "{refused:#?}");
            let finished = destination.end();
            assert_eq!(finished.code, Some(1), "{finished:#?}");
            for text in [&refused.stdout, &finished.stderr] {
                assert!(text.contains("network card net") && text.contains(word), "{text}");
            }
        }
        // To this host, on the network that it is on, and to another one that is wired to it.
        ip(&["link", "add", "wire0", "type", "veth", "peer", "name", "wire1"]).unwrap();
        for wire in ["wire0", "wire1"] {
            ip(&["link", "set", wire, "up"]).unwrap();
        }
        lan(&host, "green", "--uplink wire0");
        ip(&["link", "set", "wire1", "master", "mv-lan"]).unwrap();
        for (net, bridge) in [(None, "mv-lan"), (Some("net=network=green"), "mv-green")] {
            let args: Vec<&str> = net.iter().flat_map(|net| ["--net", *net]).collect();
            let (next, address) = host.receive(&args);
            host.ok(&["migrate", "vm", "--to", &address]);
            std::mem::replace(&mut vm, next).ends_well();
            vm.verify();
            echoes();
            let taps = taps();
            assert_eq!((taps.len(), &taps[0]["master"]), (1, &bridge.into()), "{taps:?}");
        }
    };
    in_private_network(test).unwrap();
}

fn a_saved_vm_is_plugged_in_elsewhere() {
    let test = || {
        let host = Host::new();
        lan(&host, "lan", "");
        lan(&host, "green", &format!("--address {HOST_ADDRESS}/24"));
        let mut vm = run(&host, &["--net", "id=net,network=lan"]);
        let file = host.file("saved");
        host.ok(&["save", "vm", &file, "--stop"]);
        vm.ends_well();
        let refused = host.cli(&["restore", &file, "--net", "net=network=blue"]);
        refused.refused(2, &["network card net", "no network blue"]);
        let mut vm = host.restore(&file, &["--net", "net=network=green"]);
        vm.verify();
        assert_eq!(taps()[0]["master"], "mv-green");
    };
    in_private_network(test).unwrap();
}
