//! As much of OpenFlow 1.0 (OpenFlow Switch Specification 1.0.0, chapter 5) as it takes to have a bridge of Open vSwitch send
//! frames for an address to a port for a while, whatever it learns meanwhile. The flow ends by itself, so that a process
//! that is killed leaves nothing behind.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use super::Switch;
use crate::config::Mac;

/// How long the flow stays when it is not renewed, seconds.
const SECONDS: u16 = 5;

const VERSION: u8 = 1;
const HELLO: u8 = 0;
const ERROR: u8 = 1;
const FEATURES_REQUEST: u8 = 5;
const FEATURES_REPLY: u8 = 6;
const FLOW_MOD: u8 = 14;
const BARRIER_REQUEST: u8 = 18;
const BARRIER_REPLY: u8 = 19;

/// ofp_header.
const HEADER: usize = 8;
/// What FEATURES_REPLY has before its ports, beyond the header; the length of a port (ofp_phy_port), and of its name.
const FEATURES: usize = 24;
const PORT: usize = 48;
const NAME: usize = 16;
/// OFPFW_*: everything is a match, but what is left out.
const ALL: u32 = (1 << 22) - 1;
const DL_VLAN: u32 = 1 << 1;
const DL_DST: u32 = 1 << 3;
/// OFPFC_*.
const ADD: u16 = 0;
const DELETE_STRICT: u16 = 4;
/// Before flows of others.
const PRIORITY: u16 = 0xff00;

/// A flow for an address, which its connection can renew and remove.
#[derive(Debug)]
pub(super) struct Flow {
    stream: UnixStream,
    add: Vec<u8>,
    delete: Vec<u8>,
}

impl Flow {
    /// Has the bridge send frames for `mac` to the port of `switch`, which may take `patience` for each answer.
    ///
    /// # Errors
    /// The switch is not there, has no such port, or refuses.
    pub(super) fn add(switch: &Switch, mac: Mac, patience: Duration) -> io::Result<Self> {
        let mut stream = UnixStream::connect(socket(&switch.bridge))?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        stream.write_all(&message(HELLO, &[]))?;
        stream.write_all(&message(FEATURES_REQUEST, &[]))?;
        let features = answer(&mut stream, FEATURES_REPLY)?;
        let port = port_of(&features, &switch.port).ok_or_else(|| {
            io::Error::other(format!("{} has no port {}", switch.bridge, switch.port))
        })?;
        let flow = |command| message(FLOW_MOD, &flow_mod(command, mac, switch.vlan, port));
        let (add, delete) = (flow(ADD), flow(DELETE_STRICT));
        stream.write_all(&add)?;
        stream.write_all(&message(BARRIER_REQUEST, &[]))?;
        answer(&mut stream, BARRIER_REPLY)?;
        Ok(Self { stream, add, delete })
    }

    /// Lets it stay as long as if it had been added now. Does not wait for the switch.
    pub(super) fn renew(&mut self) -> io::Result<()> {
        self.stream.write_all(&self.add)
    }

    /// Removes it.
    pub(super) fn remove(mut self) -> io::Result<()> {
        self.stream.write_all(&self.delete)
    }
}

/// Where a bridge listens (ovs-ofctl(8)).
fn socket(bridge: &str) -> PathBuf {
    let directory = std::env::var_os("OVS_RUNDIR").unwrap_or_else(|| "/var/run/openvswitch".into());
    PathBuf::from(directory).join(format!("{bridge}.mgmt"))
}

fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let length = u16::try_from(HEADER + body.len()).unwrap_or(u16::MAX);
    let mut message = vec![VERSION, kind];
    message.extend_from_slice(&length.to_be_bytes());
    // No two requests are under way that would have to be told apart.
    message.extend_from_slice(&[0; 4]);
    message.extend_from_slice(body);
    message
}

/// Reads until the body of a message of this kind.
fn answer(stream: &mut UnixStream, wanted: u8) -> io::Result<Vec<u8>> {
    loop {
        let mut header = [0; HEADER];
        stream.read_exact(&mut header)?;
        let length = usize::from(u16::from_be_bytes([header[2], header[3]]));
        let mut body = vec![0; length.saturating_sub(HEADER)];
        stream.read_exact(&mut body)?;
        match header[1] {
            kind if kind == wanted => return Ok(body),
            ERROR => {
                let code = body.get(..4).unwrap_or_default();
                return Err(io::Error::other(format!("OpenFlow error, type and code {code:02x?}")));
            }
            // HELLO is of the highest version that it speaks; both speak the lower one.
            _ => {}
        }
    }
}

