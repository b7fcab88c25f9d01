//! Networks on Open vSwitch, with daemons of the test's own and its datapath in user space.

use tests::open_vswitch::OpenVswitch;

use super::*;

pub fn add(suite: &mut Suite, needs: &[&Need]) {
    let there = OpenVswitch::need();
    let needs: Vec<&Need> = needs.iter().copied().chain([&there]).collect();
    add!(suite, &needs;
        a_bridge_of_open_vswitch_is_made_and_removed,
        ports_of_a_bridge_that_was_there_come_and_go,
        a_daemon_that_is_not_there_is_told,
    );
    let kvm = tests::kvm();
    add!(suite, &[&needs[..], &[&kvm]].concat();
        the_way_to_a_guest_in_a_vlan_is_held_while_it_leaves,
        the_way_is_held_though_open_vswitch_was_started_again_meanwhile,
        a_guest_leaves_though_open_vswitch_does_not_answer,
    );
}

/// A bridge `br-int` of an operator's.
fn add_bridge(switch: &OpenVswitch) {
    let bridge = ["add-br", "br-int", "--", "set", "bridge", "br-int", "datapath_type=netdev"];
    switch.vsctl(&bridge);
}

fn a_bridge_of_open_vswitch_is_made_and_removed() {
    let test = || {
        underlay();
        let host = Host::new();
        let switch = OpenVswitch::start(&host, false);
        // The user-space datapath has an interface of its own, which stays.
        switch.vsctl(&["add-br", "other", "--", "set", "bridge", "other", "datapath_type=netdev"]);
        let before = everything(false);
        let create =
            "create blue --type ovs --datapath netdev --vlan 7 --vni 5001 --local 192.0.2.1 \
                      --peer 192.0.2.2 --peer 192.0.2.3";
        network(&host, create).ok();
        assert_eq!(switch.vsctl(&["list-ports", "ov-blue"]), "mp-blue\nmt0-blue\nmt1-blue\n");
        assert_eq!(switch.vsctl(&["get", "bridge", "ov-blue", "datapath_type"]), "netdev\n");
        assert_eq!(switch.vsctl(&["get", "port", "mp-blue", "tag"]), "7\n");
        assert_eq!(switch.vsctl(&["get", "port", "mt0-blue", "protected"]), "true\n");
        let options = switch.vsctl(&["get", "interface", "mt1-blue", "type", "options"]);
        assert!(options.contains("vxlan") && options.contains("192.0.2.3"), "{options}");
        // Somebody else has come to use it: it stays whole.
        let whole = switch.vsctl(&["list-ports", "ov-blue"]);
        let foreign =
            ["add-port", "ov-blue", "z0", "--", "set", "interface", "z0", "type=internal"];
        switch.vsctl(&foreign);
        for dry in ["delete blue --dry-run", "delete blue"] {
            network(&host, dry).refused(5, &["in use by z0"]);
        }
        switch.vsctl(&["del-port", "z0"]);
        assert_eq!(switch.vsctl(&["list-ports", "ov-blue"]), whole);
        network(&host, create).ok();
        assert!(options.contains("key=\"5001\"") && options.contains("192.0.2.1"), "{options}");
        let shown = network(&host, "show blue --json").ok().to_owned();
        let shown: Value = serde_json::from_str(&shown).unwrap();
        assert_eq!(
            (&shown["network"]["mtu"], &shown["missing"]),
            (&1450.into(), &Value::Array(vec![]))
        );
        switch.vsctl(&["del-port", "mt0-blue"]);
        assert!(network(&host, create).ok().contains("is repaired"));
        assert_eq!(switch.vsctl(&["list-ports", "ov-blue"]), "mp-blue\nmt0-blue\nmt1-blue\n");
        network(&host, "delete blue").ok();
        assert_eq!(switch.vsctl(&["list-br"]), "other\n");
        assert_eq!(everything(false), before);
    };
    in_private_network(test).unwrap();
}

fn ports_of_a_bridge_that_was_there_come_and_go() {
    let test = || {
        let host = Host::new();
        let switch = OpenVswitch::start(&host, false);
        add_bridge(&switch);
        let before = everything(false);
        network(&host, "create sw --type ovs --bridge br-int").ok();
        assert_eq!(switch.vsctl(&["list-ports", "br-int"]), "mp-sw\n");
        assert_eq!(link("mo-sw")["master"], "mv-sw");
        network(&host, "delete sw").ok();
        assert_eq!(switch.vsctl(&["list-ports", "br-int"]), "");
        assert_eq!(everything(false), before);
        // An interface of that name, but no bridge of Open vSwitch.
        underlay();
        let taken = network(&host, "create sw --type ovs --bridge under0");
        taken.refused(5, &["interface under0 is there already"]);
        assert!(files(&host).is_empty());
    };
    in_private_network(test).unwrap();
}

