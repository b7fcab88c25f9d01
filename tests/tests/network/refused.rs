//! What cannot be is refused, in a sentence, and nothing is half-made.

use super::*;

pub fn add(suite: &mut Suite, needs: &[&Need], nft: &Need) {
    add!(suite, needs;
        what_cannot_be_is_refused_and_nothing_is_made,
        links_of_others_are_left_alone,
        who_may_not_is_told,
        programs_that_are_missing_are_named,
        a_network_in_use_is_not_deleted,
    );
    let with_nft: Vec<&Need> = needs.iter().copied().chain([nft]).collect();
    add!(suite, &with_nft; a_table_of_others_is_left_alone);
}

fn what_cannot_be_is_refused_and_nothing_is_made() {
    const CASES: &[(&str, i32, &str)] = &[
        ("a.b --type bridge", 2, "no name of a network"),
        ("toolongname --type bridge", 2, "1 to 10 characters"),
        ("x --type bridge --uplink nothere", 2, "no interface nothere"),
        ("x --type bridge --uplink lo", 5, "loopback"),
        ("x --type bridge --uplink taken", 5, "a port of br0 already"),
        ("x --type bridge --vni 5", 2, "--vni says nothing"),
        ("x --type bridge --mtu 60", 2, "no MTU"),
        ("x --type bridge --uplink under1 --mtu 9000", 2, "use at most 1500"),
        (
            "x --type vxlan --vni 16777216 --local 192.0.2.1 --peer 192.0.2.2",
            2,
            "use 1 to 16777215",
        ),
        ("x --type vxlan --vni 0 --local 192.0.2.1 --peer 192.0.2.2", 2, "use 1 to 16777215"),
        ("x --type vxlan --local 192.0.2.1 --peer 192.0.2.2", 2, "--vni is missing"),
        ("x --type vxlan --vni 5 --local 192.0.2.1", 2, "--peer"),
        ("x --type vxlan --vni 5 --local 192.0.2.9 --peer 192.0.2.2", 2, "no address of this host"),
        (
            "x --type vxlan --vni 5 --local 192.0.2.1 --peer 203.0.113.1",
            1,
            "no route to --peer 203.0.113.1",
        ),
        ("x --type vxlan --vni 5 --local 192.0.2.1 --peer fd00::1", 2, "versions of IP"),
        (
            "x --type vxlan --vni 5 --local 192.0.2.1 --peer 192.0.2.2 --mtu 1451",
            2,
            "use at most 1450",
        ),
        (
            "x --type vxlan --vni 77 --local 192.0.2.1 --peer 192.0.2.2",
            5,
            "--vni and --port already",
        ),
        ("x --type gre --local fd00::1 --peer fd00::2", 2, "IPv4 only"),
        ("x --type nat", 2, "--address"),
        ("x --type nat --address 10.1.0.1/24 --forward tcp:80:10.2.0.2:80", 2, "no guest"),
        ("x --type ovs --vlan 4095", 2, "use 1 to 4094"),
        ("x --type ovs --vni 5", 2, "--local is missing"),
    ];
    let test = || {
        underlay();
        ip(&["link", "add", "br0", "type", "bridge"]).unwrap();
        ip(&["link", "add", "taken", "type", "veth", "peer", "name", "taken1"]).unwrap();
        ip(&["link", "set", "taken", "master", "br0"]).unwrap();
        let vxlan = [
            "link",
            "add",
            "vx",
            "type",
            "vxlan",
            "id",
            "77",
            "dstport",
            "4789",
            "local",
            "192.0.2.1",
        ];
        ip(&vxlan).unwrap();
        let (host, before) = (Host::new(), everything(false));
        for (case, code, word) in CASES {
            network(&host, &format!("create {case}")).refused(*code, &[word]);
            assert_eq!(everything(false), before, "{case}");
            assert!(files(&host).is_empty(), "{case}: {:?}", files(&host));
        }
    };
    in_private_network(test).unwrap();
}

fn links_of_others_are_left_alone() {
    let test = || {
        underlay();
        let host = Host::new();
        ip(&["link", "add", "mx-blue", "type", "bridge"]).unwrap();
        let before = everything(false);
        network(&host, &format!("create {VXLAN}"))
            .refused(5, &["interface mx-blue is there already"]);
        assert_eq!(everything(false), before);
        assert!(files(&host).is_empty());
        ip(&["link", "delete", "mx-blue"]).unwrap();
        network(&host, &format!("create {VXLAN}")).ok();
        // The same name, made by somebody else meanwhile.
        ip(&["link", "delete", "mx-blue"]).unwrap();
        ip(&["link", "add", "mx-blue", "type", "bridge"]).unwrap();
        let foreign = link("mx-blue");
        network(&host, &format!("create {VXLAN}")).refused(5, &["mx-blue is there already"]);
        network(&host, "delete blue").ok();
        assert_eq!(link("mx-blue"), foreign);
        assert!(link("mv-blue").is_null());
    };
    in_private_network(test).unwrap();
}

fn a_table_of_others_is_left_alone() {
    let test = || {
        let host = Host::new();
        said(Command::new("nft").args(["add", "table", "ip", "minivmm-web"]));
        let before = everything(true);
        let create = "create web --type nat --address 10.1.0.1/24";
        network(&host, create).refused(5, &["nftables table ip minivmm-web is there already"]);
        assert_eq!(everything(true), before);
    };
    in_private_network(test).unwrap();
}

fn who_may_not_is_told() {
    let test = || {
        underlay();
        let (host, before) = (Host::new(), everything(false));
        let mut command = Command::new("setpriv");
        command.args(["--bounding-set", "-net_admin", "--"]).arg(tests::binary());
        command.args(words(&format!("create {VXLAN}")));
        host.environment(&mut command);
        finish(command, b"").refused(1, &["CAP_NET_ADMIN"]);
        assert_eq!(everything(false), before);
        assert!(files(&host).is_empty());
    };
    in_private_network(test).unwrap();
}

fn programs_that_are_missing_are_named() {
    let test = || {
        let (host, before) = (Host::new(), everything(false));
        for (line, words) in [
            ("create x --type nat --address 10.1.0.1/24", ["nft cannot be started", "nftables"]),
            ("create x --type ovs", ["ovs-vsctl cannot be started", "openvswitch-switch"]),
        ] {
            let mut command = host.command(&super::words(line));
            command.env("PATH", "/nowhere");
            finish(command, b"").refused(1, &words);
            assert_eq!(everything(false), before);
            assert!(files(&host).is_empty());
        }
    };
    in_private_network(test).unwrap();
}

fn a_network_in_use_is_not_deleted() {
    let test = || {
        let host = Host::new();
        network(&host, "create lan --type bridge").ok();
        ip(&["tuntap", "add", "dev", "guest0", "mode", "tap"]).unwrap();
        ip(&["link", "set", "guest0", "master", "mv-lan"]).unwrap();
        let before = everything(false);
        network(&host, "delete lan").refused(5, &["in use by guest0"]);
        assert_eq!(everything(false), before);
        ip(&["link", "set", "guest0", "nomaster"]).unwrap();
        network(&host, "delete lan").ok();
        assert_eq!(link("guest0")["ifname"], "guest0");
    };
    in_private_network(test).unwrap();
}