/// The number of the port with this name.
fn port_of(features: &[u8], name: &str) -> Option<u16> {
    let mut wanted = [0; NAME];
    wanted.get_mut(..name.len())?.copy_from_slice(name.as_bytes());
    let ports = features.get(FEATURES..)?.chunks_exact(PORT);
    ports
        .into_iter()
        .find(|port| port[8..8 + NAME] == wanted)
        .map(|port| u16::from_be_bytes([port[0], port[1]]))
}

/// ofp_flow_mod without its header: frames for `mac`, within `vlan` where the port is in one, go to `port`.
fn flow_mod(command: u16, mac: Mac, vlan: Option<u16>, port: u16) -> Vec<u8> {
    let mut body = Vec::new();
    let wildcards = ALL & !DL_DST & !vlan.map_or(0, |_| DL_VLAN);
    body.extend_from_slice(&wildcards.to_be_bytes());
    // Its port, and its source.
    body.extend_from_slice(&[0; 8]);
    body.extend_from_slice(&mac.0);
    body.extend_from_slice(&vlan.unwrap_or(0).to_be_bytes());
    // What else there is in ofp_match, and a cookie.
    body.extend_from_slice(&[0; 20 + 8]);
    // Idle and hard timeout.
    for number in [command, 0, SECONDS, PRIORITY] {
        body.extend_from_slice(&number.to_be_bytes());
    }
    // No buffered packet, no restriction to a port, no flags.
    body.extend_from_slice(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0]);
    if command != DELETE_STRICT {
        if vlan.is_some() {
            // OFPAT_STRIP_VLAN.
            body.extend_from_slice(&[0, 3, 0, 8, 0, 0, 0, 0]);
        }
        // OFPAT_OUTPUT.
        body.extend_from_slice(&[0, 0, 0, 8]);
        body.extend_from_slice(&port.to_be_bytes());
        body.extend_from_slice(&[0, 0]);
    }
    body
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const MAC: Mac = Mac([2, 3, 4, 5, 6, 7]);

    #[test]
    fn a_flow_is_as_the_specification_has_it() {
        // ofp_flow_mod is 72 bytes, an action 8.
        let add = message(FLOW_MOD, &flow_mod(ADD, MAC, Some(7), 0x0102));
        assert_eq!((add.len(), &add[..4]), (72 + 16, &[1, 14, 0, 88][..]));
        assert_eq!(add[8..12], 0x3f_fff5_u32.to_be_bytes(), "VLAN and destination");
        assert_eq!((&add[20..26], &add[26..28]), (&MAC.0[..], &[0, 7][..]));
        assert_eq!(add[56..64], [0, 0, 0, 0, 0, 5, 0xff, 0], "add; ends after 5 s");
        assert_eq!(add[72..], [0, 3, 0, 8, 0, 0, 0, 0, 0, 0, 0, 8, 1, 2, 0, 0]);
        let delete = message(FLOW_MOD, &flow_mod(DELETE_STRICT, MAC, None, 0x0102));
        assert_eq!(delete.len(), 72);
        assert_eq!(delete[8..12], 0x3f_fff7_u32.to_be_bytes());
        assert_eq!(delete[56..58], [0, 4]);
    }

    #[test]
    fn a_port_is_found_by_its_name() {
        let mut features = vec![0; FEATURES + 2 * PORT + 5];
        let mut port = |at: usize, number: u8, name: &[u8]| {
            let start = FEATURES + at * PORT;
            features[start + 1] = number;
            features[start + 8..start + 8 + name.len()].copy_from_slice(name);
        };
        port(0, 3, b"mp-blue2");
        port(1, 9, b"mp-blue");
        assert_eq!(port_of(&features, "mp-blue"), Some(9));
        assert_eq!(port_of(&features, "mp-blue2"), Some(3));
        for none in ["mp", "a name that is far too long"] {
            assert_eq!(port_of(&features, none), None);
        }
        assert_eq!(port_of(&features[..10], "mp-blue"), None);
    }
}
