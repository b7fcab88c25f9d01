//! What is made is what was asked for, and is removed again.

use std::process::Stdio;
use std::time::Instant;

use tests::{wait, PATIENCE};

use super::*;

/// How often one is killed that makes a network.
const KILLS: usize = 20;

pub fn add(suite: &mut Suite, needs: &[&Need], nft: &Need) {
    add!(suite, needs;
        a_bridge_takes_its_uplink_and_gives_it_back,
        a_vxlan_network_floods_to_its_peers,
        what_is_gone_is_made_again,
        a_dry_run_tells_and_changes_nothing,
        what_a_killed_create_left_is_deleted,
        gre_is_made_or_its_module_named,
    );
    let with_nft: Vec<&Need> = needs.iter().copied().chain([nft]).collect();
    add!(suite, &with_nft; a_nat_translates_and_forwards, the_last_nat_switches_routing_off);
}

fn a_bridge_takes_its_uplink_and_gives_it_back() {
    let test = || {
        underlay();
        let (host, before) = (Host::new(), everything(false));
        let made = json(&host, "create lan --type bridge --uplink under1 --address 10.1.0.1/24");
        assert_eq!((&made["network"]["state"], &made["existed"]), (&"ready".into(), &false.into()));
        let bridge = link("mv-lan");
        assert_eq!((&bridge["kind"], &bridge["up"]), (&"bridge".into(), &true.into()));
        assert_eq!(bridge["ifalias"], "minivmm:lan");
        assert_eq!(link("under1")["master"], "mv-lan");
        assert!(
            said(Command::new("ip").args(["address", "show", "mv-lan"])).contains("10.1.0.1/24")
        );
        let stp = said(Command::new("ip").args(["-d", "link", "show", "mv-lan"]));
        assert!(stp.contains("forward_delay 0 ") && stp.contains("stp_state 0 "), "{stp}");
        let listed = json(&host, "list");
        assert_eq!((&listed[0]["name"], &listed[0]["mtu"]), (&"lan".into(), &1500.into()));
        let shown = json(&host, "show lan");
        assert_eq!(shown["missing"].as_array().unwrap().len(), 0, "{shown}");
        network(&host, "delete lan").ok();
        assert_eq!(everything(false), before);
        assert!(files(&host).is_empty());
        network(&host, "delete lan").refused(4, &["no network lan"]);
    };
    in_private_network(test).unwrap();
}

fn a_vxlan_network_floods_to_its_peers() {
    let test = || {
        underlay();
        let (host, before) = (Host::new(), everything(false));
        let made = json(&host, &format!("create {VXLAN}"));
        assert_eq!(made["network"]["mtu"], 1450);
        let tunnel = link("mx-blue");
        assert_eq!((&tunnel["kind"], &tunnel["mtu"]), (&"vxlan".into(), &1450.into()));
        assert_eq!((&tunnel["master"], &tunnel["up"]), (&"mv-blue".into(), &true.into()));
        let details = said(Command::new("ip").args(["-d", "link", "show", "mx-blue"]));
        assert!(
            details.contains("vxlan id 5001 local 192.0.2.1 ") && details.contains("dstport 4789")
        );
        assert!(!details.contains("nolearning"), "{details}");
        let flooded = said(Command::new("bridge").args(["fdb", "show", "dev", "mx-blue"]));
        for peer in ["192.0.2.2", "192.0.2.3"] {
            assert!(
                flooded.contains(&format!("00:00:00:00:00:00 dst {peer} self permanent")),
                "{flooded}"
            );
        }
        network(&host, "delete blue").ok();
        assert_eq!(everything(false), before);
    };
    in_private_network(test).unwrap();
}

fn what_is_gone_is_made_again() {
    let test = || {
        underlay();
        let host = Host::new();
        let create = format!("create {VXLAN}");
        network(&host, &create).ok();
        let whole = everything(false);
        assert!(network(&host, &create).ok().contains("was there already\n"));
        ip(&["link", "delete", "mx-blue"]).unwrap();
        ip(&["link", "set", "mv-blue", "down"]).unwrap();
        let shown = json(&host, "show blue");
        assert_eq!(shown["missing"].as_array().unwrap().len(), 4, "{shown}");
        let said = network(&host, &create).ok().to_owned();
        assert!(
            said.contains("is repaired") && said.contains("made: VXLAN link mx-blue"),
            "{said}"
        );
        // The same addresses too: they are in the file.
        let links = |text: &str| {
            let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
            lines.sort();
            lines
        };
        assert_eq!(links(&everything(false)), links(&whole));
        assert!(network(&host, &create).ok().contains("was there already\n"));
        for other in ["--mtu 1400", "--peer 192.0.2.4", "--address 10.1.0.1/24"] {
            let option = other.split_once(' ').unwrap().0.trim_start_matches('-');
            network(&host, &format!("{create} {other}"))
                .refused(5, &["blue is there already", option]);
        }
        network(&host, "delete blue").ok();
    };
    in_private_network(test).unwrap();
}

