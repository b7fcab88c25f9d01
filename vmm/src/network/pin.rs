//! The way to a guest on its own host, while the guest moves.
//!
//! As soon as the guest is announced at its new host, the bridge here learns that it is behind the uplink. What a
//! switch that does not know yet still sends here comes in where it would have to go out again, and the bridge drops
//! it. So the card's entry in the bridge's forwarding table is held at its tap meanwhile; and, where tunnels of Open
//! vSwitch lead to the other hosts, its entry there at the port that leads here.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
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

use serde_json::{json, Value};

use super::Switch;
use crate::config::Mac;

/// How long Open vSwitch may take to answer.
const PATIENCE: Duration = Duration::from_secs(1);
/// Longest answer of it, bytes.
const LONGEST: usize = 64 << 10;

/// An entry that can be held. What needs more than a socket was done when it was made, so that any thread may use it.
#[derive(Debug)]
pub struct Pin {
    socket: OwnedFd,
    held: Mutex<bool>,
    hold: Vec<u8>,
    let_go: Vec<u8>,
    switch: Option<SwitchEntry>,
}

impl Pin {
    /// For the address `mac` at the bridge's port with this index, which is behind this bridge of Open vSwitch if any.
    ///
    /// # Errors
    /// As socket(2).
    pub(super) fn new(port: u32, mac: Mac, switch: Option<&Switch>) -> io::Result<Self> {
        // Protocol 0 is NETLINK_ROUTE.
        let socket = socket_with(Family::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        // A static entry alone would still move to where the address is seen.
        let (fixed, sticky) = (NeighbourState::Noarp, NeighbourFlags::Sticky);
        Ok(Self {
            socket,
            held: Mutex::new(false),
            hold: entry(port, mac, fixed, sticky),
            // As if learned: without any, frames would go everywhere.
            let_go: entry(port, mac, NeighbourState::Reachable, NeighbourFlags::empty()),
            switch: switch.map(|switch| SwitchEntry::new(switch, mac)),
        })
    }

    /// Holds the entry, or lets it be learned again. Does nothing where that is so already.
    ///
    /// # Errors
    /// The kernel's; it is tried again the next time.
    pub fn set(&self, held: bool) -> io::Result<()> {
        let mut now = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if *now == held {
            return Ok(());
        }
        self.ask(if held { &self.hold } else { &self.let_go })?;
        *now = held;
        self.switch.as_ref().map_or(Ok(()), |switch| switch.set(held))
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

/// An entry in the forwarding table of an Open vSwitch bridge. Its daemon is asked as ovs-appctl(8) does, by JSON-RPC on a
/// local socket.
#[derive(Debug)]
struct SwitchEntry {
    hold: Vec<u8>,
    let_go: Vec<u8>,
    daemon: Mutex<Option<UnixStream>>,
}

impl SwitchEntry {
    fn new(switch: &Switch, mac: Mac) -> Self {
        let (mac, vlan) = (mac.to_string(), switch.vlan.unwrap_or(0).to_string());
        let request = |method: &str, params: &[&str]| {
            json!({ "id": 0, "method": method, "params": params }).to_string().into_bytes()
        };
        Self {
            // Since Open vSwitch 2.16.
            hold: request("fdb/add", &[&switch.bridge, &switch.port, &vlan, &mac]),
            let_go: request("fdb/del", &[&switch.bridge, &vlan, &mac]),
            daemon: Mutex::new(None),
        }
    }

    /// As [`Pin::set`]. The connection stays for the thread that lets go, which cannot make one.
    fn set(&self, held: bool) -> io::Result<()> {
        let mut daemon = self.daemon.lock().unwrap_or_else(PoisonError::into_inner);
        if held {
            let mut stream = UnixStream::connect(control_socket()?)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))?;
            call(&mut stream, &self.hold)?;
            *daemon = Some(stream);
            return Ok(());
        }
        daemon.take().map_or(Ok(()), |mut stream| call(&mut stream, &self.let_go))
    }
}

/// Where ovs-vswitchd(8) listens.
fn control_socket() -> io::Result<PathBuf> {
    let directory = std::env::var_os("OVS_RUNDIR").unwrap_or_else(|| "/var/run/openvswitch".into());
    let directory = PathBuf::from(directory);
    let pid = std::fs::read_to_string(directory.join("ovs-vswitchd.pid"))?;
    Ok(directory.join(format!("ovs-vswitchd.{}.ctl", pid.trim())))
}

fn call(stream: &mut UnixStream, request: &[u8]) -> io::Result<()> {
    stream.write_all(request)?;
    let mut answer = Vec::new();
    let answer: Value = loop {
        let mut part = [0; 1024];
        let read = stream.read(&mut part)?;
        answer.extend_from_slice(&part[..read]);
        match serde_json::from_slice(&answer) {
            Ok(answer) => break answer,
            Err(error) if error.is_eof() && read > 0 && answer.len() < LONGEST => {}
            Err(error) => return Err(error.into()),
        }
    };
    match &answer["error"] {
        Value::Null => Ok(()),
        error => Err(io::Error::other(format!("Open vSwitch: {error}"))),
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
