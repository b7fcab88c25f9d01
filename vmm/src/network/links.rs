//! Links, addresses and routes of the host, by rtnetlink.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::{StreamExt, TryStreamExt};
use rtnetlink::packet_core::{
    NetlinkMessage, NetlinkPayload, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST,
};
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{
    BridgeStpState, GreIOFlags, InfoBridgePort, InfoData, InfoKind, InfoPortData, InfoVeth,
    LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::RouteAttribute;
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{
    Error, Handle, LinkBridge, LinkBridgePort, LinkGre, LinkMessageBuilder, LinkUnspec, LinkVeth,
    LinkVxlan, RouteMessageBuilder,
};
use tokio::runtime::{Builder, Runtime};

use super::options::Cidr;
use super::plan::{Link, LinkKind};
use super::whole::send_whole;
use super::NetworkError;
use crate::config::Mac;

/// The address of a forwarding entry for frames for everybody, and for who is not known.
const EVERYBODY: [u8; 6] = [0; 6];

/// Frames that a card's tap keeps at most while nobody takes them, as when a guest waits for memory that follows it
/// or gets no processor. Linux' own 1000 are a tenth of a second of small packets.
const QUEUE: u32 = 10_000;

/// A link that is there.
#[derive(Debug, Clone)]
pub struct Found {
    /// Number of it.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// What says whose it is.
    pub alias: Option<String>,
    /// Its address, where that is one of Ethernet.
    pub mac: Option<Mac>,
    /// Its MTU, bytes.
    pub mtu: u32,
    /// Number of the bridge, or the like, that it is a port of.
    pub controller: Option<u32>,
    /// It is up.
    pub up: bool,
    /// It is the loopback interface.
    pub loopback: bool,
    /// It is a bridge.
    pub bridge: bool,
    /// It is a port from which frames do not pass to other isolated ports.
    pub isolated: bool,
}

/// The kernel's side of networks, in the network namespace of the thread that opened it.
pub struct Links {
    runtime: Runtime,
    handle: Handle,
}

/// The kernel's error.
fn said(error: Error) -> io::Error {
    match error {
        Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    }
}

impl Links {
    /// Opens the way to the kernel.
    ///
    /// # Errors
    /// No socket for it.
    pub fn open() -> Result<Self, NetworkError> {
        let failed = |error| NetworkError::kernel("open an rtnetlink socket", error);
        let runtime = Builder::new_current_thread().enable_io().build().map_err(failed)?;
        let handle = {
            let _context = runtime.enter();
            let (connection, handle, _) = rtnetlink::new_connection().map_err(failed)?;
            runtime.spawn(connection);
            handle
        };
        Ok(Self { runtime, handle })
    }

    /// All links.
    ///
    /// # Errors
    /// The kernel's.
    pub fn all(&self) -> Result<Vec<Found>, NetworkError> {
        let all: Result<Vec<LinkMessage>, Error> =
            self.runtime.block_on(self.handle.link().get().execute().try_collect());
        let all = all.map_err(|error| NetworkError::kernel("list the links", said(error)))?;
        Ok(all.into_iter().map(Found::from).collect())
    }

    /// The link of this name.
    ///
    /// # Errors
    /// The kernel's; that there is none is no error.
    pub fn find(&self, name: &str) -> Result<Option<Found>, NetworkError> {
        Ok(self.all()?.into_iter().find(|link| link.name == name))
    }

    /// As [`Links::find`], of one that is there.
    ///
    /// # Errors
    /// The kernel's, and [`NetworkError::NoSuchLink`].
    pub fn get(&self, name: &str) -> Result<Found, NetworkError> {
        self.find(name)?.ok_or_else(|| NetworkError::NoSuchLink(name.to_owned()))
    }

    /// Makes a link, down and alone. An end of a pair comes with the other one.
    ///
    /// # Errors
    /// The kernel's, and [`NetworkError::NoModule`].
    pub(super) fn add(&self, link: &Link) -> Result<(), NetworkError> {
        let Some((message, kind, module)) = message_of(link) else {
            return Err(NetworkError::NoSuchLink(link.name.clone()));
        };
        let added = self.runtime.block_on(self.handle.link().add(message).execute());
        added.map_err(said).map_err(|error| match error.raw_os_error() {
            Some(libc::EOPNOTSUPP) => NetworkError::NoModule { kind, module },
            Some(libc::EEXIST) if kind == "vxlan" => NetworkError::TunnelTaken(link.name.clone()),
            _ => NetworkError::kernel(format!("make the {kind} link {}", link.name), error),
        })
    }

    /// Marks a link, sets its MTU, bridge and offloads, and switches it on.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn set_up(&self, link: &Link, mark: &str) -> Result<(), NetworkError> {
        let found = self.get(&link.name)?;
        let mut message = LinkUnspec::new_with_index(found.index).alias(mark).mtu(link.mtu.into());
        if let Some(bridge) = &link.bridge {
            message = message.controller(self.get(bridge)?.index);
        }
        self.set(message.up().build(), || format!("set up the link {}", link.name))?;
        if link.whole {
            let what = || format!("switch off checksum offload of the link {}", link.name);
            send_whole(&link.name).map_err(|error| NetworkError::kernel(what(), error))?;
        }
        if !link.isolated {
            return Ok(());
        }
        let message = LinkBridgePort::new(found.index).isolated(true).build();
        let isolated = self.runtime.block_on(self.handle.link().set_port(message).execute());
        isolated
            .map_err(|e| NetworkError::kernel(format!("isolate the port {}", link.name), said(e)))
    }

    /// Makes `link` a port of `bridge`, and switches it on; the tap of a card with its MTU and alias, and with a queue
    /// for a guest that is busy with other things.
    ///
    /// # Errors
    /// The kernel's, and [`NetworkError::NoSuchLink`].
    pub(super) fn attach(
        &self,
        link: &str,
        bridge: &str,
        card: Option<(u32, &str)>,
    ) -> Result<(), NetworkError> {
        let (port, bridge_index) = (self.get(link)?.index, self.get(bridge)?.index);
        let mut message = LinkUnspec::new_with_index(port).controller(bridge_index).up();
        if let Some((mtu, alias)) = card {
            let queue = LinkAttribute::TxQueueLen(QUEUE);
            message = message.mtu(mtu).alias(alias).append_extra_attribute(queue);
        }
        self.set(message.build(), || format!("attach {link} to the bridge {bridge}"))
    }

    /// Takes `link` out of its bridge.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn detach(&self, link: &Found) -> Result<(), NetworkError> {
        let message = LinkUnspec::new_with_index(link.index).nocontroller().build();
        self.set(message, || format!("detach {}", link.name))
    }

    fn set(&self, message: LinkMessage, what: impl FnOnce() -> String) -> Result<(), NetworkError> {
        let set = self.runtime.block_on(self.handle.link().set(message).execute());
        set.map_err(|error| NetworkError::kernel(what(), said(error)))
    }

    /// Removes a link.
    ///
    /// # Errors
    /// The kernel's; that it is gone already is no error.
    pub(super) fn delete(&self, link: &Found) -> Result<(), NetworkError> {
        let deleted = self.runtime.block_on(self.handle.link().del(link.index).execute());
        match deleted.map_err(said) {
            Err(error) if error.raw_os_error() != Some(libc::ENODEV) => {
                Err(NetworkError::kernel(format!("delete the link {}", link.name), error))
            }
            _ => Ok(()),
        }
    }

    /// The addresses of a link, or of all.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn addresses(&self, index: Option<u32>) -> Result<Vec<Cidr>, NetworkError> {
        let mut request = self.handle.address().get();
        if let Some(index) = index {
            request = request.set_link_index_filter(index);
        }
        let all: Result<Vec<_>, Error> = self.runtime.block_on(request.execute().try_collect());
        let all = all.map_err(|error| NetworkError::kernel("list the addresses", said(error)))?;
        let cidr = |message: rtnetlink::packet_route::address::AddressMessage| {
            let find = |local: bool| {
                message.attributes.iter().find_map(|attribute| match attribute {
                    AddressAttribute::Local(address) if local => Some(*address),
                    AddressAttribute::Address(address) if !local => Some(*address),
                    _ => None,
                })
            };
            // Of a point-to-point link the one is the other end's.
            let address = find(true).or_else(|| find(false))?;
            Some(Cidr { address, prefix: message.header.prefix_len })
        };
        Ok(all.into_iter().filter_map(cidr).collect())
    }

    /// Gives a link an address.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn add_address(&self, link: &str, cidr: Cidr) -> Result<(), NetworkError> {
        let index = self.get(link)?.index;
        let request = self.handle.address().add(index, cidr.address, cidr.prefix).replace();
        let added = self.runtime.block_on(request.execute());
        added.map_err(|e| NetworkError::kernel(format!("give {link} the address {cidr}"), said(e)))
    }

    /// The peers to which a VXLAN link floods frames.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn flooded(&self, index: u32) -> Result<Vec<IpAddr>, NetworkError> {
        let mut request = self.handle.neighbours().get().set_address_family(AddressFamily::Bridge);
        request.message_mut().header.ifindex = index;
        let all: Result<Vec<NeighbourMessage>, Error> =
            self.runtime.block_on(request.execute().try_collect());
        let all = all.map_err(|e| NetworkError::kernel("list the forwarding entries", said(e)))?;
        let peer = |entry: NeighbourMessage| {
            let everybody = |attribute: &NeighbourAttribute| matches!(attribute, NeighbourAttribute::LinkLayerAddress(mac) if mac[..] == EVERYBODY);
            let ours = entry.header.ifindex == index && entry.attributes.iter().any(everybody);
            entry.attributes.into_iter().filter(|_| ours).find_map(|attribute| match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(peer)) => Some(peer.into()),
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(peer)) => Some(peer.into()),
                // The kernel names the address of other families as it came.
                NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => {
                    address_of(&bytes)
                }
                _ => None,
            })
        };
        Ok(all.into_iter().filter_map(peer).collect())
    }

    /// Lets a VXLAN link flood frames to one more peer.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn flood(&self, link: &str, peer: IpAddr) -> Result<(), NetworkError> {
        let mut entry = NeighbourMessage::default();
        entry.header.family = AddressFamily::Bridge;
        entry.header.ifindex = self.get(link)?.index;
        entry.header.state = NeighbourState::Permanent;
        entry.header.flags = NeighbourFlags::Own;
        let destination = match peer {
            IpAddr::V4(peer) => NeighbourAddress::Inet(peer),
            IpAddr::V6(peer) => NeighbourAddress::Inet6(peer),
        };
        entry.attributes = vec![
            NeighbourAttribute::LinkLayerAddress(EVERYBODY.to_vec()),
            NeighbourAttribute::Destination(destination),
        ];
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewNeighbour(entry));
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_APPEND;
        let mut handle = self.handle.clone();
        let added = self.runtime.block_on(async {
            let mut answers = handle.request(request).map_err(said)?;
            while let Some(answer) = answers.next().await {
                if let NetlinkPayload::Error(error) = answer.payload {
                    if error.code.is_some() {
                        return Err(error.to_io());
                    }
                }
            }
            Ok(())
        });
        added.map_err(|e| NetworkError::kernel(format!("make {peer} a peer of {link}"), e))
    }

    /// The link that leads to an address.
    ///
    /// # Errors
    /// [`NetworkError::NoRoute`].
    pub(super) fn way_to(&self, peer: IpAddr) -> Result<Found, NetworkError> {
        let message = match peer {
            IpAddr::V4(peer) => {
                RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(peer, 32).build()
            }
            IpAddr::V6(peer) => {
                RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(peer, 128).build()
            }
        };
        let routes: Result<Vec<_>, Error> =
            self.runtime.block_on(self.handle.route().get(message).execute().try_collect());
        let no_route = |error| NetworkError::NoRoute { peer, error };
        let routes = routes.map_err(|error| no_route(said(error)))?;
        let index =
            routes.iter().flat_map(|route| &route.attributes).find_map(
                |attribute| match attribute {
                    RouteAttribute::Oif(index) => Some(*index),
                    _ => None,
                },
            );
        let found = self.all()?.into_iter().find(|link| Some(link.index) == index);
        found.ok_or_else(|| no_route(io::Error::other("the route leads to no link")))
    }
}

