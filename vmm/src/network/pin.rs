//! The way to a guest on its own host, while the guest moves.
//!
//! As soon as the guest is announced at its new host, the bridge here learns that it is behind the uplink. What a
//! switch that does not know yet still sends here comes in where it would have to go out again, and the bridge drops
//! it. So the card's entry in the bridge's forwarding table is held at its tap meanwhile; and, where the uplink is Open
//! vSwitch, the way there at the port that leads here. Both are gone when the process is, the latter some seconds later.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rtnetlink::packet_core::{
    NetlinkMessage, NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST,
};
use rtnetlink::packet_route::neighbour::{
    NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::net::{
    recv, send, socket_with, AddressFamily as Family, RecvFlags, SendFlags, SocketFlags, SocketType,
};

use super::openflow::Flow;
use super::Switch;
use crate::config::Mac;

/// How long Open vSwitch may take for an answer while the guest runs, and while it may stand.
const PATIENCE: Duration = Duration::from_secs(1);
const HASTE: Duration = Duration::from_millis(100);

/// The way to a card, which can be held. The thread that lets go of it needs no more than open sockets for it, nor does the
/// one that stops a guest, unless Open vSwitch has closed its connection.
#[derive(Debug)]
pub struct Pin {
    socket: OwnedFd,
    hold: Vec<u8>,
    let_go: Vec<u8>,
    mac: Mac,
    switch: Option<Switch>,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    /// It is to be.
    wanted: bool,
    bridge: bool,
    switch: Option<Flow>,
}

impl Pin {
    /// For the address `mac` at the bridge's port with this index, which is behind this bridge of Open vSwitch if any.
    ///
    /// # Errors
    /// As socket(2).
    pub(super) fn new(port: u32, mac: Mac, switch: Option<Switch>) -> io::Result<Self> {
        // Protocol 0 is NETLINK_ROUTE.
        let socket = socket_with(Family::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        // A static entry alone would still move to where the address is seen.
        let (fixed, sticky) = (NeighbourState::Noarp, NeighbourFlags::Sticky);
        Ok(Self {
            socket,
            hold: entry(port, mac, fixed, sticky),
            // As if learned: without any, frames would go everywhere.
            let_go: entry(port, mac, NeighbourState::Reachable, NeighbourFlags::empty()),
            mac,
            switch,
            held: Mutex::default(),
        })
    }

    /// Holds the way, or lets it be learned again. What Open vSwitch was told ends by itself after some seconds: it is to be said
    /// again until then. The first time waits for Open vSwitch, 1 s for each answer at most; later that is done only where
    /// it has closed the connection, which was silent for too long, and for 100 ms.
    ///
    /// # Errors
    /// The kernel's, and Open vSwitch's; what can be done without the other is done.
    pub fn set(&self, held: bool) -> io::Result<()> {
        let mut now = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let first = !std::mem::replace(&mut now.wanted, held) && held;
        let mut bridge = Ok(());
        if now.bridge != held {
            bridge = self.ask(if held { &self.hold } else { &self.let_go });
            now.bridge = held == bridge.is_ok();
        }
        let switch = match (held, now.switch.take(), &self.switch) {
            (true, None, Some(switch)) if first => {
                Flow::add(switch, self.mac, PATIENCE).map(|flow| now.switch = Some(flow))
            }
            (true, Some(mut flow), Some(switch)) => match flow.renew() {
                Ok(()) => Ok(flow),
                Err(_) => Flow::add(switch, self.mac, HASTE),
            }
            .map(|flow| now.switch = Some(flow)),
            (false, Some(flow), _) => flow.remove(),
            _ => Ok(()),
        };
        bridge.and(switch)
    }

    fn ask(&self, request: &[u8]) -> io::Result<()> {
        /// struct nlmsghdr and, of struct nlmsgerr, the error.
        const ANSWER: usize = 20;
        let mut answer = [0; 256];
        send(&self.socket, request, SendFlags::empty())?;
        // The kernel has answered when it has taken the request.
        let (_, length) = recv(&self.socket, &mut answer, RecvFlags::DONTWAIT)?;
        let code = answer[..length.min(ANSWER)].last_chunk().map(|code| i32::from_ne_bytes(*code));
        match code {
            Some(0) if length >= ANSWER => Ok(()),
            Some(code) if length >= ANSWER => {
                Err(io::Error::from_raw_os_error(code.saturating_neg()))
            }
            _ => Err(io::Error::other(format!("an answer of {length} bytes"))),
        }
    }
}

/// A request for an entry, in bytes.
fn entry(port: u32, mac: Mac, state: NeighbourState, flags: NeighbourFlags) -> Vec<u8> {
    let mut entry = NeighbourMessage::default();
    entry.header.family = AddressFamily::Bridge;
    entry.header.ifindex = port;
    entry.header.state = state;
    entry.header.flags = NeighbourFlags::Controller | flags;
    entry.attributes = vec![NeighbourAttribute::LinkLayerAddress(mac.0.to_vec())];
    let mut message = NetlinkMessage::from(RouteNetlinkMessage::NewNeighbour(entry));
    message.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}
