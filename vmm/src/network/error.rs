//! What can be wrong with a network: one sentence each, and what to do about it.

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

use crate::config::Mac;
use crate::state_dir::StateDirError;

/// Why a network cannot be made, shown, deleted or used.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// An option that is wrong by itself, or beside the others.
    #[error("{0}")]
    Option(String),
    /// Nothing of that name was declared.
    #[error("there is no network {0} on this host: minivmm network list shows those there are, minivmm network create makes one")]
    NoSuchNetwork(String),
    /// It is there with other options.
    #[error("network {name} is there already, with another {}: delete it first, or take another name", .differences.join("; "))]
    Differs {
        /// Its name.
        name: String,
        /// What is different.
        differences: Vec<String>,
    },
    /// It was to be deleted, and that came to no end.
    #[error("network {0} was not deleted completely: minivmm network delete {0} does the rest")]
    HalfDeleted(String),
    /// It was declared, and is not made yet.
    #[error("network {0} was not made completely: minivmm network create with the same options does the rest, minivmm network delete {0} takes it away")]
    HalfMade(String),
    /// A part of it is gone.
    #[error("network {name} lacks {}: minivmm network create with the same options makes it again", .missing.join(", "))]
    Incomplete {
        /// Its name.
        name: String,
        /// What is not there.
        missing: Vec<String>,
    },
    /// A name that it needs belongs to something else.
    #[error("{what} {name} is there already and is not this network's: take another name for the network, or remove it")]
    Taken {
        /// What it is.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// Another VXLAN link has the same network identifier, port and family of addresses.
    #[error("cannot make the VXLAN link {0}: there is one with this --vni and --port already (ip -d link show type vxlan): take another --vni")]
    TunnelTaken(String),
    /// Interfaces of others are attached to it.
    #[error("network {name} is in use by {}: end the VMs that have these interfaces, or detach them", .ports.join(", "))]
    InUse {
        /// Its name.
        name: String,
        /// The interfaces.
        ports: Vec<String>,
    },
    /// There is no such interface.
    #[error("there is no interface {0} on this host (ip link shows those there are)")]
    NoSuchLink(String),
    /// It is no bridge.
    #[error("interface {0} is not a bridge: make one (ip link add NAME type bridge), or declare a network (minivmm network create)")]
    NotABridge(String),
    /// An interface that cannot be a port of a bridge.
    #[error("{link} cannot be the uplink: it is {why}")]
    Uplink {
        /// The interface.
        link: String,
        /// Why not.
        why: String,
    },
    /// No interface of this host has the address.
    #[error("--local {0} is no address of this host (ip address shows those there are)")]
    NotLocal(IpAddr),
    /// No way to a peer.
    #[error("there is no route to --peer {peer}: {error}; make one, or correct the address")]
    NoRoute {
        /// The peer.
        peer: IpAddr,
        /// What the system said.
        error: io::Error,
    },
    /// Not for this user.
    #[error("no permission to change networks: run as root, or with the capability CAP_NET_ADMIN (setcap cap_net_admin+ep, or AmbientCapabilities= of a service)")]
    Permission,
    /// Not for this process, which is to make a tap for a card.
    #[error("a card with {to} needs a tap that is made for it, for which this process lacks the capability CAP_NET_ADMIN (--user gives it up): grant it, or make a tap for the process' user (ip tuntap add dev NAME mode tap vnet_hdr user USER), put it there, and plug the card into that (tap=NAME; at a destination --net CARD=NAME)")]
    Unprivileged {
        /// What the card is to be plugged into.
        to: String,
    },
    /// A program that does a part of it.
    #[error("{program} cannot be started: {error}; install it (Debian: the package {package})")]
    NoProgram {
        /// Which.
        program: &'static str,
        /// Where it is from.
        package: &'static str,
        /// What the system said.
        error: io::Error,
    },
    /// A program says no.
    #[error("{command}: {said}")]
    Program {
        /// As it was started.
        command: String,
        /// What it wrote to standard error, or how it ended.
        said: String,
    },
    /// The kernel lacks a kind of link.
    #[error("this kernel has no links of type {kind}: load the module {module} (modprobe {module}), where the kernel has it")]
    NoModule {
        /// The kind.
        kind: &'static str,
        /// Its module.
        module: &'static str,
    },
    /// The kernel says no.
    #[error("cannot {what}: {error}")]
    Kernel {
        /// What was attempted.
        what: String,
        /// What it said.
        error: io::Error,
    },
    /// A card that cannot be plugged in.
    #[error("network card {card}: {error}")]
    Card {
        /// Which.
        card: String,
        /// Why not.
        error: Box<NetworkError>,
    },
    /// A card was told more than its network takes.
    #[error("its guest was told an MTU of {asked} bytes, and {to} takes {mtu} here: use an MTU of at most {mtu} for the card, or another network")]
    CardMtu {
        /// What it is to be plugged into.
        to: String,
        /// MTU of the card, bytes.
        asked: u16,
        /// MTU there, bytes.
        mtu: u32,
    },
    /// Two cards of one address.
    #[error("the VM {vm} has a card with the address {mac} on {to} already: give one of them another (mac=...)")]
    MacTaken {
        /// The address.
        mac: Mac,
        /// Where.
        to: String,
        /// Who has it.
        vm: String,
    },
    /// There is no place for declared networks.
    #[error(transparent)]
    StateDir(#[from] StateDirError),
    /// The file of a network.
    #[error("cannot {what} {path}: {error}")]
    File {
        /// What was attempted.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The file of a network holds something else.
    #[error("{path} is no network of this version of minivmm ({why}): restore it, or remove it and what it made")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// What was made could not be taken away after a failure.
    #[error("{error}; what was made until then is still there ({undo}): minivmm network delete {name} takes it away")]
    NotUndone {
        /// The network.
        name: String,
        /// What failed.
        error: Box<NetworkError>,
        /// Why it could not be taken back.
        undo: Box<NetworkError>,
    },
}

impl NetworkError {
    /// Of a step that the kernel refuses.
    pub(super) fn kernel(what: impl Into<String>, error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::Permission,
            _ => Self::Kernel { what: what.into(), error },
        }
    }

    /// Whether it is refused in the present state of the host, and would be done in another one.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        if let Self::Card { error, .. } = self {
            return error.is_refused();
        }
        matches!(
            self,
            Self::Differs { .. }
                | Self::HalfDeleted(_)
                | Self::HalfMade(_)
                | Self::Incomplete { .. }
                | Self::MacTaken { .. }
                | Self::Taken { .. }
                | Self::TunnelTaken(_)
                | Self::InUse { .. }
                | Self::Uplink { .. }
        )
    }

    /// Whether other options may do.
    #[must_use]
    pub fn is_about_what_was_asked(&self) -> bool {
        if let Self::Card { error, .. } = self {
            return error.is_about_what_was_asked();
        }
        matches!(
            self,
            Self::Option(_)
                | Self::NoSuchNetwork(_)
                | Self::NoSuchLink(_)
                | Self::CardMtu { .. }
                | Self::NotABridge(_)
                | Self::NotLocal(_)
        )
    }
}
