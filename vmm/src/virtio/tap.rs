//! A tap interface as the backend of a network card (linux/if_tun.h).
#![allow(unsafe_code)] // ioctls that no crate here wraps

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use devices::virtio::net::{Offloads, HEADER};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::ioctl_iow_nr;

const DEV_NET_TUN: &str = "/dev/net/tun";
const TUN: std::ffi::c_uint = b'T' as std::ffi::c_uint;
ioctl_iow_nr!(TUNSETIFF, TUN, 202, std::ffi::c_int);
ioctl_iow_nr!(TUNSETOFFLOAD, TUN, 208, std::ffi::c_uint);
ioctl_iow_nr!(TUNSETVNETHDRSZ, TUN, 216, std::ffi::c_int);

const TUN_F_CSUM: u64 = 1;
const TUN_F_TSO4: u64 = 2;
const TUN_F_TSO6: u64 = 4;
const TUN_F_TSO_ECN: u64 = 8;

/// Why a tap cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// There is no such interface.
    #[error("there is no tap interface {tap}: make it (ip tuntap add dev {tap} mode tap, then ip link set {tap} up)")]
    Missing {
        /// Which.
        tap: String,
    },
    /// Somebody else has it.
    #[error(
        "tap {tap} is in use by another process: stop that one, or give this VM a tap of its own"
    )]
    Busy {
        /// Which.
        tap: String,
    },
    /// The user may not.
    #[error("no permission to use tap {tap}: make it for this user (ip tuntap add dev {tap} mode tap user $USER), or run as root")]
    Permission {
        /// Which.
        tap: String,
    },
    /// It is some other interface.
    #[error("interface {tap} is not a tap with a single queue: make one (ip tuntap add dev NAME mode tap)")]
    NotATap {
        /// Which.
        tap: String,
    },
    /// The driver of taps cannot be reached.
    #[error("cannot open {DEV_NET_TUN} for tap {tap}: {error}; load the module tun, or change the permissions")]
    Open {
        /// Which tap.
        tap: String,
        /// What the system said.
        error: io::Error,
    },
    /// The driver refused.
    #[error("cannot set up tap {tap} ({what}): {error}")]
    Setup {
        /// Which tap.
        tap: String,
        /// What was attempted.
        what: &'static str,
        /// What the system said.
        error: io::Error,
    },
}

/// Opens the tap named `tap` for frames with a virtio header; reads and writes do not wait.
pub(super) fn open(tap: &str) -> Result<OwnedFd, TapError> {
    let tap_name = || tap.to_owned();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(DEV_NET_TUN)
        .map_err(|error| TapError::Open { tap: tap_name(), error })?;
    // The ioctl below would make an interface that is not there.
    if rustix::net::netdevice::name_to_index(&file_socket(tap)?, tap).is_err() {
        return Err(TapError::Missing { tap: tap_name() });
    }
    attach(&file, tap).map_err(|error| match error.raw_os_error() {
        Some(libc::EBUSY) => TapError::Busy { tap: tap_name() },
        Some(libc::EPERM | libc::EACCES) => TapError::Permission { tap: tap_name() },
        Some(libc::EINVAL) => TapError::NotATap { tap: tap_name() },
        _ => TapError::Setup { tap: tap_name(), what: "TUNSETIFF", error },
    })?;
    prepare(file).map_err(|(what, error)| TapError::Setup { tap: tap_name(), what, error })
}

/// Makes a tap, for frames as [`open`] does, which is gone when the descriptor is; gives its name, which
/// the kernel chooses, too.
pub(super) fn make() -> io::Result<(OwnedFd, String)> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(DEV_NET_TUN)?;
    let name = attach(&file, "mvtap%d")?;
    let fd = prepare(file).map_err(|(what, error)| io::Error::other(format!("{what}: {error}")))?;
    Ok((fd, name))
}

/// Connects the file to the tap `tap`, or to a new one of that name, and gives its name.
fn attach(file: &File, tap: &str) -> io::Result<String> {
    // SAFETY: a C structure of integers and a union of such, for which zeros are values.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The name was checked to leave room for its final zero.
    for (to, from) in request.ifr_name.iter_mut().zip(tap.bytes()) {
        *to = from as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes the structure, which outlives the call.
    if unsafe { ioctl_with_mut_ref(file, TUNSETIFF(), &mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let name = request.ifr_name.iter().map(|&byte| byte as u8).take_while(|&byte| byte != 0);
    Ok(String::from_utf8_lossy(&name.collect::<Vec<u8>>()).into_owned())
}

/// Sets a tap up for frames with a virtio header; with an error, what was attempted.
fn prepare(file: File) -> Result<OwnedFd, (&'static str, io::Error)> {
    let size = HEADER as std::ffi::c_int;
    // SAFETY: TUNSETVNETHDRSZ reads an integer, which outlives the call.
    if unsafe { ioctl_with_ref(&file, TUNSETVNETHDRSZ(), &size) } < 0 {
        return Err(("TUNSETVNETHDRSZ", io::Error::last_os_error()));
    }
    let fd = OwnedFd::from(file);
    set_offloads(&fd, Offloads::default()).map_err(|error| ("TUNSETOFFLOAD", error))?;
    Ok(fd)
}

/// Tells the tap what may be left undone in frames for the guest.
pub(super) fn set_offloads(fd: &OwnedFd, offloads: Offloads) -> io::Result<()> {
    let bits = [
        (offloads.checksum, TUN_F_CSUM),
        (offloads.tso4, TUN_F_TSO4),
        (offloads.tso6, TUN_F_TSO6),
        (offloads.ecn && (offloads.tso4 || offloads.tso6), TUN_F_TSO_ECN),
    ];
    let bits = bits.into_iter().filter(|(on, _)| *on).fold(0, |all, (_, bit)| all | bit);
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    if unsafe { ioctl_with_val(&fd.as_raw_fd(), TUNSETOFFLOAD(), bits) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A socket in this process' network namespace, to ask for interfaces.
fn file_socket(tap: &str) -> Result<OwnedFd, TapError> {
    rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::DGRAM, None)
        .map_err(|error| TapError::Setup {
            tap: tap.to_owned(),
            what: "a socket to look it up",
            error: error.into(),
        })
}
