//! Networks that are declared once per host, and that network cards are attached to by name.
//!
//! ```text
//!   card --- tap --+
//!   card --- tap --+-- bridge mv-NAME --+-- an interface of the host's       type bridge
//!                                       +-- VXLAN link mx-NAME --- peers     type vxlan
//!                                       +-- GRE link mgN-NAME --- peer N     type gre
//!                                       +-- routes, nftables minivmm-NAME    type nat
//!                                       +-- veth --- Open vSwitch bridge     type ovs
//! ```
//!
//! Whatever carries the frames, cards are ports of one bridge: a VM's process needs rtnetlink and no other
//! program to attach to it, and one that is killed leaves nothing behind.
//!
//! A network is a file in the state directory, with all that is made for it ([`plan`]), on the disk before
//! anything is. Links carry addresses that were made up for that file: a link of the right name with
//! another address belongs to somebody else, and is left alone.

mod attach;
mod error;
mod links;
mod openflow;
mod options;
mod pin;
mod plan;
mod store;
mod tools;
mod whole;

use std::fs;

use rustix::rand::{getrandom, GetRandomFlags};
use serde::Serialize;

pub use attach::{make_tap, obstacles, offer_mtus};
pub use error::NetworkError;
pub use links::{Found, Links};
pub use options::{
    parse_network, parse_vlan, parse_vni, Cidr, Datapath, Ends, Forward, NetworkKind,
    NetworkOptions, MAX_NETWORK_NAME, MAX_PEERS, VXLAN_PORT,
};
pub use pin::Pin;
pub use plan::{Link, LinkKind, Nat, Step, Switch};
pub use store::{Record, State, Store};

use crate::config::Mac;
use plan::{marked, Facts};

/// Whether the host routes IPv4, in the network namespace of the thread that reads it.
const IP_FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";

/// What became of a network.
#[derive(Debug, Serialize)]
pub struct Outcome {
    /// The network.
    pub network: Record,
    /// What was made, or removed, in a few words each.
    pub changed: Vec<String>,
    /// It was declared before.
    pub existed: bool,
}

/// What links of this network are marked with.
#[must_use]
pub fn mark(network: &str) -> String {
    format!("minivmm:{network}")
}

/// What [`create`] would do, without doing it.
///
/// # Errors
/// As [`create`], as far as it can be known before.
pub fn dry_run(name: &str, options: &NetworkOptions) -> Result<Outcome, NetworkError> {
    let (store, links) = (Store::open()?, Links::open()?);
    if let Some(record) = declared(&store, name, options)? {
        let missing = steps(&links, &record, |step| step.to_string())?;
        return Ok(Outcome { network: record, changed: missing, existed: true });
    }
    let network = prepare(&links, name, options)?;
    let changed = network.steps.iter().map(ToString::to_string).collect();
    Ok(Outcome { network, changed, existed: false })
}

/// Declares and makes a network. One that was declared with the same options is made again as far as
/// parts of it are gone.
///
/// # Errors
/// See [`NetworkError`]. What was made of a new network until then is taken back.
pub fn create(name: &str, options: &NetworkOptions) -> Result<Outcome, NetworkError> {
    may_change_networks()?;
    let store = Store::open()?;
    let _lock = store.lock()?;
    let links = Links::open()?;
    if let Some(mut record) = declared(&store, name, options)? {
        let changed = make(&store, &links, &mut record)?;
        return Ok(Outcome { network: record, changed, existed: true });
    }
    let mut record = prepare(&links, name, options)?;
    store.put(&record)?;
    match make(&store, &links, &mut record) {
        Ok(changed) => Ok(Outcome { network: record, changed, existed: false }),
        Err(error) => Err(match unmake(&store, &links, &mut record) {
            Ok(_) => error,
            Err(undo) => NetworkError::NotUndone {
                name: name.to_owned(),
                error: Box::new(error),
                undo: Box::new(undo),
            },
        }),
    }
}

