//! What a network is made of, in the order in which it is made.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

use serde::{Deserialize, Serialize};

use super::options::{Cidr, Datapath, Ends, Forward, NetworkKind, NetworkOptions};
use super::{mark, NetworkError};
use crate::config::Mac;

/// One part of a network. Printed, it is the command that would do the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "step")]
pub enum Step {
    /// A link that is made.
    Link(Link),
    /// A link of the host's that becomes a port of the bridge.
    Uplink {
        /// The link.
        link: String,
        /// The bridge.
        bridge: String,
    },
    /// An address of a link.
    Address {
        /// The link.
        link: String,
        /// Address and prefix.
        address: Cidr,
    },
    /// Frames for everybody, and for who is not known yet, go to this peer too.
    Flood {
        /// The VXLAN link.
        link: String,
        /// The peer.
        peer: IpAddr,
    },
    /// The host routes IPv4.
    Forwarding,
    /// Translation of addresses, in an nftables table.
    Nat(Nat),
    /// Ports of an Open vSwitch bridge.
    Switch(Switch),
}

/// A link that is made for a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// Its name.
    pub name: String,
    /// What it is.
    #[serde(flatten)]
    pub kind: LinkKind,
    /// Its Ethernet address, which no other link of this host has: by it a link is known as this network's, also
    /// one that was made just before its maker was killed.
    pub mac: Mac,
    /// Its MTU, bytes.
    pub mtu: u16,
    /// The bridge that it is a port of.
    pub bridge: Option<String>,
    /// Frames do not pass from it to other ports that are isolated: peers reach each other without this host.
    pub isolated: bool,
    /// Frames leave it with their checksums, in segments that fit, as who reads them in user space expects.
    #[serde(default)]
    pub whole: bool,
}

/// Kinds of links.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "kind")]
pub enum LinkKind {
    /// A bridge, without spanning tree and without a delay before a new port forwards.
    Bridge,
    /// A VXLAN tunnel that learns.
    Vxlan {
        /// Network identifier.
        vni: u32,
        /// Address of this host.
        local: IpAddr,
        /// UDP port.
        port: u16,
    },
    /// A GRE tunnel for Ethernet frames.
    Gretap {
        /// Address of this host.
        local: Ipv4Addr,
        /// Address of the other one.
        peer: Ipv4Addr,
        /// Key in both directions.
        key: Option<u32>,
    },
    /// One end of a pair.
    Veth {
        /// Name of the other end.
        end: String,
        /// Address of the other end.
        end_mac: Mac,
    },
    /// The other end, which is made with the first one.
    End,
}

/// Translation of addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nat {
    /// Name of the table.
    pub table: String,
    /// The bridge of the guests.
    pub bridge: String,
    /// Their addresses.
    pub guests: Cidr,
    /// Ports of the host's that lead to them.
    pub forwards: Vec<Forward>,
}

/// What is made in Open vSwitch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Switch {
    /// Whose it is, as its ports say.
    pub owner: String,
    /// The Open vSwitch bridge.
    pub bridge: String,
    /// The bridge is made, with this datapath; otherwise it was there.
    pub make: Option<Datapath>,
    /// The port that leads to the guests.
    pub port: String,
    /// Its VLAN.
    pub vlan: Option<u16>,
    /// VXLAN ports: name and peer.
    pub tunnels: Vec<(String, IpAddr)>,
    /// Their network identifier and the address of this host.
    pub tunnel: Option<(u32, IpAddr)>,
}

/// What the host has to say about it.
pub struct Facts<'a> {
    /// MTU of what carries the frames, bytes; of the ways to several peers, the smallest.
    pub underlay_mtu: u32,
    /// The Open vSwitch bridge is there, with this datapath.
    pub switch: Option<Datapath>,
    /// Gives addresses that nobody has.
    pub new_mac: &'a mut dyn FnMut() -> Mac,
}

/// Name of the bridge that cards are attached to.
#[must_use]
pub fn bridge_name(network: &str) -> String {
    format!("mv-{network}")
}

/// Ethernet address of a host as the gateway of guests whose addresses it translates: the same on every host,
/// so that a guest that moves finds its gateway where it knows it. Locally administered.
fn gateway_mac(address: Ipv4Addr) -> Mac {
    let [a, b, c, d] = address.octets();
    Mac([2, 0, a, b, c, d])
}

