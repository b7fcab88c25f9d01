//! `minivmm network`: the networks of this host.

use std::io::{self, Write};
use std::net::IpAddr;

use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;
use serde_json::json;

use super::args::Output;
use super::output::{fields, table};
use super::vm_commands::{print_json, Done};
use super::{CliError, Exit};
use crate::config::{parse_mtu, parse_tap};
use crate::network::{
    self, parse_network, parse_vlan, parse_vni, Cidr, Datapath, Ends, Forward, NetworkError,
    NetworkKind, NetworkOptions, Record, State, VXLAN_PORT,
};

#[derive(Debug, Args)]
pub(super) struct NetworkArgs {
    #[command(subcommand)]
    command: NetworkCommand,
}

#[derive(Debug, Subcommand)]
enum NetworkCommand {
    /// Make a network; one that was made with the same options is repaired
    Create(Box<CreateArgs>),
    /// List the networks
    List(Output),
    /// Show a network, and what of it is gone
    Show(NamedNetwork),
    /// Remove a network: exactly what was made for it
    Delete(DeleteArgs),
}

const CREATE_HELP: &str = "\
Network cards are attached with --net id=eth0,network=NAME; guests are told the network's MTU. A VM that is migrated is
attached to the network of the same name at its destination, which may be of another type there.

Types:
  bridge  a bridge, and --uplink, an interface that leads to other hosts
  vxlan   a bridge, and VXLAN to each --peer, across routers; it learns where addresses are
  gre     a bridge, and GRE to each --peer; peers reach each other directly
  nat     a bridge with --address, a gateway for guests; their addresses are translated, and --forward leads in.
          Connections through the host do not survive a move: the other host translates to its own address
  ovs     a bridge with a port (--vlan) of an Open vSwitch bridge, which is made if it is not there, and
          with --vni, --local and --peer VXLAN from there to other hosts

It is written down in the state directory (see `minivmm --help`) before anything is made, so that `delete` removes all of it
whatever happens. After a restart of the host, `create` with the same options makes it again. It takes root, or CAP_NET_ADMIN.

Examples:
  minivmm network create lan --type bridge --uplink eth1
  minivmm network create blue --type vxlan --vni 5001 --local 192.0.2.1 --peer 198.51.100.1
  minivmm network create web --type nat --address 10.1.0.1/24 --forward tcp:8080:10.1.0.2:80
  minivmm network create sw --type ovs --bridge br-int --vlan 7 --dry-run";

#[derive(Debug, Args)]
#[command(after_help = CREATE_HELP)]
struct CreateArgs {
    /// Name, 1 to 10 characters out of [A-Za-z0-9_-]
    #[arg(value_parser = parse_network)]
    name: String,
    /// What carries its frames to other hosts
    #[arg(long = "type", value_enum, value_name = "TYPE")]
    kind: KindChoice,
    /// Address of this host on it, with the length of the prefix: 10.1.0.1/24
    #[arg(long, value_name = "ADDR/LEN")]
    address: Option<Cidr>,
    /// MTU, bytes [default: what the underlay takes, less what the tunnel adds]
    #[arg(long, value_name = "BYTES", value_parser = parse_mtu)]
    mtu: Option<u16>,
    /// bridge: an interface of this host that becomes a port
    #[arg(long, value_name = "INTERFACE", value_parser = parse_tap)]
    uplink: Option<String>,
    /// vxlan, ovs: network identifier, the same on all hosts
    #[arg(long, value_parser = parse_vni)]
    vni: Option<u32>,
    /// vxlan, gre, ovs: address of this host that tunnels come from
    #[arg(long, value_name = "ADDR")]
    local: Option<IpAddr>,
    /// vxlan, gre, ovs: address of another host; may be repeated
    #[arg(long = "peer", value_name = "ADDR")]
    peers: Vec<IpAddr>,
    /// vxlan: UDP port [default: 4789]
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// gre: key, the same on all hosts
    #[arg(long)]
    key: Option<u32>,
    /// nat: a port of this host's that leads to a guest: tcp:PORT:ADDR:PORT or udp:...; may be repeated
    #[arg(long = "forward", value_name = "RULE")]
    forwards: Vec<Forward>,
    /// ovs: the Open vSwitch bridge [default: ov-NAME]
    #[arg(long, value_name = "BRIDGE")]
    bridge: Option<String>,
    /// ovs: VLAN of the network's port
    #[arg(long, value_name = "TAG", value_parser = parse_vlan)]
    vlan: Option<u16>,
    /// ovs: where a bridge that is made forwards [default: system]
    #[arg(long, value_enum)]
    datapath: Option<Datapath>,
    /// Print the commands that would do the same, and change nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    output: Output,
}

