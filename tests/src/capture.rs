//! Frames on the interfaces of this thread's network, as they pass.

use std::net::Ipv4Addr;
use std::num::NonZeroU32;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::sockopt::{set_socket_recv_buffer_size_force, set_socket_timeout, Timeout};
use rustix::net::{recv, socket_with, AddressFamily, Protocol, RecvFlags, SocketFlags, SocketType};

use crate::PATIENCE;

/// Ethertypes.
const RARP: u16 = 0x8035;
const IPV4: u16 = 0x0800;
/// Room for frames while nobody looks, bytes.
const BUFFER: usize = 16 << 20;

/// A socket that gets frames of a type, on all interfaces of the network of this thread. Where they are not for
/// this host but pass through it, it gets them as they come in.
fn frames(ethertype: u16) -> OwnedFd {
    let protocol = NonZeroU32::new(ethertype.to_be().into()).map(Protocol::from_raw);
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::PACKET, SocketType::RAW, flags, protocol).unwrap();
    set_socket_recv_buffer_size_force(&socket, BUFFER).unwrap();
    socket
}

/// A capture, at a router, of the frames that pass through it in VXLAN tunnels.
pub struct Tunnelled(OwnedFd);

impl Tunnelled {
    /// Begins it; what comes from now on is kept.
    ///
    /// # Panics
    /// Without the right to capture.
    #[must_use]
    pub fn begin() -> Self {
        Self(frames(IPV4))
    }

    /// The host that the next frame of the card `mac` comes from; `None` if none comes until `deadline`.
    ///
    /// # Panics
    /// The capture fails.
    #[track_caller]
    pub fn next_of(&self, mac: [u8; 6], deadline: Instant) -> Option<Ipv4Addr> {
        const INNER: usize = 50;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            // Zero would be for ever.
            let left = left.max(Duration::from_millis(1));
            set_socket_timeout(&self.0, Timeout::Recv, Some(left)).unwrap();
            let mut frame = [0; 2048];
            match recv(&self.0, &mut frame, RecvFlags::empty()) {
                Ok(_) => {}
                Err(Errno::AGAIN | Errno::INTR) => continue,
                Err(error) => panic!("capturing: {error}"),
            }
            // Ethernet; IPv4 without options, UDP; to port 4789; VXLAN; the source of the frame within.
            let vxlan = frame[14] == 0x45 && frame[23] == 17 && frame[36..38] == [0x12, 0xb5];
            if vxlan && frame[INNER + 6..INNER + 12] == mac {
                return Some(Ipv4Addr::new(frame[26], frame[27], frame[28], frame[29]));
            }
        }
    }
}

/// A capture of RARP frames, on all interfaces of the network that it was begun in.
pub struct Rarps(OwnedFd);

impl Rarps {
    /// Begins it; what comes from now on is kept.
    ///
    /// # Panics
    /// Without the right to capture.
    #[must_use]
    pub fn begin() -> Self {
        Self(frames(RARP))
    }

    /// Waits for `count` of the address `mac`.
    ///
    /// # Panics
    /// They do not come, or one is malformed.
    #[track_caller]
    pub fn of(&self, mac: [u8; 6], count: usize) {
        set_socket_timeout(&self.0, Timeout::Recv, Some(PATIENCE)).unwrap();
        let mut seen = 0;
        while seen < count {
            let next = self.next().unwrap_or_else(|| panic!("{seen} of {count} RARP frames came"));
            seen += usize::from(next.0 == mac);
        }
    }

    /// Waits for the first `count` of the address `mac`, and tells whom they were for.
    ///
    /// # Panics
    /// As [`Rarps::of`].
    #[track_caller]
    pub fn were_for(&self, mac: [u8; 6], count: usize) -> Vec<[u8; 6]> {
        set_socket_timeout(&self.0, Timeout::Recv, Some(PATIENCE)).unwrap();
        let next = || self.next().unwrap_or_else(|| panic!("no {count} RARP frames came"));
        let theirs = std::iter::from_fn(|| Some(next())).filter(|(from, _)| *from == mac);
        theirs.map(|(_, to)| to).take(count).collect()
    }

    /// How many of the address `mac` have come and were not counted.
    ///
    /// # Panics
    /// One is malformed.
    #[track_caller]
    pub fn left(&self, mac: [u8; 6]) -> usize {
        set_socket_timeout(&self.0, Timeout::Recv, Some(Duration::from_millis(1))).unwrap();
        std::iter::from_fn(|| self.next()).filter(|(from, _)| *from == mac).count()
    }

    /// Who sent the next one, and to whom; `None` at the time limit.
    #[track_caller]
    fn next(&self) -> Option<([u8; 6], [u8; 6])> {
        let mut frame = [0; 2048];
        let (length, _) = recv(&self.0, &mut frame, RecvFlags::empty()).ok()?;
        let frame = &frame[..length];
        assert_eq!(frame[0] & 3, 3, "not to a group: {frame:x?}");
        assert_eq!(frame[12..22], [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3], "{frame:x?}");
        assert_eq!(frame[6..12], frame[22..28], "{frame:x?}");
        Some((frame[6..12].try_into().ok()?, frame[..6].try_into().ok()?))
    }
}