/// MTU of a network, bytes.
///
/// # Errors
/// More was asked for than there is.
pub fn mtu(options: &NetworkOptions, underlay: u32) -> Result<u16, NetworkError> {
    let largest = underlay.saturating_sub(options.overhead().into());
    // Where it goes through the loopback interface.
    let largest = u16::try_from(largest).unwrap_or(u16::MAX);
    match options.mtu {
        None if options.ends().is_some() => Ok(largest),
        // What a switch in between takes is not known here.
        None => Ok(largest.min(1500)),
        Some(mtu) if mtu <= largest => Ok(mtu),
        Some(mtu) => Err(NetworkError::Option(format!(
            "--mtu {mtu} is too large: what carries the frames takes {underlay} bytes, of which {} are for the tunnel: use at most {largest}",
            options.overhead()
        ))),
    }
}

/// All that is made for the network `name`.
///
/// # Errors
/// The MTU is too large.
pub fn plan(
    name: &str,
    options: &NetworkOptions,
    facts: Facts<'_>,
) -> Result<Vec<Step>, NetworkError> {
    let mtu = mtu(options, facts.underlay_mtu)?;
    let bridge = bridge_name(name);
    let new_mac = facts.new_mac;
    let mut link = |name: String, kind, port: bool| Link {
        name,
        kind,
        mac: new_mac(),
        mtu,
        bridge: port.then(|| bridge.clone()),
        isolated: false,
        whole: false,
    };
    let mut steps = Vec::new();
    // What a kernel may lack comes first.
    if let NetworkKind::Gre { key, ends } = &options.kind {
        for (index, peer) in ends.peers.iter().enumerate() {
            let (IpAddr::V4(local), IpAddr::V4(peer)) = (ends.local, *peer) else { continue };
            let kind = LinkKind::Gretap { local, peer, key: *key };
            let tunnel = link(format!("mg{index}-{name}"), kind, false);
            steps.push(Step::Link(tunnel));
        }
    }
    let made = link(bridge.clone(), LinkKind::Bridge, false);
    let mac = match (&options.kind, options.address.map(|cidr| cidr.address)) {
        (NetworkKind::Nat { .. }, Some(IpAddr::V4(address))) => gateway_mac(address),
        _ => made.mac,
    };
    steps.push(Step::Link(Link { mac, ..made }));
    match &options.kind {
        NetworkKind::Bridge { uplink } => {
            let uplinks = uplink
                .iter()
                .map(|link| Step::Uplink { link: link.clone(), bridge: bridge.clone() });
            steps.extend(uplinks);
        }
        NetworkKind::Vxlan { vni, ends: Ends { local, peers }, port } => {
            let kind = LinkKind::Vxlan { vni: *vni, local: *local, port: *port };
            let tunnel = link(format!("mx-{name}"), kind, true);
            let flood =
                peers.iter().map(|peer| Step::Flood { link: tunnel.name.clone(), peer: *peer });
            let flood: Vec<Step> = flood.collect();
            steps.push(Step::Link(tunnel));
            steps.extend(flood);
        }
        NetworkKind::Gre { .. } => {
            // Into the bridge that is there now.
            let ports: Vec<Step> = steps
                .iter()
                .filter_map(|step| match step {
                    Step::Link(tunnel @ Link { kind: LinkKind::Gretap { .. }, .. }) => {
                        Some(Step::Link(Link {
                            bridge: Some(bridge.clone()),
                            isolated: true,
                            ..tunnel.clone()
                        }))
                    }
                    _ => None,
                })
                .collect();
            steps.extend(ports);
        }
        NetworkKind::Nat { forwards } => {
            if let Some(guests) = options.address {
                steps.push(Step::Forwarding);
                let table = format!("minivmm-{name}");
                let (bridge, forwards) = (bridge.clone(), forwards.clone());
                steps.push(Step::Nat(Nat { table, bridge, guests, forwards }));
            }
        }
        NetworkKind::Ovs { bridge: switch, vlan, datapath, tunnel } => {
            let whole = facts.switch.unwrap_or(*datapath) == Datapath::Netdev;
            let end = Link { whole, ..link(format!("mp-{name}"), LinkKind::End, false) };
            let kind = LinkKind::Veth { end: end.name.clone(), end_mac: end.mac };
            steps.push(Step::Link(Link { whole, ..link(format!("mo-{name}"), kind, true) }));
            let peers = tunnel.iter().flat_map(|(_, ends)| &ends.peers).enumerate();
            let tunnels = peers.map(|(index, peer)| (format!("mt{index}-{name}"), *peer));
            let switch = Switch {
                owner: name.to_owned(),
                bridge: switch.clone(),
                make: facts.switch.is_none().then_some(*datapath),
                port: end.name.clone(),
                vlan: *vlan,
                tunnels: tunnels.collect(),
                tunnel: tunnel.as_ref().map(|(vni, ends)| (*vni, ends.local)),
            };
            steps.push(Step::Link(end));
            steps.push(Step::Switch(switch));
        }
    }
    let address = options.address;
    steps.extend(address.map(|address| Step::Address { link: bridge, address }));
    Ok(steps)
}

