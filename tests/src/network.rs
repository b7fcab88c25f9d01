//! Network namespaces of tests: taps that nobody else sees, gone with the thread that made them.
#![allow(unsafe_code)]

use std::net::{Ipv4Addr, TcpStream};
use std::process::Command;

use rustix::thread::{unshare_unsafe, UnshareFlags};

use crate::{Need, PATIENCE};

/// Address of the host's side of a [`tap`].
pub const HOST_ADDRESS: &str = "10.0.0.1";
/// Address that a guest takes, with the length of the prefix.
pub const GUEST_ADDRESS: &str = "10.0.0.2/24";

/// Address of everybody on the network of these two.
pub const EVERYBODY: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 255);

/// Runs `work` on a thread whose sockets, and whose child processes, are in a network namespace of
/// their own. It ends with the last of them.
///
/// # Errors
/// No namespace could be made.
///
/// # Panics
/// As `work` does.
pub fn in_private_network<R: Send>(work: impl FnOnce() -> R + Send) -> Result<R, String> {
    let inside = || {
        // SAFETY: only unsharing the table of descriptors is dangerous, and it stays shared.
        let unshared = unsafe { unshare_unsafe(UnshareFlags::NEWNET) };
        unshared.map_err(|error| format!("needs network namespaces: {error}"))?;
        ip(&["link", "set", "lo", "up"])?;
        Ok(work())
    };
    std::thread::scope(|scope| match scope.spawn(inside).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

/// Makes a tap that is up, can do offloads, and has [`HOST_ADDRESS`].
///
/// # Errors
/// `ip` is not there, or says no.
pub fn tap(name: &str) -> Result<(), String> {
    ip(&["tuntap", "add", "dev", name, "mode", "tap", "vnet_hdr"])?;
    ip(&["address", "add", &format!("{HOST_ADDRESS}/24"), "dev", name])?;
    ip(&["link", "set", name, "up"])
}

/// Makes a bridge with taps, as a switch between hosts is: each has a port. It has
/// [`HOST_ADDRESS`].
///
/// # Errors
/// As [`tap`].
pub fn bridge(taps: &[&str]) -> Result<(), String> {
    ip(&["link", "add", "br0", "type", "bridge"])?;
    for name in taps {
        ip(&["tuntap", "add", "dev", name, "mode", "tap", "vnet_hdr"])?;
        ip(&["link", "set", name, "master", "br0", "up"])?;
    }
    ip(&["address", "add", &format!("{HOST_ADDRESS}/24"), "dev", "br0"])?;
    ip(&["link", "set", "br0", "up"])
}

/// A port of the guest's.
#[must_use]
pub fn guest(port: u16) -> (&'static str, u16) {
    (GUEST_ADDRESS.split_once('/').map_or(GUEST_ADDRESS, |(address, _)| address), port)
}

/// Connects to a port of the guest's, with limits for all that follows.
///
/// # Panics
/// It does not answer.
#[track_caller]
pub fn connect(port: u16) -> TcpStream {
    let stream = TcpStream::connect(guest(port)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// The command `ip` in the namespace of this thread.
///
/// # Errors
/// It is not there, or says no.
pub fn ip(arguments: &[&str]) -> Result<(), String> {
    let output = Command::new("ip").args(arguments).output();
    let output = output.map_err(|error| format!("needs `ip` (package iproute2): {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("ip {}: {}", arguments.join(" "), said.trim()))
}

/// What a program prints that succeeds.
///
/// # Panics
/// It does not.
#[track_caller]
pub fn said(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// A program of the host's, which the package of that name has.
pub fn program(name: &str, package: &str) -> Need {
    match Command::new(name).arg("--version").output() {
        Ok(output) if output.status.success() => Ok(()),
        _ => Err(format!("needs {name} (package {package})")),
    }
}
