//! The host that a guest has left: nothing of the guest's comes from there any more, and what it passes on does not
//! come twice.

use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::time::{Duration, Instant};

use tests::capture::Tunnelled;
use tests::network::{EVERYBODY, HOST_ADDRESS};
use tests::numbered::Numbered;
use tests::open_vswitch::OpenVswitch;
use tests::topology::{Site, Sites, Topology, MAC, MAC_BYTES};
use tests::{kvm, PATIENCE};

use super::*;

/// Longer than a guest is announced after it has come.
const A_WHILE: Duration = Duration::from_millis(1700);
/// Datagrams to everybody per second.
const RATE: u64 = 100;

pub fn add(suite: &mut Suite, needs: &[&Need]) {
    let kvm = kvm();
    let needs = [needs, &[&kvm]].concat();
    let ovs = OpenVswitch::need();
    add!(suite, &needs;
        a_host_is_silent_for_a_guest_that_leaves_and_passes_nothing_on_twice,
        a_guest_that_stays_is_not_held,
    );
    add!(suite, &[&needs[..], &[&ovs]].concat(); the_way_to_a_guest_that_leaves_is_held_through_open_vswitch);
}

fn address(site: &Site) -> IpAddr {
    site.address().parse().unwrap()
}

/// Waits for a frame of the guest's from this host.
#[track_caller]
fn talks_from(passing: &Tunnelled, site: &Site) {
    let deadline = Instant::now() + PATIENCE;
    while passing.next_of(MAC_BYTES, deadline).expect("the guest is silent") != address(site) {}
}

/// Whether the bridge of this host is held to have the guest at its tap; `None` where the guest is not at a tap at all.
fn held_at_tap(site: &Site) -> Option<bool> {
    let table =
        site.place.on(|| said(Command::new("bridge").args(["fdb", "show", "br", "mv-blue"])));
    let entry = table.lines().find(|line| line.starts_with(MAC) && line.contains("mvtap"))?;
    Some(entry.contains("sticky"))
}

fn the_way_to_a_guest_that_leaves_is_held_through_open_vswitch() {
    let sites = Sites::new(Topology::Ovs);
    sites.declare();
    let Sites { a, b, c, .. } = &sites;
    let mut vm = a.run("ws=8 pace=0");
    c.place.on(|| drop(tests::network::connect(7)));
    assert_eq!((held_at_tap(a), a.held_in_switch(MAC)), (Some(false), false));

    let (mut next, destination) = b.receive();
    let host = std::sync::Arc::clone(&a.host);
    let (proxy, paused, migrating) = a.place.on(move || stopped(&host, &destination));
    assert_eq!((held_at_tap(a), a.held_in_switch(MAC)), (Some(true), true));
    paused.release();
    let finished = migrating.end();
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    vm.ends_well();
    drop(proxy);
    assert_eq!(held_at_tap(a), None);
    assert!(!a.held_in_switch(MAC));
    next.verify();
}

fn a_guest_that_stays_is_not_held() {
    let sites = Sites::new(Topology::Bridge);
    sites.declare();
    let Sites { a, b, .. } = &sites;
    let mut vm = a.run("ws=8 pace=0");
    let (_next, destination) = b.receive();
    let host = std::sync::Arc::clone(&a.host);
    let (proxy, paused, migrating) = a.place.on(move || stopped(&host, &destination));
    assert_eq!(held_at_tap(a), Some(true));
    drop(proxy);
    let finished = migrating.end();
    assert_eq!(finished.code, Some(1), "{finished:#?}");
    assert_eq!(held_at_tap(a), Some(false));
    drop(paused);
    vm.verify();
}

fn a_host_is_silent_for_a_guest_that_leaves_and_passes_nothing_on_twice() {
    let sites = Sites::new(Topology::Vxlan);
    sites.declare();
    let Sites { between, a, b, c, .. } = &sites;
    // It talks all the time, to somebody who does not answer.
    let mut vm = a.run(&format!("ws=8 pace=0 beat=50 udp-to={HOST_ADDRESS}:9 udp-rate=500"));
    let everybody = c.place.on(|| {
        drop(tests::network::connect(7));
        Numbered::to_everybody(RATE)
    });
    a.migrate(&mut vm, b, &[]);

    // It is being announced still, and goes on at once. The source is held as soon as it has stopped.
    let (mut next, destination) = a.receive();
    let passing = between.on(Tunnelled::begin);
    talks_from(&passing, b);
    let host = std::sync::Arc::clone(&b.host);
    let (proxy, paused, migrating) = b.place.on(move || stopped(&host, &destination));
    assert_eq!(
        held_at_tap(b),
        Some(true),
        "once it is announced elsewhere, what comes late finds it no more"
    );
    let passing = between.on(Tunnelled::begin);
    let socket = c.place.on(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    socket.set_broadcast(true).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    for number in 0..20_u64 {
        socket.send_to(&number.to_le_bytes(), (EVERYBODY, 7)).unwrap();
    }
    let seen: Option<Ipv4Addr> = passing.next_of(MAC_BYTES, Instant::now() + A_WHILE);
    assert_eq!(seen, None, "the guest is stopped");
    paused.release();
    let finished = migrating.end();
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    vm.ends_well();
    drop(proxy);
    // Until its process has ended, the old host sent nothing; the new one does.
    let first = passing.next_of(MAC_BYTES, Instant::now() + PATIENCE);
    assert_eq!(first.map(IpAddr::from), Some(address(a)));
    let deadline = Instant::now() + A_WHILE;
    while let Some(from) = passing.next_of(MAC_BYTES, deadline) {
        assert_eq!(IpAddr::from(from), address(a), "the old host speaks for the guest");
    }

    // What was sent to everybody meanwhile reached both hosts.
    let mut answers = Vec::new();
    while answers.len() < 20 {
        let mut number = [0; 8];
        socket.recv(&mut number).unwrap();
        answers.push(u64::from_le_bytes(number));
    }
    let tally = everybody.finish();
    socket.set_nonblocking(true).unwrap();
    assert!(socket.recv(&mut [0; 8]).is_err(), "an answer came twice");
    assert_eq!(answers, (0..20).collect::<Vec<_>>());
    println!("to everybody: {tally:?}");
    assert_eq!(tally.doubled, 0, "{tally:?}");
    next.verify();
}