/// Takes a network away, also one that was not made completely.
///
/// # Errors
/// See [`NetworkError`].
pub fn delete(name: &str) -> Result<Outcome, NetworkError> {
    may_change_networks()?;
    let store = Store::open()?;
    let _lock = store.lock()?;
    let mut record = find(&store, name)?;
    let links = Links::open()?;
    not_in_use(&links, &record)?;
    // Whoever plugs a card in meanwhile looks at the state afterwards.
    let before = std::mem::replace(&mut record.state, State::Deleting);
    store.put(&record)?;
    if let Err(error) = not_in_use(&links, &record) {
        record.state = before;
        store.put(&record)?;
        return Err(error);
    }
    let changed = unmake(&store, &links, &mut record)?;
    Ok(Outcome { network: record, changed, existed: true })
}

/// What [`delete`] would remove.
///
/// # Errors
/// As [`delete`], as far as it can be known before.
pub fn delete_dry_run(name: &str) -> Result<Outcome, NetworkError> {
    let record = find(&Store::open()?, name)?;
    let links = Links::open()?;
    not_in_use(&links, &record)?;
    let mut changed = Vec::new();
    for step in record.steps.iter().rev() {
        if is_there(&links, step)? {
            changed.push(step.label());
        }
    }
    Ok(Outcome { network: record, changed, existed: true })
}

/// All networks of this host.
///
/// # Errors
/// A file of one cannot be read.
pub fn list() -> Result<Vec<Record>, NetworkError> {
    Store::open()?.all()
}

/// A network, and what of it is gone.
///
/// # Errors
/// See [`NetworkError`].
pub fn show(name: &str) -> Result<(Record, Vec<String>), NetworkError> {
    let record = find(&Store::open()?, name)?;
    let missing = steps(&Links::open()?, &record, Step::label)?;
    Ok((record, missing))
}

/// A network that cards can be attached to.
///
/// # Errors
/// [`NetworkError::NoSuchNetwork`] and others: it is not whole.
pub fn usable(name: &str) -> Result<Record, NetworkError> {
    let record = find(&Store::open()?, name)?;
    match record.state {
        State::Creating => return Err(NetworkError::HalfMade(name.to_owned())),
        State::Deleting => return Err(NetworkError::HalfDeleted(name.to_owned())),
        State::Ready => {}
    }
    let links = Links::open()?;
    let there = links.all()?;
    let gone = |link: &Link| !there.iter().any(|found| is_ours(found, link));
    let all = marked(name, &record.steps).into_iter();
    let missing: Vec<String> =
        all.filter(|(link, _)| gone(link)).map(|(link, _)| link.name.clone()).collect();
    if missing.is_empty() {
        Ok(record)
    } else {
        Err(NetworkError::Incomplete { name: name.to_owned(), missing })
    }
}

fn find(store: &Store, name: &str) -> Result<Record, NetworkError> {
    store.get(name)?.ok_or_else(|| NetworkError::NoSuchNetwork(name.to_owned()))
}

/// The network, if it was declared with these options.
fn declared(
    store: &Store,
    name: &str,
    options: &NetworkOptions,
) -> Result<Option<Record>, NetworkError> {
    parse_network(name)?;
    options.validate()?;
    let Some(record) = store.get(name)? else { return Ok(None) };
    if record.state == State::Deleting {
        return Err(NetworkError::HalfDeleted(name.to_owned()));
    }
    let differences = record.options.differences(options);
    if differences.is_empty() {
        Ok(Some(record))
    } else {
        Err(NetworkError::Differs { name: name.to_owned(), differences })
    }
}

