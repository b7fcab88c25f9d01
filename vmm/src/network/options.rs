//! What an operator says of a network, checked as far as it can be without looking at the host.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::NetworkError;
use crate::config::{parse_mtu, parse_tap, saved_as_text};

/// Longest name of a network, bytes: names of links are made from it, and have at most 15.
pub const MAX_NETWORK_NAME: usize = 10;
/// Port of VXLAN (RFC 7348).
pub const VXLAN_PORT: u16 = 4789;
/// Most other hosts of one network.
pub const MAX_PEERS: usize = 64;
/// Highest VXLAN network identifier: 24 bits.
const MAX_VNI: u32 = (1 << 24) - 1;
/// Highest VLAN of IEEE 802.1Q that may be used.
const MAX_VLAN: u16 = 4094;

/// A network as it was declared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkOptions {
    /// Address of this host on it, with the length of its prefix.
    pub address: Option<Cidr>,
    /// MTU that was asked for, bytes.
    pub mtu: Option<u16>,
    /// What carries its frames to other hosts.
    #[serde(flatten)]
    pub kind: NetworkKind,
}

/// What carries the frames of a network to other hosts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "type")]
pub enum NetworkKind {
    /// An interface of the host's, or nothing.
    Bridge {
        /// That interface.
        uplink: Option<String>,
    },
    /// VXLAN (RFC 7348) to each peer.
    Vxlan {
        /// Network identifier, 24 bits.
        vni: u32,
        /// Where it ends here, and there.
        #[serde(flatten)]
        ends: Ends,
        /// UDP port.
        port: u16,
    },
    /// GRE (RFC 2784, 2890) to each peer.
    Gre {
        /// Key, the same at all ends.
        key: Option<u32>,
        /// Where it ends here, and there.
        #[serde(flatten)]
        ends: Ends,
    },
    /// The host routes, and translates addresses.
    Nat {
        /// Ports of the host's that lead to guests.
        forwards: Vec<Forward>,
    },
    /// A bridge of Open vSwitch.
    Ovs {
        /// That bridge.
        bridge: String,
        /// VLAN of the port.
        vlan: Option<u16>,
        /// Where Open vSwitch forwards, if it makes the bridge.
        datapath: Datapath,
        /// VXLAN to other hosts, network identifier and ends.
        tunnel: Option<(u32, Ends)>,
    },
}

/// Ends of a tunnel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ends {
    /// Address of this host.
    pub local: IpAddr,
    /// Addresses of the other hosts.
    pub peers: Vec<IpAddr>,
}

/// Where Open vSwitch forwards frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Datapath {
    /// In the kernel
    #[default]
    System,
    /// In ovs-vswitchd
    Netdev,
}

/// An address with the length of its prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Cidr {
    /// The address.
    pub address: IpAddr,
    /// Length of its prefix, bits.
    pub prefix: u8,
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl FromStr for Cidr {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let parse = || {
            let (address, prefix) = text.split_once('/')?;
            let (address, prefix): (IpAddr, u8) = (address.parse().ok()?, prefix.parse().ok()?);
            let most = if address.is_ipv4() { 32 } else { 128 };
            (prefix <= most && !address.is_unspecified()).then_some(Self { address, prefix })
        };
        parse().ok_or_else(|| {
            wrong(format!("{text:?} is no address with a prefix: write 10.1.0.1/24"))
        })
    }
}

saved_as_text!(Cidr, NetworkError);

/// A port of the host's that leads to a guest: `tcp:8080:10.0.0.2:80`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Forward {
    /// TCP, else UDP.
    pub tcp: bool,
    /// Port of the host's.
    pub port: u16,
    /// Address of the guest.
    pub guest: Ipv4Addr,
    /// Its port.
    pub guest_port: u16,
}

impl Forward {
    /// `tcp` or `udp`.
    #[must_use]
    pub fn protocol(&self) -> &'static str {
        if self.tcp {
            "tcp"
        } else {
            "udp"
        }
    }
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}:{}", self.protocol(), self.port, self.guest, self.guest_port)
    }
}

impl FromStr for Forward {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let parse = || {
            let mut parts = text.split(':');
            let tcp = match parts.next()? {
                "tcp" => true,
                "udp" => false,
                _ => return None,
            };
            let port = |text: &str| text.parse().ok().filter(|&port: &u16| port != 0);
            let forward = Self {
                tcp,
                port: port(parts.next()?)?,
                guest: parts.next()?.parse().ok()?,
                guest_port: port(parts.next()?)?,
            };
            parts.next().is_none().then_some(forward)
        };
        parse().ok_or_else(|| {
            wrong(format!("{text:?} is no forwarded port: write tcp:8080:10.1.0.2:80, or udp:..."))
        })
    }
}