/// See [`NetworkKind`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum KindChoice {
    /// A bridge
    Bridge,
    /// VXLAN
    Vxlan,
    /// GRE
    Gre,
    /// Translated addresses
    Nat,
    /// Open vSwitch
    Ovs,
}

#[derive(Debug, Args)]
struct NamedNetwork {
    /// Name of the network
    #[arg(value_parser = parse_network)]
    name: String,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Args)]
struct DeleteArgs {
    /// Name of the network
    #[arg(value_parser = parse_network)]
    name: String,
    /// Tell what would be removed, and change nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    output: Output,
}

impl CreateArgs {
    fn options(&self) -> Result<NetworkOptions, NetworkError> {
        use KindChoice::{Bridge, Gre, Nat, Ovs, Vxlan};
        let only = |flag: &str, given: bool, kinds: &[KindChoice]| {
            if given && !kinds.contains(&self.kind) {
                let kind = format!("{:?}", self.kind).to_lowercase();
                let why =
                    format!("--{flag} says nothing of a network of type {kind}: leave it out");
                return Err(NetworkError::Option(why));
            }
            Ok(())
        };
        only("uplink", self.uplink.is_some(), &[Bridge])?;
        only("vni", self.vni.is_some(), &[Vxlan, Ovs])?;
        only("local", self.local.is_some(), &[Vxlan, Gre, Ovs])?;
        only("peer", !self.peers.is_empty(), &[Vxlan, Gre, Ovs])?;
        only("port", self.port.is_some(), &[Vxlan])?;
        only("key", self.key.is_some(), &[Gre])?;
        only("forward", !self.forwards.is_empty(), &[Nat])?;
        only("bridge", self.bridge.is_some(), &[Ovs])?;
        only("vlan", self.vlan.is_some(), &[Ovs])?;
        only("datapath", self.datapath.is_some(), &[Ovs])?;
        let missing = |flag: &str| NetworkError::Option(format!("--{flag} is missing"));
        let ends = || {
            let local = self.local.ok_or_else(|| missing("local"))?;
            Ok::<_, NetworkError>(Ends { local, peers: self.peers.clone() })
        };
        let vni = || self.vni.ok_or_else(|| missing("vni"));
        let kind = match self.kind {
            Bridge => NetworkKind::Bridge { uplink: self.uplink.clone() },
            Vxlan => {
                let port = self.port.unwrap_or(VXLAN_PORT);
                NetworkKind::Vxlan { vni: vni()?, ends: ends()?, port }
            }
            Gre => NetworkKind::Gre { key: self.key, ends: ends()? },
            Nat => NetworkKind::Nat { forwards: self.forwards.clone() },
            Ovs => {
                let tunnelled =
                    self.vni.is_some() || self.local.is_some() || !self.peers.is_empty();
                NetworkKind::Ovs {
                    bridge: self.bridge.clone().unwrap_or_else(|| format!("ov-{}", self.name)),
                    vlan: self.vlan,
                    datapath: self.datapath.unwrap_or_default(),
                    tunnel: if tunnelled { Some((vni()?, ends()?)) } else { None },
                }
            }
        };
        Ok(NetworkOptions { address: self.address, mtu: self.mtu, kind })
    }
}

