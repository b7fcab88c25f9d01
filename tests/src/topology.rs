//! Three hosts in network namespaces: a guest moves between A and B, and C talks to it.
//!
//! ```text
//!   bridge           one subnet: A, B and C are at a switch, a Linux bridge
//!   vxlan, gre, ovs  a router between all; A, B and C are in one network through it
//!   nat              a router between all; A and B each have the guest's network behind them
//! ```

use std::sync::Arc;
use std::time::Instant;

use crate::network::{said, GUEST_ADDRESS, HOST_ADDRESS};
use crate::open_vswitch::OpenVswitch;
use crate::place::Place;
use crate::process::{finish, Finished};
use crate::{Host, Vm, PATIENCE};

/// The guest's Ethernet address.
pub const MAC: &str = "52:54:00:0a:00:02";
/// As [`MAC`], in bytes.
pub const MAC_BYTES: [u8; 6] = [0x52, 0x54, 0, 0x0a, 0, 2];
/// Ports of A and B that lead to the guest in [`Topology::Nat`]: to its echo service, TCP and UDP.
pub const FORWARDED_ECHO: u16 = 8007;
/// As above, to its generator, TCP.
pub const FORWARDED_CHARGEN: u16 = 8019;

/// A wire between A and B beside all that, for the memory of guests that move: a network of its own.
const OWN_WIRE: &str = "eth1";

/// How the hosts are connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Topology {
    /// See the head of this file.
    Bridge,
    /// As above.
    Vxlan,
    /// As above.
    Gre,
    /// As above, with Open vSwitch's datapath in user space.
    Ovs,
    /// As above, with its datapath in the kernel.
    OvsKernel,
    /// As above.
    Nat,
}

/// A host.
pub struct Site {
    /// Its network namespace.
    pub place: Place,
    /// Its VMs and networks.
    pub host: Arc<Host>,
    topology: Topology,
    number: usize,
    switch: Option<Arc<OpenVswitch>>,
}

/// All hosts, and what is between them.
pub struct Sites {
    /// The switch or router.
    pub between: Place,
    /// The first host.
    pub a: Site,
    /// The second host.
    pub b: Site,
    /// The third host, which has [`HOST_ADDRESS`] unless addresses are translated.
    pub c: Site,
    topology: Topology,
}

impl Sites {
    /// Connects the hosts; no network is declared yet.
    ///
    /// # Panics
    /// Something of it cannot be had here.
    #[must_use]
    pub fn new(topology: Topology) -> Self {
        let between = Place::new();
        if topology == Topology::Bridge {
            between.ip("link add br0 type bridge");
            between.ip("link set br0 up");
        } else {
            between.on(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap());
        }
        let site = |number| Site::new(topology, number, &between);
        let (a, b, c) = (site(1), site(2), site(3));
        a.place.wire(OWN_WIRE, &b.place, OWN_WIRE);
        for site in [&a, &b] {
            site.place.ip(&format!("address add {}/24 dev {OWN_WIRE}", site.wire_address()));
        }
        Self { between, a, b, c, topology }
    }

    /// Declares the network `blue` wherever the topology has it.
    ///
    /// # Panics
    /// That is refused.
    #[track_caller]
    pub fn declare(&self) {
        for site in [&self.a, &self.b, &self.c] {
            if let Some(options) = site.options() {
                site.network(&format!("create blue {options}")).ok();
            }
        }
    }

    /// Deletes it again.
    ///
    /// # Panics
    /// That is refused.
    #[track_caller]
    pub fn delete(&self) {
        for site in [&self.a, &self.b, &self.c] {
            if site.options().is_some() {
                site.network("delete blue").ok();
            }
        }
    }