saved_as_text!(Forward, NetworkError);

fn wrong(why: impl Into<String>) -> NetworkError {
    NetworkError::Option(why.into())
}

/// Checks the name of a network: 1 to 10 characters out of `[A-Za-z0-9_-]`, beginning with a letter or digit.
///
/// # Errors
/// Another name.
pub fn parse_network(name: &str) -> Result<String, NetworkError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    let begins = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if !begins || name.len() > MAX_NETWORK_NAME || !name.chars().all(allowed) {
        return Err(wrong(format!(
            "{name:?} is no name of a network: use 1 to {MAX_NETWORK_NAME} characters out of [A-Za-z0-9_-], a letter or a digit first"
        )));
    }
    Ok(name.to_owned())
}

/// Reads a VXLAN network identifier.
///
/// # Errors
/// Not a number of 24 bits, or zero.
pub fn parse_vni(text: &str) -> Result<u32, NetworkError> {
    match text.parse() {
        Ok(vni) if (1..=MAX_VNI).contains(&vni) => Ok(vni),
        _ => Err(wrong(format!("{text:?} is no VNI: use 1 to {MAX_VNI}"))),
    }
}

/// Reads a VLAN tag.
///
/// # Errors
/// Not a number of 12 bits, or one that is reserved.
pub fn parse_vlan(text: &str) -> Result<u16, NetworkError> {
    match text.parse() {
        Ok(vlan) if (1..=MAX_VLAN).contains(&vlan) => Ok(vlan),
        _ => Err(wrong(format!("{text:?} is no VLAN: use 1 to {MAX_VLAN}"))),
    }
}