impl Nat {
    /// The table, as nft reads it; one of the same name is replaced.
    #[must_use]
    pub fn rules(&self) -> String {
        let Self { table, bridge, guests, forwards } = self;
        let mut text = format!("table ip {table}\ndelete table ip {table}\ntable ip {table} {{\n");
        let mut chain = |name, hook: &str, rules: &[String]| {
            text.push_str(&format!("  chain {name} {{\n    type nat hook {hook};\n"));
            rules.iter().for_each(|rule| text.push_str(&format!("    {rule}\n")));
            text.push_str("  }\n");
        };
        let forward = |forward: &Forward| {
            let Forward { port, guest, guest_port, .. } = forward;
            format!(
                "fib daddr type local {} dport {port} dnat to {guest}:{guest_port}",
                forward.protocol()
            )
        };
        let forwards: Vec<String> = forwards.iter().map(forward).collect();
        chain("prerouting", "prerouting priority dstnat", &forwards);
        chain("output", "output priority -100", &forwards);
        let masquerade = format!("ip saddr {guests} oifname != \"{bridge}\" masquerade");
        chain("postrouting", "postrouting priority srcnat", &[masquerade]);
        text.push('}');
        text
    }
}

impl Switch {
    /// Arguments of ovs-vsctl that make all of it, in one transaction; what is there stays.
    #[must_use]
    pub fn make_arguments(&self) -> Vec<String> {
        let Self { owner, bridge, make, port, vlan, tunnels, tunnel } = self;
        let owner = format!("external_ids:minivmm={owner}");
        let mut all: Vec<String> = Vec::new();
        let mut command = |words: &[&str]| {
            all.push("--".to_owned());
            all.extend(words.iter().map(|&word| word.to_owned()));
        };
        if let Some(datapath) = make {
            let datapath = match datapath {
                Datapath::System => "datapath_type=system",
                Datapath::Netdev => "datapath_type=netdev",
            };
            command(&["--may-exist", "add-br", bridge]);
            command(&["set", "Bridge", bridge, datapath, &owner]);
        }
        command(&["--may-exist", "add-port", bridge, port]);
        command(&["set", "Port", port, &owner]);
        if let Some(vlan) = vlan {
            command(&["set", "Port", port, &format!("tag={vlan}")]);
        }
        for (name, peer) in tunnels {
            let Some((vni, local)) = tunnel else { break };
            // ovs-vsctl takes a colon for the end of a value.
            let remote = format!("options:remote_ip=\"{peer}\"");
            let (local, key) =
                (format!("options:local_ip=\"{local}\""), format!("options:key={vni}"));
            command(&["--may-exist", "add-port", bridge, name]);
            // Frames do not pass from one tunnel to another: peers reach each other without this host.
            command(&["set", "Port", name, &owner, "protected=true"]);
            command(&["set", "Interface", name, "type=vxlan", &remote, &local, &key]);
        }
        all
    }

    /// The names of its ports.
    pub fn ports(&self) -> impl Iterator<Item = &str> {
        std::iter::once(self.port.as_str())
            .chain(self.tunnels.iter().map(|(name, _)| name.as_str()))
    }
}

