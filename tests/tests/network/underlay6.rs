//! VXLAN between hosts whose addresses are of IPv6.

use tests::conversation::Conversation;
use tests::network::{connect, GUEST_ADDRESS, HOST_ADDRESS};
use tests::place::Place;
use tests::{kvm, Vm};

use super::*;

pub fn add(suite: &mut Suite, needs: &[&Need]) {
    let kvm = kvm();
    add!(suite, &[needs, &[&kvm]].concat(); a_guest_moves_through_vxlan_over_ipv6);
}

/// A host at one end of a wire.
struct End {
    place: Place,
    host: std::sync::Arc<Host>,
    address: &'static str,
}

impl End {
    fn new(address: &'static str) -> Self {
        Self { place: Place::new(), host: std::sync::Arc::new(Host::new()), address }
    }

    /// Runs the program there.
    #[track_caller]
    fn cli(&self, line: &str) -> Finished {
        let (host, line) = (std::sync::Arc::clone(&self.host), line.to_owned());
        self.place.on(move || host.cli(&line.split_whitespace().collect::<Vec<_>>()))
    }

    /// Waits for a VM; gives the address too.
    #[track_caller]
    fn receive(&self) -> (Vm, String) {
        let (host, listen) = (std::sync::Arc::clone(&self.host), format!("[{}]:0", self.address));
        self.place.on(move || {
            let mut vm = host.launch(&["receive", "--listen", &listen, "--once"]);
            vm.console.may_begin_within_a_line();
            let address = vm.listens_at();
            (vm, address)
        })
    }
}

fn a_guest_moves_through_vxlan_over_ipv6() {
    let (a, b) = (End::new("fd00::1"), End::new("fd00::2"));
    a.place.wire("eth0", &b.place, "eth0");
    for (end, other, address) in [(&a, &b, "10.0.0.11"), (&b, &a, HOST_ADDRESS)] {
        let underlay = end.address;
        end.place.ip(&format!("address add {underlay}/64 dev eth0 nodad"));
        let create = format!(
            "network create blue --type vxlan --vni 5001 --local {underlay} --peer {} --address {address}/24",
            other.address
        );
        end.cli(&create).ok();
        // IPv6 40, UDP 8, VXLAN 8, Ethernet 14.
        let shown: Value = serde_json::from_str(end.cli("network show blue --json").ok()).unwrap();
        assert_eq!(shown["network"]["mtu"], 1430, "{shown}");
        end.cli(
            "network create wide --type vxlan --vni 6 --local fd00::9 --peer fd00::7 --mtu 1431",
        )
        .refused(2, &["fd00::9"]);
        let wide = format!(
            "network create wide --type vxlan --vni 6 --local {underlay} --peer {} --mtu 1431",
            other.address
        );
        end.cli(&wide).refused(2, &["use at most 1430"]);
    }
    let host = std::sync::Arc::clone(&a.host);
    let mut vm = a.place.on(move || {
        let options = format!("virtio=irq ip={GUEST_ADDRESS} report=0");
        host.run(&options, &["--net", "id=net,network=blue"]).ready()
    });
    // Packets as long as the guest may send.
    let conversation = Conversation::begin(b.place.on(|| connect(7)));
    conversation.goes_on();
    for (from, to) in [(&a, &b), (&b, &a)] {
        let (next, address) = to.receive();
        from.cli(&format!("migrate vm --to {address}")).ok();
        std::mem::replace(&mut vm, next).ends_well();
        conversation.goes_on();
    }
    conversation.end();
    vm.verify();
    vm.send("poweroff");
    vm.ends_well();
    for end in [&a, &b] {
        end.cli("network delete blue").ok();
    }
}