    /// The host, A or B, that frames for the guest are sent to from C, as far as the switches know; `None` if
    /// nowhere in particular, or if the topology has no switch between C and the guest.
    #[must_use]
    pub fn known_at(&self) -> Option<usize> {
        let words = |text: &str, which: &dyn Fn(&str) -> bool| -> Vec<String> {
            let line = text.lines().find(|line| which(line)).unwrap_or_default();
            line.split_whitespace().map(ToOwned::to_owned).collect()
        };
        let after = |words: &[String], word: &str| {
            words.iter().skip_while(|w| *w != word).nth(1).cloned().unwrap_or_default()
        };
        let bridge = |place: &Place, what: &'static [&'static str]| {
            place.on(move || {
                said(std::process::Command::new("bridge").args(["fdb", "show"]).args(what))
            })
        };
        let guests = |line: &str| line.starts_with(MAC);
        let ports: [String; 2] = match self.topology {
            Topology::Bridge => {
                let entry = words(&bridge(&self.between, &["br", "br0"]), &guests);
                return ["to1", "to2"]
                    .iter()
                    .position(|port| after(&entry, "dev") == *port)
                    .map(|n| n + 1);
            }
            Topology::Vxlan => {
                let entry = words(&bridge(&self.c.place, &["dev", "mx-blue"]), &|line| {
                    guests(line) && line.contains(" dst ")
                });
                return (1..=2).find(|n| after(&entry, "dst") == format!("10.9.{n}.1"));
            }
            Topology::Gre => {
                let entry = words(&bridge(&self.c.place, &["br", "mv-blue"]), &guests);
                return ["mg0-blue", "mg1-blue"]
                    .iter()
                    .position(|port| after(&entry, "dev") == *port)
                    .map(|n| n + 1);
            }
            Topology::Ovs | Topology::OvsKernel => ["mt0-blue", "mt1-blue"].map(ToOwned::to_owned),
            Topology::Nat => return None,
        };
        let switch = Arc::clone(self.c.switch.as_ref()?);
        self.c.place.on(move || {
            let table = switch.appctl(&["fdb/show", "ov-blue"]);
            let entry = words(&table, &|line: &str| line.contains(MAC));
            let port = |name: &String| switch.vsctl(&["get", "Interface", name, "ofport"]);
            ports
                .iter()
                .position(|name| entry.first().is_some_and(|at| *at == port(name).trim()))
                .map(|n| n + 1)
        })
    }

    /// Waits until the guest is known to be at host `number`: announcements may still be on their way.
    ///
    /// # Panics
    /// It does not come to be.
    #[track_caller]
    pub fn becomes_known_at(&self, number: usize) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let known = self.known_at();
            if known == Some(number) {
                return;
            }
            assert!(Instant::now() < deadline, "the guest is known at {known:?}, not at {number}");
            std::thread::yield_now();
        }
    }
}

impl Site {
    fn new(topology: Topology, number: usize, between: &Place) -> Self {
        let (place, host, port) = (Place::new(), Arc::new(Host::new()), format!("to{number}"));
        place.wire("eth0", between, &port);
        let mut site = Self { place, host, topology, number, switch: None };
        if topology == Topology::Bridge {
            between.ip(&format!("link set {port} master br0"));
            if number == 3 {
                site.place.ip(&format!("address add {HOST_ADDRESS}/24 dev eth0"));
            }
            return site;
        }
        between.ip(&format!("address add 10.9.{number}.254/24 dev {port}"));
        if matches!(topology, Topology::Ovs | Topology::OvsKernel) {
            let host = Arc::clone(&site.host);
            let start =
                move || Arc::new(OpenVswitch::start(&host, topology == Topology::OvsKernel));
            site.switch = Some(site.place.on(start));
        }
        let mut under = "eth0";
        if let (Topology::Ovs, Some(switch)) = (topology, site.switch.clone()) {
            // In user space tunnels go through bridges of its own only.
            site.place.on(move || {
                let bridge =
                    ["add-br", "br-phy", "--", "set", "bridge", "br-phy", "datapath_type=netdev"];
                switch.vsctl(&[&bridge[..], &["--", "add-port", "br-phy", "eth0"]].concat());
            });
            site.place.ip("link set br-phy up");
            under = "br-phy";
        }
        site.place.ip(&format!("address add {}/24 dev {under}", site.address()));
        site.place.ip(&format!("route add default via 10.9.{number}.254"));
        site
    }

    /// Its number: 1 for A, 2 for B, 3 for C.
    #[must_use]
    pub fn number(&self) -> usize {
        self.number
    }

    /// The address that other hosts reach it at.
    #[must_use]
    pub fn address(&self) -> String {
        match self.topology {
            Topology::Bridge if self.number == 3 => HOST_ADDRESS.to_owned(),
            Topology::Bridge => format!("10.0.0.1{}", self.number),
            _ => format!("10.9.{}.1", self.number),
        }
    }

    /// The address that A and B reach each other at over a wire of their own.
    #[must_use]
    pub fn wire_address(&self) -> String {
        format!("10.8.0.{}", self.number)
    }