fn a_dry_run_tells_and_changes_nothing() {
    let test = || {
        underlay();
        let (host, before) = (Host::new(), everything(false));
        let said = network(&host, &format!("create {VXLAN} --dry-run")).ok().to_owned();
        assert_eq!(everything(false), before);
        assert!(files(&host).is_empty());
        // What it prints does what it says.
        for line in said.lines() {
            super::said(Command::new("sh").args(["-c", line]));
        }
        assert_eq!(link("mx-blue")["master"], "mv-blue");
        assert_eq!(link("mx-blue")["mtu"], 1450);
        ip(&["link", "delete", "mx-blue"]).unwrap();
        ip(&["link", "delete", "mv-blue"]).unwrap();
        network(&host, &format!("create {VXLAN}")).ok();
        let made = everything(false);
        assert!(network(&host, "delete blue --dry-run")
            .ok()
            .contains("would be removed: bridge mv-blue"));
        assert_eq!(everything(false), made);
        network(&host, "delete blue").ok();
        assert_eq!(everything(false), before);
    };
    in_private_network(test).unwrap();
}

fn a_nat_translates_and_forwards() {
    let test = || {
        underlay();
        let (host, before) = (Host::new(), everything(true));
        let create = "create web --type nat --address 10.1.0.1/24 --forward tcp:8080:10.1.0.2:80 --forward udp:53:10.1.0.2:53";
        let said = network(&host, create).ok().to_owned();
        assert!(said.contains("net.ipv4.ip_forward"), "{said}");
        let rules = super::said(Command::new("nft").args(["list", "table", "ip", "minivmm-web"]));
        assert!(rules.contains("tcp dport 8080 dnat to 10.1.0.2:80"), "{rules}");
        assert!(rules.contains("ip saddr 10.1.0.0/24 oifname != \"mv-web\" masquerade"), "{rules}");
        assert_eq!(std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap(), "1\n");
        assert!(network(&host, "show web").ok().contains("after a move"));
        super::said(Command::new("nft").args(["delete", "table", "ip", "minivmm-web"]));
        assert!(network(&host, create).ok().contains("made: nftables table"));
        network(&host, "delete web").ok();
        assert_eq!(everything(true), before);
        // The host routed before: it does afterwards.
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        network(&host, create).ok();
        network(&host, "delete web").ok();
        assert_eq!(std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap(), "1\n");
    };
    in_private_network(test).unwrap();
}

fn the_last_nat_switches_routing_off() {
    let test = || {
        let host = Host::new();
        let forward = || std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap();
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "0").unwrap();
        network(&host, "create a --type nat --address 10.1.0.1/24").ok();
        network(&host, "create b --type nat --address 10.2.0.1/24").ok();
        network(&host, "delete a").ok();
        assert_eq!(forward(), "1\n");
        network(&host, "delete b").ok();
        assert_eq!(forward(), "0\n");
    };
    in_private_network(test).unwrap();
}

fn what_a_killed_create_left_is_deleted() {
    let test = || {
        underlay();
        let before = everything(false);
        let mut unfinished = 0;
        for _ in 0..KILLS {
            let host = Host::new();
            let mut command = host.command(&words(&format!("create {VXLAN}")));
            let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            let deadline = Instant::now() + PATIENCE;
            // From then on there is something to clean up.
            while files(&host) != ["blue.json"] {
                assert!(Instant::now() < deadline, "nothing is written down");
                std::thread::yield_now();
            }
            child.kill().unwrap();
            wait(&mut child, PATIENCE).unwrap();
            let state = json(&host, "list")[0]["state"].clone();
            unfinished += usize::from(state == "creating");
            let deleted = network(&host, "delete blue");
            deleted.ok();
            assert_eq!(everything(false), before, "{deleted:#?}");
            // Its temporary file may be there, which the next one overwrites.
            assert!(!files(&host).contains(&"blue.json".to_owned()));
        }
        assert!(unfinished > 0, "every one was ready when it was killed");
        // And one that was killed can be finished.
        let host = Host::new();
        network(&host, &format!("create {VXLAN}")).ok();
        let file = host.root().join("state/networks/blue.json");
        let text = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, text.replace("\"ready\"", "\"creating\"")).unwrap();
        ip(&["link", "delete", "mx-blue"]).unwrap();
        network(&host, &format!("create {VXLAN}")).ok();
        assert_eq!(json(&host, "list")[0]["state"], "ready");
        network(&host, "delete blue").ok();
        assert_eq!(everything(false), before);
    };
    in_private_network(test).unwrap();
}

fn gre_is_made_or_its_module_named() {
    let test = || {
        underlay();
        let (host, before) = (Host::new(), everything(false));
        let create =
            "create g --type gre --key 7 --local 192.0.2.1 --peer 192.0.2.2 --peer 192.0.2.3";
        let made = network(&host, create);
        if made.code == Some(0) {
            assert_eq!(
                (&link("mg1-g")["master"], &link("mg1-g")["mtu"]),
                (&"mv-g".into(), &1458.into())
            );
            let details = said(Command::new("ip").args(["-d", "link", "show", "mg1-g"]));
            assert!(details.contains("isolated on"), "{details}");
            network(&host, "delete g").ok();
        } else {
            made.refused(1, &["gretap", "ip_gre"]);
        }
        assert_eq!(everything(false), before);
        assert!(files(&host).is_empty());
    };
    in_private_network(test).unwrap();
}
