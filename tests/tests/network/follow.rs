//! A VM that moves between hosts, and a third host that talks to it meanwhile: pings, numbered datagrams, a
//! connection.

use tests::capture::Rarps;
use tests::conversation::Conversation;
use tests::network::connect;
use tests::numbered::Numbered;
use tests::open_vswitch::OpenVswitch;
use tests::ping::Pings;
use tests::topology::{Sites, Topology, MAC_BYTES};
use tests::{kvm, userfaultfd};

use super::*;

/// Datagrams per second. The test is of what follows the guest, not of how fast a guest is: while it does not get
/// its processor for a second, the queues on the way hold them.
const RATE: u64 = 200;

pub fn add(suite: &mut Suite, needs: &[&Need]) {
    let (kvm, userfaultfd) = (kvm(), userfaultfd());
    let (gre, ovs) = (gre(), OpenVswitch::need());
    let needs = [needs, &[&kvm, &userfaultfd]].concat();
    add!(suite, &needs;
        all_traffic_follows_a_guest_in_a_subnet,
        all_traffic_follows_a_guest_through_vxlan_across_a_router,
    );
    add!(suite, &[&needs[..], &[&gre]].concat(); all_traffic_follows_a_guest_through_gre_across_a_router);
    add!(suite, &[&needs[..], &[&ovs]].concat(); all_traffic_follows_a_guest_through_open_vswitch_across_a_router);
}

/// Whether the kernel has GRE.
fn gre() -> Need {
    let made = in_private_network(|| {
        ip(&["link", "add", "g", "type", "gretap", "local", "127.0.0.1", "remote", "127.0.0.2"])
    });
    made?.map_err(|_| "needs the kernel's module ip_gre".to_owned())
}

/// All that is made for networks at A, B and C.
pub fn all_of(sites: &Sites, nft: bool) -> Vec<String> {
    [&sites.a, &sites.b, &sites.c].map(|site| site.place.on(move || everything(nft))).to_vec()
}

/// From A to B by pre-copy and back by post-copy.
fn there_and_back(topology: Topology) {
    let sites = Sites::new(topology);
    let before = all_of(&sites, false);
    sites.declare();
    let Sites { a, b, c, .. } = &sites;
    let mut vm = a.run("ws=8 dirty=2000 pace=0 beat=50");
    let conversation = Conversation::begin(c.place.on(|| connect(7)));
    let (pings, numbered) = c.place.on(|| (Pings::start(), Numbered::start(RATE)));
    sites.becomes_known_at(1);
    for (from, to, mode) in [(a, b, "precopy"), (b, a, "postcopy")] {
        conversation.goes_on();
        let rarps = c.place.on(Rarps::begin);
        to.forget_flows();
        let report = from.migrate(&mut vm, to, &["--mode", mode]);
        rarps.of(MAC_BYTES, 1);
        sites.becomes_known_at(to.number());
        println!("{topology:?}, {mode}: late frames {}", report["late_frames"]);
    }
    conversation.goes_on();
    let tally = numbered.finish();
    let pings = pings.finish();
    conversation.end();
    println!("{topology:?}: {pings:?}, {tally:?}");
    assert_eq!(tally.doubled, 0, "{tally:?}");
    assert!(tally.sent > 0 && pings.answered > 0);
    // Open vSwitch in user space goes on to send to the old host for up to half a second.
    assert_eq!((tally.lost, pings.lost), (0, 0), "{tally:?}, {pings:?}");
    vm.report_with("an announcement", |field| field("net_announces_acked") >= 2);
    vm.verify();
    vm.send("poweroff");
    vm.ends_well();
    sites.delete();
    assert_eq!(all_of(&sites, false), before);
}

fn all_traffic_follows_a_guest_in_a_subnet() {
    there_and_back(Topology::Bridge);
}

fn all_traffic_follows_a_guest_through_vxlan_across_a_router() {
    there_and_back(Topology::Vxlan);
}

fn all_traffic_follows_a_guest_through_gre_across_a_router() {
    there_and_back(Topology::Gre);
}

fn all_traffic_follows_a_guest_through_open_vswitch_across_a_router() {
    there_and_back(Topology::Ovs);
}