    /// Whether its Open vSwitch has a flow for this address; not where it has none.
    #[must_use]
    pub fn held_in_switch(&self, mac: &str) -> bool {
        let Some(switch) = self.switch.clone() else { return false };
        let flows = self.place.on(move || switch.appctl(&["bridge/dump-flows", "ov-blue"]));
        flows.contains(&format!("dl_dst={mac}"))
    }

    /// Has its Open vSwitch, if it has one, forget what it did with frames. It keeps that for 10 s after the last one that
    /// was like it (`max-idle`, ovs-vswitchd.conf.db(5)), and follows its own table a few milliseconds late: a guest that comes to
    /// where it was announced to be elsewhere just before loses some. Few guests do.
    pub fn forget_flows(&self) {
        if let Some(switch) = self.switch.clone() {
            self.place.on(move || drop(switch.appctl(&["dpctl/del-flows"])));
        }
    }

    /// What its network is declared with, if it has it.
    fn options(&self) -> Option<String> {
        let peers = || {
            let others = (1..=3).filter(|other| *other != self.number);
            others.map(|other| format!(" --peer 10.9.{other}.1")).collect::<String>()
        };
        let tunnel = |kind: &str| {
            let address = if self.number == 3 {
                format!(" --address {HOST_ADDRESS}/24")
            } else {
                String::new()
            };
            format!("--type {kind} --local {}{}{address}", self.address(), peers())
        };
        match self.topology {
            Topology::Bridge | Topology::Nat if self.number == 3 => None,
            Topology::Bridge => {
                Some(format!("--type bridge --uplink eth0 --address {}/24", self.address()))
            }
            Topology::Vxlan => Some(tunnel("vxlan --vni 5001")),
            Topology::Gre => Some(tunnel("gre --key 7")),
            Topology::Ovs => Some(tunnel("ovs --datapath netdev --vni 5001")),
            Topology::OvsKernel => Some(tunnel("ovs --datapath system --vni 5001")),
            Topology::Nat => {
                let guest = GUEST_ADDRESS.split('/').next()?;
                let forward =
                    |protocol, port, to| format!(" --forward {protocol}:{port}:{guest}:{to}");
                Some(format!(
                    "--type nat --address {HOST_ADDRESS}/24{}{}{}",
                    forward("tcp", FORWARDED_ECHO, 7),
                    forward("udp", FORWARDED_ECHO, 7),
                    forward("tcp", FORWARDED_CHARGEN, 19)
                ))
            }
        }
    }

    /// `minivmm network ...` here.
    #[track_caller]
    pub fn network(&self, line: &str) -> Finished {
        let words = ["network"].into_iter().chain(line.split_whitespace());
        let command = self.host.command(&words.collect::<Vec<_>>());
        self.place.on(move || finish(command, b""))
    }

    /// Runs a guest with a card on the network; `options` are beacon's.
    #[track_caller]
    pub fn run(&self, options: &str) -> Vm {
        let host = Arc::clone(&self.host);
        let options = format!("virtio=irq ip={GUEST_ADDRESS} report=0 {options}");
        let card = format!("id=net,network=blue,mac={MAC}");
        self.place.on(move || host.run(&options, &["--net", &card]).ready())
    }

    /// Waits for a VM; gives the address too. Memory does not pass Open vSwitch in user space, whose sockets it would fill.
    #[track_caller]
    pub fn receive(&self) -> (Vm, String) {
        let at = match self.topology {
            Topology::Ovs => self.wire_address(),
            _ => self.address(),
        };
        let (host, listen) = (Arc::clone(&self.host), format!("{at}:0"));
        self.place.on(move || {
            let mut vm = host.launch(&["receive", "--listen", &listen, "--once"]);
            vm.console.may_begin_within_a_line();
            let address = vm.listens_at();
            (vm, address)
        })
    }

    /// Moves its VM `vm` to `other`; gives the report.
    #[track_caller]
    pub fn migrate(&self, vm: &mut Vm, other: &Self, args: &[&str]) -> serde_json::Value {
        let (next, address) = other.receive();
        let (host, args) = (Arc::clone(&self.host), args.join(" "));
        let report = self.place.on(move || {
            let args: Vec<&str> = args.split_whitespace().collect();
            host.json(&[&["migrate", "vm", "--to", &address], &args[..]].concat())
        });
        assert_eq!(report["verdict"], "handed-over", "{report}");
        std::mem::replace(vm, next).ends_well();
        report
    }
}