/// Looks at the host and plans a new network: nothing is changed.
fn prepare(links: &Links, name: &str, options: &NetworkOptions) -> Result<Record, NetworkError> {
    let all = links.all()?;
    let mut underlay_mtu = u32::from(u16::MAX);
    if let Some(ends) = options.ends() {
        if !links.addresses(None)?.iter().any(|cidr| cidr.address == ends.local) {
            return Err(NetworkError::NotLocal(ends.local));
        }
        for peer in &ends.peers {
            underlay_mtu = underlay_mtu.min(links.way_to(*peer)?.mtu);
        }
    }
    let mut switch = None;
    match &options.kind {
        NetworkKind::Bridge { uplink: Some(uplink) } => {
            underlay_mtu = usable_uplink(&all, uplink)?.mtu;
        }
        NetworkKind::Nat { .. } => {
            let table = format!("minivmm-{name}");
            if tools::has_table(&table)? {
                return Err(NetworkError::Taken { what: "nftables table ip", name: table });
            }
        }
        NetworkKind::Ovs { bridge, .. } => {
            if tools::switches()?.contains(bridge) {
                switch = Some(tools::datapath_of(bridge)?);
            }
            if switch.is_none() && all.iter().any(|link| link.name == *bridge) {
                return Err(NetworkError::Taken { what: "interface", name: bridge.clone() });
            }
        }
        _ => {}
    }
    let mut random = Ok(());
    let mut new_mac = || {
        let mut bytes = [0; 6];
        // So few come whole or not at all (getrandom(2)).
        if let Err(error) = getrandom(&mut bytes, GetRandomFlags::empty()) {
            random = Err(NetworkError::kernel("get random bytes", error.into()));
        }
        // Locally administered, of a single interface (IEEE 802).
        bytes[0] = bytes[0] & 0xfc | 2;
        Mac(bytes)
    };
    let facts = Facts { underlay_mtu, switch, new_mac: &mut new_mac };
    let steps = plan::plan(name, options, facts)?;
    random?;
    for (link, _) in marked(name, &steps) {
        if all.iter().any(|found| found.name == link.name) {
            return Err(NetworkError::Taken { what: "interface", name: link.name.clone() });
        }
    }
    let mtu = plan::mtu(options, underlay_mtu)?;
    Ok(Record::new(name, options.clone(), mtu, plan::bridge_name(name), steps))
}

/// The interface that is to be the uplink of a bridge.
fn usable_uplink<'a>(all: &'a [Found], uplink: &str) -> Result<&'a Found, NetworkError> {
    let found = all.iter().find(|link| link.name == uplink);
    let found = found.ok_or_else(|| NetworkError::NoSuchLink(uplink.to_owned()))?;
    let refused = |why: String| NetworkError::Uplink { link: uplink.to_owned(), why };
    if let Some(index) = found.controller {
        let bridge = all.iter().find(|link| link.index == index);
        let name = bridge.map_or_else(|| index.to_string(), |bridge| bridge.name.clone());
        return Err(refused(format!("a port of {name} already")));
    }
    if found.loopback || found.bridge {
        let what = if found.loopback { "the loopback interface" } else { "a bridge itself" };
        return Err(refused(what.to_owned()));
    }
    Ok(found)
}

/// Whether `found` is what was made for `link`, or is about to be marked as that.
fn is_ours(found: &Found, link: &Link) -> bool {
    found.name == link.name && found.mac == Some(link.mac)
}

/// Whether a step needs nothing any more.
///
/// # Errors
/// It cannot be known, or somebody else has its name.
fn is_there(links: &Links, step: &Step) -> Result<bool, NetworkError> {
    Ok(match step {
        Step::Link(link) => {
            let all = links.all()?;
            let Some(found) = all.iter().find(|found| found.name == link.name) else {
                return Ok(false);
            };
            if !is_ours(found, link) {
                return Err(NetworkError::Taken { what: "interface", name: link.name.clone() });
            }
            let in_bridge = |bridge: &String| {
                all.iter().any(|b| b.name == *bridge && Some(b.index) == found.controller)
            };
            let attached = link.bridge.as_ref().is_none_or(in_bridge);
            let (mtu, isolated) = (u32::from(link.mtu), found.isolated || !link.isolated);
            found.up && found.alias.is_some() && found.mtu == mtu && attached && isolated
        }
        Step::Uplink { link, bridge } => {
            let (Some(link), Some(bridge)) = (links.find(link)?, links.find(bridge)?) else {
                return Ok(false);
            };
            link.controller == Some(bridge.index) && link.up
        }
        Step::Address { link, address } => match links.find(link)? {
            Some(link) => links.addresses(Some(link.index))?.contains(address),
            None => false,
        },
        Step::Flood { link, peer } => match links.find(link)? {
            Some(link) => links.flooded(link.index)?.contains(peer),
            None => false,
        },
        Step::Forwarding => forwarding()?,
        Step::Nat(nat) => tools::has_table(&nat.table)?,
        Step::Switch(switch) => tools::has_switch(switch)?,
    })
}

