//! Links whose frames leave them whole: checksums are computed and segments cut before, by the kernel. Who reads
//! frames from a packet socket, as Open vSwitch's datapath in user space does, otherwise gets what a network
//! card would have completed.
#![allow(unsafe_code)] // an ioctl that no crate here wraps

use std::ffi::{c_char, c_void};
use std::io;
use std::os::fd::AsRawFd;

use rustix::net::{socket_with, AddressFamily, SocketFlags, SocketType};

/// linux/ethtool.h.
const ETHTOOL_STXCSUM: u32 = 0x17;

/// struct ethtool_value.
#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

/// Lets frames leave `link` whole. Without checksums left to it, a link gets no large segments either.
///
/// # Errors
/// The kernel's.
pub(super) fn send_whole(link: &str) -> io::Result<()> {
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    let mut value = Value { command: ETHTOOL_STXCSUM, data: 0 };
    // SAFETY: a C structure of integers and a union of such and of pointers, for which zeros are values.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(link.bytes()) {
        *to = from as c_char;
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast::<c_char>();
    let request: *mut c_void = (&raw mut request).cast();
    // SAFETY: SIOCETHTOOL reads the name, and of the value its command and, for this one, its data; both outlive
    // the call.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL as _, request) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