/// Four or sixteen bytes as an address.
fn address_of(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

/// The request for a link, its kind and the module that has it.
fn message_of(link: &Link) -> Option<(LinkMessage, &'static str, &'static str)> {
    let mac = link.mac.0.to_vec();
    Some(match &link.kind {
        LinkKind::Bridge => {
            let bridge = LinkBridge::new(&link.name).stp_state(BridgeStpState::Disabled);
            (bridge.forward_delay(0).address(mac).build(), "bridge", "bridge")
        }
        LinkKind::Vxlan { vni, local, port } => {
            let tunnel = LinkVxlan::new(&link.name, *vni).port(*port).learning(true);
            let tunnel = match local {
                IpAddr::V4(local) => tunnel.local(*local),
                IpAddr::V6(local) => tunnel.local6(*local),
            };
            (tunnel.address(mac).build(), "vxlan", "vxlan")
        }
        LinkKind::Gretap { local, peer, key } => {
            let tunnel = LinkGre::new_gretap(&link.name).local(*local).remote(*peer);
            let tunnel = tunnel.ttl(64).pmtudisc(true);
            let tunnel = match key {
                None => tunnel,
                Some(key) => {
                    let flags = GreIOFlags::Key;
                    tunnel.iflags(flags).oflags(flags).ikey(*key).okey(*key)
                }
            };
            (tunnel.address(mac).build(), "gretap", "ip_gre")
        }
        LinkKind::Veth { end, end_mac } => {
            let other = LinkMessageBuilder::<LinkUnspec>::default().name(end.clone());
            let other = other.address(end_mac.0.to_vec()).build();
            let pair = LinkVeth::new(&link.name, end).address(mac);
            (pair.set_info_data(InfoData::Veth(InfoVeth::Peer(other))).build(), "veth", "veth")
        }
        LinkKind::End => return None,
    })
}

fn is_isolated(info: &LinkInfo) -> bool {
    match info {
        LinkInfo::PortData(InfoPortData::BridgePort(all)) => {
            all.contains(&InfoBridgePort::Isolated(true))
        }
        _ => false,
    }
}

impl From<LinkMessage> for Found {
    fn from(message: LinkMessage) -> Self {
        let flags = message.header.flags;
        let mut found = Self {
            index: message.header.index,
            name: String::new(),
            alias: None,
            mac: None,
            mtu: 0,
            controller: None,
            up: flags.contains(LinkFlags::Up),
            loopback: flags.contains(LinkFlags::Loopback),
            bridge: false,
            isolated: false,
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => found.name = name,
                LinkAttribute::IfAlias(alias) => found.alias = Some(alias),
                LinkAttribute::Address(mac) => found.mac = <[u8; 6]>::try_from(mac).ok().map(Mac),
                LinkAttribute::Mtu(mtu) => found.mtu = mtu,
                LinkAttribute::Controller(index) if index != 0 => found.controller = Some(index),
                LinkAttribute::LinkInfo(all) => {
                    found.bridge = all.contains(&LinkInfo::Kind(InfoKind::Bridge));
                    found.isolated = all.iter().any(is_isolated);
                }
                _ => {}
            }
        }
        found
    }
}