/// What `tell` says of the steps that are to be done.
fn steps(
    links: &Links,
    record: &Record,
    tell: impl Fn(&Step) -> String,
) -> Result<Vec<String>, NetworkError> {
    let mut missing = Vec::new();
    for step in &record.steps {
        match is_there(links, step) {
            Ok(true) => {}
            Ok(false) => missing.push(tell(step)),
            // Somebody else's is not this network's.
            Err(NetworkError::Taken { .. }) => missing.push(tell(step)),
            Err(error) => return Err(error),
        }
    }
    Ok(missing)
}

/// Does all steps that are to be done, and declares the network ready.
fn make(store: &Store, links: &Links, record: &mut Record) -> Result<Vec<String>, NetworkError> {
    let mut changed = Vec::new();
    for step in record.steps.clone() {
        if is_there(links, &step)? {
            continue;
        }
        match &step {
            Step::Link(link) => {
                if links.find(&link.name)?.is_none() {
                    links.add(link)?;
                }
                links.set_up(link, &mark(&record.name))?;
            }
            Step::Uplink { link, bridge } => {
                let port = links.get(link)?;
                let index = links.find(bridge)?.map(|bridge| bridge.index);
                // One that is this bridge's already is only to be switched on.
                if port.controller.is_none() || port.controller != index {
                    usable_uplink(&links.all()?, link)?;
                }
                links.attach(link, bridge, None)?;
            }
            Step::Address { link, address } => links.add_address(link, *address)?,
            Step::Flood { link, peer } => links.flood(link, *peer)?,
            Step::Forwarding => {
                // Known before it is done: who deletes the network switches it off again.
                record.forwarding_was_off = true;
                store.put(record)?;
                set_forwarding(true)?;
            }
            Step::Nat(nat) => tools::make_table(nat)?,
            Step::Switch(switch) => tools::make_switch(switch)?,
        }
        changed.push(step.label());
    }
    if record.state != State::Ready {
        record.state = State::Ready;
        store.put(record)?;
    }
    Ok(changed)
}

/// Removes what is there of a network, and then its file.
fn unmake(store: &Store, links: &Links, record: &mut Record) -> Result<Vec<String>, NetworkError> {
    record.state = State::Deleting;
    store.put(record)?;
    let mut changed = Vec::new();
    let mut gone = |label: String| changed.push(label);
    for step in record.steps.clone().iter().rev() {
        match step {
            Step::Link(link) => {
                if let Some(found) = links.find(&link.name)?.filter(|found| is_ours(found, link)) {
                    links.delete(&found)?;
                    gone(step.label());
                }
            }
            Step::Uplink { link, bridge } => {
                let (port, bridge) = (links.find(link)?, links.find(bridge)?);
                let index = bridge.map(|bridge| bridge.index);
                let port = port.filter(|port| index.is_some() && port.controller == index);
                if let Some(port) = port {
                    links.detach(&port)?;
                    gone(step.label());
                }
            }
            // They go with their link.
            Step::Address { .. } | Step::Flood { .. } => {}
            Step::Forwarding if record.forwarding_was_off => {
                if give_forwarding_up(store, record)? {
                    gone(step.label());
                }
            }
            Step::Forwarding => {}
            Step::Nat(nat) => {
                if tools::has_table(&nat.table)? {
                    tools::delete_table(&nat.table)?;
                    gone(step.label());
                }
            }
            Step::Switch(switch) => {
                tools::delete_switch(switch)?;
                gone(step.label());
            }
        }
    }
    store.remove(&record.name)?;
    Ok(changed)
}

