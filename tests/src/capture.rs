//! Frames on the interfaces of this thread's network, as they pass.

use std::num::NonZeroU32;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::net::sockopt::{set_socket_timeout, Timeout};
use rustix::net::{recv, socket_with, AddressFamily, Protocol, RecvFlags, SocketFlags, SocketType};

use crate::PATIENCE;

/// Ethertype of RARP.
const RARP: u16 = 0x8035;

/// A capture of RARP frames, on all interfaces of the network that it was begun in.
pub struct Rarps(OwnedFd);

impl Rarps {
    /// Begins it; what comes from now on is kept.
    ///
    /// # Panics
    /// Without the right to capture.
    #[must_use]
    pub fn begin() -> Self {
        let protocol = NonZeroU32::new(RARP.to_be().into()).map(Protocol::from_raw);
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::PACKET, SocketType::RAW, flags, protocol).unwrap();
        Self(socket)
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
            seen += usize::from(next == mac);
        }
    }

    /// How many of the address `mac` have come and were not counted.
    ///
    /// # Panics
    /// One is malformed.
    #[track_caller]
    pub fn left(&self, mac: [u8; 6]) -> usize {
        set_socket_timeout(&self.0, Timeout::Recv, Some(Duration::from_millis(1))).unwrap();
        std::iter::from_fn(|| self.next()).filter(|from| *from == mac).count()
    }

    /// Who sent the next one; `None` at the time limit.
    #[track_caller]
    fn next(&self) -> Option<[u8; 6]> {
        let mut frame = [0; 2048];
        let (length, _) = recv(&self.0, &mut frame, RecvFlags::empty()).ok()?;
        let frame = &frame[..length];
        assert_eq!(frame[..6], [0xff; 6], "{frame:x?}");
        assert_eq!(frame[12..22], [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3], "{frame:x?}");
        assert_eq!(frame[6..12], frame[22..28], "{frame:x?}");
        frame[6..12].try_into().ok()
    }
}