impl Step {
    /// What it makes, in a few words.
    #[must_use]
    pub fn label(&self) -> String {
        match self {
            Self::Link(Link { name, kind, bridge, .. }) => match (kind, bridge) {
                (LinkKind::Bridge, _) => format!("bridge {name}"),
                (LinkKind::Vxlan { .. }, _) => format!("VXLAN link {name}"),
                (LinkKind::Gretap { .. }, None) => format!("GRE link {name}"),
                (LinkKind::Gretap { .. }, Some(bridge)) => format!("port {name} of {bridge}"),
                (LinkKind::Veth { .. } | LinkKind::End, _) => format!("veth {name}"),
            },
            Self::Uplink { link, bridge } => format!("port {link} of {bridge}"),
            Self::Address { link, address } => format!("address {address} of {link}"),
            Self::Flood { link, peer } => format!("peer {peer} of {link}"),
            Self::Forwarding => "routing of IPv4 (net.ipv4.ip_forward)".to_owned(),
            Self::Nat(nat) => format!("nftables table ip {}", nat.table),
            Self::Switch(switch) if switch.make.is_some() => {
                format!("Open vSwitch bridge {}", switch.bridge)
            }
            Self::Switch(switch) => format!("ports of Open vSwitch bridge {}", switch.bridge),
        }
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, kind, mac, mtu, bridge, isolated, whole } = self;
        if !isolated {
            let add = |f: &mut fmt::Formatter<'_>| write!(f, "ip link add {name} address {mac}");
            match kind {
                LinkKind::Bridge => {
                    add(f)?;
                    writeln!(f, " type bridge stp_state 0 forward_delay 0")?;
                }
                LinkKind::Vxlan { vni, local, port } => {
                    add(f)?;
                    writeln!(f, " type vxlan id {vni} local {local} dstport {port} learning")?;
                }
                LinkKind::Gretap { local, peer, key } => {
                    add(f)?;
                    write!(f, " type gretap local {local} remote {peer}")?;
                    key.map_or(Ok(()), |key| write!(f, " key {key}"))?;
                    writeln!(f)?;
                }
                LinkKind::Veth { end, end_mac } => {
                    add(f)?;
                    writeln!(f, " type veth peer name {end} address {end_mac}")?;
                }
                LinkKind::End => {}
            }
        }
        write!(f, "ip link set {name}")?;
        bridge.as_ref().map_or(Ok(()), |bridge| write!(f, " master {bridge}"))?;
        write!(f, " mtu {mtu} up")?;
        if *isolated {
            write!(f, "\nip link set {name} type bridge_slave isolated on")?;
        }
        if *whole {
            write!(f, "\nethtool -K {name} tx off")?;
        }
        Ok(())
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Link(link) => link.fmt(f),
            Self::Uplink { link, bridge } => write!(f, "ip link set {link} master {bridge} up"),
            Self::Address { link, address } => write!(f, "ip address add {address} dev {link}"),
            Self::Flood { link, peer } => {
                write!(
                    f,
                    "bridge fdb append 00:00:00:00:00:00 dev {link} dst {peer} self permanent"
                )
            }
            Self::Forwarding => f.write_str("sysctl net.ipv4.ip_forward=1"),
            Self::Nat(nat) => write!(f, "nft -f - <<EOF\n{}\nEOF", nat.rules()),
            Self::Switch(switch) => {
                let arguments = switch.make_arguments().join(" ");
                write!(f, "ovs-vsctl{}", arguments.strip_prefix("--").unwrap_or(&arguments))
            }
        }
    }
}