/// Cards, and what else is attached to the network's bridges beside its own ports.
fn not_in_use(links: &Links, record: &Record) -> Result<(), NetworkError> {
    let mut ports = attached(links, record)?;
    for step in &record.steps {
        if let Step::Switch(switch) = step {
            ports.extend(tools::ports_of_others(switch)?);
        }
    }
    match ports.is_empty() {
        true => Ok(()),
        false => Err(NetworkError::InUse { name: record.name.clone(), ports }),
    }
}

/// What is attached to the network's bridge beside its own ports.
fn attached(links: &Links, record: &Record) -> Result<Vec<String>, NetworkError> {
    let all = links.all()?;
    let own = marked(&record.name, &record.steps);
    let Some(bridge) = all.iter().find(|link| link.name == record.bridge) else {
        return Ok(Vec::new());
    };
    if !own.iter().any(|(link, _)| is_ours(bridge, link)) {
        return Ok(Vec::new());
    }
    let uplinks: Vec<&String> = record
        .steps
        .iter()
        .filter_map(|step| match step {
            Step::Uplink { link, .. } => Some(link),
            _ => None,
        })
        .collect();
    let mine = |port: &Found| {
        uplinks.contains(&&port.name) || own.iter().any(|(link, _)| link.name == port.name)
    };
    let others = all.iter().filter(|port| port.controller == Some(bridge.index) && !mine(port));
    Ok(others.map(|port| port.name.clone()).collect())
}

fn forwarding() -> Result<bool, NetworkError> {
    let read = fs::read_to_string(IP_FORWARD);
    let text = read.map_err(|e| NetworkError::kernel("read net.ipv4.ip_forward", e))?;
    Ok(text.trim() != "0")
}

fn set_forwarding(on: bool) -> Result<(), NetworkError> {
    let text = if on { "1" } else { "0" };
    fs::write(IP_FORWARD, text)
        .map_err(|e| NetworkError::kernel(format!("set net.ipv4.ip_forward to {text}"), e))
}

/// Switches routing off again, or leaves that to another network that needs it. Whether it was switched off.
fn give_forwarding_up(store: &Store, record: &mut Record) -> Result<bool, NetworkError> {
    let needs =
        |other: &Record| other.name != record.name && other.steps.contains(&Step::Forwarding);
    let heir = store.all()?.into_iter().find(needs);
    match heir {
        Some(mut heir) => {
            heir.forwarding_was_off = true;
            store.put(&heir)?;
        }
        None => set_forwarding(false)?,
    }
    record.forwarding_was_off = false;
    Ok(true)
}

/// Whether this process has CAP_NET_ADMIN.
fn may_change_networks() -> Result<(), NetworkError> {
    const CAP_NET_ADMIN: u64 = 12;
    let status = fs::read_to_string("/proc/thread-self/status")
        .map_err(|error| NetworkError::kernel("read /proc/thread-self/status", error))?;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    match effective {
        Some(set) if set >> CAP_NET_ADMIN & 1 == 0 => Err(NetworkError::Permission),
        // Where it is not told, the kernel says no.
        _ => Ok(()),
    }
}

/// An interface of this host that a card's tap is attached to: a bridge, by its name.
///
/// # Errors
/// It is not there, or no bridge.
pub fn bridge(name: &str) -> Result<Found, NetworkError> {
    let found = Links::open()?.get(name)?;
    if found.bridge {
        Ok(found)
    } else {
        Err(NetworkError::NotABridge(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permission_is_said_as_such() {
        let error = NetworkError::kernel("x", std::io::Error::from_raw_os_error(libc::EPERM));
        assert!(matches!(error, NetworkError::Permission));
    }
}
