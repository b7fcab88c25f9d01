//! Waiting for the end of a VM's process, without polling.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{pidfd_open, PidfdFlags};

/// The process behind an API socket.
pub(super) struct VmProcess {
    pidfd: OwnedFd,
}

impl VmProcess {
    /// Asks the kernel who listens on `socket`. Talk to the VM after this and before trusting
    /// it: an answer proves that the process had not ended, and its id been used again, before.
    pub(super) fn behind(socket: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        let peer = rustix::net::sockopt::socket_peercred(&stream)?;
        Ok(Self { pidfd: pidfd_open(peer.pid, PidfdFlags::empty())? })
    }

    /// True when the process has ended, false when it has not by `deadline`.
    pub(super) fn wait(&self, deadline: Instant) -> io::Result<bool> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left.min(Duration::from_secs(3600)));
            let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
            match poll(&mut fds, timeout.ok().as_ref()) {
                Ok(0) if Instant::now() >= deadline => return Ok(false),
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(true),
                Err(e) => return Err(e.into()),
            }
        }
    }
}
