//! Networks that are declared once per host, each test in a network namespace of its own: what is made,
//! what is removed, and that nothing else is touched.
#![allow(clippy::unwrap_used)]

use std::process::{Command, ExitCode};

use migration::stream::RecordType;
use serde_json::Value;
use tests::network::{in_private_network, ip, program, said};
use tests::proxy::{Held, On, Proxy, Spot, Way};
use tests::{add, finish, network_namespaces, root, Finished, Host, Migrating, Need, Suite};

#[path = "network/attached.rs"]
mod attached;
#[path = "network/declared.rs"]
mod declared;
#[path = "network/follow.rs"]
mod follow;
#[path = "network/nat.rs"]
mod nat;
#[path = "network/readme.rs"]
mod readme;
#[path = "network/refused.rs"]
mod refused;
#[path = "network/silent.rs"]
mod silent;
#[path = "network/switch.rs"]
mod switch;
#[path = "network/underlay6.rs"]
mod underlay6;

fn main() -> ExitCode {
    let mut suite = Suite::default();
    let (root, networks, nft) = (root(), network_namespaces(), program("nft", "nftables"));
    let needs = [&root, &networks];
    declared::add(&mut suite, &needs, &nft);
    refused::add(&mut suite, &needs, &nft);
    switch::add(&mut suite, &needs);
    attached::add(&mut suite, &needs);
    follow::add(&mut suite, &needs);
    nat::add(&mut suite, &needs, &nft);
    silent::add(&mut suite, &needs);
    underlay6::add(&mut suite, &needs);
    readme::add(&mut suite, &needs);
    suite.run()
}

/// The links of this namespace, with what an operator could have set.
#[track_caller]
fn links() -> Vec<Value> {
    let all: Value =
        serde_json::from_str(&said(Command::new("ip").args(["-j", "-d", "link"]))).unwrap();
    let keep = ["ifname", "mtu", "address", "master", "ifalias"];
    let all = all.as_array().unwrap().iter().map(|link| {
        let mut kept: Value = keep.iter().map(|&key| (key, link[key].clone())).collect();
        kept["kind"] = link["linkinfo"]["info_kind"].clone();
        kept["up"] = link["flags"].as_array().unwrap().contains(&"UP".into()).into();
        kept
    });
    all.collect()
}

/// All of this namespace that networks are made of.
#[track_caller]
fn everything(nft: bool) -> String {
    let rules =
        if nft { said(Command::new("nft").args(["list", "ruleset"])) } else { String::new() };
    let forward = std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap();
    let addresses = said(Command::new("ip").args(["-br", "-4", "address"]));
    format!("{:#?}\n{rules}\n{forward}\n{addresses}", links())
}

/// The link of this name, or null.
fn link(name: &str) -> Value {
    links().into_iter().find(|link| link["ifname"] == name).unwrap_or_default()
}

/// A link `under0` with an address, that leads to 192.0.2.0/24.
fn underlay() {
    ip(&["link", "add", "under0", "type", "veth", "peer", "name", "under1"]).unwrap();
    ip(&["link", "set", "under0", "up"]).unwrap();
    ip(&["link", "set", "under1", "up"]).unwrap();
    ip(&["address", "add", "192.0.2.1/24", "dev", "under0"]).unwrap();
}

const VXLAN: &str =
    "blue --type vxlan --vni 5001 --local 192.0.2.1 --peer 192.0.2.2 --peer 192.0.2.3";

/// The words of `minivmm network ...`.
fn words(line: &str) -> Vec<&str> {
    ["network"].into_iter().chain(line.split_whitespace()).collect()
}

/// Runs `minivmm network ...`.
#[track_caller]
fn network(host: &Host, line: &str) -> Finished {
    host.cli(&words(line))
}

/// As [`network`], with what it prints as JSON; it succeeds.
#[track_caller]
fn json(host: &Host, line: &str) -> Value {
    host.json(&words(line))
}

/// Begins to move the VM `vm` of `host`, to what listens at `destination` on another host as far as it can tell, and
/// stops right after the guest did.
#[track_caller]
fn stopped(host: &Host, destination: &str) -> (Proxy, Held, Migrating) {
    let proxy = Proxy::apart(destination);
    let paused = proxy.hold(Spot::new(On::Main, Way::Forth, RecordType::Complete));
    let migrating = Migrating::start(host, &proxy.address(), &["--dead-after", "60s"]);
    paused.wait();
    (proxy, paused, migrating)
}

/// The files of declared networks.
fn files(host: &Host) -> Vec<String> {
    let Ok(all) = std::fs::read_dir(host.root().join("state/networks")) else { return Vec::new() };
    let names = all.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.filter(|name| name != "lock").collect();
    names.sort();
    names
}
