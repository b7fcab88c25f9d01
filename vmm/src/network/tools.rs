//! The programs that do what rtnetlink cannot: nft and ovs-vsctl. What they complain of is shown.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use super::plan::{Nat, Switch};
use super::{Datapath, NetworkError};

/// How long ovs-vsctl waits for the daemons, seconds.
const OVS_PATIENCE: &str = "--timeout=10";

/// Runs a program to its end, `input` on its standard input.
fn run(
    program: &'static str,
    package: &'static str,
    arguments: &[String],
    input: &str,
) -> Result<Output, NetworkError> {
    let no_program = |error| NetworkError::NoProgram { program, package, error };
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(no_program)?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that does not read it says why.
        let _ = stdin.write_all(input.as_bytes());
    }
    child.wait_with_output().map_err(no_program)
}

/// The standard output of a program that succeeded.
fn text_of(program: &str, arguments: &[String], output: Output) -> Result<String, NetworkError> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let said = if said.is_empty() { output.status.to_string() } else { said };
    Err(NetworkError::Program { command: format!("{program} {}", arguments.join(" ")), said })
}

fn nft(arguments: &[&str], input: &str) -> Result<String, NetworkError> {
    let arguments: Vec<String> = arguments.iter().map(|&argument| argument.to_owned()).collect();
    let output = run("nft", "nftables", &arguments, input)?;
    text_of("nft", &arguments, output)
}

/// Whether the table is there.
pub(super) fn has_table(table: &str) -> Result<bool, NetworkError> {
    let tables = nft(&["list", "tables", "ip"], "")?;
    Ok(tables.lines().any(|line| line.trim() == format!("table ip {table}")))
}

/// Makes the table, or makes it anew.
pub(super) fn make_table(nat: &Nat) -> Result<(), NetworkError> {
    nft(&["-f", "-"], &nat.rules()).map(drop)
}

/// Removes the table, if it is there.
pub(super) fn delete_table(table: &str) -> Result<(), NetworkError> {
    if has_table(table)? {
        nft(&["delete", "table", "ip", table], "")?;
    }
    Ok(())
}

fn ovs(arguments: Vec<String>) -> Result<String, NetworkError> {
    let arguments: Vec<String> = [OVS_PATIENCE.to_owned()].into_iter().chain(arguments).collect();
    let output = run("ovs-vsctl", "openvswitch-switch", &arguments, "")?;
    text_of("ovs-vsctl", &arguments, output)
}

fn ovs_words(arguments: &[&str]) -> Result<String, NetworkError> {
    ovs(arguments.iter().map(|&argument| argument.to_owned()).collect())
}

/// The Open vSwitch bridges there are.
pub(super) fn switches() -> Result<Vec<String>, NetworkError> {
    Ok(ovs_words(&["list-br"])?.lines().map(ToOwned::to_owned).collect())
}

/// The datapath of an Open vSwitch bridge.
pub(super) fn datapath_of(bridge: &str) -> Result<Datapath, NetworkError> {
    let said = ovs_words(&["get", "Bridge", bridge, "datapath_type"])?;
    // It is the kernel's where nothing is said.
    Ok(if said.trim().trim_matches('"') == "netdev" { Datapath::Netdev } else { Datapath::System })
}

/// The rows of `table` that say that they are of network `owner`.
fn owned(table: &str, owner: &str) -> Result<Vec<String>, NetworkError> {
    let owner = format!("external_ids:minivmm={owner}");
    let found = ovs_words(&["--bare", "--no-headings", "--columns=name", "find", table, &owner])?;
    Ok(found.lines().filter(|line| !line.is_empty()).map(ToOwned::to_owned).collect())
}

/// Whether all that is made in Open vSwitch is there.
pub(super) fn has_switch(switch: &Switch) -> Result<bool, NetworkError> {
    if !switches()?.contains(&switch.bridge) {
        return Ok(false);
    }
    let ports = owned("Port", &switch.owner)?;
    Ok(switch.ports().all(|port| ports.iter().any(|found| found == port)))
}

/// Makes what is missing.
///
/// # Errors
/// Those of ovs-vsctl, and those of the daemon, which ovs-vsctl does not tell.
pub(super) fn make_switch(switch: &Switch) -> Result<(), NetworkError> {
    ovs(switch.make_arguments())?;
    let bridge = switch.make.map(|_| switch.bridge.as_str());
    for interface in switch.ports().chain(bridge) {
        let said = ovs_words(&["--bare", "get", "Interface", interface, "error"])?;
        let said = said.trim().trim_matches('"');
        if !matches!(said, "" | "[]") {
            return Err(NetworkError::Program {
                command: format!("ovs-vswitchd, of interface {interface}"),
                said: format!(
                    "{said} (where the kernel has no module openvswitch, use --datapath netdev)"
                ),
            });
        }
    }
    Ok(())
}

/// Ports of others at the bridge that was made for this network.
pub(super) fn ports_of_others(switch: &Switch) -> Result<Vec<String>, NetworkError> {
    let own = owned("Port", &switch.owner)?;
    let mut others = Vec::new();
    for bridge in owned("Bridge", &switch.owner)? {
        let ports = ovs_words(&["list-ports", &bridge])?;
        let foreign = ports.lines().filter(|port| !own.iter().any(|mine| mine == port));
        others.extend(foreign.map(ToOwned::to_owned));
    }
    Ok(others)
}

/// Removes the ports that are this network's, and the bridge, if that is too and nobody else has ports there.
pub(super) fn delete_switch(switch: &Switch) -> Result<(), NetworkError> {
    let ports = ports_of_others(switch)?;
    if !ports.is_empty() {
        return Err(NetworkError::InUse { name: switch.owner.clone(), ports });
    }
    for port in owned("Port", &switch.owner)? {
        ovs_words(&["--if-exists", "del-port", &port])?;
    }
    for bridge in owned("Bridge", &switch.owner)? {
        ovs_words(&["--if-exists", "del-br", &bridge])?;
    }
    Ok(())
}
