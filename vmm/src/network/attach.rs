//! Cards on networks: a tap is made for each, as a port of the network's bridge, and is gone with the process.

use std::io;
use std::os::fd::OwnedFd;

use rustix::thread::{capabilities, CapabilitySet};

use super::links::Found;
use super::{bridge, usable, Links, NetworkError, Pin, Step, Switch};
use crate::config::{Attachment, Mac, NetConfig};

/// Begins the alias of a tap that was made for a card.
const CARD: &str = "minivmm card";

/// What a card is plugged into, on this host.
struct Place {
    bridge: String,
    /// The MTU there, bytes.
    mtu: u32,
    /// The Open vSwitch bridge behind it.
    switch: Option<Switch>,
}

/// The bridge that a card is plugged into; `None` where that is a tap.
fn place(attachment: &Attachment) -> Result<Option<Place>, NetworkError> {
    match attachment {
        Attachment::Tap(_) => Ok(None),
        Attachment::Bridge(name) => {
            let Found { name, mtu, .. } = bridge(name)?;
            Ok(Some(Place { bridge: name, mtu, switch: None }))
        }
        Attachment::Network(name) => {
            let record = usable(name)?;
            let switch = record.steps.into_iter().find_map(|step| match step {
                Step::Switch(switch) => Some(switch),
                _ => None,
            });
            Ok(Some(Place { bridge: record.bridge, mtu: record.mtu.into(), switch }))
        }
    }
}

/// What a tap says of its card: the address is last, and no part has a space.
fn alias(vm: &str, card: &str, mac: Mac) -> String {
    format!("{CARD} {vm} {card} {mac}")
}

/// Tells cards that were told no MTU that of their network.
///
/// # Errors
/// A network that is not there.
pub fn offer_mtus(nets: &mut [NetConfig]) -> Result<(), NetworkError> {
    for net in nets.iter_mut().filter(|net| net.mtu.is_none()) {
        if matches!(net.attachment, Attachment::Network(_)) {
            let mtu = place(&net.attachment)?.map(|place| place.mtu);
            net.mtu = mtu.and_then(|mtu| u16::try_from(mtu).ok());
        }
    }
    Ok(())
}

/// Every reason why cards cannot be plugged in here. The VM `comes_from` one of this name, which may be on
/// this host with the same addresses until it is here.
#[must_use]
pub fn obstacles(nets: &[NetConfig], comes_from: Option<&str>) -> Vec<NetworkError> {
    nets.iter().filter_map(|net| obstacle(net, comes_from).err()).collect()
}

/// Whether this process may change networks. Where that cannot be told, the attempt tells.
fn may_make_taps() -> bool {
    capabilities(None).map_or(true, |all| all.effective.contains(CapabilitySet::NET_ADMIN))
}

fn obstacle(net: &NetConfig, comes_from: Option<&str>) -> Result<(), NetworkError> {
    let at_card = |error| NetworkError::Card { card: net.id.clone(), error: Box::new(error) };
    if net.attachment.tap().is_none() && !may_make_taps() {
        return Err(at_card(NetworkError::Unprivileged { to: net.attachment.to_string() }));
    }
    let Some(Place { bridge, mtu, .. }) = place(&net.attachment).map_err(at_card)? else {
        return Ok(());
    };
    if let Some(asked) = net.mtu.filter(|asked| u32::from(*asked) > mtu) {
        let to = net.attachment.to_string();
        return Err(at_card(NetworkError::CardMtu { to, asked, mtu }));
    }
    let all = Links::open().and_then(|links| links.all()).map_err(at_card)?;
    let index = all.iter().find(|link| link.name == bridge).map(|bridge| bridge.index);
    let mac = net.mac.to_string();
    for port in all.iter().filter(|link| link.controller.is_some() && link.controller == index) {
        let Some(alias) = port.alias.as_deref().and_then(|alias| alias.strip_prefix(CARD)) else {
            continue;
        };
        let mut words = alias.split_whitespace();
        let (vm, _card, has) = (words.next(), words.next(), words.next());
        if has == Some(&mac) && (comes_from.is_none() || vm != comes_from) {
            let (to, vm) = (net.attachment.to_string(), vm.unwrap_or_default().to_owned());
            return Err(at_card(NetworkError::MacTaken { mac: net.mac, to, vm }));
        }
    }
    Ok(())
}

/// Makes `tap` a port of what the card is plugged into, and switches it on; gives its entry there, unless the
/// attachment is a tap.
fn plug(tap: &str, net: &NetConfig, vm: &str) -> Result<Option<Pin>, NetworkError> {
    let at_card = |error| NetworkError::Card { card: net.id.clone(), error: Box::new(error) };
    let plugged = || {
        let Some(Place { bridge, mtu, switch }) = place(&net.attachment)? else { return Ok(None) };
        let alias = alias(vm, &net.id, net.mac);
        let links = Links::open()?;
        links.attach(tap, &bridge, Some((mtu, &alias)))?;
        // From here on who would delete the network sees the card; who began before is seen here.
        place(&net.attachment)?;
        let pin = Pin::new(links.get(tap)?.index, net.mac, switch);
        pin.map(Some).map_err(|error| NetworkError::kernel("open an rtnetlink socket", error))
    };
    plugged().map_err(at_card)
}

/// Makes a tap for a card that is plugged into a bridge, with `make`, which gives its name too; and what holds the
/// card's entry in the bridge's forwarding table.
///
/// # Errors
/// See [`NetworkError`]; one that the kernel refuses to make is of this kind too.
pub fn make_tap(
    net: &NetConfig,
    vm: &str,
    make: impl FnOnce() -> io::Result<(OwnedFd, String)>,
) -> Result<(OwnedFd, Option<Pin>), NetworkError> {
    let (fd, tap) = make().map_err(|error| NetworkError::Card {
        card: net.id.clone(),
        error: Box::new(NetworkError::kernel("make a tap (/dev/net/tun)", error)),
    })?;
    // Where this fails the tap goes with its descriptor.
    let pin = plug(&tap, net, vm)?;
    Ok((fd, pin))
}