/// The links among `steps`, each once, with the mark of the network.
pub fn marked<'a>(network: &str, steps: &'a [Step]) -> Vec<(&'a Link, String)> {
    let mut all: Vec<(&Link, String)> = Vec::new();
    for step in steps {
        if let Step::Link(link) = step {
            if !all.iter().any(|(other, _)| other.name == link.name) {
                all.push((link, mark(network)));
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn plan_of(kind: NetworkKind, address: Option<&str>, underlay_mtu: u32) -> Vec<Step> {
        let options =
            NetworkOptions { address: address.map(|a| a.parse().unwrap()), mtu: None, kind };
        let mut next = 0;
        let mut new_mac = || {
            next += 1;
            Mac([2, 0, 0, 0, 0, next])
        };
        plan("0123456789", &options, Facts { underlay_mtu, switch: None, new_mac: &mut new_mac })
            .unwrap()
    }

    fn ends(peers: u8) -> Ends {
        let peers = (1..=peers).map(|n| IpAddr::V4(Ipv4Addr::new(10, 0, n, 1))).collect();
        Ends { local: "10.0.0.1".parse().unwrap(), peers }
    }

    fn every_kind() -> Vec<NetworkKind> {
        vec![
            NetworkKind::Bridge { uplink: Some("eth0".into()) },
            NetworkKind::Vxlan { vni: 5, ends: ends(64), port: 4789 },
            NetworkKind::Gre { key: Some(7), ends: ends(64) },
            NetworkKind::Nat { forwards: vec!["tcp:80:10.1.0.2:80".parse().unwrap()] },
            NetworkKind::Ovs {
                bridge: "br".into(),
                vlan: Some(3),
                datapath: Datapath::Netdev,
                tunnel: Some((5, ends(64))),
            },
        ]
    }

    #[test]
    fn names_are_those_that_links_can_have() {
        for kind in every_kind() {
            let steps = plan_of(kind, Some("10.1.0.1/24"), 1500);
            for (link, _) in marked("x", &steps) {
                assert!(crate::config::parse_tap(&link.name).is_ok(), "{}", link.name);
            }
            let ports = steps.iter().filter_map(|step| match step {
                Step::Switch(switch) => Some(switch.ports()),
                _ => None,
            });
            assert!(ports.flatten().all(|port| port.len() <= 15));
        }
    }

    #[test]
    fn a_gateway_has_the_same_address_everywhere() {
        let bridge = |address| {
            let steps = plan_of(NetworkKind::Nat { forwards: Vec::new() }, Some(address), 1500);
            marked("x", &steps)[0].0.mac.to_string()
        };
        assert_eq!(bridge("10.1.0.1/24"), "02:00:0a:01:00:01");
        assert_eq!(bridge("10.1.0.254/24"), "02:00:0a:01:00:fe");
    }

    #[test]
    fn a_plan_is_read_again_as_it_was() {
        for kind in every_kind() {
            let steps = plan_of(kind, Some("10.1.0.1/24"), 1500);
            let text = serde_json::to_string(&steps).unwrap();
            assert_eq!(serde_json::from_str::<Vec<Step>>(&text).unwrap(), steps, "{text}");
        }
    }

    #[test]
    fn the_mtu_leaves_room_for_the_tunnel() {
        let of = |kind, asked| mtu(&NetworkOptions { address: None, mtu: asked, kind }, 1500);
        let vxlan = |local: &str| NetworkKind::Vxlan {
            vni: 5,
            ends: Ends { local: local.parse().unwrap(), peers: Vec::new() },
            port: 4789,
        };
        assert_eq!(of(vxlan("10.0.0.1"), None).unwrap(), 1450);
        assert_eq!(of(vxlan("fd00::1"), None).unwrap(), 1430);
        assert_eq!(of(NetworkKind::Gre { key: None, ends: ends(1) }, None).unwrap(), 1458);
        assert_eq!(of(NetworkKind::Bridge { uplink: None }, None).unwrap(), 1500);
        assert_eq!(of(vxlan("10.0.0.1"), Some(1450)).unwrap(), 1450);
        let text = of(vxlan("10.0.0.1"), Some(1451)).unwrap_err().to_string();
        assert!(text.contains("use at most 1450"), "{text}");
    }

    #[test]
    fn commands_are_those_of_iproute2() {
        let steps = plan_of(NetworkKind::Vxlan { vni: 5, ends: ends(2), port: 4789 }, None, 1500);
        let text: Vec<String> = steps.iter().map(ToString::to_string).collect();
        let expected = "\
ip link add mv-0123456789 address 02:00:00:00:00:01 type bridge stp_state 0 forward_delay 0
ip link set mv-0123456789 mtu 1450 up
ip link add mx-0123456789 address 02:00:00:00:00:02 type vxlan id 5 local 10.0.0.1 dstport 4789 learning
ip link set mx-0123456789 master mv-0123456789 mtu 1450 up
bridge fdb append 00:00:00:00:00:00 dev mx-0123456789 dst 10.0.1.1 self permanent
bridge fdb append 00:00:00:00:00:00 dev mx-0123456789 dst 10.0.2.1 self permanent";
        assert_eq!(text.join("\n"), expected);
    }
}