impl NetworkOptions {
    /// `bridge`, `vxlan`, ...
    #[must_use]
    pub fn type_name(&self) -> &'static str {
        match self.kind {
            NetworkKind::Bridge { .. } => "bridge",
            NetworkKind::Vxlan { .. } => "vxlan",
            NetworkKind::Gre { .. } => "gre",
            NetworkKind::Nat { .. } => "nat",
            NetworkKind::Ovs { .. } => "ovs",
        }
    }

    /// The ends of its tunnels, if it has any.
    #[must_use]
    pub fn ends(&self) -> Option<&Ends> {
        match &self.kind {
            NetworkKind::Vxlan { ends, .. } | NetworkKind::Gre { ends, .. } => Some(ends),
            NetworkKind::Ovs { tunnel, .. } => tunnel.as_ref().map(|(_, ends)| ends),
            NetworkKind::Bridge { .. } | NetworkKind::Nat { .. } => None,
        }
    }

    /// What a tunnel adds to a frame beyond its payload, bytes.
    #[must_use]
    pub fn overhead(&self) -> u16 {
        let Some(ends) = self.ends() else { return 0 };
        match (&self.kind, ends.local) {
            // IPv4 20, GRE 4, key 4, Ethernet 14: room for a key, so that all networks are alike.
            (NetworkKind::Gre { .. }, _) => 42,
            // IPv4 20, UDP 8, VXLAN 8, Ethernet 14.
            (_, IpAddr::V4(_)) => 50,
            (_, IpAddr::V6(_)) => 70,
        }
    }

    /// Checks what can be known without looking at the host.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn validate(&self) -> Result<(), NetworkError> {
        if let Some(mtu) = self.mtu {
            parse_mtu(&mtu.to_string()).map_err(|error| wrong(error.to_string()))?;
        }
        if let Some(ends) = self.ends() {
            ends.validate(matches!(self.kind, NetworkKind::Gre { .. }))?;
        }
        match &self.kind {
            NetworkKind::Bridge { uplink: Some(link) } => {
                parse_tap(link)
                    .map_err(|_| wrong(format!("--uplink {link:?} is no name of an interface")))?;
            }
            NetworkKind::Nat { forwards } => self.validate_nat(forwards)?,
            NetworkKind::Ovs { bridge, .. } => {
                // It goes into a command of ovs-vsctl.
                let odd = |c: char| !(c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.'));
                if parse_tap(bridge).is_err() || bridge.contains(odd) || bridge.starts_with('-') {
                    return Err(wrong(format!("--bridge {bridge:?} is no name of a bridge: use at most 15 characters out of [A-Za-z0-9._-]")));
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn validate_nat(&self, forwards: &[Forward]) -> Result<(), NetworkError> {
        let Some(Cidr { address: IpAddr::V4(address), prefix }) = self.address else {
            return Err(wrong(
                "a network of type nat translates IPv4: give --address, such as 10.1.0.1/24",
            ));
        };
        if !(1..=30).contains(&prefix) {
            return Err(wrong(format!(
                "--address with a prefix of {prefix} leaves no address for guests: use /1 to /30"
            )));
        }
        for (index, forward) in forwards.iter().enumerate() {
            let mask = u32::MAX << (32 - prefix);
            if (u32::from(forward.guest) ^ u32::from(address)) & mask != 0
                || forward.guest == address
            {
                return Err(wrong(format!("--forward {forward} leads to an address that no guest of {address}/{prefix} has")));
            }
            let same = |other: &&Forward| (other.tcp, other.port) == (forward.tcp, forward.port);
            if let Some(other) = forwards[..index].iter().find(same) {
                return Err(wrong(format!(
                    "--forward {other} and --forward {forward} have one port: change one"
                )));
            }
        }
        Ok(())
    }

    /// What is different in `other`, option by option.
    #[must_use]
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let fields = |options: &Self| match serde_json::to_value(options) {
            Ok(serde_json::Value::Object(fields)) => fields,
            // A structure of plain fields is an object.
            _ => serde_json::Map::new(),
        };
        let (mine, theirs) = (fields(self), fields(other));
        let keys: std::collections::BTreeSet<_> = mine.keys().chain(theirs.keys()).collect();
        let show = |value: Option<&serde_json::Value>| match value {
            None | Some(serde_json::Value::Null) => "none".to_owned(),
            Some(value) => value.to_string(),
        };
        keys.into_iter()
            .filter(|key| mine.get(*key) != theirs.get(*key))
            .map(|key| format!("{key} ({}, not {})", show(mine.get(key)), show(theirs.get(key))))
            .collect()
    }
}

impl Ends {
    fn validate(&self, only_ipv4: bool) -> Result<(), NetworkError> {
        let Self { local, peers } = self;
        let single = |address: &IpAddr| !address.is_unspecified() && !address.is_multicast();
        if let Some(bad) = std::iter::once(local).chain(peers).find(|address| !single(address)) {
            return Err(wrong(format!("{bad} is no address of a single host")));
        }
        if only_ipv4 && local.is_ipv6() {
            return Err(wrong(format!("--local {local}: networks of type gre go over IPv4 only; type vxlan goes over IPv6")));
        }
        if peers.is_empty() {
            return Err(wrong("no other host: give --peer ADDRESS for each"));
        }
        if peers.len() > MAX_PEERS {
            return Err(wrong(format!(
                "{} peers are too many: use at most {MAX_PEERS}",
                peers.len()
            )));
        }
        for (index, peer) in peers.iter().enumerate() {
            if peer == local {
                return Err(wrong(format!(
                    "--peer {peer} is --local too: name the other hosts only"
                )));
            }
            if peer.is_ipv4() != local.is_ipv4() {
                return Err(wrong(format!(
                    "--peer {peer} and --local {local} are of different versions of IP"
                )));
            }
            if peers[..index].contains(peer) {
                return Err(wrong(format!("--peer {peer} is there twice")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn options(kind: NetworkKind) -> NetworkOptions {
        NetworkOptions { address: None, mtu: None, kind }
    }

    fn vxlan(local: &str, peers: &[&str]) -> NetworkOptions {
        let peers = peers.iter().map(|peer| peer.parse().unwrap()).collect();
        let ends = Ends { local: local.parse().unwrap(), peers };
        options(NetworkKind::Vxlan { vni: 5, ends, port: VXLAN_PORT })
    }

    fn nat(address: &str, forwards: &[&str]) -> NetworkOptions {
        let forwards = forwards.iter().map(|text| text.parse().unwrap()).collect();
        let address = Some(address.parse().unwrap());
        NetworkOptions { address, ..options(NetworkKind::Nat { forwards }) }
    }

    #[track_caller]
    fn refused(options: &NetworkOptions, word: &str) {
        let text = options.validate().unwrap_err().to_string();
        assert!(text.contains(word), "{text}");
    }

    #[test]
    fn names_leave_room_for_links() {
        for good in ["a", "blue", "0123456789", "a_b-c"] {
            assert_eq!(parse_network(good).unwrap(), good);
        }
        for bad in ["", "01234567890", "a.b", "-a", "_a", "a b", "ä"] {
            assert!(parse_network(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn numbers_have_their_ranges() {
        assert_eq!(parse_vni("16777215").unwrap(), 16_777_215);
        assert_eq!(parse_vlan("4094").unwrap(), 4094);
        for bad in ["0", "16777216", "-1", "x", ""] {
            assert!(parse_vni(bad).is_err() && parse_vlan(bad).is_err(), "{bad}");
        }
        assert!(parse_vlan("4095").is_err());
    }

    #[test]
    fn addresses_and_forwards() {
        assert_eq!("10.1.0.1/24".parse::<Cidr>().unwrap().to_string(), "10.1.0.1/24");
        for bad in ["10.1.0.1", "10.1.0.1/33", "x/24", "0.0.0.0/0", "fd00::1/129"] {
            assert!(bad.parse::<Cidr>().is_err(), "{bad}");
        }
        let forward: Forward = "udp:53:10.1.0.2:5353".parse().unwrap();
        assert_eq!(forward.to_string(), "udp:53:10.1.0.2:5353");
        for bad in [
            "tcp:0:10.1.0.2:80",
            "sctp:1:10.1.0.2:1",
            "tcp:80:10.1.0.2",
            "tcp:1:x:1",
            "tcp:1:10.0.0.1:1:1",
        ] {
            assert!(bad.parse::<Forward>().is_err(), "{bad}");
        }
    }

    #[test]
    fn ends_of_a_tunnel() {
        vxlan("10.0.0.1", &["10.0.1.1", "10.0.2.1"]).validate().unwrap();
        refused(&vxlan("10.0.0.1", &[]), "--peer");
        refused(&vxlan("10.0.0.1", &["10.0.0.1"]), "--local too");
        refused(&vxlan("10.0.0.1", &["fd00::1"]), "versions of IP");
        refused(&vxlan("10.0.0.1", &["10.0.1.1", "10.0.1.1"]), "twice");
        refused(&vxlan("10.0.0.1", &["239.0.0.1"]), "single host");
        let ends =
            Ends { local: "fd00::1".parse().unwrap(), peers: vec!["fd00::2".parse().unwrap()] };
        refused(&options(NetworkKind::Gre { key: None, ends }), "IPv4 only");
    }

    #[test]
    fn a_nat_leads_to_its_own_guests() {
        nat("10.1.0.1/24", &["tcp:80:10.1.0.2:80", "udp:80:10.1.0.2:80"]).validate().unwrap();
        refused(&options(NetworkKind::Nat { forwards: Vec::new() }), "--address");
        refused(&nat("fd00::1/64", &[]), "IPv4");
        refused(&nat("10.1.0.1/31", &[]), "/30");
        refused(&nat("10.1.0.1/24", &["tcp:80:10.2.0.2:80"]), "no guest");
        refused(&nat("10.1.0.1/24", &["tcp:80:10.1.0.1:80"]), "no guest");
        refused(&nat("10.1.0.1/24", &["tcp:80:10.1.0.2:80", "tcp:80:10.1.0.3:80"]), "one port");
    }

    #[test]
    fn a_difference_has_its_name() {
        let one = vxlan("10.0.0.1", &["10.0.1.1"]);
        let two = NetworkOptions { mtu: Some(1400), ..vxlan("10.0.0.1", &["10.0.1.2"]) };
        assert!(one.differences(&one).is_empty());
        let text = one.differences(&two).join("; ");
        assert_eq!(text, "mtu (none, not 1400); peers ([\"10.0.1.1\"], not [\"10.0.1.2\"])");
        assert!(one.differences(&nat("10.1.0.1/24", &[])).join("").contains("type"));
    }

    #[test]
    fn what_was_declared_is_read_again() {
        let all = [
            options(NetworkKind::Bridge { uplink: Some("eth0".into()) }),
            vxlan("fd00::1", &["fd00::2"]),
            nat("10.1.0.1/24", &["tcp:80:10.1.0.2:80"]),
            options(NetworkKind::Ovs {
                bridge: "br0".into(),
                vlan: Some(7),
                datapath: Datapath::Netdev,
                tunnel: vxlan("10.0.0.1", &["10.0.1.1"]).ends().map(|ends| (5, ends.clone())),
            }),
        ];
        for one in all {
            let text = serde_json::to_string(&one).unwrap();
            assert_eq!(serde_json::from_str::<NetworkOptions>(&text).unwrap(), one, "{text}");
        }
    }
}