pub(super) fn run(args: NetworkArgs) -> Done {
    match args.command {
        NetworkCommand::Create(args) => create(&args),
        NetworkCommand::List(output) => list(&output),
        NetworkCommand::Show(args) => show(&args),
        NetworkCommand::Delete(args) => delete(&args),
    }
}

fn create(args: &CreateArgs) -> Done {
    let options = args.options()?;
    if args.dry_run {
        let outcome = network::dry_run(&args.name, &options)?;
        return print(&args.output, &outcome, || lines(&outcome.changed));
    }
    let outcome = network::create(&args.name, &options)?;
    print(&args.output, &outcome, || {
        let Record { name, bridge, mtu, .. } = &outcome.network;
        let mut text = match (outcome.existed, outcome.changed.is_empty()) {
            (true, true) => format!("{name}: was there already\n"),
            (true, false) => format!("{name}: was there already, and is repaired\n"),
            (false, _) => format!("{name}: made; bridge {bridge}, MTU {mtu}\n"),
        };
        outcome.changed.iter().for_each(|label| text.push_str(&format!("  made: {label}\n")));
        text
    })
}

fn delete(args: &DeleteArgs) -> Done {
    let outcome = if args.dry_run {
        network::delete_dry_run(&args.name)?
    } else {
        network::delete(&args.name)?
    };
    let verb = if args.dry_run { "would be removed" } else { "removed" };
    print(&args.output, &outcome, || {
        let mut text = format!("{}: {verb}\n", args.name);
        outcome.changed.iter().for_each(|label| text.push_str(&format!("  {verb}: {label}\n")));
        text
    })
}

fn list(output: &Output) -> Done {
    let all = network::list()?;
    print(output, &all, || {
        let mut rows = vec![["NAME", "TYPE", "STATE", "BRIDGE", "MTU"].map(str::to_owned).to_vec()];
        rows.extend(all.iter().map(|record| {
            vec![
                record.name.clone(),
                record.options.type_name().to_owned(),
                state_text(record.state).to_owned(),
                record.bridge.clone(),
                record.mtu.to_string(),
            ]
        }));
        table(&rows)
    })
}

fn show(args: &NamedNetwork) -> Done {
    let (record, missing) = network::show(&args.name)?;
    let value = json!({ "network": record, "missing": missing });
    print(&args.output, &value, || {
        let Record { name, state, options, mtu, bridge, steps, .. } = &record;
        let mut pairs = vec![
            ("name", name.clone()),
            ("type", options.type_name().to_owned()),
            ("state", state_text(*state).to_owned()),
            ("bridge", bridge.clone()),
            ("mtu", mtu.to_string()),
        ];
        pairs.extend(steps.iter().map(|step| {
            let label = step.label();
            (if missing.contains(&label) { "gone" } else { "there" }, label)
        }));
        if let NetworkKind::Nat { .. } = options.kind {
            let what = "the guest keeps its address and what it talks to on this network; connections through \
                        the host end, since the other host translates to its own address";
            pairs.push(("after a move", what.to_owned()));
        }
        fields(&pairs)
    })
}

fn state_text(state: State) -> &'static str {
    match state {
        State::Creating => "creating",
        State::Ready => "ready",
        State::Deleting => "deleting",
    }
}

fn lines(all: &[String]) -> String {
    all.iter().map(|line| format!("{line}\n")).collect()
}

fn print(output: &Output, value: &impl Serialize, text: impl FnOnce() -> String) -> Done {
    let mut out = io::stdout().lock();
    if output.json {
        print_json(&mut out, value)?;
    } else {
        out.write_all(text().as_bytes()).and_then(|()| out.flush()).map_err(CliError::from)?;
    }
    Ok(Exit::Ok)
}