fn the_way_to_a_guest_in_a_vlan_is_held_while_it_leaves() {
    let test = || {
        let (a, b) = (Host::new(), Host::new());
        let switch = OpenVswitch::start(&a, false);
        add_bridge(&switch);
        network(&a, "create sw --type ovs --bridge br-int --vlan 7").ok();
        let flows = || switch.appctl(&["bridge/dump-flows", "br-int"]);
        let before = flows().lines().count();
        let mut vm = a.run("virtio=irq ws=8 pace=0", &["--net", "id=net,network=sw"]).ready();
        let (mut next, destination) = b.receive(&["--net", "net=bridge=mv-sw"]);
        let (proxy, paused, migrating) = stopped(&a, &destination);
        let held = flows();
        let flow = held.lines().find(|line| line.contains("dl_vlan=7,dl_dst=")).expect(&held);
        assert!(flow.contains("actions=strip_vlan,output"), "{flow}");
        paused.release();
        let finished = migrating.end();
        assert_eq!(finished.code, Some(0), "{finished:?}");
        vm.ends_well();
        drop(proxy);
        assert_eq!(flows().lines().count(), before, "{}", flows());
        next.verify();
    };
    in_private_network(test).unwrap();
}

/// It closes connections that are silent for two minutes, too.
fn the_way_is_held_though_open_vswitch_was_started_again_meanwhile() {
    let test = || {
        let (a, b) = (Host::new(), Host::new());
        let mut switch = OpenVswitch::start(&a, false);
        add_bridge(&switch);
        network(&a, "create sw --type ovs --bridge br-int").ok();
        let mut vm = a.run("virtio=irq ws=8 pace=0", &["--net", "id=net,network=sw"]).ready();
        let (mut next, destination) = b.receive(&["--net", "net=bridge=mv-sw"]);
        let proxy = Proxy::apart(&destination);
        let copying = proxy.hold(Spot::new(On::Page(0), Way::Forth, RecordType::Pages));
        let commit = proxy.hold(Spot::new(On::Main, Way::Forth, RecordType::Commit));
        let migrating = Migrating::start(&a, &proxy.address(), &["--dead-after", "60s"]);
        copying.wait();
        switch.restart();
        let flows = || switch.appctl(&["bridge/dump-flows", "br-int"]);
        assert!(!flows().contains("dl_dst="), "{}", flows());
        copying.release();
        commit.wait();
        assert!(flows().contains("dl_dst="), "{}", flows());
        commit.release();
        let finished = migrating.end();
        assert_eq!(finished.code, Some(0), "{finished:?}");
        vm.ends_well();
        next.verify();
    };
    in_private_network(test).unwrap();
}

fn a_guest_leaves_though_open_vswitch_does_not_answer() {
    let test = || {
        let (a, b) = (Host::new(), Host::new());
        let switch = OpenVswitch::start(&a, false);
        add_bridge(&switch);
        network(&a, "create sw --type ovs --bridge br-int").ok();
        let mut vm = a.run("virtio=irq ws=8 pace=0", &["--net", "id=net,network=sw"]).ready();
        let (mut next, destination) = b.receive(&["--net", "net=bridge=mv-sw"]);
        let proxy = Proxy::apart(&destination);
        switch.hang();
        let finished = Migrating::start(&a, &proxy.address(), &["--dead-after", "60s"]).end();
        assert_eq!(finished.code, Some(0), "{finished:?}");
        vm.ends_well();
        next.verify();
    };
    in_private_network(test).unwrap();
}

fn a_daemon_that_is_not_there_is_told() {
    let test = || {
        let (host, before) = (Host::new(), everything(false));
        let mut command = host.command(&words("create sw --type ovs"));
        command.env("OVS_RUNDIR", host.root());
        finish(command, b"").refused(1, &["ovs-vsctl", "db.sock"]);
        assert_eq!(everything(false), before);
        assert!(files(&host).is_empty());
    };
    in_private_network(test).unwrap();
}
